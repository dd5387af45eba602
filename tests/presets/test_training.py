"""SFT-Demo and Custom02 for real: a base model is built, trained, saved and asked in the `trl` environment."""

import json
import math
import signal
from pathlib import Path

import pytest

from app.domain.launchers import Launcher, LauncherKind
from app.presets import catalogue
from tests.presets.conftest import NewHome
from tests.presets.curves import (
    SHORT,
    assert_stops_early_over_a_kill,
    assert_went_on,
    run_whole_and_stopped,
    stop_and_resume,
)
from tests.presets.stage import Finished, Home, dataset, demo_parameters

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("training")]

PAIR = Launcher(kind=LauncherKind.TORCHRUN, processes=2)
QUESTION = "Which is larger, 3 or 8?"


@pytest.fixture(scope="module")
def trained(new_home: NewHome, tiny_base: Path) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported."""
    home = new_home("trained")
    return home, train(home.unforked, tiny_base)


def sft_arguments(home: Home, base: Path, *more: str, rows: Path | None = None, output: str = "out") -> list[str]:
    return [
        "--train_id=job-1",
        "--seq=1",
        "--model_name=demo",
        f"--model_path={base}",
        f"--dataset_path={rows or dataset('sft-demo')}",
        f"--output_dir={home.path / output}",
        *demo_parameters("SFT-Demo"),
        *more,
    ]


def train(home: Home, base: Path, *more: str, rows: Path | None = None, output: str = "out") -> Finished:
    return home.run("sft-demo.py", *sft_arguments(home, base, *more, rows=rows, output=output))


def save(home: Home, base: Path) -> Finished:
    paths = ("--save_path", str(home.path / "complete"), "--base_path", str(base), "--adapter_path")
    more = (str(home.path / "out"), "--dtype_str", "bfloat16", "--model_usage_type", "chat")
    return home.run("save_model.py", "--train_id", "job-2", "--seq", "2", *paths, *more)


def ask(home: Home, base: Path, model: Path, *more: str) -> Finished:
    paths = (f"--base_model_path={base}", f"--model_path={model}")
    arguments = (*paths, f"--prompt={QUESTION}", "--temperature=0", "--top_p=None", "--max_length=16", *more)
    return home.run("ask_model.py", *arguments)


class TestSftDemo:
    def test_base_is_one_that_transformers_4_reads_too(self, tiny_base: Path) -> None:
        config = json.loads((tiny_base / "tokenizer_config.json").read_text())

        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert config["model_input_names"] == ["input_ids", "attention_mask"]

    def test_learns_what_the_base_model_does_not_know(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        assert run.code == 0, run.stderr
        assert run.exact_match("before") < 0.4
        assert run.exact_match("after") >= 0.9
        run.lowered("eval_loss", "perplexity")
        assert run.score("after", "perplexity") == pytest.approx(math.exp(run.score("after", "eval_loss")))

    def test_reports_curve_progress_and_records(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        losses = {
            event["step"]: event["values"]["loss"] for event in run.of_type("metrics") if "loss" in event["values"]
        }
        assert losses[120] < losses[1] / 4
        assert run.curve("eval_loss").keys() == {0, 100, 120}
        assert run.curve("eval_loss")[0] == run.score("before", "eval_loss")
        answers = [one for one in run.of_type("sample") if one["phase"] == "after"]
        assert [one["answer"] == one["wanted"] for one in answers] == [True] * 5
        asked = {json.loads(line)["instruction"] for line in dataset("sft-demo").read_text().splitlines()}
        assert {one["prompt"] for one in answers} <= asked
        assert run.of_type("progress")[-1]["step"] == run.of_type("progress")[-1]["total"] == 120
        codes = [record["msg"] for record in run.records]
        assert codes[-1] == 200005
        assert 200006 not in codes

    def test_leaves_an_adapter_that_others_may_read(self, trained: tuple[Home, Finished]) -> None:
        home, _ = trained

        files = {file.name: file.stat().st_mode & 0o777 for file in (home.path / "out").iterdir() if file.is_file()}

        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(files)
        assert files["adapter_model.safetensors"] == 0o644

    def test_saved_model_answers_like_the_adapter_and_unlike_the_base(
        self, trained: tuple[Home, Finished], tiny_base: Path
    ) -> None:
        home, _ = trained

        saved = save(home, tiny_base)

        assert saved.code == 0, saved.stderr
        assert saved.json_lines[-1]["status"] == "success"
        assert saved.json_lines[-1]["dtype_used"] == "bfloat16"
        complete = home.path / "complete"
        assert (complete / "model.safetensors").stat().st_mode & 0o777 == 0o644
        assert ask(home, tiny_base, tiny_base).answer == "11"
        assert ask(home, tiny_base, home.path / "out").answer == "8"
        assert ask(home, complete, complete).answer == "8"

    def test_newest_turn_of_the_history_wins_over_the_prompt(
        self, trained: tuple[Home, Finished], tiny_base: Path
    ) -> None:
        home, _ = trained
        history = '[{"role": "user", "content": "Which is larger, 9 or 4?"}]'

        run = ask(home, tiny_base, home.path / "out", f"--history={history}", "--system_prompt=None")

        assert run.answer == "9"

    def test_missing_model_is_an_error_in_the_protocol(self, torch_home: Home, tmp_path: Path) -> None:
        run = ask(torch_home, tmp_path, tmp_path)

        assert run.code == 1
        assert [line["status"] for line in run.json_lines] == ["error"]


class TestStopAndResume:
    def test_stopped_run_goes_on_and_ends_like_an_undisturbed_one(self, torch_home: Home, tiny_base: Path) -> None:
        short = sft_arguments(torch_home, tiny_base, *SHORT)
        runs = run_whole_and_stopped(torch_home, "sft-demo.py", short, at=6)

        assert_went_on(*runs, "loss", "learning_rate", "grad_norm")
        files = [torch_home.path / name / "adapter_model.safetensors" for name in ("out", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_early_stopping_keeps_the_best_step_over_a_stop(self, torch_home: Home, tiny_base: Path) -> None:
        # the loss falls, so that of all losses the first is the highest: here it is the best one
        best = ("--early_stopping_patience=2", "--metric_for_best_model=eval_loss", "--greater_is_better=true")
        more = (*best, "--eval_steps=20", "--save_steps=20", "--eval_samples=20")

        stopped, resumed = stop_and_resume(
            torch_home, "sft-demo.py", sft_arguments(torch_home, tiny_base, *more), at=45
        )

        assert (stopped.code, resumed.code) == (143, 0), resumed.stderr
        notes = [note["message"] for note in resumed.of_type("note")]
        assert "ended early at step 60 of 120: eval_loss has not improved 2 times" in notes
        assert any(note.startswith("the weights are those of step 20, the best: eval_loss ") for note in notes)
        assert resumed.score("after", "eval_loss") == pytest.approx(stopped.curve("eval_loss")[20], rel=1e-5)

    def test_half_written_checkpoint_is_passed_over(self, torch_home: Home, tiny_base: Path) -> None:
        train(torch_home, tiny_base, "--max_steps=4", "--save_steps=2")
        weights = torch_home.path / "out" / "checkpoint-4" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

        run = train(torch_home, tiny_base, "--max_steps=6", "--save_steps=2")

        assert run.code == 0, run.stderr
        notes = [note["message"] for note in run.of_type("note")]
        assert notes[1:3] == ["checkpoint-4 is incomplete and is passed over", "resumed from checkpoint-2"]


class TestData:
    def test_plain_text_trains_without_a_score(self, torch_home: Home, tiny_base: Path) -> None:
        rows = torch_home.write_rows(*(json.dumps({"text": f"some words to read {number}"}) for number in range(8)))

        run = train(torch_home, tiny_base, "--max_steps=1", "--batch_size=2", rows=rows)

        assert run.code == 0, run.stderr
        assert {event["name"] for event in run.of_type("evaluation")} == {"eval_loss", "perplexity"}

    def test_long_answers_are_measured_by_their_loss(self, torch_home: Home, tiny_base: Path) -> None:
        answers = [" ".join(str((first + step) % 10) for step in range(50)) for first in range(40)]
        rows = torch_home.write_rows(
            *(json.dumps({"prompt": f"Count on from {n}.", "completion": text}) for n, text in enumerate(answers))
        )

        run = train(torch_home, tiny_base, "--max_steps=1", "--batch_size=4", "--eval_max_new_tokens=8", rows=rows)

        assert run.code == 0, run.stderr
        assert {event["name"] for event in run.of_type("evaluation")} == {"eval_loss", "perplexity"}
        assert any("no exact match is measured" in note["message"] for note in run.of_type("note"))
        assert [(one["phase"], one["number"]) for one in run.of_type("sample")] == [
            (phase, number) for phase in ("before", "after") for number in range(5)
        ]

    def test_named_columns_packing_and_checkpointing(self, torch_home: Home, tiny_base: Path) -> None:
        rows = torch_home.write_rows(*['{"q": "What is 1 + 1?", "a": "2"}'] * 20)
        more = ("--input_train_name=q", "--output_train_name=a", "--packing=true", "--gradient_checkpointing=true")

        run = train(torch_home, tiny_base, "--max_steps=2", "--batch_size=2", *more, rows=rows)

        assert run.code == 0, run.stderr
        (told,) = [note["message"] for note in run.of_type("note") if note["message"].startswith("packing")]
        assert told == (
            "packing=true puts 20 sequences into about 1: 2 steps pass over the rows about 20 times as often; "
            "without flash attention it is slower than no packing"
        )

    def test_packing_of_rows_of_its_own_accord_leaves_the_steps_alone(self, torch_home: Home, tiny_base: Path) -> None:
        """Also the loss of packed rows is that of the rows: attention does not reach from one into another."""
        rows = torch_home.write_rows(*(json.dumps({"prompt": f"{n} + 1?", "completion": "2"}) for n in range(8)))
        more = ("--max_steps=1", "--batch_size=8", "--eval_fraction=0", "--resume=false")

        plain = train(torch_home, tiny_base, *more, rows=rows, output="plain")
        packed = train(torch_home, tiny_base, *more, "--packing=true", rows=rows, output="packed")

        said = [note["message"] for note in plain.of_type("note")]
        assert [one for one in said if "memory" not in one] == ["8 rows -> 8 sequences -> 1 steps"]
        why = "packing=auto: rows are not packed: without flash attention they would be kept apart only at a cost"
        assert why in [record["msgDetail"] for record in plain.records]
        assert packed.of_type("note")[-1]["message"] == "8 rows -> 1 sequences -> 1 steps"
        assert packed.curve()[1] == pytest.approx(plain.curve()[1], rel=1e-4)

    def test_long_rows_are_left_out_and_counted(self, torch_home: Home, tiny_base: Path) -> None:
        rows = torch_home.write_rows(
            *['{"prompt": "a", "completion": "b"}'] * 8,
            '{"prompt": "a", "completion": null}',
            '{"prompt": "a", "completion": "%s"}' % ("b " * 99),
        )

        run = train(torch_home, tiny_base, "--max_steps=1", "--max_seq_length=64", "--eval_fraction=0", rows=rows)

        assert run.code == 0, run.stderr
        notes = [note["message"] for note in run.of_type("note") if not note["message"].startswith("expected memory")]
        assert notes == [
            "rows.jsonl: rows are left out: there is no answer to learn (1 of 10 rows; line 9)",
            "the row is longer than allowed and is left out (1 of 9 rows: rows.jsonl, line 10)",
            "9 rows -> 8 sequences -> 1 steps",
        ]

    def test_too_long_everywhere_gets_one_sentence(self, torch_home: Home, tiny_base: Path) -> None:
        rows = torch_home.write_rows(*['{"prompt": "a", "completion": "b"}'] * 9)

        run = train(torch_home, tiny_base, "--max_seq_length=2", "--eval_fraction=0", rows=rows)

        assert run.code == 1
        assert "all 9 rows are longer than allowed" in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006


class TestCustom02:
    def arguments(self, home: Home, base: Path, *more: str, output: str = "out") -> list[str]:
        pairs = [argument.removeprefix("--").split("=") for argument in demo_parameters("Custom02")]
        words = [word for name, value in pairs for word in (f"--{name}", value)]
        paths = ["--base_path", str(base), "--save_path", str(home.path / "complete" / output)]
        paths += ["--output_dir", str(home.path / output), "--dataset_path", str(dataset("sft-demo"))]
        return ["--train_id", "job-1", "--seq", "1", *words, *paths, "--dtype_str", "float32", *more]

    def test_makes_a_complete_model_that_has_learned(
        self, torch_home: Home, tiny_base: Path, trained: tuple[Home, Finished]
    ) -> None:
        run = torch_home.run("custom02.py", *self.arguments(torch_home, tiny_base))

        assert run.code == 0, run.stderr
        assert run.json_lines[-1]["status"] == "success"
        assert run.exact_match("before") < 0.4
        assert run.exact_match("after") >= 0.9
        run.lowered("eval_loss", "perplexity")
        # the same rows are held out of the same base model: two ways to the same number
        assert run.score("before", "eval_loss") == pytest.approx(trained[1].score("before", "eval_loss"), rel=1e-5)
        complete = torch_home.path / "complete" / "out"
        assert ask(torch_home, complete, complete).answer == "8"
        assert run.of_type("progress")[-1]["step"] == 100

    def test_stopped_run_ends_with_the_same_weights(self, torch_home: Home, tiny_base: Path) -> None:
        whole = torch_home.run("custom02.py", *self.arguments(torch_home, tiny_base, *SHORT, output="whole"))
        cut = self.arguments(torch_home, tiny_base, *SHORT, output="cut")
        stopped, resumed = stop_and_resume(torch_home, "custom02.py", cut, at=6)

        assert_went_on(whole, stopped, resumed, "loss")
        files = [torch_home.path / "complete" / name / "model.safetensors" for name in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_early_stopping_keeps_the_best_step_over_a_kill(self, torch_home: Home, tiny_base: Path) -> None:
        answers = [(7 * number * number + 3) % 10 for number in range(32)]  # nothing that other rows would teach
        rows = torch_home.write_rows(
            *(json.dumps({"instruction": f"What is {n}?", "output": str(a)}) for n, a in enumerate(answers))
        )
        more = ("--dataset_path", str(rows), "--batch_size", "8", "--eval_steps", "2", "--save_steps", "100")
        stopping = ("--early_stopping_patience", "3", "--logging_steps", "1", "--eval_fraction", "0.25")
        names = ("whole", "cut")
        whole, cut = (self.arguments(torch_home, tiny_base, *more, *stopping, output=name) for name in names)
        first, second = (torch_home.path / "complete" / name / "model.safetensors" for name in names)

        assert_stops_early_over_a_kill(torch_home, "custom02.py", whole, cut, weights=(first, second))

    def test_best_step_that_cannot_be_had_is_refused(self, home: Home) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"
        refused = {
            (
                "--early_stopping_patience",
                "2",
                "--save_steps",
                "7",
            ): "save_steps (7) must be a multiple of eval_steps (50)",
            (
                "--load_best_model_at_end",
                "true",
                "--save_steps",
                "7",
            ): "load_best_model_at_end keeps the best checkpoint",
            ("--early_stopping_patience", "0"): "early_stopping_patience must be at least 1, it is 0",
            (
                "--metric_for_best_model",
                "bleu",
            ): "metric_for_best_model is eval_bleu; what is measured: eval_loss, eval_",
        }
        for more, sentence in refused.items():
            run = home.run("custom02.py", *self.arguments(home, base, *more))
            assert run.code == 1
            assert sentence in run.stderr

    def test_missing_column_gets_one_sentence(self, torch_home: Home, tiny_base: Path) -> None:
        more = ("--dataset_path", str(torch_home.write_rows('{"a": 1}')))

        run = torch_home.run("custom02.py", *self.arguments(torch_home, tiny_base, *more))

        assert run.code == 1
        assert run.json_lines[-1]["status"] == "failed"
        assert "no row has the column 'instruction'; there are: a" in run.stderr


class TestGroupOfProcesses:
    """The shipped scripts as two processes of one group, on CPUs."""

    def test_sft_demo_learns_and_reports_once(
        self, torch_home: Home, tiny_base: Path, trained: tuple[Home, Finished]
    ) -> None:
        # the demo's rows of a step are shared by two
        arguments = sft_arguments(torch_home, tiny_base, "--batch_size=16")

        run = torch_home.unforked.run("sft-demo.py", *arguments, launcher=PAIR)

        assert run.code == 0, run.stderr
        steps = [event["step"] for event in run.of_type("metrics") if "loss" in event["values"]]
        assert steps == sorted(set(steps))
        assert last_loss(run) < run.curve()[1] / 4
        assert [event["phase"] for event in run.of_type("evaluation")] == ["before"] * 3 + ["after"] * 3
        # 90 rows for two processes: those that come again to fill up the last batches do not count
        assert run.score("before", "eval_loss") == pytest.approx(trained[1].score("before", "eval_loss"), rel=1e-5)
        assert run.exact_match("after") >= 0.8
        assert [event["kind"] for event in run.of_type("artifact")].count("adapter") == 1
        (log,) = (torch_home.path / "logs").iterdir()
        assert log.read_text().count('"msg": 200005') == 1

    def test_sft_demo_stops_at_one_step_and_goes_on(self, torch_home: Home, tiny_base: Path) -> None:
        arguments = sft_arguments(torch_home, tiny_base, "--save_steps=1000", "--eval_fraction=0")
        process = torch_home.start("sft-demo.py", *arguments, launcher=PAIR)
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step 10/"):
            assert process.poll() is None

        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()

        stopped = [line for line in stderr.splitlines() if "its checkpoint is complete" in line]
        assert len({line.removeprefix("[rank1]: ") for line in stopped}) == 1, stderr
        (made,) = [event for event in torch_home.events() if event["type"] == "artifact"]
        assert made["kind"] == "checkpoint"
        resumed = torch_home.run("sft-demo.py", *arguments, "--max_steps=14", launcher=PAIR)
        assert resumed.code == 0, resumed.stderr
        (note,) = [note["message"] for note in resumed.of_type("note") if "resumed" in note["message"]]
        assert note.removeprefix("resumed from ") == Path(made["path"]).name

    def test_custom02_makes_the_same_model_as_one_process(self, torch_home: Home, tiny_base: Path) -> None:
        arguments = TestCustom02().arguments(torch_home, tiny_base, "--max_steps", "10", "--logging_steps", "1")

        alone = torch_home.run("custom02.py", *arguments, "--eval_samples", "5")
        pair = torch_home.run("custom02.py", *arguments, "--eval_samples", "5", launcher=PAIR)

        assert (alone.code, pair.code) == (0, 0), pair.stderr
        losses = [[event["values"]["loss"] for event in run.of_type("metrics")] for run in (alone, pair)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert len(losses[0]) == 10
        for phase in ("before", "after"):
            assert pair.score(phase, "eval_loss") == pytest.approx(alone.score(phase, "eval_loss"), rel=1e-3)
        assert pair.json_lines[-1]["status"] == "success"


def last_loss(run: Finished) -> float:
    return float([event["values"]["loss"] for event in run.of_type("metrics") if "loss" in event["values"]][-1])


class TestWhatIsNotThere:
    """What was asked for and cannot be had is refused before a row is read, not replaced."""

    @pytest.mark.parametrize(
        ("argument", "sentence"),
        [
            (
                "--load_in_4bit=true",
                "load_in_4bit=true needs the package bitsandbytes, which this environment does not",
            ),
            ("--optimizer=paged_adamw_8bit", "optimizer=paged_adamw_8bit needs the package bitsandbytes"),
            ("--attention=flash_attention_2", "attention=flash_attention_2 needs the package flash-attn"),
        ],
    )
    def test_gets_one_sentence(self, home: Home, argument: str, sentence: str) -> None:
        run = train(home, catalogue.ROOM / "custom01" / "custom01-base", argument)

        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr

    def test_argument_that_a_script_does_not_know_is_refused_by_hand_and_told_in_a_job(self, home: Home) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"
        paths = ("--dataset_path", str(home.write_rows("no")), "--base_path", str(base), "--save_path", "saved")
        arguments = (*paths, "--learning_rat=1", "--num_generations=2", "--train_env=trl", "--adapter_path=")

        by_hand = home.run("custom02.py", *arguments)
        in_a_job = home.run("custom02.py", *arguments, environment={"DEEPE_JOB_ID": "j"})

        assert "unknown arguments: learning_rat; did you mean --learning_rate?" in by_hand.stderr
        told = [note["message"] for note in in_a_job.of_type("note")]
        assert told == ["this script does not know learning_rat: without effect"]
        assert "not valid JSON" in in_a_job.stderr


MIXTURE = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import deepe_llm as llm
for kind in ("qwen2_moe", "mixtral", "qwen3"):
    config = AutoConfig.for_model(kind, num_hidden_layers=1, hidden_size=32, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    print(kind, llm.linear_layers(model), sorted(llm.ROUTERS & llm.names_of_linear(model, routers=True)))
"""


def test_routers_of_a_mixture_are_left_alone(torch_home: Home) -> None:
    (torch_home.scripts / "mixture.py").write_text(MIXTURE)

    run = torch_home.run("mixture.py")

    attention, experts = ["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]
    assert run.stdout.splitlines() == [
        f"qwen2_moe {sorted(attention + experts)} ['gate', 'shared_expert_gate']",
        f"mixtral {sorted([*attention, 'w1', 'w2', 'w3'])} ['gate']",
        "qwen3 all-linear []",
    ], run.stderr
