"""What people ask for: submit, look, cancel, retry, copy, compare, ask a model."""
