"""Base models: uploads, cards, kinds and what follows for each training type."""
