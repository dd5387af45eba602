import argparse
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.enums import JobKind
from app.domain.kinds import Stage
from app.domain.rendering import (
    MAX_ARGUMENT_BYTES,
    ArgumentForm,
    ArgumentNotText,
    ArgumentTooLong,
    deployment_arguments,
    filled_arguments,
    inference_arguments,
    picture_arguments,
    render_equals,
    render_pairs,
    saving_arguments,
    training_arguments,
)
from app.domain.training_types import InferenceForm

characters = st.characters(codec="utf-8", exclude_characters="\0", max_codepoint=0x2FFF)
texts = st.text(characters, max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)

TRAINING: dict[str, Any] = {
    "train_id": "t-1",
    "seq": 1,
    "model_name": "m",
    "model_path": "../models/base",
    "dataset_path": "../datasets/d",
    "output_dir": "../runs/t-1/output",
    "train_file_name": "sft-demo.py",
    "train_env": "trl",
}


class TestRenderEquals:
    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (None, []),
            (True, ["--k=True"]),
            (False, ["--k=False"]),
            (8, ["--k=8"]),
            (10.0, ["--k=10.0"]),
            (2e-5, ["--k=2e-05"]),
            (-1, ["--k=-1"]),
            ("", ["--k="]),
            ("two\nlines = 'x' $HOME", ["--k=two\nlines = 'x' $HOME"]),
            ([1, "ä", None, True], ['--k=[1, "\\u00e4", null, true]']),
            ({"a": {"b": 2.5}}, ['--k={"a": {"b": 2.5}}']),
            ([], ["--k=[]"]),
        ],
    )
    def test_follows_the_contract(self, value: Any, words: list[str]) -> None:
        assert render_equals({"k": value}) == words

    @pytest.mark.parametrize("false_as", ["False", "false", ""])
    def test_false_is_what_the_method_says(self, false_as: str) -> None:
        assert render_equals({"a": False, "b": True}, false_as=false_as) == [f"--a={false_as}", "--b=True"]

    def test_keeps_the_order(self) -> None:
        assert render_equals({"b": 1, "a": 2, "c": 3}) == ["--b=1", "--a=2", "--c=3"]

    @given(st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), json_values, max_size=5))
    def test_scripts_get_the_values_back(self, arguments: dict[str, Any]) -> None:
        argv = render_equals(arguments)

        read = dict(word.removeprefix("--").split("=", 1) for word in argv)
        assert list(read) == [name for name, value in arguments.items() if value is not None]
        for name, text in read.items():
            assert _value_of(text, like=arguments[name]) == arguments[name]

    def test_a_real_script_reads_it_without_a_shell(self) -> None:
        arguments = {"s": "a b\n'\"$(x)` ü", "o": {"k": [1, "ß"]}, "n": None, "f": 2e-05}
        script = "import argparse, json; p = argparse.ArgumentParser()\n" + "\n".join(
            f"p.add_argument('--{name}')" for name in arguments
        )

        output = subprocess.run(
            [sys.executable, "-c", script + "\nprint(json.dumps(vars(p.parse_args())))", *render_equals(arguments)],
            capture_output=True,
            check=True,
        ).stdout

        assert json.loads(output) == {"s": arguments["s"], "o": '{"k": [1, "\\u00df"]}', "n": None, "f": "2e-05"}


def _value_of(text: str, *, like: Any) -> Any:
    match like:
        case bool():
            return text == "True"
        case int() | float():
            return type(like)(text)
        case str():
            return text
        case _:
            return json.loads(text)


class TestRenderPairs:
    def test_name_and_value_are_two_words(self) -> None:
        assert render_pairs({"a": "x y", "b": None, "c": True, "d": ""}) == ["--a", "x y", "--c", "True", "--d", ""]

    def test_value_that_looks_like_an_option_stays_with_its_name(self) -> None:
        argv = render_pairs({"template": "--- {{x}}"})

        parser = argparse.ArgumentParser()
        parser.add_argument("--template")
        assert parser.parse_args(argv).template == "--- {{x}}"


class TestForms:
    def test_each_form_is_read_back_by_argparse(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--on", action="store_true")
        parser.add_argument("--off", action="store_true")
        parser.add_argument("--yes", action=argparse.BooleanOptionalAction)
        parser.add_argument("--no", action=argparse.BooleanOptionalAction)
        parser.add_argument("--many", action="append", type=int)
        parser.add_argument("--words", nargs="+", type=float)
        parser.add_argument("--none", nargs="*")
        parser.add_argument("--loud", action="count")
        forms = {
            "on": ArgumentForm.FLAG,
            "off": ArgumentForm.FLAG,
            "yes": ArgumentForm.NEGATABLE,
            "no": ArgumentForm.NEGATABLE,
            "many": ArgumentForm.REPEATED,
            "words": ArgumentForm.WORDS,
            "none": ArgumentForm.WORDS,
            "loud": ArgumentForm.COUNTED,
        }
        values = {
            "on": True,
            "off": False,
            "yes": True,
            "no": False,
            "many": [1, -2],
            "words": [0.5, -1.0],
            "none": [],
            "loud": 2,
        }

        for render in (render_equals, render_pairs):
            assert vars(parser.parse_args(render(values, forms=forms))) == values


class TestLimits:
    def test_longest_argument_can_be_started_and_one_byte_more_is_refused(self) -> None:
        value = "x" * (MAX_ARGUMENT_BYTES - len("--k="))

        argv = render_equals({"k": value})

        subprocess.run(["true", *argv], check=True)
        with pytest.raises(ArgumentTooLong) as raised:
            render_equals({"k": value + "x"})
        assert raised.value.params == {"name": "k", "size": MAX_ARGUMENT_BYTES + 1, "limit": MAX_ARGUMENT_BYTES}

    def test_length_is_counted_in_bytes(self) -> None:
        with pytest.raises(ArgumentTooLong):
            render_equals({"k": "语" * 50_000})

    def test_long_history_is_refused(self) -> None:
        history = [{"role": "user", "content": "x" * 200_000}]

        with pytest.raises(ArgumentTooLong):
            render_equals(_inference(history=history))

    def test_all_arguments_together_have_a_limit(self) -> None:
        with pytest.raises(ArgumentTooLong):
            render_equals({f"k{number}": "x" * 100_000 for number in range(20)})

    @pytest.mark.parametrize("value", ["a\0b", "\ud800"])
    def test_what_is_no_text_is_refused(self, value: str) -> None:
        for render in (render_equals, render_pairs):
            with pytest.raises(ArgumentNotText):
                render({"k": value})


def _inference(**optional: Any) -> dict[str, Any]:
    return inference_arguments(model_id="1", model_name="m", base_model_path="../models/b", prompt="hi", **optional)


class TestStages:
    def test_question_says_how_the_template_is_used_only_if_asked_to(self) -> None:
        given = _inference(enable_thinking=False, chat_template_kwargs={"language": "de"})

        assert render_equals(given)[-2:] == ["--enable_thinking=false", '--chat_template_kwargs={"language": "de"}']
        assert not any("thinking" in word or "kwargs" in word for word in render_equals(_inference()))

    def test_training_puts_the_parameters_between_paths_and_file(self) -> None:
        arguments = training_arguments(
            **TRAINING, parameters={"lora_rank": 8, "load_in_4bit": False, "max_steps": None}
        )

        assert render_equals(arguments) == [
            "--train_id=t-1",
            "--seq=1",
            "--model_name=m",
            "--model_path=../models/base",
            "--dataset_path=../datasets/d",
            "--output_dir=../runs/t-1/output",
            "--lora_rank=8",
            "--load_in_4bit=False",
            "--train_file_name=sft-demo.py",
            "--train_env=trl",
        ]

    def test_parameters_cannot_replace_what_the_platform_fills_in(self) -> None:
        arguments = training_arguments(**TRAINING, parameters={"output_dir": "/etc", "train_env": "x"})

        assert arguments == TRAINING

    def test_saving_as_pairs(self) -> None:
        assert render_pairs(_saving()) == [
            *("--train_id", "s-1", "--seq", "2", "--save_path", "../models/c", "--base_path", "../models/b"),
            *("--adapter_path", "../runs/t-1/output", "--dtype_str", "bfloat16", "--model_usage_type", "chat"),
        ]

    def test_saving_that_produces_gets_the_training_arguments_too(self) -> None:
        arguments = _saving(training={**TRAINING, "lora_rank": 8})

        assert list(arguments) == [*_saving(), *[n for n in TRAINING if n not in ("train_id", "seq")], "lora_rank"]
        assert arguments["train_id"] == "s-1"

    def test_inference_leaves_out_what_was_not_sent(self) -> None:
        assert render_equals(_inference())[3:] == [
            "--prompt=hi",
            "--session_id=default",
            "--max_length=512",
            "--max_context_tokens=2048",
            "--temperature=0.7",
            "--top_p=0.9",
            "--top_k=50",
            "--model_type=chat",
            "--template=",
        ]

    def test_inference_passes_on_the_optional_fields_and_the_models_folder_last(self) -> None:
        arguments = _inference(
            system_prompt="Be kind.",
            reset_context=False,
            history=[{"role": "user", "content": "grüß"}],
            model_path="../runs/t-1/output",
        )

        assert render_equals(arguments, false_as="")[-4:] == [
            "--system_prompt=Be kind.",
            "--reset_context=false",
            '--history=[{"role": "user", "content": "gr\\u00fc\\u00df"}]',
            "--model_path=../runs/t-1/output",
        ]

    def test_pictures_are_asked_for_in_the_form_of_the_contract(self) -> None:
        told = picture_arguments(model_path="../models/b", prompt="- a cat", output="../images/j.png", batch_size=2)

        assert tuple(told) == filled_arguments(JobKind.INFERENCE_COMPLETE, InferenceForm.IMAGES)
        assert render_pairs(told) == [
            *("--model_path", "../models/b", "--lora_path", "", "--prompt=- a cat", "--negative_prompt", ""),
            *("--output", "../images/j.png", "--batch_size", "2", "--aspect_ratio", "1:1"),
        ]

    def test_deployment_forwards_system_and_parameters_when_given(self) -> None:
        plain = _deployment(quantize="no_quantization")
        full = _deployment(quantize="q8_0", system="Be kind.", parameters={"num_ctx": 2048})

        assert render_pairs(plain) == [
            *("--trainId", "d-1", "--seq", "3", "--folderPath", "/models/c", "--serverUrl", "http://localhost:11434"),
            *("--modelName", "m", "--quantize", "", "--template", "", "--basePath", "", "--actualPath", ""),
        ]
        assert render_pairs(full)[-4:] == ["--system", "Be kind.", "--parameters", '{"num_ctx": 2048}']
        assert full["quantize"] == "q8_0"

    @pytest.mark.parametrize(
        ("stage", "arguments"),
        [
            (JobKind.TRAINING, training_arguments(**TRAINING, parameters={})),
            (JobKind.SAVING, lambda: _saving()),
            (JobKind.INFERENCE_CUSTOMIZED, _inference()),
            (JobKind.INFERENCE_COMPLETE, _inference()),
            (JobKind.DEPLOYMENT, lambda: _deployment()),
        ],
    )
    def test_table_of_filled_arguments_is_what_the_builders_make(self, stage: Stage, arguments: Any) -> None:
        made = arguments() if callable(arguments) else arguments

        assert tuple(made) == filled_arguments(stage)


def _saving(training: dict[str, Any] | None = None) -> dict[str, Any]:
    return saving_arguments(
        train_id="s-1",
        seq=2,
        save_path="../models/c",
        base_path="../models/b",
        adapter_path="../runs/t-1/output",
        dtype_str="bfloat16",
        model_usage_type="chat",
        training=training,
    )


def _deployment(**optional: Any) -> dict[str, Any]:
    return deployment_arguments(
        train_id="d-1",
        seq=3,
        folder_path="/models/c",
        server_url="http://localhost:11434",
        model_name="m",
        **optional,
    )
