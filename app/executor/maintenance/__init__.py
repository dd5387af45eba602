"""What API processes do beside answering: webhooks, retention."""
