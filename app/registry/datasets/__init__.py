"""Data sets: files, checks, conversions, mixes and what methods make of their rows."""
