"""Arguments that a script takes from modules beside it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from app.argspec.client import BoundedReader
from app.argspec.modules import MAX_MODULES, Source
from app.domain.script_parameters import ScriptParameters
from app.registry.methods.files import MethodFiles
from app.registry.methods.pins import PinnedFile, pin
from app.registry.methods.script_reading import ScriptReader, script_parameters
from app.registry.scripts.root import ScriptRoot
from app.registry.scripts.versions import VersionStore
from tests.argspec.reading import read_parameters

Stored = Callable[..., PinnedFile]

SCRIPT = """
import argparse
from common import add_arguments
p = argparse.ArgumentParser()
add_arguments(p)
p.parse_args()
"""
COMMON = "def add_arguments(parser, rank=8):\n    parser.add_argument('--rank', type=int, default=rank)\n"
CLASSES = """
class Base:
    @staticmethod
    def add(p): p.add_argument("--rank", default=4)
class Options(Base):
    pass
"""


def read(source: str, **beside: str) -> ScriptParameters:
    modules = {name.replace("__", "."): dedent(text) for name, text in beside.items()}
    return read_parameters(dedent(source), modules)


def defaults(script: ScriptParameters) -> dict[str, object]:
    assert not script.partly_read, script.unread
    return {parameter.name: parameter.default for parameter in script.parameters}


class TestFollowing:
    @pytest.mark.parametrize(
        ("use", "common"),
        [
            ("from common import add\nadd(p, rank=4)", "def add(p, rank): p.add_argument('--rank', default=rank)"),
            ("import common\ncommon.add(p, 4)", "def add(p, rank): p.add_argument('--rank', default=rank)"),
            ("import common as c\nc.add(p)", "RANK = 4\ndef add(p):\n    p.add_argument('--rank', default=RANK)"),
            ("from common import *\nadd(p)", "def add(p): p.add_argument('--rank', default=4)"),
            ("from common import RANK\np.add_argument('--rank', default=RANK)", "RANK = 2 + 2"),
            ("import common\nfor n in common.NAMES: p.add_argument(n, default=4)", "NAMES = ('--rank',)"),
            ("import common\np.add_argument('--rank', **common.OPTIONS)", "OPTIONS = {'default': 4}"),
            (
                "from common import Options\nOptions.add(p)",
                CLASSES,
            ),
            ("from common import Options\nOptions().add(p)", CLASSES),
            ("from common import add\nadd(p)", "from .other import add"),
            (
                "import common\ng = p.add_argument_group('x')\ncommon.add(g)",
                "def add(g): g.add_argument('--rank', default=4)",
            ),
            (
                "import common\ng = common.group(p)\ng.add_argument('--rank', default=4)",
                "def group(p): return p.add_argument_group('x')",
            ),
        ],
    )
    def test_a_parser_that_is_handed_to_a_module(self, use: str, common: str) -> None:
        other = "def add(p):\n    p.add_argument('--rank', default=4)"
        head, tail = "import argparse\np = argparse.ArgumentParser()\n", "\np.parse_args()\n"

        package = "other" in common
        script = read(
            head + use + tail, **({"common/": common, "common__other": other} if package else {"common": common})
        )

        assert defaults(script) == {"rank": 4}

    @pytest.mark.parametrize(
        "use",
        [
            "args = argparse.ArgumentParser(parents=[common.make_parser()]).parse_args()",
            "args = argparse.ArgumentParser(parents=[common.PARENT]).parse_args()",
            "args = common.make_parser().parse_args()",
            "args = common.get_args()",
            "args = common.Arguments().parse()",
            "args = common.Parser().parse_args()",
        ],
    )
    def test_a_parser_that_comes_from_a_module(self, use: str) -> None:
        common = """
            import argparse
            class Parser(argparse.ArgumentParser):
                def __init__(self):
                    super().__init__()
                    self.add_argument("--rank", type=int, default=4)
            def make_parser():
                parser = argparse.ArgumentParser(add_help=False)
                parser.add_argument("--rank", type=int, default=4)
                return parser
            PARENT = make_parser()
            def get_args():
                return make_parser().parse_args()
            class Arguments:
                def parse(self):
                    return make_parser().parse_args()
            if __name__ == "__main__":
                argparse.ArgumentParser().add_argument("--never")
        """
        assert defaults(read(f"import argparse, common\n{use}\n", common=common)) == {"rank": 4}

    def test_exclusive_groups_titles_and_types_of_a_module(self) -> None:
        script = read(
            "import argparse, common\np = argparse.ArgumentParser()\n\ncommon.add(p)\np.parse_known_args()",
            common="""
                def on_off(text) -> bool:
                    return text == "on"
                def add(parser):
                    group = parser.add_argument_group("length")
                    either = group.add_mutually_exclusive_group(required=True)
                    either.add_argument("--epochs", type=float)
                    either.add_argument("--steps", type=int)
                    group.add_argument("--shuffle", type=on_off, choices=[True, False])
            """,
        )

        assert [(p.name, p.kind, p.group, p.line) for p in script.parameters] == [
            ("epochs", "number", "length", 4),
            ("steps", "integer", "length", 4),
            ("shuffle", "boolean", "length", 4),
        ]
        assert [(group.names, group.required) for group in script.exclusive] == [(("epochs", "steps"), True)]
        assert script.accepts_unknown

    def test_what_a_module_hides_is_said_with_the_line_that_led_there(self) -> None:
        script = read(
            "import argparse, common\np = argparse.ArgumentParser()\ncommon.add(p)\np.parse_args()",
            common="import sys\ndef add(p):\n    p.add_argument('--x')\n    p.add_argument(sys.argv[1])\n",
        )

        assert [p.name for p in script.parameters] == ["x"]
        assert [(remark.code, remark.line, remark.subject) for remark in script.unread] == [
            ("unread_dynamic_name", 3, "common:4 p.add_argument(sys.argv[1])")
        ]

    @pytest.mark.parametrize("common", ["def add(p", "", "from common import add", "import common\nadd = common.add"])
    def test_a_module_that_has_no_such_function_stays_unread(self, common: str) -> None:
        script = read(
            "import argparse\nfrom common import add\np = argparse.ArgumentParser()\nadd(p)\np.parse_args()",
            common=common,
        )

        assert [(remark.code, remark.line) for remark in script.unread] == [("unread_handed_on", 4)]


class TestLoops:
    @pytest.mark.parametrize(
        ("loop", "expected"),
        [
            ("for n in ('a', 'b'): p.add_argument('--' + n)", {"a": None, "b": None}),
            ("for n in ['a', 'b']:\n    if n == 'a': continue\n    p.add_argument(f'--{n}')", {"b": None}),
            ("for n, d in {'a': 1, 'b': 2}.items(): p.add_argument(f'--{n}', type=int, default=d)", {"a": 1, "b": 2}),
            ("for n, o in {'a': {'type': int}}.items(): p.add_argument(f'--{n}', **o)", {"a": None}),
            ("for i, n in enumerate('ab'): p.add_argument('--' + n, default=i)", {"a": 0, "b": 1}),
            ("for n, d in zip(['a', 'b'], [1, 2]): p.add_argument('--' + n, default=d)", {"a": 1, "b": 2}),
            ("[p.add_argument('--' + n) for n in 'ab']", {"a": None, "b": None}),
            ("def add(q, n): q.add_argument('--' + n)\nfor n in 'ab': add(p, n)", {"a": None, "b": None}),
        ],
    )
    def test_over_what_is_known(self, loop: str, expected: dict[str, object]) -> None:
        script = read(f"import argparse\np = argparse.ArgumentParser()\n{loop}\np.parse_args()")

        assert defaults(script) == expected

    @pytest.mark.parametrize(
        "loop",
        [
            "for n in open('names'): p.add_argument('--' + n)",
            "for n in range(5000): p.add_argument(f'--x{n}')",
            "for n in 'ab':\n    if n == stop: break\n    p.add_argument('--' + n)",
            "[p.add_argument('--' + n) for n in 'ab' if keep(n)]",
            "{p.add_argument('--' + n) for n in 'ab'}",
        ],
    )
    def test_over_other_things_are_said(self, loop: str) -> None:
        script = read(f"import argparse\np = argparse.ArgumentParser()\n{loop}\np.parse_args()")

        assert [(remark.code, remark.line) for remark in script.unread] in ([("unread_loop", 3)], [("unread_loop", 5)])


class TestScriptReader:
    """What a stage imports from where it runs."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "scripts").mkdir()
        return tmp_path / "scripts"

    @pytest.fixture
    def files(self, root: Path) -> MethodFiles:
        return MethodFiles(ScriptRoot(root), VersionStore(root.parent / "versions"))

    @pytest.fixture
    def reader(self, files: MethodFiles) -> ScriptReader:
        return ScriptReader(files)

    @pytest.fixture
    def stored(self, files: MethodFiles) -> Stored:
        def store(file: str, source: str = SCRIPT, *, shipped: bool = False) -> PinnedFile:
            files.versions.put(source.encode())
            return pin(file, source.encode(), shipped=shipped)

        return store

    def test_the_module_of_its_own_folder(self, reader: ScriptReader, root: Path, stored: Stored) -> None:
        (root / "method").mkdir()
        (root / "common.py").write_text(COMMON.replace("8", "1"))
        (root / "method/common.py").write_text(COMMON)

        assert defaults(reader.pinned(stored("method/train.py"))) == {"rank": 8}
        assert defaults(reader.pinned(stored("train.py"))) == {"rank": 1}

    def test_a_folder_above_only_if_the_script_looks_there(
        self, reader: ScriptReader, root: Path, stored: Stored
    ) -> None:
        (root / "common.py").write_text(COMMON)
        adds = "import os, sys\nsys.path.append(os.path.dirname(os.path.dirname(__file__)))\n" + SCRIPT

        assert reader.pinned(stored("method/train.py")).partly_read
        assert defaults(reader.pinned(stored("method/train.py", adds))) == {"rank": 8}

    def test_a_change_of_the_module_is_seen(self, reader: ScriptReader, root: Path, stored: Stored) -> None:
        pinned = stored("train.py")
        assert reader.pinned(pinned).partly_read

        (root / "common.py").write_text(COMMON)
        first = reader.pinned(pinned)
        assert defaults(first) == {"rank": 8}
        assert reader.pinned(pinned) is first

        (root / "common.py").write_text(COMMON.replace("8", "16"))
        assert defaults(reader.pinned(pinned)) == {"rank": 16}

        (root / "common.py").unlink()
        (root / "common").mkdir()
        (root / "common/__init__.py").write_text("from .arguments import add_arguments\n")
        (root / "common/arguments.py").write_text(COMMON)
        assert defaults(reader.pinned(pinned)) == {"rank": 8}

    def test_a_module_that_a_link_leads_out_to_is_not_read(
        self, reader: ScriptReader, root: Path, stored: Stored
    ) -> None:
        (root.parent / "secret.py").write_text(COMMON)
        (root / "common.py").symlink_to(root.parent / "secret.py")

        assert reader.pinned(stored("train.py")).partly_read

    def test_a_shipped_script_sees_no_module_of_the_users(
        self, reader: ScriptReader, root: Path, stored: Stored
    ) -> None:
        (root / "common.py").write_text(COMMON)

        assert reader.pinned(stored("train.py", shipped=True)).partly_read


class TestLimits:
    @pytest.fixture
    def reader(self) -> Iterator[BoundedReader]:
        reader = BoundedReader()
        yield reader
        reader.close()

    def test_modules_that_lead_from_one_to_the_next_are_followed_so_far(self, reader: BoundedReader) -> None:
        asked: list[str] = []

        def find(name: str) -> Source:
            asked.append(name)
            number = int(name.removeprefix("m"))
            return Source(f"from m{number + 1} import add\n".encode())

        source = SCRIPT.replace("common import add_arguments", "m0 import add as add_arguments")
        reading = reader.read(source.encode(), find)

        assert [remark.code for remark in reading.arguments.unread] == ["unread_handed_on"]
        assert len(asked) <= MAX_MODULES + 1

    def test_a_module_too_large_is_left_out(self, reader: BoundedReader) -> None:
        content = COMMON.encode() + b"#" * 4 * 2**20

        reading = reader.read(SCRIPT.encode(), lambda _: Source(content))

        assert script_parameters(reading.arguments).partly_read
