"""Training on from an adapter: each method begins where the earlier training ended, and compares with that."""

import json
import shutil
from pathlib import Path

import pytest

from tests.presets.conftest import NewHome
from tests.presets.curves import assert_went_on, stop_and_resume
from tests.presets.stage import Home, dataset

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("going_on")]
ROWS = {"dpo": "dpo-demo", "grpo": "grpo-demo", "ppo": "grpo-demo", "sft": "sft-demo", "peft": "sft-demo"}


def arguments(home: Home, base: Path, method: str, *more: str, out: str = "out") -> list[str]:
    rows = dataset(ROWS[method])
    short = ["--max_steps=4", "--batch_size=8", "--logging_steps=1", "--learning_rate=0.001", "--eval_samples=8"]
    return [f"--model_path={base}", f"--dataset_path={rows}", f"--output_dir={home.path}/{out}", *short, *more]


@pytest.fixture(scope="module")
def started(new_home: NewHome, styles_base: Path) -> tuple[Home, Path]:
    """Return a home with an adapter that SFT has made of preferred answers."""
    home = new_home("going-on")
    rows = [json.loads(line) for line in dataset("dpo-demo").read_text().splitlines()]
    taught = [json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) for row in rows]
    more = ["--max_steps=40", "--batch_size=32", "--learning_rate=0.01", "--lora_rank=8", "--chat_template_kwargs={}"]
    paths = [
        f"--model_path={styles_base}",
        f"--dataset_path={home.write_rows(*taught)}",
        f"--output_dir={home.path}/sft",
    ]
    run = home.run("sft-demo.py", *paths, *more)
    assert run.code == 0, run.stderr
    return home, home.path / "sft"


def tensors_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


class TestStart:
    def test_dpo_begins_where_sft_ended(self, started: tuple[Home, Path], styles_base: Path) -> None:
        home, adapter = started
        new = home.run("dpo-demo.py", *arguments(home, styles_base, "dpo", out="new"))

        run = home.run("dpo-demo.py", *arguments(home, styles_base, "dpo", f"--adapter_name_or_path={adapter}"))

        assert run.code == 0, run.stderr
        assert new.score("before") < 0.5 < run.score("before")
        # the policy equals its reference, so nothing is preferred yet: against the bare base something would be
        assert run.curve("rewards/margins")[1] == pytest.approx(0, abs=1e-6)
        assert run.curve("loss")[1] == pytest.approx(0.6931, abs=1e-4)
        assert run.curve("rewards/margins")[4] > 0
        assert (home.path / "out" / "tokenizer_config.json").is_file()
        assert not (home.path / "out" / "ref").exists()
        config = json.loads((home.path / "out" / "adapter_config.json").read_text())
        assert (config["r"], config["base_model_name_or_path"]) == (8, str(styles_base))
        assert tensors_of(home.path / "out") != tensors_of(adapter)

    @pytest.mark.parametrize("method", ["grpo", "ppo"])
    def test_answers_are_compared_with_those_of_the_start(
        self, started: tuple[Home, Path], styles_base: Path, method: str
    ) -> None:
        home, adapter = started
        few = ["--kl_coef=0.1", "--max_content_length=16", "--eval_fraction=0", "--max_steps=2"]
        few += ["--rollouts=8"] if method == "ppo" else ["--num_generations=4"]
        start = f"--adapter_name_or_path={adapter}"

        run = home.run(f"{method}-demo.py", *arguments(home, styles_base, method, start, *few, out=method))

        assert run.code == 0, run.stderr
        assert run.curve("kl")[1] == pytest.approx(0, abs=1e-5)
        assert not (home.path / method / "ref").exists()
        assert tensors_of(home.path / method) != tensors_of(adapter)

    @pytest.mark.parametrize("kind", ["loha", "dora"])
    def test_the_kind_is_the_adapters_own(self, started: tuple[Home, Path], styles_base: Path, kind: str) -> None:
        home, _ = started
        no_score = ["--eval_fraction=0", "--max_steps=2", "--warmup_steps=0"]
        made = home.run("peft-demo.py", *arguments(home, styles_base, "peft", f"--adapter={kind}", *no_score, out=kind))
        assert made.code == 0, made.stderr

        start = f"--adapter_name_or_path={home.path}/{kind}"
        run = home.run("peft-demo.py", *arguments(home, styles_base, "peft", start, *no_score, out=f"{kind}-on"))

        assert run.code == 0, run.stderr
        configs = [json.loads((home.path / out / "adapter_config.json").read_text()) for out in (kind, f"{kind}-on")]
        layers = [sorted(config.pop("target_modules")) for config in configs]  # a set when it was written
        assert (configs[0], layers[0]) == (configs[1], layers[1])
        assert tensors_of(home.path / kind) != tensors_of(home.path / f"{kind}-on")

    def test_resumed_run_goes_on_from_its_checkpoint(
        self, started: tuple[Home, Path], styles_base: Path, new_home: NewHome
    ) -> None:
        home, adapter = started
        more = [f"--adapter_name_or_path={adapter}", "--eval_fraction=0", "--max_steps=12"]
        whole = home.run("dpo-demo.py", *arguments(home, styles_base, "dpo", *more, out="whole"))

        other = new_home("going-on-resumed")
        stopped, resumed = stop_and_resume(other, "dpo-demo.py", arguments(other, styles_base, "dpo", *more), at=4)

        assert_went_on(whole, stopped, resumed, "loss", "rewards/margins")


class TestRefused:
    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--lora_rank=16"], "lora_rank=16: the adapter in {adapter} has 8"),
            (["--r=16"], "lora_rank=16: the adapter in {adapter} has 8"),
            (["--use_rslora=true"], "use_rslora=True: the adapter in {adapter} has False"),
            (["--adapter_name_or_path={base}"], "it holds a complete model: give it as model_path"),
            (["--adapter_name_or_path=nowhere"], "there is no adapter in nowhere"),
        ],
        ids=["rank", "its other name", "option", "complete model", "nothing"],
    )
    def test_what_is_not_the_adapters(
        self, started: tuple[Home, Path], styles_base: Path, more: list[str], said: str
    ) -> None:
        home, adapter = started
        given = [text.format(base=styles_base) for text in more]

        run = home.run(
            "sft-demo.py", *arguments(home, styles_base, "sft", f"--adapter_name_or_path={adapter}", *given, out="no")
        )

        assert run.code == 1
        assert said.format(adapter=adapter) in run.stderr

    def test_another_base_by_both_names(self, started: tuple[Home, Path], tiny_base: Path, styles_base: Path) -> None:
        home, adapter = started

        run = home.run("sft-demo.py", *arguments(home, tiny_base, "sft", f"--adapter_name_or_path={adapter}", out="no"))

        assert run.code == 1
        assert f"was made for the base model {styles_base}, this training is of {tiny_base}" in run.stderr

    def test_pissa_where_a_copy_is_needed(self, started: tuple[Home, Path], styles_base: Path) -> None:
        home, adapter = started
        other = home.path / "pissa"
        shutil.copytree(adapter, other)
        config = json.loads((other / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
        (other / "adapter_config.json").write_text(json.dumps(config))

        run = home.run("dpo-demo.py", *arguments(home, styles_base, "dpo", f"--adapter_name_or_path={other}", out="no"))

        assert run.code == 1
        assert "of the kind pissa, which has no second copy to compare with" in run.stderr
