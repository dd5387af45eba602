"""What a chat template is given, where turns end by it, and what is said after the reasoning. No weights are needed."""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jinja2
import pytest

from app.presets import catalogue

PHI = (  # writes the end of a document behind the last turn
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
CONTENTS = "{% for m in messages %}{{ m.content }}{% endfor %}"
ARGUMENTS = "{{ [flag, number, nothing, words, nested['a'][0]] | tojson }}" + CONTENTS


class Tokenizer:
    """A character is a token, or what stands between angle brackets; its template is rendered by Jinja."""

    special: ClassVar = ["<bos>", "<|endoftext|>", "<|end|>"]
    added_tokens_decoder: ClassVar = {2: SimpleNamespace(special=True)}
    all_special_ids = (0, 1)
    bos_token = "<bos>"
    document_end_id: int

    def __init__(self, chat_template: Any, *, begins: bool = False) -> None:
        self.chat_template, self._begins = chat_template, begins
        self.eos_token, self.pad_token = "<|endoftext|>", None
        self.bos_token_id = 0 if begins else None

    @property
    def eos_token_id(self) -> int:
        return self.special.index(self.eos_token)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        parts = re.findall(r"<bos>|<\|\w+\|>|(?s:.)", text)
        tokens = [self.special.index(part) if part in self.special else 10 + ord(part[0]) for part in parts]
        return {"input_ids": [0, *tokens] if self._begins and add_special_tokens else tokens}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(self.special[token])

    def apply_chat_template(
        self, turns: Any, *, tokenize: bool, add_generation_prompt: bool = False, **more: Any
    ) -> str:
        given = {"messages": turns, "add_generation_prompt": add_generation_prompt} | more
        tokens = {"eos_token": self.eos_token, "bos_token": self.bos_token}
        return jinja2.Environment(trim_blocks=True).from_string(self.chat_template).render(**tokens, **given)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(catalogue.helpers_dir()))
    before = set(sys.modules)
    yield importlib.import_module("deepe_chat")
    for name in set(sys.modules) - before:
        if name.partition(".")[0].startswith(("deepe", "enums")):
            del sys.modules[name]


def arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**given)


def asked(tokenizer: Tokenizer, **more: Any) -> str:
    turns = [{"role": "user", "content": "q"}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **more)


class TestArguments:
    GIVEN: ClassVar = {"flag": False, "number": 1.5, "nothing": None, "words": "é \"'\\n 🙂", "nested": {"a": ["x"]}}

    def test_reach_the_template_as_they_are(self, chat: Any) -> None:
        tokenizer = Tokenizer(ARGUMENTS)

        chat.choose_template(tokenizer, Path("base"), arguments(chat_template_kwargs=json.dumps(self.GIVEN)))

        assert json.loads(asked(tokenizer)[:-1]) == [False, 1.5, None, self.GIVEN["words"], "x"]
        assert json.loads(asked(tokenizer, number=3)[:-1])[1] == 3

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [("{", "is not valid JSON"), ("[1]", "must be a JSON object"), ('{"a b": 1}', "'a b' is not")],
    )
    def test_that_are_no_object_are_refused(self, chat: Any, text: str, sentence: str) -> None:
        with pytest.raises(chat.Refused, match=f"chat_template_kwargs:? {sentence}"):
            chat.template_arguments(arguments(chat_template_kwargs=text))

    def test_come_as_text_or_as_an_object(self, chat: Any) -> None:
        for given in ('{"flag": true}', {"flag": True}, chat.json_object('{"flag": true}')):
            assert chat.template_arguments(arguments(chat_template_kwargs=given)) == {"flag": True}

    def test_of_a_question_win_over_those_of_the_training(self, chat: Any) -> None:
        tokenizer = Tokenizer("{{ enable_thinking }}" + CONTENTS)

        chat.choose_template(tokenizer, Path("base"), arguments(enable_thinking="false"))
        trained = asked(tokenizer)
        chat.choose_template(tokenizer, Path("base"), arguments(enable_thinking="True"))

        assert (trained, asked(tokenizer)) == ("Falseq", "Trueq")

    def test_are_given_to_each_of_several_templates(self, chat: Any) -> None:
        tokenizer = Tokenizer({"default": "{{ flag }}", "tool_use": "{{ flag }}!"})

        chat.choose_template(tokenizer, Path("base"), arguments(chat_template_kwargs='{"flag": true}'))

        assert all(text.startswith("{%- if flag is not defined %}") for text in tokenizer.chat_template.values())


class TestTemplate:
    def test_none_writes_contents_only(self, chat: Any) -> None:
        tokenizer = Tokenizer(PHI, begins=True)

        chat.choose_template(tokenizer, Path("base"), arguments(chat_template="none"))

        turns = [{"role": role, "content": content} for role, content in (("system", "s"), ("user", "q"))]
        answered = [*turns, {"role": "assistant", "content": "a"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == "<bos>s\n\nq"
        assert tokenizer.apply_chat_template(answered, tokenize=False) == "<bos>s\n\nqa<|endoftext|>"

    @pytest.mark.parametrize(
        ("chosen", "text"),
        [("auto", "<bos>### user:\n<image>\nq\n\n### assistant:\n"), ("none", "<bos><image>\nq")],
    )
    def test_of_a_model_that_sees(self, chat: Any, chosen: str, text: str) -> None:
        pictures = importlib.import_module("deepe_pictures")
        tokenizer = Tokenizer(None, begins=True)
        parts = [{"type": "image"}, {"type": "text", "text": "q"}]

        pictures.choose_template(tokenizer, Path("base"), arguments(chat_template=chosen), tokenizer, image="<image>")

        turns = [{"role": "user", "content": parts}]
        assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text
        assert chat.end_turns(tokenizer, Path("base")) == ""


class TestEnds:
    def test_template_that_writes_the_tokenizers_end_goes_on_to(self, chat: Any, tmp_path: Path) -> None:
        tokenizer = Tokenizer(PHI)
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        before = tokenizer.apply_chat_template(turns, tokenize=False)

        own = chat.end_turns(tokenizer, tmp_path)

        assert (own, tokenizer.eos_token, tokenizer.document_end_id) == ("<|endoftext|>", "<|end|>", 1)
        assert tokenizer.pad_token == "<|endoftext|>"
        assert tokenizer.apply_chat_template(turns, tokenize=False) == before
        assert chat.ends_of(tokenizer, [1, 7]) == [2, 1, 7]
        assert chat.end_turns(tokenizer, tmp_path) == ""

    @pytest.mark.parametrize(
        ("config", "end"),
        [
            ({"eos_token_id": 2}, 2),
            ({"text_config": {"eos_token_id": 2}}, 2),
            ({"eos_token_id": [2, 0]}, 1),
            ({"eos_token_id": 99}, 1),
            ({}, 1),
        ],
    )
    def test_documents_end_as_the_base_says(self, chat: Any, tmp_path: Path, config: Any, end: int) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))

        assert chat.document_end(Tokenizer(PHI), tmp_path) == end


@pytest.mark.parametrize(
    ("prompt", "text", "said", "cut"),
    [
        ("q", "a", "a", False),
        ("q", "<think>\nhm\n</think>\n\na", "a", False),
        ("q<think>\n", "hm\n</think>\n\na", "a", False),
        ("q<think>\n", "hm", "hm", True),
        ("q", "<think>\nhm", "<think>\nhm", True),
        ("what is <think>?", "a", "a", False),
        ("q<think>\n\n</think>\n\n", "a", "a", False),
    ],
)
def test_reasoning_is_no_part_of_what_is_said(chat: Any, prompt: str, text: str, said: str, *, cut: bool) -> None:
    assert (chat.after_reasoning(text), chat.is_cut_in_reasoning(prompt, text)) == (said, cut)
