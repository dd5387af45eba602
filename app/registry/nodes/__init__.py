"""Nodes, their platforms and the queues before them."""
