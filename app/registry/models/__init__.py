"""Folders of models, what is in them, and the models that jobs made."""
