"""Full and partial fine-tuning by SFT-Demo: a whole model that learns, resumes, is saved, asked and refused rightly."""

import json
import struct
from pathlib import Path

import pytest

from app.executor.attempts.artifacts import ArtifactKind, check_complete, check_customized
from tests.presets.conftest import NewHome
from tests.presets.curves import assert_went_on, stop_and_resume
from tests.presets.stage import Finished, Home, dataset

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("full_tuning")]
SCRIPT = "sft-demo.py"
QUESTION = "Which is larger, 3 or 8?"


def arguments(home: Home, base: Path, *more: str, kind: str = "full", out: str = "out") -> list[str]:
    steps = ["--max_steps=24", "--batch_size=32", "--learning_rate=0.002", "--logging_steps=2", "--eval_samples=20"]
    paths = [f"--model_path={base}", f"--dataset_path={dataset('sft-demo')}", f"--output_dir={home.path}/{out}"]
    return [*paths, f"--finetuning_type={kind}", *steps, *more]


def tensors(file: Path) -> dict[str, bytes]:
    """Return the bytes of each tensor of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


@pytest.fixture(scope="module")
def trained(new_home: NewHome, tiny_base: Path) -> tuple[Home, Finished]:
    """Return the home of a finished full fine-tuning and what it reported."""
    home = new_home("full")
    return home, home.run(SCRIPT, *arguments(home, tiny_base))


class TestFull:
    def test_learns_and_leaves_a_whole_model(self, trained: tuple[Home, Finished], tiny_base: Path) -> None:
        home, run = trained

        assert run.code == 0, run.stderr
        assert run.exact_match("after") > run.exact_match("before")
        assert check_customized(home.path / "out").kind is ArtifactKind.MODEL
        config = json.loads((home.path / "out" / "config.json").read_text())
        assert (config["use_cache"], config["dtype"]) == (True, "float32")
        assert not list((home.path / "out").glob("adapter*"))

    def test_is_saved_and_asked_before_and_after(self, trained: tuple[Home, Finished], tiny_base: Path) -> None:
        home, _ = trained
        out, complete = home.path / "out", home.path / "complete"

        saved = home.run(
            "save_model.py",
            f"--save_path={complete}",
            f"--base_path={tiny_base}",
            f"--adapter_path={out}",
            "--dtype_str=bfloat16",
        )

        assert saved.code == 0, saved.stderr
        assert check_complete(complete).kind is ArtifactKind.MODEL
        assert json.loads((complete / "config.json").read_text())["dtype"] == "bfloat16"
        asked = ["--temperature=0", f"--prompt={QUESTION}", "--max_length=8"]
        answers = [
            home.run("ask_model.py", f"--base_model_path={base}", f"--model_path={model}", *asked).answer
            for base, model in ((tiny_base, out), (complete, complete))
        ]
        assert answers[0] == answers[1] != ""

    def test_stopped_run_goes_on_like_an_undisturbed_one(
        self, trained: tuple[Home, Finished], torch_home: Home, tiny_base: Path
    ) -> None:
        stopped, resumed = stop_and_resume(torch_home, SCRIPT, arguments(torch_home, tiny_base), at=6)

        assert_went_on(trained[1], stopped, resumed, "loss")


class TestOtherMethods:
    @pytest.mark.parametrize(
        ("method", "rows", "curve"), [("dpo", "dpo-demo", "rewards/margins"), ("grpo", "grpo-demo", "kl")]
    )
    def test_reference_is_the_base_while_all_weights_learn(
        self, torch_home: Home, styles_base: Path, method: str, rows: str, curve: str
    ) -> None:
        steps = ["--max_steps=3", "--batch_size=8", "--learning_rate=0.001", "--warmup_steps=0", "--logging_steps=1"]
        steps += ["--eval_fraction=0", "--max_content_length=16"]
        steps += ["--kl_coef=0.1", "--num_generations=4"] if method == "grpo" else []
        out = torch_home.path / "out"
        paths = [f"--model_path={styles_base}", f"--dataset_path={dataset(rows)}", f"--output_dir={out}"]

        run = torch_home.run(f"{method}-demo.py", *paths, "--finetuning_type=full", *steps)

        assert run.code == 0, run.stderr
        assert check_customized(out).kind is ArtifactKind.MODEL
        assert run.curve(curve)[1] == pytest.approx(0, abs=1e-5)
        assert run.curve(curve)[3] > 0


class TestFreeze:
    def test_only_the_last_layers_change(self, trained: tuple[Home, Finished], tiny_base: Path) -> None:
        home, _ = trained
        more = ["--freeze_trainable_layers=1", "--max_steps=2", "--warmup_steps=0", "--eval_fraction=0"]

        run = home.run(SCRIPT, *arguments(home, tiny_base, *more, kind="freeze", out="frozen"))

        assert run.code == 0, run.stderr
        before, after = tensors(tiny_base / "model.safetensors"), tensors(home.path / "frozen" / "model.safetensors")
        last = json.loads((tiny_base / "config.json").read_text())["num_hidden_layers"] - 1
        changed = {name for name in after if after[name] != before[name]}
        assert before.keys() == after.keys()
        assert changed
        assert all(name.startswith(f"model.layers.{last}.") for name in changed)


class TestRefused:
    @pytest.mark.parametrize(
        ("kind", "more", "said"),
        [
            ("full", ["--lora_rank=8"], "finetuning_type=full makes no adapter, so that lora_rank has no effect"),
            ("full", ["--load_in_4bit=true"], "which 4 bits are too few for; leave load_in_4bit out"),
            ("freeze", ["--adapter_name_or_path=x"], "leave adapter_name_or_path out, or set finetuning_type=lora"),
            ("full", ["--freeze_trainable_layers=1"], "or set finetuning_type=freeze"),
            ("freeze", ["--freeze_trainable_layers=99"], "freeze_trainable_layers=99: the base model has"),
            ("full", ["--lora_dropout=0.1"], "it is an option of peft.LoraConfig, with finetuning_type=lora"),
        ],
    )
    def test_what_does_not_fit_together(
        self, torch_home: Home, tiny_base: Path, kind: str, more: list[str], said: str
    ) -> None:
        run = torch_home.run(SCRIPT, *arguments(torch_home, tiny_base, *more, kind=kind))

        assert run.code == 1
        assert said in run.stderr
        assert "Traceback" not in run.stderr
