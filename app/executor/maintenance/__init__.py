"""Periodic work of API processes: webhooks, retention."""
