"""A machine with a worker: what it has, what it claims, how it lives."""
