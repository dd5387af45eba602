"""Scripts made at random: what we read without running them is what argparse itself says when it runs them."""

import argparse
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.domain.parameters import check_parameters, json_schema
from app.domain.rendering import ArgumentForm, render_equals, render_pairs
from app.domain.script_parameters import ParameterKind, ScriptParameters
from tests.argspec.reading import read_parameters

OPTION_NAMES = [f"{word}{number}" for word in ("alpha", "lora_rank_", "with-way", "x") for number in range(4)]
TEXTS = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), max_size=8)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(-1000, 1000),
    "float": st.floats(-1e6, 1e6) | st.integers(-5, 5),
    "str": TEXTS,
    "json.loads": st.dictionaries(
        TEXTS, st.integers(-(2**62), 2**62) | st.none() | st.lists(TEXTS, max_size=2), max_size=2
    ),
    "str2bool": st.booleans(),
}
KINDS = {
    "int": ParameterKind.INTEGER,
    "float": ParameterKind.NUMBER,
    "str": ParameterKind.STRING,
    "json.loads": ParameterKind.ANY,
    "str2bool": ParameterKind.BOOLEAN,
}
PRELUDE = """
import argparse, json
def str2bool(text):
    return text.lower() == "true"
def make_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    first = parser.add_argument_group("first")
    second = parser.add_mutually_exclusive_group()
"""
EPILOGUE = """    return parser
if __name__ == "__main__":
    make_parser().parse_args()
"""


@st.composite
def declarations(draw: st.DrawFn) -> str:
    """Return the source of one `add_argument` call, without its option name."""
    action = draw(st.sampled_from(["store", "store", "store", "append", "store_true", "optional", "count", "words"]))
    help_text = draw(st.sampled_from(["", ", help='about %(default)s'", ", help='100%%'"]))
    match action:
        case "store_true" | "count":
            return f"action={action!r}{help_text}"
        case "optional":
            default = draw(st.sampled_from(["", ", default=True", ", default=False"]))
            return f"action=argparse.BooleanOptionalAction{default}"
    type_ = draw(st.sampled_from(["int", "float", "str"] if action != "store" else sorted(VALUES)))
    parts = [f"type={type_}"]
    if action == "append":
        parts.append("action='append'")
    elif action == "words":
        parts.append(f"nargs={draw(st.sampled_from(['+', '*']))!r}")
    elif type_ in ("int", "str") and draw(st.booleans()):
        choices = draw(st.lists(VALUES[type_], min_size=1, max_size=3, unique=True))
        parts += [f"choices={choices!r}", f"default={choices[0]!r}"]
    elif draw(st.booleans()):
        parts.append(f"default={draw(VALUES[type_])!r}")
    if draw(st.booleans()):
        parts.append("required=True")
    return ", ".join(parts) + help_text


@st.composite
def scripts(draw: st.DrawFn) -> str:
    """Return the source of a script with some options in one or another group."""
    lines = []
    for name in draw(st.lists(st.sampled_from(OPTION_NAMES), unique=True, max_size=6)):
        declaration = draw(declarations())
        owners = ["parser", "first"] + ([] if "required" in declaration else ["second"])
        alias = draw(st.sampled_from(["", f", '--{name}-alias'", f", '-{name[0]}{name[-1]}'"]))
        lines.append(f"    {draw(st.sampled_from(owners))}.add_argument('--{name}'{alias}, {declaration})")
    return PRELUDE + "\n".join(lines) + "\n" + EPILOGUE


def real_parser(source: str) -> argparse.ArgumentParser:
    scope: dict[str, Any] = {"__name__": "script"}
    exec(source, scope)
    parser = scope["make_parser"]()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


class TestReading:
    @given(scripts())
    def test_agrees_with_argparse(self, source: str) -> None:
        script = read_parameters(source)

        actions = {a.option_strings[0][2:]: a for a in real_parser(source)._actions if a.dest != "help"}
        assert not script.partly_read
        assert [parameter.name for parameter in script.parameters] == list(actions)
        for parameter in script.parameters:
            action = actions[parameter.name]
            options = {option[2:] for option in action.option_strings if option.startswith("--")}
            negations = {f"no-{name}" for name in (parameter.name, *parameter.aliases)}
            assert {parameter.name, *parameter.aliases} == options - (
                negations if parameter.form is ArgumentForm.NEGATABLE else set()
            )
            assert parameter.required is action.required
            assert parameter.default == action.default
            assert parameter.choices == (None if action.choices is None else tuple(action.choices))
            type_name = getattr(action.type, "__name__", None)
            assert type_name is None or parameter.kind is KINDS.get(type_name.replace("loads", "json.loads"))


class TestRoundTrip:
    @given(scripts(), st.data())
    def test_values_that_pass_the_check_reach_the_script(self, source: str, data: st.DataObject) -> None:
        script = read_parameters(source)
        values = _values(script, data)

        check = check_parameters(values, script)
        namespace = vars(real_parser(source).parse_args(render_equals(check.effective, forms=script.forms)))

        assert check.violations == ()
        assert json.loads(json.dumps(json_schema(script)))["properties"].keys() == script.by_name().keys() - {
            alias for parameter in script.parameters for alias in parameter.aliases
        }
        for name, value in values.items():
            given = script.by_name()[name]
            expected = int(value) if given.form is ArgumentForm.COUNTED else value
            read = namespace[name.replace("-", "_")]
            assert read == expected or (given.form is ArgumentForm.COUNTED and not value and read is None)

    @given(scripts(), st.data())
    def test_pairs_mean_the_same_as_equals(self, source: str, data: st.DataObject) -> None:
        script = read_parameters(source)
        values = _values(script, data)
        parser = real_parser(source)

        pairs = parser.parse_args(render_pairs(values, forms=script.forms))

        assert pairs == parser.parse_args(render_equals(values, forms=script.forms))


def _values(script: ScriptParameters, data: st.DataObject) -> dict[str, Any]:
    """Return values that the script declares it takes: all that it requires and some others."""
    values: dict[str, Any] = {}
    exclusive = {name for group in script.exclusive for name in group.names[1:]}
    for parameter in script.parameters:
        if parameter.name in exclusive or not (parameter.required or data.draw(st.booleans())):
            continue
        values[parameter.name] = data.draw(_value(parameter))
    return values


def _value(parameter: Any) -> st.SearchStrategy[Any]:
    if parameter.choices is not None:
        return st.sampled_from(parameter.choices)
    by_kind = {kind: VALUES[name] for name, kind in KINDS.items()}
    single = by_kind[parameter.kind]
    if parameter.form is ArgumentForm.COUNTED:
        return st.integers(0, 3)
    if parameter.form is ArgumentForm.WORDS:
        # a word that begins with a hyphen is refused at submit
        plain = single.filter(lambda word: not str(word).startswith("-"))
        return st.lists(plain, min_size=1, max_size=3)
    return st.lists(single, min_size=1, max_size=3) if parameter.form is ArgumentForm.REPEATED else single
