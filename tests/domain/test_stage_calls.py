"""How a stage is called: what is wrong with a method's call, and what values make of it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind
from app.domain.errors import Violation
from app.domain.lifecycle import violations
from app.domain.placeholders import MalformedTemplate, Placeholder, PlaceholderKind, parse
from app.domain.rendering import ArgumentForm, ArgumentNotText, ArgumentTooLong
from app.domain.stage_calls import CallValues, ExpandedCall, StageCall, expand, platform_placeholders, stage_call
from app.domain.texts import Language, catalogue

PLATFORM = {"model_path": "/models/x", "dataset_path": "/data/rows.jsonl", "seq": 1, "adapter_path": "", "config": "/c"}


def called(
    parameters: dict[str, Any] | None = None, *, forms: dict[str, ArgumentForm] | None = None, **members: Any
) -> ExpandedCall:
    call = stage_call(definition(**members), JobKind.TRAINING)
    return expand(call, CallValues(PLATFORM, parameters or {}, forms or {}))


def definition(**members: Any) -> MethodDefinition:
    stage = {"conda_env": "trl", **members}
    if "module" not in stage:
        stage = {"file": "train.py", **stage}
    return MethodDefinition.model_validate(
        {"name": "m", "training_type": "chat", "lifecycle": ["customized"], "stages": {"training": stage}}
    )


def found(**members: Any) -> list[tuple[str, str]]:
    return [(one.pointer, one.code) for one in violations(definition(**members), deploy_targets=())]


class TestParse:
    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("", ()),
            ("--train", ("--train",)),
            ("--m={model_path}", ("--m=", Placeholder(PlaceholderKind.PLATFORM, "model_path"))),
            ("{param:a-b.c}", (Placeholder(PlaceholderKind.PARAMETER, "a-b.c"),)),
            ("{flag:packing}", (Placeholder(PlaceholderKind.FLAG, "packing"),)),
            ("{parameters}", (Placeholder(PlaceholderKind.OTHERS),)),
            ('{{"a": {param:a}}}', ('{"a": ', Placeholder(PlaceholderKind.PARAMETER, "a"), "}")),
        ],
    )
    def test_splits_a_text_into_words_and_placeholders(self, text: str, parts: tuple[object, ...]) -> None:
        assert parse(text) == parts

    @pytest.mark.parametrize("text", ["{", "}", "{}", "{a b}", "{param:}", "{other:x}", "{{a}", "{a{b}}", "{param: x}"])
    def test_refuses_a_brace_that_is_no_placeholders(self, text: str) -> None:
        with pytest.raises(MalformedTemplate):
            parse(text)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "parameters", "argv"),
        [
            ([], {}, []),
            (["sft", "--model={model_path}", "{seq}"], {}, ["sft", "--model=/models/x", "1"]),
            (["--lr={param:lr}", ["--e", "{param:e}"]], {}, []),
            (["--lr={param:lr}", ["--e", "{param:e}"]], {"lr": 1e-4, "e": 2}, ["--lr=0.0001", "--e", "2"]),
            (["--a={adapter_path}", "--b"], {}, ["--b"]),  # there is no adapter
            (["{flag:packing}"], {"packing": True}, ["--packing"]),
            (["{flag:packing}"], {"packing": False}, []),
            (["--packing={param:packing}"], {"packing": False}, ["--packing=False"]),
            ([["--mods", "{param:mods}"]], {"mods": ["q", "v"]}, ["--mods", "q", "v"]),
            (["--mods={param:mods}"], {"mods": ["q", "v"]}, ['--mods=["q", "v"]']),
            (["{parameters}"], {"lr": 1e-4, "mods": ["q"], "x": True}, ["--lr=0.0001", "--mods", "q", "--x=True"]),
            (["{param:a}", "{parameters}"], {"b": 1, "a": ""}, ["", "--b=1"]),
            (["--{{x}}"], {}, ["--{x}"]),
        ],
    )
    def test_are_exactly_those_of_the_method(
        self, arguments: list[Any], parameters: dict[str, Any], argv: list[str]
    ) -> None:
        expanded = called(parameters, arguments=arguments)

        assert expanded.arguments == argv
        assert not expanded.unplaced

    def test_are_written_as_the_script_declares_them(self) -> None:
        forms = {"x": ArgumentForm.FLAG, "mods": ArgumentForm.LIST, "v": ArgumentForm.COUNTED}

        expanded = called({"x": True, "mods": ["q"], "v": 2}, forms=forms, arguments=[["{param:mods}"], "{parameters}"])

        assert expanded.arguments == ['["q"]', "--x", "--v", "--v"]

    def test_a_parameter_without_a_place_is_named(self) -> None:
        assert called({"a": 1, "b": 2, "none": None}, arguments=["{param:a}"]).unplaced == ("b",)

    def test_a_parameter_whose_part_lacks_another_value_is_named(self) -> None:
        expanded = called({"a": 1}, arguments=[["--range", "{param:a}", "{param:b}"]])

        assert (expanded.arguments, expanded.unplaced, expanded.left_out) == (
            [],
            ("a",),
            ["--range {param:a} {param:b}"],
        )

    def test_are_the_platforms_where_the_method_says_nothing(self) -> None:
        expanded = called({"a": 1}, env={"X": "1"})

        assert (expanded.arguments, expanded.unplaced) == (None, ())

    def test_what_no_program_can_be_given_is_refused(self) -> None:
        with pytest.raises(ArgumentNotText):
            called({"a": "\0"}, arguments=["{param:a}"])
        with pytest.raises(ArgumentTooLong):
            called({"a": "x" * 200_000}, env={"A": "{param:a}"})


class TestConfigAndVariables:
    def test_values_keep_their_types(self) -> None:
        content = {
            "model": "{model_path}",
            "seq": "{seq}",
            "name": "run-{seq}",
            "fixed": [1, None, {"deep": True}],
            "lr": "{param:lr}",
            "targets": "{param:targets}",
            "nested": {"gone": "{param:gone}", "list": ["{param:gone}", "a"]},
        }

        expanded = called({"lr": 1e-4, "targets": ["q"]}, config={"name": "c.yaml", "content": content})

        assert expanded.config == {
            "model": "/models/x",
            "seq": 1,
            "name": "run-1",
            "fixed": [1, None, {"deep": True}],
            "lr": 1e-4,
            "targets": ["q"],
            "nested": {"list": ["a"]},
        }

    def test_other_parameters_are_an_object_or_are_merged(self) -> None:
        apart = called({"a": 1, "b": [2]}, arguments=[], config={"name": "c.json", "content": {"all": "{parameters}"}})
        merged = {"lr": "{param:a}", "<<": "{parameters}"}
        together = called({"a": 1, "b": [2]}, arguments=[], config={"name": "c.json", "content": merged})

        assert (apart.config, apart.unplaced) == ({"all": {"a": 1, "b": [2]}}, ())
        assert (together.config, together.unplaced) == ({"b": [2], "lr": 1}, ())

    def test_a_merged_parameter_that_the_method_sets_itself_is_named(self) -> None:
        content = {"lr": 1, "<<": "{parameters}"}

        expanded = called({"lr": 2}, arguments=["{config}"], config={"name": "c.json", "content": content})

        assert (expanded.config, expanded.unplaced) == ({"lr": 1}, ("lr",))

    def test_a_variable_without_value_is_left_out(self) -> None:
        expanded = called({"n": 2, "off": False}, env={"N": "{param:n}", "GONE": "{param:m}", "OFF": "x{param:off}"})

        assert expanded.env == {"N": "2", "OFF": "xFalse"}

    def test_options_of_the_method_itself_are_known(self) -> None:
        call = stage_call(
            definition(
                arguments=["--learning-rate=1", ["--out", "{seq}"], "--{param:x}=1", "--"],
                config={"name": "c.json", "content": {"a": {"inner": 1, "<<": "{parameters}"}, "b": 1}},
            ),
            JobKind.TRAINING,
        )

        assert call.options == {"learning_rate", "out", "inner"}


TEXTS = st.text("ab{}:= /", max_size=6)
NAMES = st.sampled_from(["a", "b", "c", "long_name", "x-y"])
PARTS = st.one_of(
    st.builds("--o={{param:{}}}".format, NAMES),
    st.builds("{{param:{}}}".format, NAMES),
    st.builds("{{param:{}}}{{param:{}}}".format, NAMES, NAMES),
    st.builds("{}{{adapter_path}}".format, st.sampled_from(["", "x"])),
    TEXTS.map(lambda text: text.replace("{", "{{").replace("}", "}}")),
)
ITEMS = st.one_of(PARTS, st.lists(PARTS, max_size=3), st.builds("{{flag:{}}}".format, NAMES), st.just("{parameters}"))
VALUES = st.dictionaries(NAMES, st.sampled_from([1, None]))


class TestNothingIsLost:
    @settings(max_examples=300, deadline=None)
    @given(arguments=st.lists(ITEMS, max_size=5), parameters=VALUES, env=st.dictionaries(st.just("V"), PARTS))
    def test_a_parameter_reaches_the_script_or_is_named(
        self, arguments: list[Any], parameters: dict[str, Any], env: dict[str, str]
    ) -> None:
        marked = {name: None if value is None else f"<{name}>" for name, value in parameters.items()}

        expanded = called(marked, arguments=arguments, env=env)

        passed = "\n".join([*(expanded.arguments or ()), *expanded.env.values()])
        for name in (name for name, value in marked.items() if value is not None):
            reached = f"<{name}>" in passed or f"--{name}" in passed
            assert reached is (name not in expanded.unplaced), (name, expanded)


class TestViolations:
    @pytest.mark.parametrize(
        ("members", "expected"),
        [
            ({"module": "mlx_lm.lora"}, []),
            ({"module": " "}, [("/stages/training/file", "missing_file")]),
            ({"module": "a-b"}, [("/stages/training/module", "invalid_module")]),
            ({"module": "a.b", "file": "x.py"}, [("/stages/training/module", "module_beside_file")]),
            ({"arguments": ["{model_path}", ["{dataset_dir}", "{script_root}/{run_dir}"]]}, []),
            ({"arguments": ["{x}", ["a", "{"]]}, [("/0", "unknown_placeholder"), ("/1/1", "malformed_placeholder")]),
            ({"arguments": ["{save_path}"]}, [("/0", "unknown_placeholder")]),  # of another stage
            ({"arguments": ["{config}"]}, [("/0", "placeholder_without_config")]),
            ({"arguments": [["{parameters}"]]}, [("/0/0", "placeholder_not_alone")]),
            ({"arguments": ["x{flag:a}"]}, [("/0", "placeholder_not_alone")]),
            ({"arguments": ["{parameters}", "{parameters}"]}, [("", "placeholder_repeated")]),
            ({"arguments": ["a\0"]}, [("/0", "text_unusable")]),
        ],
    )
    def test_of_arguments_and_module(self, members: dict[str, Any], expected: list[tuple[str, str]]) -> None:
        at = "/stages/training/arguments"

        assert found(**members) == [(p if p.startswith("/stages") else at + p, code) for p, code in expected]

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"name": "job.yaml", "content": {"a": "{model_path}", "b": ["{param:x}"], "<<": "{parameters}"}}, []),
            ({}, [("/name", "missing_config_member"), ("/content", "missing_config_member")]),
            ({"name": "../a.yaml", "content": {}}, [("/name", "invalid_config_name")]),
            ({"name": "a.ini", "content": {}}, [("/name", "invalid_config_name")]),
            ({"name": "params.json", "content": {}}, [("/name", "config_name_taken")]),
            ({"name": "a.toml", "content": {"a": [{"b/c": None}]}}, [("/content/a/0/b~1c", "config_null_in_toml")]),
            ({"name": "a.toml", "content": [{"a": 1}]}, [("/content", "config_list_in_toml")]),
            ({"name": "a.json", "content": [{"a": "{no}"}]}, [("/content/0/a", "unknown_placeholder")]),
            ({"name": "a.json", "content": {"a": "{config}"}}, [("/content/a", "placeholder_without_config")]),
            ({"name": "a.json", "content": {"a": "{flag:x}"}}, [("/content/a", "placeholder_not_alone")]),
            ({"name": "a.json", "content": {}, "more": 1}, [("/more", "unknown_field")]),
        ],
    )
    def test_of_the_configuration(self, config: dict[str, Any], expected: list[tuple[str, str]]) -> None:
        problems = found(config=config, arguments=["{config}"])

        assert sorted(problems) == sorted((f"/stages/training/config{p}", code) for p, code in expected)

    def test_of_a_configuration_that_nothing_names(self) -> None:
        config = {"name": "a.json", "content": {}}

        assert found(config=config) == [("/stages/training/config", "config_not_named")]
        assert found(config=config, working_directory="run") == []
        assert found(config=config, env={"CONFIG": "{config}"}) == []

    @pytest.mark.parametrize(
        ("name", "code"),
        [
            ("FORCE_TORCHRUN", None),
            ("1X", "invalid_variable_name"),
            ("A=B", "invalid_variable_name"),
            *((name, "variable_of_platform") for name in ("DEEPE_HOME", "PYTHONPATH", "LD_PRELOAD", "PATH", "RANK")),
            ("CUDA_VISIBLE_DEVICES", "variable_of_platform"),
        ],
    )
    def test_of_variables(self, name: str, code: str | None) -> None:
        assert found(env={name: "1"}) == ([] if code is None else [(f"/stages/training/env/{name}", code)])

    def test_of_the_working_directory(self) -> None:
        at = "/stages/training/working_directory"

        assert found(working_directory="method") == []
        assert found(working_directory="home") == [(at, "unknown_working_directory")]
        assert found(working_directory="method", module="a") == [(at, "working_directory_without_file")]

    def test_of_a_deployment(self) -> None:
        wanted = {"name": "m", "training_type": "chat", "lifecycle": ["complete", "online"]}
        stages = {"saving": {"module": "a", "conda_env": "b", "arguments": ["{model_path}", "{save_path}"]}}

        def judged(**deployment: Any) -> list[Violation]:
            document = {**wanted, "stages": stages, "deployment": deployment}
            return violations(MethodDefinition.model_validate(document), deploy_targets=("ollama",))

        assert judged(target="custom", module="a.b", conda_env="base", arguments=["{serverUrl}"]) == []
        own = judged(target="ollama", env={"A": "1"}, arguments=[])
        assert [one.pointer for one in own] == ["/deployment/arguments", "/deployment/env"]
        assert {one.code for one in own} == {"deployment_file_not_custom"}
        (wrong,) = judged(target="custom", file="d.py", conda_env="base", arguments=["{model_path}"])
        assert (wrong.pointer, wrong.code) == ("/deployment/arguments/0", "unknown_placeholder")


class TestWire:
    def test_a_method_that_says_nothing_of_it_is_what_it_was(self) -> None:
        canonical = definition(launcher={"kind": "torchrun"}).canonical()

        assert list(canonical["stages"]["training"]) == ["file", "conda_env", "launcher"]
        assert stage_call(definition(), JobKind.TRAINING) == StageCall()

    def test_nulls_of_a_configuration_are_kept(self) -> None:
        config = {"name": "a.yaml", "content": {"a": None, "b": [{"c": None}]}}

        assert definition(config=config).canonical()["stages"]["training"]["config"] == config

    def test_every_text_of_calls_has_its_values(self) -> None:
        where = "{param:lr}"
        for language in Language:
            text = catalogue()["parameter_without_place"][language]
            assert where in text.format(name="lr", places="-")

    def test_placeholders_of_a_producing_saving_are_those_of_a_training_too(self) -> None:
        alone = platform_placeholders(JobKind.SAVING, "chat", producing=False)
        producing = platform_placeholders(JobKind.SAVING, "chat", producing=True)

        assert "dataset_dir" not in alone
        assert {"save_path", "dataset_path", "dataset_dir", "script_root", "run_dir"} <= set(producing)
