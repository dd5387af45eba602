"""The script root: its files, their names and the bytes of every version."""
