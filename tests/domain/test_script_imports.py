"""Which modules a script needs, read from its text."""

import pytest

from app.domain.script_imports import imported_modules


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import os, json, torch.nn as nn", {"torch"}),
        ("from transformers.models import x", {"transformers"}),
        ("def main():\n    from trl import SFTTrainer\n", {"trl"}),
        ("from . import helper\nfrom .other import y", set()),
        ("try:\n    import flash_attn\nexcept ImportError:\n    import fallback\n", {"fallback"}),
        ("try:\n    import a\nexcept (ValueError, ModuleNotFoundError):\n    pass\nelse:\n    import b", {"b"}),
        ("try:\n    import a\nexcept:\n    pass", set()),
        ("try:\n    import a\nexcept ValueError:\n    pass", {"a"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\nelse:\n    import c", {"c"}),
        ("import importlib.util", set()),
        ("import sys, own\nsys.path.insert(0, '../lib')", set()),
        ("import sys, own\nsys.path.append(str(Path(__file__).parent / 'helpers'))", {"own"}),
        ("import sys, own\nsys.path.append('helpers')\nsys.path.append('lib')", set()),
        ("from sys import path\nimport own", set()),
        ("this is no Python", set()),
        ("", set()),
    ],
)
def test_modules(source: str, modules: set[str]) -> None:
    assert imported_modules(source.encode()) == modules
