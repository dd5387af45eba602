"""PEFT-Demo for real: every adapter trains, is saved and answers; a stopped run goes on."""

import json
from pathlib import Path

import pytest

from app.presets import catalogue
from tests.presets.conftest import NewHome
from tests.presets.curves import SHORT, assert_went_on, run_whole_and_stopped
from tests.presets.stage import Finished, Home, dataset, demo_parameters

SCRIPT = "peft-demo.py"
PROMPTS = ("prompt_tuning", "prefix_tuning")
EVERY_ADAPTER = """
import json, runpy, sys
base, rows, out, adapters = sys.argv[1:5]

def run(script, *arguments):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        return exit.code or 0
    return 0

codes = {}
for adapter in adapters.split(","):
    folder = f"{out}/{adapter}"
    paths = (f"--model_path={base}", f"--dataset_path={rows}", f"--output_dir={folder}", f"--adapter={adapter}")
    small = ("--max_steps=3", "--batch_size=4", "--eval_samples=4", "--eval_max_new_tokens=4", "--learning_rate=0.01")
    trained = run("peft-demo.py", *paths, *small)
    merge = ("--base_path", base, "--adapter_path", folder, "--save_path", f"{folder}-complete", "--dtype_str=float32")
    codes[adapter] = [trained, run("save_model.py", *merge)]
again = (*paths[:2], f"--output_dir={out}/again", "--adapter=adalora", *small, "--max_steps=8", "--save_steps=4")
codes["adalora twice"] = [run("peft-demo.py", *again), run("peft-demo.py", *again)]
print("codes " + json.dumps(codes))
"""


def arguments(home: Home, base: Path, *more: str, rows: Path | None = None) -> list[str]:
    paths = [f"--model_path={base}", f"--dataset_path={rows or dataset('sft-demo')}", f"--output_dir={home.path}/out"]
    return [*paths, *demo_parameters("PEFT-Demo"), *more]


@pytest.fixture(scope="module")
def trained(new_home: NewHome, tiny_base: Path) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported."""
    home = new_home("peft")
    return home, home.run(SCRIPT, *arguments(home, tiny_base))


@pytest.mark.training
@pytest.mark.xdist_group("peft_demo")
class TestTraining:
    def test_learns_and_leaves_an_adapter(self, trained: tuple[Home, Finished]) -> None:
        home, run = trained

        assert run.code == 0, run.stderr
        assert run.exact_match("before") < 0.4
        assert run.exact_match("after") >= 0.9
        run.lowered("eval_loss", "perplexity")
        names = {file.name: file.stat().st_mode & 0o777 for file in (home.path / "out").iterdir() if file.is_file()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names.keys()
        assert names["adapter_model.safetensors"] == 0o644
        assert json.loads((home.path / "out" / "adapter_config.json").read_text())["use_dora"] is True

    def test_reports_curves_speed_memory_and_the_time_left(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        assert run.curve("loss")[120] < run.curve("loss")[1] / 4
        assert run.curve("eta_seconds")[120] == 0
        assert min(run.curve("tokens_per_second").values()) > 0
        assert min(run.curve("memory_peak_mib").values()) > 0
        assert run.of_type("progress")[-1]["step"] == run.of_type("progress")[-1]["total"] == 120
        assert [record["msg"] for record in run.records][-1] == 200005

    def test_stopped_run_goes_on_like_an_undisturbed_one(self, torch_home: Home, tiny_base: Path) -> None:
        runs = run_whole_and_stopped(torch_home, SCRIPT, arguments(torch_home, tiny_base, *SHORT), at=6)

        assert_went_on(*runs, "loss", "learning_rate", "grad_norm")

    def test_adapters_of_every_sort_train_and_all_but_prompts_are_saved(
        self, torch_home: Home, tiny_base: Path
    ) -> None:
        adapters = "pissa,oft,adalora,ia3,prompt_tuning,prefix_tuning"  # the others: test_adapters.py
        (torch_home.scripts / "probe.py").write_text(EVERY_ADAPTER)

        run = torch_home.run(
            "probe.py", str(tiny_base), str(dataset("sft-demo")), str(torch_home.path / "out"), adapters
        )

        assert run.code == 0, run.stderr
        (codes,) = [json.loads(line[6:]) for line in run.stdout.splitlines() if line.startswith("codes ")]
        assert codes.pop("adalora twice") == [0, 0]
        assert codes == {name: [0, 1 if name in PROMPTS else 0] for name in adapters.split(",")}
        assert "an adapter of the kind prefix_tuning cannot be merged" in run.json_lines[-1]["message"]
        notes = [note["message"] for note in run.of_type("note")]
        assert any("prompt_tuning cannot be merged" in note for note in notes)
        assert [note.split(" ")[0] for note in notes if "that AdaLoRA has cut" in note] == [
            "checkpoint-8",
            "checkpoint-4",
        ]

    def test_layer_that_is_not_there_gets_one_sentence(self, torch_home: Home, tiny_base: Path) -> None:
        run = torch_home.run(SCRIPT, *arguments(torch_home, tiny_base, "--target_modules=q_proj,nothing"))

        assert run.code == 1
        assert "no linear layer is called 'nothing'; there are: down_proj, gate_proj" in run.stderr
        assert "Traceback" not in run.stderr


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "more", "sentence"),
        [
            ('{"a": 1}', [], "rows.jsonl, line 1: the columns to learn from are missing; there are: a. Name the"),
            ('{"text": "x"}', ["--load_in_4bit=true", "--adapter=loha"], "adapter=loha cannot be trained on a base"),
            (
                '{"text": "x"}',
                ["--early_stopping_patience=2", "--adapter=adalora"],
                "adapter=adalora keeps the last step",
            ),
            ('{"text": "x"}', ["--virtual_tokens=0"], "virtual_tokens must be at least 1, it is 0"),
            ('{"text": "x"}', ["--max_steps=0"], "max_steps must be at least 1"),
            ('{"text": "x"}', ["--model_path=nowhere"], "there is no base model in nowhere"),
            ("{", [], "rows.jsonl, line 1: not valid JSON"),
        ],
    )
    def test_gets_one_sentence(self, home: Home, row: str, more: list[str], sentence: str) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"

        run = home.run(SCRIPT, *arguments(home, base, *more, rows=home.write_rows(row)))

        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006

    def test_unknown_adapter_is_a_matter_of_the_form(self, home: Home) -> None:
        run = home.run(SCRIPT, *arguments(home, home.path, "--adapter=magic"))

        assert run.code == 2
        assert "invalid choice: 'magic'" in run.stderr
