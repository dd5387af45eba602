"""Arguments of a stage script, read without running it.

Knows nothing of the product and needs the standard library alone, so that a bare interpreter starts it in milliseconds.
"""
