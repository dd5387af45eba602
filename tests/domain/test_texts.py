"""Every code that a person may meet has its sentence in English, Chinese and German."""

import ast
import importlib
import inspect
import pkgutil
import string
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import app
from app.domain import errors
from app.domain.definition import MethodDefinition
from app.domain.enums import EndReason
from app.domain.errors import AppError
from app.domain.lifecycle import violations
from app.domain.texts import Language, catalogue, text

ROOT = Path(app.__file__).parent
# Calls whose argument is a code: the name of the function, and which argument (position or keyword).
CODE_ARGUMENTS = {"Violation": (1, "code"), "Remark": (0, "code"), "_lose": (0, "code"), "WaitingReason": (0, "code")}


def import_everything() -> None:
    for module in pkgutil.walk_packages(app.__path__, "app."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def subclasses(kind: type[AppError]) -> Iterator[type[AppError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def codes_in_source() -> dict[str, str]:
    """Return each code that is written in a call, with where it stands."""
    found: dict[str, str] = {}
    for path in ROOT.rglob("*.py"):
        if "scripts" in path.parts:
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                for code in _codes(node):
                    found[code] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def _codes(node: ast.Call) -> Iterator[str]:
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    if name not in CODE_ARGUMENTS:
        return
    position, keyword = CODE_ARGUMENTS[name]
    arguments = [*node.args[position : position + 1], *(k.value for k in node.keywords if k.arg == keyword)]
    for argument in arguments:
        for part in ast.walk(argument):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


def placeholders(code: str) -> set[str]:
    """Return what the sentences of a code want filled."""
    parts = (part for sentence in catalogue()[code].values() for part in string.Formatter().parse(sentence))
    return {name for _, name, _, _ in parts if name}


def names_its_own_params(kind: type[AppError]) -> bool:
    """Say whether a class fills its sentence in its constructor."""
    return kind.__init__ is not AppError.__init__


def unfilled_in_errors() -> Iterator[str]:
    """Yield each place that raises an error without all that its sentence wants."""
    kinds: dict[str, list[type[AppError]]] = {}
    for kind in subclasses(AppError):
        if kind.code in catalogue() and not names_its_own_params(kind):
            kinds.setdefault(kind.__name__, []).append(kind)
    for path, tree in product_source():
        for node in ast.walk(tree):
            # `raise Error` without a call gives nothing
            target = node.func if isinstance(node, ast.Call) else node.exc if isinstance(node, ast.Raise) else None
            keywords = node.keywords if isinstance(node, ast.Call) else []
            for kind in kinds.get(getattr(target, "id", getattr(target, "attr", "")), []):
                missing = placeholders(kind.code) - {keyword.arg for keyword in keywords}
                if missing and all(keyword.arg for keyword in keywords):
                    yield f"{path}:{getattr(node, 'lineno', 0)}: {kind.__name__} lacks {sorted(missing)}"


def unfilled_in_violations() -> Iterator[str]:
    """Yield each violation whose code and params are written out, and that lacks some."""
    for path, tree in product_source():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "Violation" or len(node.args) < 2:
                continue
            params = node.args[2] if len(node.args) > 2 else ast.Dict([], [])
            if not isinstance(params, ast.Dict) or not all(isinstance(key, ast.Constant) for key in params.keys):
                continue
            given = {key.value for key in params.keys if isinstance(key, ast.Constant)}
            for code in _codes(node):
                if code in catalogue() and (missing := placeholders(code) - given):
                    yield f"{path}:{node.lineno}: {code} lacks {sorted(map(str, missing))}"


def product_source() -> Iterator[tuple[Path, ast.Module]]:
    for path in ROOT.rglob("*.py"):
        if "presets" not in path.parts:
            yield path.relative_to(ROOT), parsed(path)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


class TestPlaceholders:
    def test_every_raise_fills_its_sentence(self) -> None:
        import_everything()

        assert list(unfilled_in_errors()) == []

    def test_every_violation_that_is_written_out_fills_its_sentence(self) -> None:
        assert list(unfilled_in_violations()) == []

    def test_constructors_fill_their_sentence(self) -> None:
        import_everything()

        own = [kind for kind in subclasses(AppError) if kind.code in catalogue() and names_its_own_params(kind)]
        sources = {kind: ast.parse(textwrap.dedent(inspect.getsource(kind))) for kind in own}
        unfilled = {
            kind.__name__: missing
            for kind, tree in sources.items()
            if (missing := placeholders(kind.code) - _keywords_to_super(tree))
        }
        assert own
        assert unfilled == {}


def _keywords_to_super(tree: ast.Module) -> set[str | None]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {k.arg for call in calls if getattr(call.func, "attr", "") == "__init__" for k in call.keywords}


class TestCodes:
    def test_every_error_has_its_sentence(self) -> None:
        import_everything()

        leaves = [kind for kind in subclasses(AppError) if kind.__module__ != errors.__name__ or kind.code]
        without_code = [kind.__qualname__ for kind in leaves if not kind.code and not kind.__subclasses__()]
        without_text = sorted({kind.code for kind in leaves if kind.code} - set(catalogue()))
        assert len(leaves) > 10
        assert without_code == []
        assert without_text == []

    def test_no_two_errors_share_a_code(self) -> None:
        import_everything()

        own = [kind for kind in subclasses(AppError) if "code" in vars(kind) and kind.__module__.startswith("app.")]
        codes = [kind.code for kind in own]
        assert sorted({code for code in codes if codes.count(code) > 1}) == []

    def test_every_violation_has_its_sentence(self) -> None:
        used = codes_in_source()

        assert len(used) > 40
        assert {code: place for code, place in used.items() if code not in catalogue()} == {}

    @pytest.mark.parametrize("reason", EndReason)
    def test_every_end_has_its_sentence(self, reason: EndReason) -> None:
        assert f"reason_{reason}" in catalogue()


class TestSentences:
    def test_each_stands_in_three_languages_with_the_same_placeholders(self) -> None:
        for code, entry in catalogue().items():
            assert set(entry) == set(Language), code
            assert all(sentence.strip() == sentence != "" for sentence in entry.values()), code
            parts = [string.Formatter().parse(entry[language]) for language in Language]
            placeholders = [{name for _, name, _, _ in part if name} for part in parts]
            assert placeholders[0] == placeholders[1] == placeholders[2], code

    def test_chinese_is_chinese(self) -> None:
        latin = [
            code
            for code, entry in catalogue().items()
            if not any("\u4e00" <= c <= "\u9fff" for c in entry[Language.ZH])
        ]

        assert latin == ["label_technique_sd"]

    def test_placeholders_are_filled(self) -> None:
        assert "7" in text("invalid_python", Language.DE, file="x.py", line=7, column=1, problem="p", python="3")

    def test_unknown_code_answers_with_itself(self) -> None:
        assert text("no_such_code") == "no_such_code"


class TestParams:
    def test_rules_fill_every_placeholder(self) -> None:
        bodies = [
            {},
            {"name": "a/b ", "technique": "/", "training_type": "x", "lifecycle": ["x"], "odd": 1},
            {"lifecycle": ["complete"], "stages": {"training": {}, "nope": {}, "inference-customized": {}}},
            {"lifecycle": ["customized"], "stages": {"saving": {}, "inference-customized": {}}, "deployment": {}},
            {"lifecycle": ["customized", "online"], "deployment": {"target": "custom"}},
            {"lifecycle": ["customized", "online"], "deployment": {"target": "t", "file": "x"}},
            {"lifecycle": ["customized", "online"], "deployment": {"target": "nowhere"}},
            {"lifecycle": ["customized", "online"], "inference": {"complete": True}, "arguments": {"false_as": "x"}},
        ]

        for body in bodies:
            for violation in violations(MethodDefinition.model_validate(body), deploy_targets=("t",)):
                for language in Language:
                    assert "{" not in violation.detail(language)
