"""Which modules a script needs, read from its text."""

import pytest

from app.argspec.imports import read_imports
from app.argspec.report import Imports
from app.argspec.source import parse


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
        ("", set()),
    ],
)
def test_modules(source: str, modules: set[str]) -> None:
    found = read_imports(parse(source))

    assert (found.modules, found.search_path) == (tuple(modules), ())


@pytest.mark.parametrize(
    ("source", "search_path"),
    [
        ("sys.path.insert(0, '../lib')", ("../lib",)),
        ("sys.path.append(str(Path(__file__).parent / 'helpers'))", ("helpers",)),
        ("sys.path.append('helpers')\nsys.path.append('lib')", ("helpers", "lib")),
        ("sys.path.append('a' + 'b')", ("",)),
        ("sys.path[0] = 'a'", ("",)),
        ("from sys import path", ("",)),
    ],
)
def test_folders_that_a_script_adds_to_its_search_path(source: str, search_path: tuple[str, ...]) -> None:
    assert read_imports(parse(f"import sys, own\n{source}")) == Imports(("own",), search_path)


def test_what_is_taken_from_modules_before_anything_can_catch_it() -> None:
    source = """
from transformers import AutoTokenizer, AutoModelForVision2Seq as Model
from torch.nn import *
from json import loads
try:
    from trl import Old
except ImportError:
    from trl import New
if new:
    from peft import Newer
def later():
    from peft import Late
"""

    assert read_imports(parse(source.encode())).attributes == (
        "transformers:AutoTokenizer",
        "transformers:AutoModelForVision2Seq",
    )
