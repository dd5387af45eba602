"""Conda environments of a node: found, built, packed, looked into, removed."""
