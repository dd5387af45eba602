"""Environments, their specifications and how they stand on nodes."""
