"""Training methods: created, changed, restored, installed from presets, read, run and judged ready."""
