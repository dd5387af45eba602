"""Containment: what a stage sees of its machine, and whether this machine can keep it to that."""
