"""Where answers end, and what is said before them: base models whose template and tokenizer disagree, for real."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.presets import families
from tests.presets.conftest import NewHome
from tests.presets.stage import Finished, Home, dataset, demo_parameters

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("turn_ends")]

QUESTION = "Which is larger, 3 or 8?"
TURN, DOCUMENT = 2, 0  # <|im_end|> and <|endoftext|>
GEMMA_2 = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

tokens, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokens)
tokenizer.save_pretrained(folder)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
config = Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, **sizes)
AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(folder)
"""
ELSEWHERE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, question = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
turns = [{"role": "user", "content": question}]
asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1]:]
print('{"answer": "%s"}' % tokenizer.decode(answer))
"""


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the small base with the end of documents as its only end, as bases of the Qwen family have it."""
    folder = tmp_path_factory.mktemp("bases") / "another-end"
    shutil.copytree(tiny_base, folder)
    changes: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
        "config.json": {"eos_token_id": DOCUMENT},
        "generation_config.json": {"eos_token_id": DOCUMENT},
    }
    for name, change in changes.items():
        (folder / name).write_text(json.dumps(document(folder / name) | change))
    return folder


def document(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def train(home: Home, base: Path, *more: str) -> Finished:
    paths = (f"--model_path={base}", f"--dataset_path={dataset('sft-demo')}", f"--output_dir={home.path / 'out'}")
    return home.run("sft-demo.py", *paths, *demo_parameters("SFT-Demo"), *more)


def train_all_weights(home: Home, base: Path, *more: str) -> Finished:
    paths = ("--base_path", str(base), "--save_path", str(home.path / "complete"))
    rows = ("--dataset_path", str(dataset("sft-demo")), "--eval_fraction", "0.2")
    return home.run("custom02.py", *paths, *rows, "--batch_size", "32", "--learning_rate", "0.002", *more)


def save(home: Home, base: Path) -> Path:
    complete = home.path / "complete"
    paths = ("--base_path", str(base), "--adapter_path", str(home.path / "out"), "--save_path", str(complete))
    saved = home.run("save_model.py", *paths, "--dtype_str", "float32")
    assert saved.code == 0, saved.stderr
    return complete


def ask(home: Home, base: Path, model: Path, *more: str) -> Finished:
    paths = (f"--base_model_path={base}", f"--model_path={model}", f"--prompt={QUESTION}", "--temperature=0")
    return home.run("ask_model.py", *paths, "--max_length=24", *more)


@pytest.fixture(scope="module")
def trained(new_home: NewHome, base: Path) -> tuple[Home, Finished]:
    home = new_home("turn-ends")
    return home, train(home, base)


class TestBaseWithAnotherEnd:
    def test_learns_to_stop_and_says_so(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        assert run.code == 0, run.stderr
        assert run.exact_match("after") >= 0.9
        (note,) = [one["message"] for one in run.of_type("note") if "ends a turn" in one["message"]]
        assert "<|im_end|>" in note
        assert "<|endoftext|>" in note

    def test_adapter_and_complete_model_tell_both_ends(self, trained: tuple[Home, Finished], base: Path) -> None:
        home, _ = trained

        complete = save(home, base)

        for folder in (home.path / "out", complete):
            assert document(folder / "generation_config.json")["eos_token_id"] == [TURN, DOCUMENT]
            assert document(folder / "tokenizer_config.json")["eos_token"] == "<|im_end|>"
        assert document(complete / "config.json")["eos_token_id"] == DOCUMENT

    def test_answers_end_here_and_elsewhere(self, trained: tuple[Home, Finished], base: Path) -> None:
        home, _ = trained
        complete = save(home, base)
        (home.scripts / "elsewhere.py").write_text(ELSEWHERE)

        assert ask(home, base, home.path / "out").answer == "8"
        assert ask(home, complete, complete).answer == "8"
        assert home.run("elsewhere.py", str(complete), QUESTION).json_lines[-1]["answer"] == "8<|im_end|>"

    def test_custom02_makes_a_model_that_stops(self, torch_home: Home, base: Path) -> None:
        run = train_all_weights(torch_home, base, "--max_steps", "60", "--eval_samples", "20")

        assert run.code == 0, run.stderr
        assert run.exact_match("after") >= 0.8
        complete = torch_home.path / "complete"
        assert document(complete / "generation_config.json")["eos_token_id"] == [TURN, DOCUMENT]
        assert ask(torch_home, complete, complete).answer == "8"


def test_base_without_sdpa_is_trained_and_asked(torch_home: Home, base: Path) -> None:
    """Transformers refuses SDPA for Gemma 2 when it is asked for by name."""
    (torch_home.scripts / "gemma_2.py").write_text(GEMMA_2)
    gemma = torch_home.path / "gemma-2"
    torch_home.run("gemma_2.py", str(base), str(gemma))

    run = train(torch_home, gemma, "--max_steps=1", "--eval_samples=1")

    assert run.code == 0, run.stderr
    answered = ask(torch_home, gemma, torch_home.path / "out")
    assert answered.code == 0, answered.stderr


@pytest.fixture(scope="module")
def thinking(new_home: NewHome, tiny_base: Path) -> tuple[Home, Finished, Path]:
    """Return a complete model whose template puts an empty block of reasoning before an answer."""
    home = new_home("thinking")
    file = home.path / "template.jinja"
    file.write_text(families.QWEN3)
    run = train_all_weights(home, tiny_base, "--chat_template", str(file), "--max_steps", "200")
    return home, run, home.path / "complete"


class TestReasoning:
    def test_empty_block_is_no_part_of_the_score(self, thinking: tuple[Home, Finished, Path]) -> None:
        _, run, _ = thinking

        assert run.code == 0, run.stderr
        assert run.exact_match("after") >= 0.5

    def test_question_may_be_asked_without(self, thinking: tuple[Home, Finished, Path]) -> None:
        home, _, model = thinking

        assert ask(home, model, model).answer == "<think>\n\n</think>\n\n8"
        assert ask(home, model, model, "--enable_thinking=false").answer == "8"
        assert ask(home, model, model, '--chat_template_kwargs={"enable_thinking": false}').answer == "8"

    def test_answers_that_cannot_be_given_in_full_are_no_score(self, thinking: tuple[Home, Finished, Path]) -> None:
        home, _, model = thinking

        run = train(home, model, "--max_steps=1", "--eval_max_new_tokens=10", "--eval_samples=9")

        assert run.code == 0, run.stderr
        assert [one for one in run.of_type("evaluation") if one["name"] == "exact_match"] == []
        notes = [one["message"] for one in run.of_type("note")]
        assert any("no exact match is measured" in note and "eval_max_new_tokens (10)" in note for note in notes)

    def test_training_without_thinking_is_asked_without(self, thinking: tuple[Home, Finished, Path]) -> None:
        home, _, model = thinking

        run = train(home, model, "--max_steps=1", "--enable_thinking=false", "--eval_samples=20")

        assert run.code == 0, run.stderr
        assert run.exact_match("before") >= 0.5
        assert "think>" not in ask(home, model, home.path / "out").answer

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (("--enable_thinking=false",), "enable_thinking has no effect: the chat template of"),
            (('--chat_template_kwargs={"messages": []}',), "'messages' is not a name that can be set"),
            (
                ('--chat_template_kwargs={"enable_thinking": true}', "--enable_thinking=false"),
                "enable_thinking and chat_template_kwargs contradict each other",
            ),
            (("--chat_template=nowhere.jinja",), "nowhere.jinja cannot be read"),
            (("--chat_template={% for",), "the chat template of the base model refuses the row: unexpected"),
        ],
    )
    def test_what_has_no_effect_is_refused(
        self, torch_home: Home, tiny_base: Path, more: tuple[str, ...], sentence: str
    ) -> None:
        run = train(torch_home, tiny_base, *more)

        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
