"""What runs inside a cell."""
