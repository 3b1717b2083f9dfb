"""The embedded certificate authority."""
