"""The OpenAPI document of the real application, as the clients are generated from it."""

import json
from pathlib import Path
from typing import Any

from app.main import create_app
from app.settings import load_settings


def openapi_document(home: Path) -> dict[str, Any]:
    """Return the document; nothing is started, `home` stays empty."""
    document = create_app(load_settings(home=home)).openapi()
    whole: dict[str, Any] = json.loads(json.dumps(document))
    return whole


def write_document(folder: Path) -> Path:
    """Write the document into `folder` and return the file."""
    file = folder / "openapi.json"
    file.write_text(json.dumps(openapi_document(folder / "home")), "utf-8")
    return file
