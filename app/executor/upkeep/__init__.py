"""What API processes do beside answering: webhooks sent, old things removed."""
