"""The process that owns an attempt, a program of the standard library alone, and its client."""
