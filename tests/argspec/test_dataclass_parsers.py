"""Scripts whose parsers are made of dataclasses: their own, and those of libraries."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from app.domain.library_options import DescribedOptions, OptionClass, OptionField, with_parser_classes
from app.domain.parameters import check_parameters, json_schema
from app.domain.rendering import ArgumentForm, render_equals
from app.domain.script_parameters import ParameterKind, ScriptParameters
from app.executor.environments import environment_probe
from app.executor.environments.environment_probe import describe
from tests.argspec.dataclass_script import SCRIPT
from tests.argspec.reading import read_parameters

FORM, KIND = ArgumentForm, ParameterKind
NESTED = """
import enum
from dataclasses import dataclass, field
from typing import Literal
import tyro, simple_parsing

class Kind(enum.Enum):
    LORA = "lora"

@dataclass
class Optim:
    learning_rate: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])

@dataclass
class Config:
    model_name: str
    use_lora: bool = True
    kind: Kind = Kind.LORA
    level: Literal["low", "high"] = "low"
    optim: Optim = field(default_factory=Optim)
"""
TRAINER = """
from dataclasses import dataclass, field
import transformers
from trl import SFTConfig, TrlParser

@dataclass
class Own(transformers.TrainingArguments):
    rank: int = field(default=8)
    learning_rate: float = 1e-3

script_args, training_args = TrlParser((Own, SFTConfig)).parse_args_and_config()
"""
ARGUMENTS = OptionClass(
    path="transformers.TrainingArguments",
    library="transformers",
    version="5.0",
    fields=(
        OptionField(name="output_dir", kind=KIND.STRING, nullable=True),
        OptionField(name="learning_rate", kind=KIND.NUMBER, default=5e-5),
        OptionField(name="label_names", kind=KIND.STRING, is_list=True, nullable=True),
    ),
)
SFT = OptionClass(
    path="trl.SFTConfig",
    library="trl",
    version="1.0",
    fields=(
        OptionField(name="packing", kind=KIND.BOOLEAN, default=False),
        OptionField(name="max_length", kind=KIND.INTEGER, required=True),
    ),
)


def described(*classes: OptionClass) -> DescribedOptions:
    return DescribedOptions({one.path: one for one in classes}, "trl")


class TestOwnFields:
    def test_each_field_is_an_option(self) -> None:
        script = read_parameters(SCRIPT)

        found = {p.name: (p.kind, p.form, p.required, p.default, p.choices) for p in script.parameters}

        assert not script.partly_read, script.unread
        assert not script.accepts_unknown
        assert found == {
            "model_name_or_path": (KIND.STRING, FORM.VALUE, True, None, None),
            "plain": (KIND.BOOLEAN, FORM.VALUE, False, False, None),
            "revision": (KIND.STRING, FORM.VALUE, False, None, None),
            "kind": (KIND.STRING, FORM.VALUE, False, "lora", ("full", "lora")),
            "dtype": (KIND.STRING, FORM.VALUE, False, "auto", ("auto", "bfloat16")),
            "lora_rank": (KIND.INTEGER, FORM.VALUE, False, 8, None),
            "heads": (KIND.INTEGER, FORM.VALUE, False, None, None),
            "rate": (KIND.NUMBER, FORM.VALUE, False, 1e-5, None),
            "fast": (KIND.BOOLEAN, FORM.VALUE, False, True, None),
            "perhaps": (KIND.BOOLEAN, FORM.VALUE, False, None, None),
            "layers": (KIND.STRING, FORM.WORDS, False, ["q", "v"], None),
            "sizes": (KIND.INTEGER, FORM.WORDS, False, [], None),
            "words": (KIND.STRING, FORM.WORDS, False, None, None),
            "level": (KIND.STRING, FORM.VALUE, False, "low", ("low", "high")),
            "options": (KIND.ANY, FORM.VALUE, False, None, None),
            "quiet": (KIND.BOOLEAN, FORM.VALUE, False, True, None),
            "train_file": (KIND.STRING, FORM.VALUE, False, None, None),
        }

    def test_other_spellings_are_names_too(self) -> None:
        script = read_parameters(SCRIPT)

        assert script.by_name()["model-name-or-path"].name == "model_name_or_path"
        assert script.by_name()["rank"].name == "lora_rank"
        assert script.by_name()["model_name_or_path"].help == "Model or its folder."

    def test_classes_beside_the_script(self) -> None:
        script = read_parameters(
            "from transformers import HfArgumentParser\nfrom common import Data\n"
            "HfArgumentParser([Data]).parse_args_into_dataclasses(return_remaining_strings=True)",
            {
                "common": "from dataclasses import dataclass\nfrom base import Base\nLOW = 2\n"
                "@dataclass\nclass Data(Base):\n    rows: int = LOW",
                "base": "import dataclasses\n@dataclasses.dataclass\nclass Base:\n    file: str = 'a.csv'",
            },
        )

        assert [(p.name, p.default) for p in script.parameters] == [("file", "a.csv"), ("rows", 2)]
        assert (script.partly_read, script.accepts_unknown) == (False, True)

    def test_arguments_that_are_added_to_such_a_parser(self) -> None:
        script = read_parameters(
            "from transformers import HfArgumentParser\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass A:\n    x: int = 1\n"
            "p = HfArgumentParser(A)\np.add_argument('--y', type=float, default=2)\np.parse_args()"
        )

        assert [(p.name, p.default) for p in script.parameters] == [("x", 1), ("y", 2)]

    @pytest.mark.parametrize(
        ("parse", "flag", "nested"),
        [
            ("tyro.cli(Config)", FORM.NEGATABLE, "optim."),
            ("simple_parsing.parse(Config)", FORM.VALUE, ""),
            ("p = simple_parsing.ArgumentParser()\np.add_arguments(Config, dest='c')\np.parse_args()", FORM.VALUE, ""),
        ],
    )
    def test_other_parsers_of_dataclasses(self, parse: str, flag: ArgumentForm, nested: str) -> None:
        script = read_parameters(f"{NESTED}\n{parse}")

        assert not script.partly_read, script.unread
        assert not script.accepts_unknown
        assert {p.name: (p.form, p.required, p.default, p.default_text, p.choices) for p in script.parameters} == {
            "model_name": (FORM.VALUE, True, None, None, None),
            "use_lora": (flag, False, True, None, None),
            "kind": (FORM.VALUE, False, None, "Kind.LORA", None),
            "level": (FORM.VALUE, False, "low", None, ("low", "high")),
            f"{nested}learning_rate": (FORM.VALUE, False, 1e-4, None, None),
            f"{nested}betas": (FORM.WORDS, False, [0.9, 0.99], None, None),
        }

    def test_a_nested_object_with_values_of_its_own_has_other_defaults(self) -> None:
        script = read_parameters(NESTED.replace("default_factory=Optim", "default_factory=make") + "\ntyro.cli(Config)")

        assert script.by_name()["optim.learning_rate"].default_text == "make"
        assert script.by_name()["optim.learning_rate"].default is None

    @pytest.mark.parametrize(
        "types", ["A", "make()", "(A, make())", "open", "os.PathLike", "[]+make()", ".x.A"], ids=str
    )
    def test_what_is_no_class_is_said(self, types: str) -> None:
        source = f"import os\nfrom transformers import HfArgumentParser\nHfArgumentParser({types}).parse_args()"

        assert [(one.code, one.line) for one in read_parameters(source).unread] in (
            [("unread_dataclass_parser", 3)],
            [("unread_not_python", 3)],
        )


class TestFieldsOfLibraries:
    def test_are_unknown_until_the_environment_says_them(self) -> None:
        read = read_parameters(TRAINER)

        half = with_parser_classes(read, described(ARGUMENTS))

        assert [one.path for one in read.parser_classes] == ["transformers.TrainingArguments", "trl.SFTConfig"]
        assert read.partly_read
        assert [(one.code, one.line, one.subject) for one in half.unread] == [
            ("unread_parser_class", 11, "trl.SFTConfig")
        ]

    def test_join_what_the_script_declares_and_yield_to_it(self) -> None:
        script = with_parser_classes(read_parameters(TRAINER), described(ARGUMENTS, SFT))

        assert not script.partly_read
        assert {p.name: (p.default, p.required, p.form) for p in script.parameters} == {
            "rank": (8, False, FORM.VALUE),
            "learning_rate": (1e-3, False, FORM.VALUE),
            "output_dir": (None, False, FORM.VALUE),
            "label_names": (None, False, FORM.WORDS),
            "packing": (False, False, FORM.VALUE),
            "max_length": (None, True, FORM.VALUE),
        }
        schema = json_schema(script)["properties"]
        advanced = {name for name, one in schema.items() if "x-advanced" in one}
        assert advanced == {"output_dir", "label_names", "packing", "max_length"}

    def test_nothing_is_filled_in_for_them(self) -> None:
        script = with_parser_classes(read_parameters(TRAINER), described(ARGUMENTS, SFT))

        check = check_parameters({"max_length": 64, "label_names": ["a", "b"]}, script)

        assert check.violations == ()
        assert check.effective == {"max_length": 64, "label_names": ["a", "b"]}
        assert render_equals(check.effective, forms=script.forms) == ["--label_names", "a", "b", "--max_length=64"]


DUMP = """
import json, runpy, sys
found = {}
for script in sys.argv[1:]:
    parser = runpy.run_path(script, run_name="probe")["make_parser"]()
    found[script] = {
        action.option_strings[0][2:]: {
            "names": [name[2:] for name in action.option_strings if name.startswith("--")],
            "default": action.default,
            "required": action.required,
            "several": action.nargs == "+",
        }
        for action in parser._actions
        if action.nargs != 0
    }
print("@" + json.dumps(found, default=repr))
"""
LISTS_OF_OTHERS = {"debug", "datasets"}
"""Text or list, and a list of dataclasses: both take one text as well."""


@pytest.mark.training
def test_what_is_read_is_what_the_libraries_parsers_declare(
    training_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own scripts as they are installed, and ours with every kind of field."""
    monkeypatch.setattr(environment_probe, "LOWEST_PRIORITY", 0)  # beside other tests it would hardly get a turn
    own = tmp_path / "own.py"
    own.write_text(SCRIPT)
    (packages,) = (training_python.parent.parent / "lib").glob("python3*/site-packages")
    scripts = [own, *(packages / f"trl/scripts/{name}.py" for name in ("sft", "dpo", "grpo", "reward"))]

    read = {str(file): read_parameters(file.read_text()) for file in scripts}
    paths = dict.fromkeys(one.path for script in read.values() for one in script.parser_classes)
    classes, trouble, _ = describe(training_python.parent.parent, list(paths), {"PATH": "/usr/bin:/bin"})
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [training_python, "-c", DUMP, *read], env=environment, capture_output=True, text=True, check=True
    )

    assert trouble == {}
    for file, expected in json.loads(run.stdout.rpartition("@")[2]).items():
        script = with_parser_classes(read[file], described(*classes))
        assert not script.partly_read, script.unread
        assert _declared(script, expected) == expected, file
        assert {"model_name_or_path"} <= expected.keys()


def _declared(script: ScriptParameters, expected: dict[str, Any]) -> dict[str, Any]:
    """Return what was read, in the form of the real parsers; defaults that are texts only are theirs."""
    found = {}
    unknown: dict[str, Any] = {"names": [], "default": None, "several": None}
    for parameter in script.parameters:
        real = {name: one for name, one in expected.items() if parameter.name in one["names"]}
        name, one = next(iter(real.items()), (parameter.name, unknown))
        unlike = parameter.default_text is not None or name in LISTS_OF_OTHERS
        found[name] = {
            "names": [text for text in one["names"] if text in (parameter.name, *parameter.aliases)],
            "default": one["default"] if unlike else parameter.default,
            "required": parameter.required,
            "several": one["several"] if unlike else parameter.form is ArgumentForm.WORDS,
        }
    return found
