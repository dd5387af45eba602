"""Takes over what a DeepExtension installation has: its database is read; what is written goes through the HTTP API."""
