"""What a reviewer of a script should look at, and differences of files: found in a bounded process."""

import ast
from collections.abc import Iterator

import pytest

from app.argspec.client import BoundedReader, Limits
from app.argspec.differences import packed_pair, read_difference
from app.argspec.risks import MAX_RISKS, read_risks
from app.presets.catalogue import ROOM
from tests.argspec.hostile import SCRIPTS


@pytest.fixture(scope="module")
def reader() -> Iterator[BoundedReader]:
    reader = BoundedReader(Limits(cpu_seconds=2))
    yield reader
    reader.close()


def risks(source: str) -> list[tuple[str, int, str]]:
    return [(risk.kind, risk.line, risk.name) for risk in read_risks(ast.parse(source), source.encode()).found]


class TestRisks:
    @pytest.mark.parametrize(
        ("source", "kind", "name"),
        [
            ("import socket", "network", "socket"),
            ("from urllib import request", "network", "urllib.request"),
            ("import requests as r", "network", "requests"),
            ("m = __import__('http.client')", "network", "http.client"),
            ("import importlib\nimportlib.import_module('ssl')", "network", "ssl"),
            ("import os\nos.system('ls')", "process", "os.system"),
            ("from os import popen as p\np('ls')", "process", "os.popen"),
            ("import os as o\no.execv('/bin/sh', [])", "process", "os.execv"),
            ("__import__('os').system('x')", "process", "os.system"),
            ("import os\ngetattr(os, 'system')('x')", "process", "os.system"),
            ("import os\ngetattr(os, 'sys' + 'tem')('x')", "evaluates", "getattr(os, …)"),
            ("from subprocess import run\nrun(['a'])", "process", "subprocess.run"),
            ("eval('1')", "evaluates", "eval"),
            ("import builtins\nbuiltins.exec('1')", "evaluates", "builtins.exec"),
            ("from runpy import run_path\nrun_path('x')", "evaluates", "runpy.run_path"),
            ("import base64\nexec(base64.b64decode('eA=='))", "encoded", "exec"),
            ("import base64, zlib\nx = zlib.decompress(base64.b64decode(b''))\nexec(x)", "encoded", "exec"),
            ("exec(bytes.fromhex('61'))", "encoded", "exec"),
            ("import pickle\npickle.load(f)", "unpickles", "pickle.load"),
            ("from pickle import loads as l\nl(f)", "unpickles", "pickle.loads"),
            ("import torch\ntorch.load('x')", "unpickles", "torch.load"),
            ("import torch\ntorch.load('x', weights_only=False)", "unpickles", "torch.load"),
            ("import yaml\nyaml.load(f, Loader=yaml.Loader)", "unpickles", "yaml.load"),
            ("import numpy as np\nnp.load('x', allow_pickle=True)", "unpickles", "numpy.load"),
            ("import ctypes", "native", "ctypes"),
            ("open('/etc/x', 'w')", "writes", "/etc/x"),
            ("open('../x', mode='ab')", "writes", "../x"),
            ("open(f'/tmp/{name}', 'w')", "writes", "/tmp/…"),
            ("from pathlib import Path\nPath('~/.ssh/x').write_text('')", "writes", "~/.ssh/x"),
            ("import shutil\nshutil.rmtree('/data')", "writes", "/data"),
            ("import shutil\nshutil.copy(a, '/data/x')", "writes", "/data/x"),
            ("import os\nos.environ['HF_TOKEN']", "secret_variable", "HF_TOKEN"),
            ("from os import environ as e\ne.get('DB_PASSWORD')", "secret_variable", "DB_PASSWORD"),
            ("import os\nos.getenv('AWS_SECRET_ACCESS_KEY')", "secret_variable", "AWS_SECRET_ACCESS_KEY"),
            ("import os\ndict(os.environ)", "all_variables", "os.environ"),
            ("import os\nos.environ.items()", "all_variables", "os.environ.items"),
            ("import sys\nsys.path.append('.')", "search_path", "sys.path"),
            ("import importlib\nimportlib.import_module(name)", "computed_import", "importlib.import_module"),
        ],
    )
    def test_finds(self, source: str, kind: str, name: str) -> None:
        assert (kind, len(source.splitlines()), name) in risks(source)

    @pytest.mark.parametrize(
        "source",
        [
            "import torch\ntorch.load('x', weights_only=True)",
            "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)\nyaml.safe_load(f)",
            "import numpy as np\nnp.load('x')",
            "import re\nre.compile('x')",
            "import os\nos.environ['DEEPE_OUTPUT_DIR']\nopen('x')\nopen(path, 'w')\nos.makedirs(out)",
            "class Model:\n    def eval(self): pass\nModel().eval()",
            "model.eval()\nmodel.compile()",
        ],
    )
    def test_leaves_alone(self, source: str) -> None:
        assert risks(source) == []

    def test_quotes_the_code_though_it_stands_far_to_the_right(self) -> None:
        (found,) = read_risks(ast.parse("x = 1;" + " " * 5000 + "eval(y)"), b"x = 1;" + b" " * 5000 + b"eval(y)").found

        assert found.quoted == "eval(y)"

    def test_tells_of_characters_that_hide_text(self) -> None:
        assert risks("x = 1  # \u202e evil \u2066\n") == [("hidden_characters", 1, "U+202E")]

    def test_lists_so_many_and_counts_the_rest(self) -> None:
        source = "eval('x')\n" * (MAX_RISKS + 7)

        found = read_risks(ast.parse(source), source.encode())

        assert (len(found.found), found.more) == (MAX_RISKS, 7)

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_of_hostile_scripts_are_read_or_refused(self, name: str, reader: BoundedReader) -> None:
        reading = reader.risks(SCRIPTS[name])

        assert reading.stopped is not None or reading.problem is not None or len(reading.risks.found) <= MAX_RISKS

    @pytest.mark.parametrize(
        "source", [b"x = '\0'", b"\xff\xfe", b"# coding: latin-1\nx = '\xfc'\neval(x)", b"(" * 10**6]
    )
    def test_of_odd_sources(self, source: bytes, reader: BoundedReader) -> None:
        reading = reader.risks(source)

        assert reading.problem is not None or [risk.name for risk in reading.risks.found] == ["eval"]

    def test_shipped_scripts_are_read_within_the_limits(self, reader: BoundedReader) -> None:
        for file in ROOM.rglob("*.py"):
            assert reader.risks(file.read_bytes()).stopped is None, file


class TestDifference:
    def test_is_unified(self) -> None:
        found = read_difference(packed_pair(b"a\nb\n", b"a\nc\n"))

        assert found.text.split("\n") == ["@@ -1,2 +1,2 @@", " a", "-b", "+c"]
        assert not found.cut

    def test_escapes_what_is_no_text_or_hides_it(self) -> None:
        found = read_difference(packed_pair(b"", b"x\xff\x1b[2J\r\n" + "\u202ey".encode()))

        assert found.text.split("\n")[1:] == ["+x\\xff\\x1b[2J\\r", "+\\u202ey"]

    def test_of_a_binary_file_shows_nothing(self) -> None:
        assert read_difference(packed_pair(b"\0", b"x")).binary

    def test_is_cut(self) -> None:
        long, many = read_difference(packed_pair(b"", b"x" * 5000)), read_difference(packed_pair(b"", b"x\n" * 200_000))

        assert (long.cut, many.cut) == (True, True)
        assert len(long.text) < 2100
        assert len(many.text) <= 200_000

    def test_of_files_that_are_too_different_meets_a_limit(self, reader: BoundedReader) -> None:
        before = "".join(f"{number % 997}\n" for number in range(150_000)).encode()
        after = "".join(f"{number % 991}\n" for number in range(150_000)).encode()

        reading = reader.difference(before, after)

        assert reading.stopped is not None
        assert reader.difference(b"a\n", b"b\n").difference.text.endswith("-a\n+b")
