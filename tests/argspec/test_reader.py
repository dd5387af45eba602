from textwrap import dedent
from typing import Any

import pytest

from app.domain.rendering import ArgumentForm
from app.domain.script_parameters import ParameterKind, ScriptParameter, ScriptParameters
from tests.argspec.reading import read_parameters

HEAD = "import argparse\np = argparse.ArgumentParser()\n"
TAIL = "\nargs = p.parse_args()\n"


def read(source: str) -> ScriptParameters:
    return read_parameters(dedent(source))


def names(script: ScriptParameters) -> list[str]:
    return [parameter.name for parameter in script.parameters]


def argument(call: str, *, before: str = "") -> ScriptParameter:
    script = read(HEAD + dedent(before) + f"\np.add_argument({call})" + TAIL)
    assert not script.partly_read, script.unread
    (parameter,) = script.parameters
    return parameter


def unread(source: str) -> list[tuple[str, int]]:
    return [(remark.code, remark.line) for remark in read(source).unread]


class TestTypes:
    @pytest.mark.parametrize(
        ("type_", "kind"),
        [
            ("int", ParameterKind.INTEGER),
            ("float", ParameterKind.NUMBER),
            ("str", ParameterKind.STRING),
            ("bool", ParameterKind.BOOLEAN),
            ("json.loads", ParameterKind.ANY),
            ("Path", ParameterKind.STRING),
            ("pathlib.Path", ParameterKind.STRING),
            ("lambda x: int(x)", ParameterKind.INTEGER),
            ("lambda x: x.lower() == 'true'", ParameterKind.BOOLEAN),
            ("lambda x: x.split(',')", ParameterKind.ANY),
            ("str2bool", ParameterKind.BOOLEAN),
            ("flag", ParameterKind.BOOLEAN),
            ("annotated", ParameterKind.INTEGER),
            ("positive_int", ParameterKind.INTEGER),
            ("anything", ParameterKind.ANY),
            ("strtobool", ParameterKind.BOOLEAN),
            ("argparse.FileType('r')", ParameterKind.ANY),
            ("Mode", ParameterKind.STRING),
        ],
    )
    def test_kind_of_value(self, type_: str, kind: ParameterKind) -> None:
        before = """
            import enum, json, pathlib
            from pathlib import Path
            from distutils.util import strtobool
            def str2bool(v): raise ValueError
            def flag(text):
                if text in ("yes", "1"):
                    return True
                return not text
            def annotated(text) -> int: return len(text)
            def positive_int(text):
                value = int(text)
                return value
            def anything(text): return text.split()
            class Mode(str, enum.Enum):
                A = "a"
        """

        assert argument(f"'--x', type={type_}", before=before).kind is kind

    def test_type_bool_is_noted_because_false_reads_as_true(self) -> None:
        script = read(HEAD + "p.add_argument('--x', type=bool)" + TAIL)

        assert script.parameters[0].reads_false_as_true
        assert [(note.code, note.subject) for note in script.notes] == [("type_bool", "x")]


class TestActions:
    @pytest.mark.parametrize(
        ("call", "form", "kind", "default"),
        [
            ("'--x', action='store_true'", ArgumentForm.FLAG, ParameterKind.BOOLEAN, False),
            ("'--no_x', action='store_false', dest='x'", ArgumentForm.FLAG, ParameterKind.BOOLEAN, False),
            ("'--x', action='store_const', const=3", ArgumentForm.FLAG, ParameterKind.BOOLEAN, False),
            (
                "'--x', action=argparse.BooleanOptionalAction, default=True",
                ArgumentForm.NEGATABLE,
                ParameterKind.BOOLEAN,
                True,
            ),
            ("'--x', action='append', type=int", ArgumentForm.REPEATED, ParameterKind.INTEGER, None),
            ("'--x', action='count', default=0", ArgumentForm.COUNTED, ParameterKind.INTEGER, 0),
            ("'--x', nargs='+', type=float, default=[1, 2]", ArgumentForm.WORDS, ParameterKind.NUMBER, [1, 2]),
            ("'--x', nargs=2", ArgumentForm.WORDS, ParameterKind.STRING, None),
            ("'--x', nargs='?', const='a'", ArgumentForm.VALUE, ParameterKind.STRING, None),
            ("'--x', action='extend', nargs='*'", ArgumentForm.WORDS, ParameterKind.STRING, None),
            ("'--x', action=MyAction", ArgumentForm.VALUE, ParameterKind.ANY, None),
        ],
    )
    def test_form_of_argument(self, call: str, form: ArgumentForm, kind: ParameterKind, default: Any) -> None:
        parameter = argument(call, before="class MyAction(argparse.Action): pass")

        assert (parameter.form, parameter.kind, parameter.default) == (form, kind, default)

    def test_help_and_version_are_no_parameters(self) -> None:
        script = read(HEAD + "p.add_argument('--v', action='version', version='1')\np.add_argument('--x')" + TAIL)

        assert names(script) == ["x"]


class TestValues:
    @pytest.mark.parametrize(
        ("before", "source", "value"),
        [
            ("", "8", 8),
            ("", "-1", -1),
            ("", "2e-5", 2e-5),
            ("", "1024 * 4", 4096),
            ("", "1 << 10", 1024),
            ("", "10 / 4", 2.5),
            ("", "None", None),
            ("", "(1, 2)", [1, 2]),
            ("", "{'a': [1]}", {"a": [1]}),
            ("", "{'b', 'a'}", ["a", "b"]),
            ("", "'a' 'b'", "ab"),
            ("", "'%s-%d' % ('a', 1)", "a-1"),
            ("RANK = 4", "RANK * 2", 8),
            ("NAME = 'qwen'", "f'../models/{NAME}-{2:02d}'", "../models/qwen-02"),
            ("A, B = 1, 2", "B", 2),
            ("X = 1\nX += 2", "X", 3),
            ("D = {'lr': 0.1}", "D['lr']", 0.1),
            ("class C:\n    RANK = 8", "C.RANK", 8),
            ("def rank(): return 16", "rank()", 16),
            ("def rank(n=3):\n    'doc'\n    return n * 2", "rank(n=5)", 10),
            ("import os", "os.path.join('a', 'b')", "a/b"),
            ("from pathlib import Path", "Path('models') ", "models"),
            ("DEBUG = False", "1 if DEBUG else 2", 2),
            ("DEBUG = True\nif DEBUG:\n    N = 1\nelse:\n    N = 2", "N", 1),
            ("try:\n    N = 1\nexcept ImportError:\n    N = 1", "N", 1),
            ("", "max(3, 4)", 4),
            ("", "', '.join(['a', 'b'])", "a, b"),
        ],
    )
    def test_constants_are_evaluated(self, before: str, source: str, value: Any) -> None:
        parameter = argument(f"'--x', default={source}", before=before)

        assert (parameter.default, parameter.default_text) == (value, None)
        assert parameter.has_default

    @pytest.mark.parametrize(
        ("before", "source"),
        [
            ("import os", "os.environ.get('HOME', 'x')"),
            ("import torch", "torch.cuda.device_count()"),
            ("import torch", "torch.float16"),
            ("import sys\nif len(sys.argv) > 1:\n    N = 1\nelse:\n    N = 2", "N"),
            ("L = [1]\nL.append(2)", "L"),
            ("D = {}\nD['a'] = 1", "D"),
            ("N = 0\nfor N in range(3): pass", "N"),
            ("", "float('inf')"),
            ("", "9 ** 9 ** 9"),
            ("", "'x' * 10 ** 10"),
            ("", "[0] * 10 ** 9"),
            ("", "1 << 10 ** 9"),
            ("", "f'{1:999999999}'"),
            ("", "'%999999999d' % 1"),
            ("", "list(range(10 ** 12))"),
            ("", "undefined_name"),
            ("", "[n for n in range(3)]"),
            ("", "1 / 0"),
            ("", "(lambda: 3)()"),
        ],
    )
    def test_what_only_a_run_could_tell_is_shown_as_source(self, before: str, source: str) -> None:
        parameter = argument(f"'--x', default={source}", before=before)

        assert parameter.default is None
        assert parameter.default_text
        assert parameter.has_default

    def test_nothing_is_executed(self, tmp_path: Any) -> None:
        trap = tmp_path / "trap"
        source = (
            HEAD
            + f"""
open({str(trap)!r}, "w").write("x")
__import__("os").system("touch {trap}")
p.add_argument("--x", default=open({str(trap)!r}, "w"))
"""
            + TAIL
        )

        read(source)

        assert not trap.exists()

    @pytest.mark.parametrize(
        ("call", "default"),
        [
            ("type=int, default='8'", 8),
            ("type=float, default='0.5'", 0.5),
            ("type=float, default=1", 1),
            ("type=int, default='many'", "many"),
            ("type=lambda s: s == 'true', default='True'", True),
            ("type=bool, default='False'", True),
            ("default=argparse.SUPPRESS", None),
        ],
    )
    def test_default_is_what_argparse_makes_of_it(self, call: str, default: Any) -> None:
        assert argument(f"'--x', {call}").default == default

    @pytest.mark.parametrize(
        ("before", "source", "choices"),
        [
            ("", "['a', 'b']", ("a", "b")),
            ("", "range(1, 4)", (1, 2, 3)),
            ("MODELS = {'small': object(), 'large': object()}", "MODELS", ("small", "large")),
            ("MODELS = {'small': object(), 'large': object()}", "list(MODELS.keys())", ("small", "large")),
            ("MODELS = {'small': object(), 'large': object()}", "sorted(MODELS)", ("large", "small")),
            ("A = ['a']", "A + ['b']", ("a", "b")),
            ("import x", "x.CHOICES", None),
            ("", "range(10 ** 9)", None),
        ],
    )
    def test_choices(self, before: str, source: str, choices: tuple[Any, ...] | None) -> None:
        assert argument(f"'--x', choices={source}", before=before).choices == choices

    def test_help_names_the_default(self) -> None:
        parameter = argument("'--x', type=int, default=8, help='rank (%(default)s), 100%% of\\n  %(dest)s'")

        assert parameter.help == "rank (8), 100% of x"


class TestNames:
    def test_long_option_is_the_name_and_others_are_aliases(self) -> None:
        parameter = argument("'-r', '--rank', '--r_rank', dest='lora'")

        assert (parameter.name, parameter.aliases) == ("rank", ("r_rank",))

    def test_known_name_is_preferred(self) -> None:
        parameter = argument("'--lr', '--learning_rate'")

        assert (parameter.name, parameter.aliases) == ("learning_rate", ("lr",))

    def test_hyphens_stay_as_they_are_passed(self) -> None:
        assert argument("'--batch-size'").name == "batch-size"

    def test_short_option_alone_cannot_be_passed(self) -> None:
        script = read(HEAD + "p.add_argument('-r', required=True)" + TAIL)

        assert names(script) == []
        assert [note.code for note in script.notes] == ["short_option_only"]

    def test_positionals_are_listed_apart(self) -> None:
        script = read(HEAD + "p.add_argument('config')\np.add_argument('rest', nargs='*')" + TAIL)

        assert [(p.name, p.required) for p in script.positionals] == [("config", True), ("rest", False)]
        assert [note.code for note in script.notes] == ["positional_argument", "positional_argument"]

    def test_of_two_declarations_the_later_wins_and_is_noted(self) -> None:
        script = read(HEAD + "p.add_argument('--x', type=int)\np.add_argument('--x', type=float)" + TAIL)

        assert [(p.name, p.kind) for p in script.parameters] == [("x", ParameterKind.NUMBER)]
        assert [(note.code, note.line) for note in script.notes] == [("duplicate_argument", 4)]

    def test_conflict_handler_resolves_silently(self) -> None:
        script = read("""
            import argparse
            p = argparse.ArgumentParser(conflict_handler="resolve")
            p.add_argument("--x", "--old", type=int)
            p.add_argument("--x", type=float)
            p.parse_args()
        """)

        assert [(p.name, p.kind) for p in script.parameters] == [
            ("old", ParameterKind.INTEGER),
            ("x", ParameterKind.NUMBER),
        ]
        assert script.notes == ()


class TestParsers:
    @pytest.mark.parametrize(
        "imports",
        [
            "import argparse\nP = argparse.ArgumentParser",
            "import argparse as ap\nP = ap.ArgumentParser",
            "from argparse import ArgumentParser as P",
            "from argparse import *\nfrom argparse import ArgumentParser\nP = ArgumentParser",
        ],
    )
    def test_however_argparse_is_imported(self, imports: str) -> None:
        script = read_parameters(f"{imports}\np = P()\np.add_argument('--x')\np.parse_args()")

        assert names(script) == ["x"]
        assert not script.partly_read

    def test_groups_and_exclusive_groups(self) -> None:
        script = read("""
            import argparse
            p = argparse.ArgumentParser()
            g = p.add_argument_group("data")
            g.add_argument("--a")
            m = g.add_mutually_exclusive_group(required=True)
            m.add_argument("--b")
            m.add_argument("--c")
            p.parse_args()
        """)

        assert [(p.name, p.group) for p in script.parameters] == [("a", "data"), ("b", "data"), ("c", "data")]
        assert [(g.names, g.required) for g in script.exclusive] == [(("b", "c"), True)]

    def test_parents(self) -> None:
        script = read("""
            import argparse
            common = argparse.ArgumentParser(add_help=False)
            common.add_argument("--seed", type=int, default=42)
            common.set_defaults(seed=7)
            p = argparse.ArgumentParser(parents=[common])
            p.add_argument("--x")
            p.parse_args()
        """)

        assert [(p.name, p.default) for p in script.parameters] == [("seed", 7), ("x", None)]

    def test_functions_that_build_and_return_parsers(self) -> None:
        script = read("""
            import argparse, asyncio

            def add_data(parser, *, default):
                parser.add_argument("--rows", type=int, default=default)
                return parser

            def make_parser():
                parser = argparse.ArgumentParser()
                parser.add_argument("--x", required=True)
                return add_data(parser, default=10)

            async def main():
                args = make_parser().parse_args()

            if __name__ == "__main__":
                asyncio.run(main())
        """)

        assert [(p.name, p.required, p.default) for p in script.parameters] == [("x", True, None), ("rows", False, 10)]
        assert not script.partly_read
        assert not script.accepts_unknown

    def test_function_called_twice_declares_nothing_twice(self) -> None:
        script = read("""
            import argparse
            def get_args():
                p = argparse.ArgumentParser()
                p.add_argument("--x")
                return p.parse_known_args()[0]
            a = get_args()
            b = get_args()
        """)

        assert names(script) == ["x"]
        assert script.notes == ()

    def test_classes_that_hold_or_are_parsers(self) -> None:
        held = read("""
            import argparse
            class Options:
                def __init__(self):
                    self.parser = argparse.ArgumentParser()
                    self.parser.add_argument("--x")
                def more(self):
                    self.parser.add_argument("--y")
                def parse(self):
                    self.more()
                    return self.parser.parse_args()
            opts = Options().parse()
        """)
        derived = read("""
            import argparse
            class Options(argparse.ArgumentParser):
                def __init__(self):
                    super().__init__()
                    self.add_argument("--x")
            opts = Options().parse_args()
        """)

        assert names(held) == ["x", "y"]
        assert names(derived) == ["x"]
        assert not held.partly_read
        assert not derived.partly_read

    def test_function_that_nobody_calls_here_is_read_too(self) -> None:
        script = read("""
            import argparse
            import fire
            def main():
                p = argparse.ArgumentParser()
                p.add_argument("--x")
                args = p.parse_args()
            fire.Fire(main)
        """)

        assert names(script) == ["x"]

    def test_parsers_that_do_not_read_the_command_line_do_not_count(self) -> None:
        script = read("""
            import argparse
            other = argparse.ArgumentParser()
            other.add_argument("--y")
            other.parse_args([])
            p = argparse.ArgumentParser()
            p.add_argument("--x")
            p.parse_args()
        """)

        assert names(script) == ["x"]

    def test_arguments_under_an_undecided_condition_are_not_required(self) -> None:
        script = read("""
            import argparse, sys
            p = argparse.ArgumentParser()
            if sys.platform == "linux":
                p.add_argument("--x", required=True, type=int)
            else:
                p.add_argument("--x", required=True, type=float)
            p.parse_args()
        """)

        assert [(p.name, p.required) for p in script.parameters] == [("x", False)]
        assert script.notes == ()

    def test_defaults_set_later_and_attributes_of_arguments(self) -> None:
        script = read("""
            import argparse
            p = argparse.ArgumentParser()
            a = p.add_argument("--x", type=int)
            p.add_argument("--y", type=int, default=1)
            a.required = True
            p.set_defaults(y=2)
            p.parse_args()
        """)

        assert [(p.name, p.required, p.default) for p in script.parameters] == [("x", True, None), ("y", False, 2)]

    def test_arguments_of_a_constant_dict(self) -> None:
        assert argument("*NAMES, **OPTIONS", before="NAMES = ['--x']\nOPTIONS = dict(type=int, default=3)").default == 3


class TestUnknownArguments:
    @pytest.mark.parametrize(
        ("parse", "accepts"),
        [
            ("p.parse_args()", False),
            ("p.parse_known_args()", True),
            ("args, rest = p.parse_known_args()", True),
            ("args, rest = p.parse_known_args()\np.parse_args(rest)", False),
            ("import sys\np.parse_args(sys.argv[1:])", False),
        ],
    )
    def test_says_whether_unknown_arguments_are_ignored(self, parse: str, accepts: bool) -> None:
        assert read(HEAD + "p.add_argument('--x')\n" + parse).accepts_unknown is accepts

    def test_abbreviations(self) -> None:
        assert read(HEAD + TAIL).abbreviates
        assert not read("import argparse\nargparse.ArgumentParser(allow_abbrev=False).parse_args()").abbreviates


class TestPartlyRead:
    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ("while p.add_argument('--x'):\n    p.add_argument('--y')", [("unread_loop", 4)]),
            ("{p.add_argument('--' + n) for n in 'ab'}", [("unread_loop", 3)]),
            ("def add(q, n): q.add_argument(n)\n[add(p, n) for n in names]", [("unread_loop", 4)]),
            ("import sys\np.add_argument(sys.argv[1])", [("unread_dynamic_name", 4)]),
            ("import c\np.add_argument(*c.NAMES)", [("unread_star_arguments", 4)]),
            ("import c\np.add_argument('--x', **c.OPTIONS)", [("unread_star_arguments", 4)]),
            ("import c\nc.add_common(p)", [("unread_handed_on", 4)]),
            ("import c\np = c.add_common(p)", [("unread_handed_on", 4)]),
            ("s = p.add_subparsers()\ns.add_parser('train').add_argument('--x')", [("unread_subcommands", 3)]),
            ("import c\np = argparse.ArgumentParser(parents=[c.parent])", [("unread_foreign_parser", 4)]),
        ],
    )
    def test_says_where_the_reading_broke_off(self, body: str, expected: list[tuple[str, int]]) -> None:
        assert unread(HEAD + body + TAIL) == expected

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("from transformers import HfArgumentParser\nHfArgumentParser((A, B)).parse_args_into_dataclasses()", 2),
            ("from trl import TrlParser\nparser = TrlParser(A)\nparser.parse_args_and_config()", 2),
            ("import transformers\n\ntransformers.HfArgumentParser(A).parse_args_into_dataclasses()", 3),
        ],
    )
    def test_dataclass_parsers(self, source: str, expected: int) -> None:
        assert unread(source) == [("unread_dataclass_parser", expected)]

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("", ("unread_no_parser", 1)),
            ("import sys\nprint(sys.argv)", ("unread_no_parser", 1)),
            ("from common import make_parser\nargs = make_parser().parse_args()", ("unread_foreign_parser", 2)),
            ("from common import parse_args\nargs = parse_args()", ("unread_foreign_parser", 2)),
            ("import argparse\np = argparse.ArgumentParser()\nrun(lambda: p)", ("unread_parse_not_found", 2)),
            ("x = (", ("unread_not_python", 1)),
            (
                "import argparse\n" + "\n".join(f"def f{n}(): f{n + 1}(); f{n + 1}()" for n in range(24)) + "\nf0()",
                None,
            ),
        ],
    )
    def test_scripts_without_a_parser_of_their_own(self, source: str, expected: tuple[str, int] | None) -> None:
        assert expected is None or expected in unread(source)
        assert read(source).partly_read

    def test_what_could_be_read_is_listed_nevertheless(self) -> None:
        script = read(HEAD + "p.add_argument('--x', type=int)\nfor n in names: p.add_argument('--' + n)" + TAIL)

        assert names(script) == ["x"]
        assert script.partly_read

    def test_loops_that_have_nothing_to_do_with_the_parser_do_not_matter(self) -> None:
        script = read("""
            import argparse
            def main():
                p = argparse.ArgumentParser()
                p.add_argument("--x")
                args = p.parse_args()
                for step in range(10):
                    print([str(step) for _ in range(3)])
                while True:
                    main()
            main()
        """)

        assert not script.partly_read

    @pytest.mark.parametrize(
        "source",
        [
            "def f(): return f()\nf()",
            "def f(): raise ValueError\nx = f()",
            "x = " + "[" * 90 + "]" * 90,
            "a = [0] * 999\n" + "\n".join(f"{b} = [{a}] * 999" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
            "s = 'x' * 999\n" + "s = s + s\n" * 60,
            "if x: pass\n" + "elif x: pass\n" * 500,
            "import argparse\nclass A(A): pass\nA()",
            "x.y.z = 1\nx[0].y = 2\n(a, *b), c = 1, 2\ndel x.y",
            "match x:\n    case [a, *b]: pass\n    case {'k': v}: pass",
            "import argparse\nargparse.ArgumentParser(**x).add_argument()",
            "import argparse\nargparse.ArgumentParser().add_argument(None, 5, '--', '')",
            "global z\nz = 1\ndef f():\n    global q\n    q = 1\nf()",
            "async def f():\n    async with x as y:\n        async for z in y:\n            await z\n",
            "try:\n    x\nexcept* ValueError:\n    y",
        ],
    )
    def test_odd_scripts_are_survived(self, source: str) -> None:
        assert read(source).partly_read


class TestOptionClasses:
    """Classes whose fields a script takes by `deepe_options`."""

    def test_are_read_from_the_constant(self) -> None:
        script = read(
            HEAD + "p.add_argument('--objective')\n"
            "LIBRARY_OPTIONS = {'classes': {'trl.SFTConfig': {}, 'trl.KTOConfig': {'objective': ['kto'], 'no': [1]}},"
            "'instead': {'max_length': 'max_seq_length'}}" + TAIL
        )

        assert {one.path: one.when for one in script.option_classes} == {
            "trl.SFTConfig": {},
            "trl.KTOConfig": {"objective": ("kto",)},  # one on an argument that there is not holds
        }
        assert script.options_instead == {"max_length": "max_seq_length"}
        assert not script.partly_read

    @pytest.mark.parametrize(
        "value",
        [
            "compute()",
            "{}",
            "{'classes': ['trl.SFTConfig']}",
            "{'classes': {'trl.SFTConfig': ['x']}}",
            "{'classes': {'import os': {}}}",
            "{'classes': {'trl.SFTConfig': {}}, 'instead': {'x': 1}}",
            "{'classes': {f'a.b{n}': {} for n in range(9)}}",
        ],
    )
    def test_what_is_no_such_constant_is_said(self, value: str) -> None:
        found = unread(f"{HEAD}\nLIBRARY_OPTIONS = {value}\n{TAIL}")

        assert ("unread_option_classes", 1) in found
