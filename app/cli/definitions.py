"""Files that a person writes and a command reads: definitions of methods as JSON, TOML or YAML."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from app.cli.exits import Misused

STDIN = Path("-")


def read_document(file: Path) -> dict[str, Any]:
    """Return the object in `file` (`-`: JSON on stdin), by its suffix."""
    try:
        text = sys.stdin.read() if file == STDIN else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Misused(f"{file} cannot be read: {error}") from None
    try:
        document = _parse(text, file.suffix.lower())
    except ValueError as error:
        raise Misused(f"{file} cannot be parsed: {error}") from None
    if not isinstance(document, dict):
        raise Misused(f"{file} must hold one object.")
    return document


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        return tomllib.loads(text)
    if suffix in {".yaml", ".yml"}:
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    return json.loads(text)
