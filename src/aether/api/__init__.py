"""The operations table and its spellings."""
