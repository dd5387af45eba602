"""Which modules a script needs, read from its text."""

import pytest

from app.argspec.imports import read_imports
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
        ("sys.path.insert(0, os.getcwd())", (".",)),
    ],
)
def test_folders_that_a_script_adds_to_its_search_path(source: str, search_path: tuple[str, ...]) -> None:
    imports = read_imports(parse(f"import sys, own\n{source}"))

    assert (imports.modules, imports.search_path) == (("own",), search_path)


@pytest.mark.parametrize(
    ("source", "folders", "unknown"),
    [
        ("sys.path.insert(0, '../lib')", ("../lib",), ()),
        ("sys.path.append(str(Path(__file__).resolve().parent.parent / 'helpers'))", ("{file}/../../helpers",), ()),
        ("sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))", ("{file}/../..",), ()),
        ("sys.path.append(os.path.join(os.path.dirname(__file__), '..', 'a'))", ("{file}/../../a",), ()),
        ("HERE = Path(__file__).parents[1]\nsys.path.insert(0, str(HERE))", ("{file}/../..",), ()),
        ("sys.path.insert(0, os.getcwd())", (".",), ()),
        ("HERE = 'a'\nHERE = 'b'\nsys.path.insert(0, HERE)", (), (4,)),
        ("for name in names:\n    sys.path.append(name)", (), (3,)),
        ("A = B\nB = A\nsys.path.append(A)", (), (4,)),
        ("sys.path.append(os.environ['LIB'])", (), (2,)),
        ("sys.path.append(f'{own}/lib')", (), (2,)),
        ("sys.path = ['a']", (), (2,)),
        ("from sys import path", (), (2,)),
    ],
)
def test_folders_are_followed_as_far_as_texts_go(
    source: str, folders: tuple[str, ...], unknown: tuple[int, ...]
) -> None:
    imports = read_imports(parse(f"import sys, own\n{source}"))

    assert (imports.folders, imports.unknown_folders) == (folders, unknown)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b, c as d", ("a.b", "c")),
        ("from a.b import c, d as e", ("a.b.c", "a.b.d")),
        ("from . import a\nfrom .b import c\nfrom .. import d", (".a", ".b.c", "..d")),
        ("from a import *", ("a.*",)),
        ("try:\n    import a\nexcept ImportError:\n    pass", ("a",)),
        ("import importlib\nimportlib.import_module('a.b')\n__import__('c')", ("importlib", "a.b", "c")),
    ],
)
def test_every_module_that_may_be_imported(source: str, names: tuple[str, ...]) -> None:
    assert read_imports(parse(source)).names == names


@pytest.mark.parametrize(
    "source",
    [
        "importlib.import_module(name)",
        "__import__(f'a{n}')",
        "runpy.run_path(p)",
        "util.spec_from_file_location('a', p)",
    ],
)
def test_lines_that_import_what_is_known_only_at_run_time(source: str) -> None:
    assert read_imports(parse(f"import own\n{source}")).computed == (2,)


def test_texts_are_names_of_files_only_where_a_script_looks_beside_itself() -> None:
    source = "open(os.path.join(HERE, 'a', 'b.txt'))\nHERE / 'c' / 'd.txt'\n"

    found = read_imports(parse(f"HERE = Path(__file__).parent\n{source}")).files

    assert {"a/b.txt", "c/d.txt", "b.txt"} <= set(found)
    assert read_imports(parse(source)).files == ()


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
