"""The methods we ship: manifests, stage scripts, environment specs and sample data."""
