"""The `deepe` command: what an operator and a script touch."""

from app.cli.main import app

__all__ = ["app"]
