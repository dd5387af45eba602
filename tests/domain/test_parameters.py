from typing import Any

import jsonschema
import pytest

from app.domain.enums import JobKind
from app.domain.errors import Violation
from app.domain.kinds import STAGES, Stage
from app.domain.known_parameters import KNOWN
from app.domain.parameters import ParameterCheck, check_parameters, json_schema, withheld_arguments
from app.domain.rendering import filled_arguments
from app.domain.script_parameters import ScriptParameters
from app.domain.texts import Language
from tests.argspec.reading import read_parameters

DECLARATIONS = """
    p.add_argument("--train_id", required=True)
    p.add_argument("--lora_rank", type=int, required=True)
    p.add_argument("--learning_rate", type=float)
    p.add_argument("--load_in_4bit", default="true")
    p.add_argument("--warmup_steps", type=int)
    p.add_argument("--warmup_ratio", type=float, default=None)
    p.add_argument("--max_steps", type=int, default=None)
    p.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    p.add_argument("--project", required=True)
    p.add_argument("--tags", nargs="*", type=str)
    p.add_argument("--verbose", action="count", default=0)
    p.add_argument("--config", type=json.loads)
    p.add_argument("--strict", type=bool, default=True)
"""


def script(declarations: str = DECLARATIONS, *, parse: str = "parse_args") -> ScriptParameters:
    return read_parameters(
        "import argparse, json\nif True:\n    p = argparse.ArgumentParser()\n" + declarations + f"\n    p.{parse}()\n"
    )


def check(declarations: str = DECLARATIONS, *, parse: str = "parse_args", **values: Any) -> ParameterCheck:
    return check_parameters(values, script(declarations, parse=parse))


def refusals(result: ParameterCheck) -> list[tuple[str, str]]:
    return [(v.pointer, v.code) for v in result.violations]


def warnings(result: ParameterCheck) -> list[tuple[str, str]]:
    """Return the warnings without the one that stands beside every value of the platform's own."""
    return [(v.pointer, v.code) for v in result.warnings if v.code != "parameters_filled_in"]


class TestCheck:
    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"lora_rank": 16, "learning_rate": 1},
            {"learning_rate": 1e-5, "load_in_4bit": False},
            {"tags": ["a", "b"], "tags_": None},
            {"config": {"a": [1, None]}},
            {"config": "text"},
            {"verbose": 3},
            {"optimizer": "sgd"},
            {"lora_rank": None},
        ],
    )
    def test_accepts(self, values: dict[str, Any]) -> None:
        assert refusals(check(project="p", **values)) == []

    @pytest.mark.parametrize(
        ("name", "value", "code"),
        [
            ("lora_rank", "8", "parameter_wrong_type"),
            ("lora_rank", 8.0, "parameter_wrong_type"),
            ("lora_rank", True, "parameter_wrong_type"),
            ("lora_rank", [8], "parameter_wrong_type"),
            ("lora_rank", 2**63, "parameter_value_unusable"),
            ("learning_rate", "1e-5", "parameter_wrong_type"),
            ("learning_rate", False, "parameter_wrong_type"),
            ("learning_rate", float("nan"), "parameter_value_unusable"),
            ("learning_rate", float("inf"), "parameter_value_unusable"),
            ("load_in_4bit", "true", "parameter_wrong_type"),
            ("load_in_4bit", 1, "parameter_wrong_type"),
            ("optimizer", "adam", "parameter_not_a_choice"),
            ("optimizer", 1, "parameter_wrong_type"),
            ("tags", "a", "parameter_wrong_type"),
            ("tags", ["a", 1], "parameter_wrong_type"),
            ("tags", ["--x"], "parameter_item_like_option"),
            ("tags", ["a\0"], "parameter_value_unusable"),
            ("verbose", -1, "parameter_wrong_type"),
            ("verbose", 10**9, "parameter_wrong_type"),
            ("config", {"a": [float("nan")]}, "parameter_value_unusable"),
            ("config", "\ud800", "parameter_value_unusable"),
            ("train_id", "mine", "parameter_reserved"),
            ("output_dir", "/etc", "parameter_reserved"),
            ("lora_rnk", 8, "unknown_parameter"),
            ("--x", 8, "parameter_name_invalid"),
            ("a=b", 8, "parameter_name_invalid"),
            ("", 8, "parameter_name_invalid"),
        ],
    )
    def test_refuses(self, name: str, value: Any, code: str) -> None:
        result = check_parameters({"project": "p", name: value}, script())

        assert [v.code for v in result.violations] == [code]
        assert result.violations[0].pointer.startswith(f"/parameters/{name}")
        for language in Language:
            assert "{" not in result.violations[0].detail(language).replace(str(value), "")

    def test_number_too_long_to_print_is_refused(self) -> None:
        assert refusals(check(project="p", lora_rank=10**5000, optimizer=10**5000)) == [
            ("/parameters/lora_rank", "parameter_value_unusable"),
            ("/parameters/optimizer", "parameter_wrong_type"),
        ]

    def test_finds_everything_at_once_and_names_items(self) -> None:
        result = check(lora_rank="8", tags=["a", "b", 3], nope=1)

        assert refusals(result) == [
            ("/parameters/lora_rank", "parameter_wrong_type"),
            ("/parameters/tags/2", "parameter_wrong_type"),
            ("/parameters/nope", "unknown_parameter"),
            ("/parameters/project", "missing_parameter"),
        ]

    def test_out_of_the_typical_range_only_warns(self) -> None:
        result = check(project="p", lora_rank=32, warmup_steps=100_000, max_steps=10)

        assert refusals(result) == []
        assert warnings(result) == [
            ("/parameters/lora_rank", "parameter_unusual"),
            ("/parameters/warmup_steps", "parameter_unusual"),
            ("/parameters/max_steps", "parameter_unusual"),
        ]

    def test_warns_of_what_has_no_effect(self) -> None:
        result = check(project="p", warmup_ratio=0.1, warmup_steps=5)

        assert warnings(result) == [("/parameters/warmup_ratio", "parameter_without_effect")]

    def test_warns_of_false_that_the_script_reads_as_true(self) -> None:
        values = {"project": "p", "strict": False}

        assert warnings(check_parameters(values, script())) == [("/parameters/strict", "parameter_false_reads_as_true")]
        assert warnings(check_parameters(values, script(), false_as="")) == []

    def test_exclusive_groups(self) -> None:
        declarations = """
    g = p.add_mutually_exclusive_group(required=True)
    g.add_argument("--a")
    g.add_argument("--b")
"""

        assert refusals(check(declarations, a="1")) == []
        assert refusals(check(declarations, a="1", b="2")) == [("/parameters/b", "parameters_exclude_each_other")]
        assert refusals(check(declarations)) == [("/parameters", "missing_one_of_parameters")]

    def test_alias_is_as_good_as_the_name(self) -> None:
        declarations = '    p.add_argument("--name", "--alias", type=int, required=True)'

        assert refusals(check(declarations, alias=1)) == []
        assert refusals(check(declarations, alias="1")) == [("/parameters/alias", "parameter_wrong_type")]
        assert check(declarations, alias=1).effective == {"name": 1}
        assert refusals(check(declarations, name=1, alias=2)) == [
            ("/parameters/alias", "parameters_exclude_each_other")
        ]


class TestUnknownParameters:
    def test_script_that_was_read_in_part_may_take_anything(self) -> None:
        declarations = "    for n in open('names'): p.add_argument('--' + n)"

        assert refusals(check(declarations, a=1, anything={"x": 1})) == []
        assert refusals(check(declarations, seq=1)) == [("/parameters/seq", "parameter_reserved")]
        assert refusals(check(declarations, lora_rank="8")) == [("/parameters/lora_rank", "parameter_wrong_type")]

    def test_script_that_ignores_unknown_arguments_may_be_given_what_the_platform_knows(self) -> None:
        declarations = '    p.add_argument("--x")'

        lenient = check(declarations, parse="parse_known_args", batch_size=2, other=1)
        strict = check(declarations, batch_size=2)

        assert refusals(lenient) == []
        assert warnings(lenient) == [("/parameters/other", "parameter_undeclared")]
        assert lenient.effective == {"batch_size": 2, "other": 1}
        assert refusals(strict) == [("/parameters/batch_size", "unknown_parameter")]

    def test_of_a_shipped_script_all_parameters_are_known(self) -> None:
        lenient = script('    p.add_argument("--x")', parse="parse_known_args")

        found = check_parameters({"batch_size": 2, "other": 1}, lenient, shipped=True)

        assert refusals(found) == [("/parameters/other", "unknown_parameter")]

    def test_a_name_that_argparse_would_take_for_another_is_never_passed(self) -> None:
        declarations = '    p.add_argument("--rate_of_noise", type=float)\n    p.add_argument("--rate_of_rows")'

        assert refusals(check(declarations, parse="parse_known_args", rate=1.0)) == [
            ("/parameters/rate", "parameter_abbreviates")
        ]
        exact = read_parameters(
            "import argparse\nif True:\n    p = argparse.ArgumentParser(allow_abbrev=False)\n"
            f"{declarations}\n    p.parse_known_args()\n"
        )
        assert refusals(check_parameters({"rate": 1}, exact)) == []


class TestEffective:
    def test_fills_in_what_scripts_need_and_nobody_gave(self) -> None:
        result = check(project="p", learning_rate=1e-4)

        assert list(result.effective.items()) == [
            ("lora_rank", 8),
            ("learning_rate", 1e-4),
            ("warmup_steps", 2),
            ("project", "p"),
        ]
        (told,) = (v for v in result.warnings if v.code == "parameters_filled_in")
        assert told.params == {"values": "lora_rank = 8, warmup_steps = 2"}

    def test_leaves_alone_what_the_script_has_a_default_for(self) -> None:
        effective = check('    p.add_argument("--lora_rank", type=int, default=None)').effective

        assert effective == {}
        assert check('    p.add_argument("--lora_rank", type=int, default=None)').warnings == ()

    def test_warmup_ratio_is_not_defeated_by_a_value_nobody_gave(self) -> None:
        assert check(project="p", warmup_ratio=0.1).effective["warmup_steps"] == 0

    def test_script_that_was_not_read_gets_only_what_was_given(self) -> None:
        check = check_parameters({"zeta": 1}, read_parameters("print(1)"))

        assert (check.effective, check.warnings) == ({"zeta": 1}, ())

    def test_script_that_was_read_in_part_gets_what_the_part_needs(self) -> None:
        declarations = "    p.add_argument('--lora_rank', type=int)\n    add_more(p)"

        assert check(declarations).effective == {"lora_rank": 8}

    def test_default_that_the_script_does_not_take_is_not_filled_in(self) -> None:
        declarations = '    p.add_argument("--lora_rank", type=int, choices=[16, 32], required=True)'

        assert refusals(check(declarations)) == [("/parameters/lora_rank", "missing_parameter")]

    def test_other_stages_have_no_known_parameters(self) -> None:
        saving = script('    p.add_argument("--lora_rank", type=int)\n    p.add_argument("--save_path", required=True)')

        assert check_parameters({}, saving, stage=JobKind.SAVING).effective == {}
        assert check_parameters({}, saving, stage=JobKind.SAVING).violations == ()
        assert check_parameters({}, saving, stage=JobKind.SAVING, producing=True).effective == {"lora_rank": 8}


class TestSchema:
    @pytest.mark.parametrize("stage", STAGES)
    def test_is_a_valid_schema_for_every_stage(self, stage: Stage) -> None:
        schema = json_schema(script(), stage=stage)

        jsonschema.Draft202012Validator.check_schema(schema)

    def test_joins_script_and_platform(self) -> None:
        properties = json_schema(script(), language=Language.DE)["properties"]

        assert properties["lora_rank"] == {
            "type": "integer",
            "title": "LoRA-Rang",
            "default": 8,
            "description": "Größe des Adapters: Ein höherer Rang lernt mehr und braucht mehr Speicher.",
            "x-line": 6,
            "x-typical-minimum": 4,
            "x-typical-maximum": 16,
            "x-typical-values": [4, 8, 16],
        }
        assert properties["load_in_4bit"]["type"] == "boolean"
        assert properties["load_in_4bit"]["default"] is True
        assert properties["optimizer"]["enum"] == ["adamw", "sgd"]
        assert properties["tags"]["items"] == {"type": "string"}

    def test_marks_what_the_platform_fills_in(self) -> None:
        schema = json_schema(script())

        assert schema["properties"]["train_id"]["x-platform"] is True
        assert "x-platform" not in schema["properties"]["lora_rank"]
        assert schema["required"] == ["project"]
        assert schema["additionalProperties"] is False

    def test_of_a_script_read_in_part_allows_more_and_shows_the_contract(self) -> None:
        schema = json_schema(read_parameters(""))

        assert schema["additionalProperties"] is True
        assert list(schema["properties"]) == [k.name for k in KNOWN.values() if k.required]
        assert not any("default" in one for one in schema["properties"].values())

    @pytest.mark.parametrize(
        "values",
        [
            {"project": "p"},
            {},
            {"project": "p", "lora_rank": "8"},
            {"project": "p", "lora_rank": True},
            {"project": "p", "optimizer": "adam"},
            {"project": "p", "tags": ["a", 1]},
            {"project": "p", "learning_rate": 1},
            {"project": "p", "nope": 1},
            {"project": "p", "verbose": -1},
        ],
    )
    def test_says_the_same_as_the_check(self, values: dict[str, Any]) -> None:
        valid = jsonschema.Draft202012Validator(json_schema(script())).is_valid(values)

        assert valid is not bool(check_parameters(values, script()).violations)

    def test_exclusive_groups_are_part_of_it(self) -> None:
        grouped = script("""
    g = p.add_mutually_exclusive_group(required=True)
    g.add_argument("--a")
    g.add_argument("--b")
""")
        validator = jsonschema.Draft202012Validator(json_schema(grouped))

        assert [validator.is_valid(values) for values in ({}, {"a": "1"}, {"a": "1", "b": "1"})] == [False, True, False]


class TestWithheldArguments:
    def test_strict_script_gets_only_what_it_declares(self) -> None:
        strict = script('    p.add_argument("--train_id")\n    p.add_argument("--seq_length")')

        (note,) = withheld_arguments(strict, ("train_id", "seq", "model_path"), "/method")

        assert note == Violation("/method", "arguments_undeclared", {"names": "seq, model_path"})

    @pytest.mark.parametrize("options", [["seq_length"], ["seq_length", "sequences"]])
    def test_script_that_abbreviates_would_take_an_argument_for_another(self, options: list[str]) -> None:
        declarations = "\n".join(f"    p.add_argument('--{name}')" for name in options)
        lenient = script(declarations, parse="parse_known_args")

        (note,) = withheld_arguments(lenient, filled_arguments(JobKind.TRAINING))

        assert (note.code, note.params) == ("argument_withheld", {"name": "seq", "option": ", ".join(options)})

    @pytest.mark.parametrize(
        ("declarations", "parse"),
        [
            ('    p.add_argument("--x")', "parse_known_args"),
            ("    for n in open('names'): p.add_argument(n)", "parse_args"),
        ],
    )
    def test_script_that_ignores_the_rest_or_may_declare_it_gets_all(self, declarations: str, parse: str) -> None:
        assert withheld_arguments(script(declarations, parse=parse), filled_arguments(JobKind.TRAINING)) == []

    def test_what_a_library_adds_to_a_strict_parser_is_none_of_the_platforms(self) -> None:
        strict = script("    import deepspeed\n    deepspeed.add_config_arguments(p)")

        assert strict.partly_read
        assert [note.code for note in withheld_arguments(strict, ("seq",))] == ["arguments_undeclared"]


class TestKnownParameters:
    @pytest.mark.parametrize("known", KNOWN.values(), ids=lambda known: known.name)
    def test_default_is_typical_save_for_the_demo_steps(self, known: Any) -> None:
        if isinstance(known.default, (int, float)) and not isinstance(known.default, bool):
            assert known.is_typical(known.default) is (known.name != "max_steps")
        assert known.required is (
            known.default is not None and known.name not in ("max_steps", "epochs", "warmup_ratio")
        )
        for language in Language:
            assert known.label(language) != f"label_parameter_{known.name}"
            assert known.help(language) != f"help_parameter_{known.name}"
