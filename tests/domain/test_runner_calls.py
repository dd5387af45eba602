"""What DeepExtension's backend sends becomes the arguments of the contract."""

from typing import Any

import pytest

from app.domain.rendering import render_equals, render_pairs
from app.domain.runner_calls import (
    QUESTION_REQUIRED,
    TRAINING_REQUIRED,
    deployment_call,
    missing,
    pictures_call,
    question_call,
    saving_call,
    training_call,
)

SAVING = {
    "baseModelPath": "../models/b", "loraAdapterPath": "../models/a", "savePath": "../models/s",
    "modelUsageType": "chat", "trainId": "t", "seq": 2,
}  # fmt: skip
QUESTION = {"modelName": "m", "prompt": "p", "baseModelPath": "b"}


def option(words: list[str], name: str) -> str | None:
    """Return the value of an option in either style."""
    for index, word in enumerate(words):
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
        if word == f"--{name}":
            return words[index + 1]
    return None


class TestTrainingCall:
    def test_passes_every_member_in_the_order_of_the_body(self) -> None:
        body = {"z": 1, "train_id": 7, "a": None, "seq": 1, "train_file_name": "x.py", "train_env": "base", "b": False}

        call = training_call(body)

        words = ["--z=1", "--train_id=7", "--seq=1", "--train_file_name=x.py", "--train_env=base", "--b=False"]
        assert render_equals(call.arguments) == words
        assert (call.key, call.seq, call.file, call.environment) == ("7", 1, "x.py", "base")

    def test_has_labels_of_its_own_for_start_and_end(self) -> None:
        assert (training_call({}).started, training_call({}).ended) == ("Training", "Training")
        call = training_call({"training_name": "start", "train_name": "end"})
        assert (call.started, call.ended) == ("start", "end")

    def test_null_counts_as_given(self) -> None:
        assert missing({"train_id": None, "seq": None}, TRAINING_REQUIRED) == []
        assert training_call({"train_id": None}).key is None
        assert missing({"prompt": None}, QUESTION_REQUIRED) == ["modelName"]


class TestSavingCall:
    @pytest.mark.parametrize(
        ("members", "dtype"), [({}, "bfloat16"), ({"dtypeStr": None}, "None"), ({"dtypeStr": "float16"}, "float16")]
    )
    def test_precision(self, members: dict[str, Any], dtype: str) -> None:
        assert option(render_pairs(saving_call({**SAVING, **members}).arguments), "dtype_str") == dtype

    @pytest.mark.parametrize("value", [None, ""])
    def test_null_and_empty_mean_the_default_file(self, value: Any) -> None:
        call = saving_call({**SAVING, "savePythonFile": value, "condaEnv": value})

        assert (call.file, call.environment) == ("linux_code/save_model", "base")

    def test_writes_the_parameter_records_of_their_runner_in_its_order(self) -> None:
        assert saving_call(SAVING).records == (
            "base_path:../models/b", "adapter_path:../models/a", "save_path:../models/s", "dtype_str:bfloat16",
            "train_id:t", "seq:2", "modelUsageType:chat",
        )  # fmt: skip


class TestDeploymentCall:
    def test_has_all_nine_pairs(self) -> None:
        call = deployment_call({"trainId": "t", "seq": None, "serverUrl": "u", "modelName": "m"}, folder="/f")

        assert render_pairs(call.arguments) == [
            "--trainId", "t", "--seq", "None", "--folderPath", "/f", "--serverUrl", "u", "--modelName", "m",
            "--quantize", "", "--template", "", "--basePath", "", "--actualPath", "",
        ]  # fmt: skip

    def test_offers_a_system_prompt_to_scripts_that_take_one(self) -> None:
        assert deployment_call({"system": "Be brief."}, folder="/f").optional == {"system": "Be brief."}
        assert deployment_call({"system": ""}, folder="/f").optional == {}

    @pytest.mark.parametrize(
        ("given", "options", "any_given"),
        [
            (None, None, False),
            ("{}", {}, False),
            ('{"top_k": 1}', {"top_k": 1}, True),
            ({"top_k": 1}, {"top_k": 1}, True),
            ("top_k 1", None, True),
            ("[1]", None, True),
            (7, None, True),
        ],
    )
    def test_reads_parameters_that_are_an_object(self, given: Any, options: Any, any_given: bool) -> None:
        call = deployment_call({"parameters": given}, folder="/f")

        assert (call.options, call.has_options) == (options, any_given)


class TestQuestionCall:
    def test_leaves_out_what_was_not_sent(self) -> None:
        words = render_equals(question_call(QUESTION).arguments)

        assert words[-1] == "--template="
        assert option(words, "max_context_tokens") == "2048"

    @pytest.mark.parametrize(
        ("member", "value", "name", "text"),
        [
            ("systemPrompt", None, "system_prompt", "None"),
            ("resetContext", None, "reset_context", "none"),
            ("resetContext", True, "reset_context", "true"),
            ("history", None, "history", "null"),
            ("history", [{"role": "user", "content": "ä"}], "history", '[{"role": "user", "content": "\\u00e4"}]'),
            ("modelType", "", "model_type", "chat"),
            ("temperature", None, "temperature", "None"),
            ("topK", 3, "top_k", "3"),
        ],
    )
    def test_value(self, member: str, value: Any, name: str, text: str) -> None:
        assert option(render_equals(question_call({**QUESTION, member: value}).arguments), name) == text


class TestPicturesCall:
    def test_leaves_to_the_script_what_was_not_given(self) -> None:
        call = pictures_call({"model": "m", "prompt": "p", "batchSize": 2, "loraPath": None}, task="id")

        words = ["--model_path", "m", "--prompt", "p", "--output", "../images/id.png", "--batch_size", "2"]
        assert render_pairs(call.arguments) == words
        assert (call.environment, call.file) == ("sd", None)
