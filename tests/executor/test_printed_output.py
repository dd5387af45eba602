"""What trainers print becomes curves and progress, at steps that are known; nothing else does."""

import json
import os
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.executor.attempts.log_projection import LogProjector
from app.executor.attempts.printed_forms import MAX_LINE_BYTES, WORTH_READING, printed_forms
from app.executor.attempts.projections import project_whole_log
from app.executor.runs.events import NoteEvent, ProgressEvent, RunEvents, event_document
from app.executor.runs.metrics import MetricSeries
from app.executor.runs.observe import RunObserver
from app.executor.runs.progress import Progress
from app.executor.runs.run_folder import RunFolder
from app.store.home import Home
from tests.training_environment import ready

CLEAR = "\r" + " " * 45 + "\r"


def bar(step: int, total: int, about: str = "", more: str = "") -> str:
    return f"\r{about}{100 * step // total:3d}%|{'#' * step}{' ' * 3}| {step}/{total} [00:01<00:09,  1.50s/it{more}]"


def trainer(values: dict[str, Any], step: int, total: int) -> str:
    """Return what `Trainer` prints of a step: the bar is taken away, the values written, the bar drawn anew."""
    return f"{CLEAR}{values}\n{bar(step, total)}"


def record(step: int, **values: Any) -> str:
    """Return a log record of a callback of DeepExtension's form."""
    document = {"level": "info", "time": "2026-01-01T00:00:00Z", "taskUuid": "t", "seq": 1, "msg": 200009}
    details = dict.fromkeys(("reward", "kl", "validation_loss")) | {"step": step} | values
    return "[log_data]: " + json.dumps(document | {"msgDetail": str(25.0 * step), "details": details}) + "\n"


class Run:
    """One attempt whose output is written in pieces."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.folder = RunFolder(self.home.run_folder("j", 1))
        self.folder.path.mkdir(parents=True)

    def prints(self, text: str | bytes, *, final: bool = True) -> "Run":
        with self.folder.output_log.open("ab") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        projector = LogProjector(self.folder.output_log, self.folder.projected_events, self.folder.events)
        while projector.advance(final=final) and final:
            pass
        return self

    def tells(self, *documents: dict[str, Any]) -> None:
        with self.folder.events.open("a") as file:
            file.writelines(json.dumps({"time": 1.0} | document) + "\n" for document in documents)

    @property
    def curves(self) -> dict[str, list[tuple[int, float | None]]]:
        series = MetricSeries([self.folder])
        series.refresh()
        return {name: [(point.step, point.value) for point in series.series(name)] for name in series.names}

    @property
    def notes(self) -> list[str]:
        return [event.message for event in RunEvents(self.folder).read() if isinstance(event, NoteEvent)]

    @property
    def progress(self) -> Progress | None:
        return RunObserver(self.home).digest("j", 1).progress


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


NUMBERS = [{"loss": 2.5, "grad_norm": 1.25, "learning_rate": 2e-05, "epoch": 0.5}, {"loss": 1.5, "epoch": 1.0}]
WORDS: list[dict[str, Any]] = [{name: f"{value:.4g}" for name, value in one.items()} for one in NUMBERS]
EVALUATION = "\n" + bar(0, 3) + f"\x1b[A{CLEAR}\x1b[A" + bar(3, 3) + "\x1b[A"


class TestTrainer:
    @pytest.mark.parametrize("values", [NUMBERS, WORDS])
    def test_values_stand_at_the_step_of_the_bar_behind_them(self, run: Run, values: list[dict[str, Any]]) -> None:
        run.prints(bar(0, 20) + trainer(values[0], 10, 20) + trainer(values[1], 20, 20) + "\n")

        assert run.curves["loss"] == [(10, 2.5), (20, 1.5)]
        assert run.curves["learning_rate"] == [(10, 2e-05)]
        assert run.notes == []
        progress = run.progress
        assert progress is not None
        assert (progress.step, progress.total, progress.percent) == (20, 20, 100.0)

    def test_bar_of_an_evaluation_is_not_the_trainings(self, run: Run) -> None:
        text = bar(0, 4) + trainer(NUMBERS[0], 2, 4) + EVALUATION + trainer({"eval_loss": 3.0, "epoch": 1.0}, 2, 4)
        text += trainer(NUMBERS[1], 4, 4) + EVALUATION + trainer({"eval_loss": 2.0, "epoch": 2.0}, 4, 4)
        text += EVALUATION  # an evaluation of its own behind the training

        run.prints(text)

        assert run.curves["eval_loss"] == [(2, 3.0), (4, 2.0)]
        assert (run.progress.step, run.progress.total) == (4, 4) if run.progress else False

    def test_step_of_a_slow_training_is_known_before_its_bar_is_drawn_again(self, run: Run) -> None:
        run.prints(bar(0, 20) + trainer(NUMBERS[0], 10, 20), final=False)

        assert run.curves["loss"] == [(10, 2.5)]
        assert run.progress is not None
        assert run.progress.step == 10

    @settings(deadline=None, max_examples=30)
    @given(seed=st.integers(0, 10_000))
    def test_growth_in_any_pieces_with_a_restart_after_each_gives_the_same(
        self, tmp_path_factory: pytest.TempPathFactory, seed: int
    ) -> None:
        random, run = Random(seed), Run(tmp_path_factory.mktemp("run"))
        text = bar(0, 30)
        for step in range(1, 31):
            text += trainer({"loss": 30.0 - step, "epoch": step / 10}, step, 30)
        data = text.encode()
        while data:
            size = random.choice((1, 7, 40, 200, 3000))
            run.prints(data[:size], final=len(data) <= size)
            data = data[size:]

        assert run.curves["loss"] == [(step, 30.0 - step) for step in range(1, 31)]

    def test_reports_are_counted_and_said_to_be_where_nothing_names_a_step(self, run: Run) -> None:
        evaluation = {"eval_loss": 3.0, "epoch": 1.0}
        run.prints(f"{NUMBERS[0]}\n{NUMBERS[0]}\n{NUMBERS[1]}\n{evaluation}\n")

        assert run.curves["loss"] == [(1, 2.5), (2, 1.5)]
        assert run.curves["eval_loss"] == [(2, 3.0)]
        assert [note.partition(":")[0] for note in run.notes] == ["The output names no steps"]

    def test_of_a_group_of_processes_the_first_one_counts(self, run: Run) -> None:
        run.prints(f"[rank1]: {{'loss': 9.0, 'epoch': 0.5}}\n[rank0]: {NUMBERS[0]}\n[default2]:{NUMBERS[1]}\n")

        assert run.curves["loss"] == [(1, 2.5)]

    def test_holes_are_holes(self, run: Run) -> None:
        run.prints("{'loss': nan, 'grad_norm': inf, 'learning_rate': '1e-05', 'epoch': 0.1}\n")

        assert run.curves["loss"] == [(1, None)]
        assert run.curves["grad_norm"] == [(1, None)]
        assert run.curves["learning_rate"] == [(1, 1e-05)]


class TestPriority:
    def test_the_scripts_own_metrics_leave_its_bar(self, run: Run) -> None:
        run.tells({"type": "metrics", "step": 7, "values": {"loss": 2.5}})

        run.prints(trainer(NUMBERS[0], 10, 20))

        assert run.curves == {"loss": [(7, 2.5)]}
        assert run.progress is not None
        assert run.progress.total == 20
        assert b'"type": "metrics"' not in run.folder.projected_events.read_bytes()

    def test_own_metrics_that_come_later_take_over(self, run: Run) -> None:
        run.prints(trainer(NUMBERS[0], 10, 20))
        run.tells({"type": "metrics", "step": 12, "values": {"loss": 2.0}})

        assert run.curves == {"loss": [(12, 2.0)]}

    def test_steps_that_are_named_take_over_from_counted_reports(self, run: Run) -> None:
        run.prints(f"{NUMBERS[0]}\n" + trainer(NUMBERS[1], 20, 20))

        assert run.curves["loss"] == [(20, 1.5)]

    @pytest.mark.parametrize("has_bar", [True, False])
    def test_records_that_lag_behind_the_output_are_put_right(self, run: Run, has_bar: bool) -> None:
        """DeepExtension's callback writes, at the end of a step, what the newest report said."""
        text, last = record(1).replace("200009", "200004"), None
        for step in range(1, 9):
            if last is not None:
                text += record(step, **{name: last.get(name) for name in ("loss", "learning_rate", "epoch")})
            for report in ({"loss": 10.0 - step, "learning_rate": 1e-05 * step}, {"eval_loss": 20.0 - step}):
                if step % (2 if "loss" in report else 4) == 0:
                    last = report | {"epoch": step / 4}
                    text += trainer(last, step, 8) if has_bar else f"{last}\n"

        run.prints(text)

        assert run.curves["loss"] == [(2, 8.0), (4, 6.0), (6, 4.0), (8, 2.0)]
        assert run.curves["eval_loss"] == [(4, 16.0), (8, 12.0)]
        assert run.notes == []
        assert run.progress is not None
        assert run.progress.step == 8

    @pytest.mark.parametrize("separator", ["", "{'loss': 3.0, 'lr': 0.1}\n"])
    def test_records_of_a_loop_of_its_own_stay_as_they_are(self, run: Run, separator: str) -> None:
        second = separator.replace("3", "2")
        run.prints(
            bar(0, 2) + separator + record(1, loss=3.0, lr=0.1) + second + bar(1, 2) + record(2, loss=2.0, lr=0.1)
        )

        assert run.curves["loss"] == [(1, 3.0), (2, 2.0)]


# what is printed -> the curves of it, at their steps
FORMS: list[tuple[str, dict[str, list[tuple[int, float | None]]]]] = [
    # mlx-lm, by words and (since 0.32) as a table
    (
        "Starting training..., iters: 20\nIter 1: Val loss 2.858, Val took 5.1s\n"
        "Iter 10: Train loss 2.600, Learning Rate 1.000e-05, It/sec 0.500, Tokens/sec 200.1, Trained Tokens 4012, "
        "Peak mem 4.8 GB\nIter 10: Saved adapter weights to a.safetensors.\n",
        {"validation_loss": [(1, 2.858)], "loss": [(10, 2.6)], "learning_rate": [(10, 1e-05)]},
    ),
    (
        "  iter   train_loss     tok/s     tokens\n     1    val 2.858    5.10s\n"
        "    10    2.345 \u25bc    1,234      1.2k\n"
        "  \x1b[38;5;244m  20\x1b[0m    \x1b[1;35mval\x1b[0m \x1b[1m1.5\x1b[0m    \x1b[38;5;244m0.10s\x1b[0m\n",
        {"validation_loss": [(1, 2.858), (20, 1.5)], "loss": [(10, 2.345)], "tokens_per_second": [(10, 1234.0)]},
    ),
    # ms-swift
    (
        "{'loss': 1.5, 'token_acc': 0.7, 'epoch': 0.1, 'global_step/max_steps': '5/50', 'percentage': '10.00%', "
        "'elapsed_time': '3s', 'remaining_time': '27s', 'memory(GiB)': 3.5, 'train_speed(iter/s)': 1.4}\n",
        {"loss": [(5, 1.5)], "token_acc": [(5, 0.7)], "memory(GiB)": [(5, 3.5)]},
    ),
    ("{'loss': 1.5, 'iteration': '5/50', 'elapsed_time': '3s'}\n", {"loss": [(5, 1.5)]}),
    # LLaMA-Factory, by its logger
    ("[INFO|2026-01-01 10:00:00] app.callbacks:143 >> {'loss': 0.9, 'learning_rate': 1e-05, 'epoch': 0.5}\n",
     {"loss": [(1, 0.9)]}),
    # accelerate's examples
    ("epoch 0: {'accuracy': 0.68, 'f1': 0.81}\nepoch 1: {'accuracy': 0.7, 'f1': 0.82}\n",
     {"accuracy": [(0, 0.68), (1, 0.7)], "f1": [(0, 0.81), (1, 0.82)]}),
    (bar(3, 9) + "\nstep loss: 0.5, lr: 1e-4\n", {"step_loss": [(3, 0.5)], "lr": [(3, 1e-4)]}),
    # Lightning, tqdm and rich
    (
        bar(2, 2, "Epoch 0: ", ", v_num=0, train_loss=0.500") + bar(1, 2, "Epoch 1: ", ", v_num=0, train_loss=nan"),
        {"train_loss": [(2, 0.5), (3, None)]},
    ),
    ("Epoch 0/9 \u2501\u2501\u2501\u2501\u2501 10/10 0:00:00 \u2022 0:00:00 12.5it/s v_num: 0.000 train_loss: 0.5\n",
     {"train_loss": [(10, 0.5)]}),
    # SimpleTuner, diffusers
    (bar(10, 99, "Epoch 1/1, Steps: ", ", lr=1e-4, step_loss=0.1"), {"lr": [(10, 1e-4)], "step_loss": [(10, 0.1)]}),
    # loops of one's own
    ("Epoch [1/2], Step [600/600], Loss: 0.5\nEpoch [2/2], Step [100/600], Loss: 0.25\n",
     {"loss": [(600, 0.5), (700, 0.25)]}),
    ("Train Epoch: 1 [640/6400 (10%)]\tLoss: 2.2\nTrain Epoch: 2 [0/6400 (0%)]\tLoss: 1.1\n",
     {"loss": [(640, 2.2), (6400, 1.1)]}),
    ("iter 100: loss 2.5, time 123.1ms, mfu -100.00%\nstep 200: train loss 4.2, val loss 4.3\n",
     {"loss": [(100, 2.5)], "train_loss": [(200, 4.2)], "val_loss": [(200, 4.3)]}),
    ("2026-01-01 12:00:00,123 [INFO] step=10 loss=0.5 lr=1e-05 acc=93.2%\n",
     {"loss": [(10, 0.5)], "lr": [(10, 1e-05)], "acc": [(10, 93.2)]}),
    ("epoch 3 | train_loss 0.5 | perplexity 1.2k\n", {"train_loss": [(3, 0.5)], "perplexity": [(3, 1200.0)]}),
    (bar(1, 3) + "{'loss': np.float64(0.5), 'step': 7}\n", {"loss": [(7, 0.5)]}),
    # printed twice, by bar and by line
    (bar(1, 3, more=", loss=0.51") + "\nstep 1: loss 0.512\n" + bar(2, 3, more=", loss=0.42") + "\nstep 2: loss 0.42\n",
     {"loss": [(1, 0.512), (2, 0.42)]}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "curves"), FORMS)
def test_form(run: Run, text: str, curves: dict[str, Any]) -> None:
    run.prints(text)

    assert curves.items() <= run.curves.items()


@pytest.mark.parametrize(
    "text",
    [
        "{'learning_rate': 1e-4, 'loss': 'mse', 'epochs': 3}",
        "{'row': 1, 'loss': 2.0, 'text': 'x'}",
        "line 5 of a script that says a lot: loss 0.123456 learning rate 2e-05",
        "the loss of 3 packets; step 4 follows",
        bar(1, 3, "Map: ") + bar(3, 3, "Map: "),
        bar(1, 3, "Loading checkpoint shards: "),
        bar(1, 3, "Tokenizing train dataset: ") + bar(3, 3, "Generating train split: "),
        "\rmodel.safetensors: 100%|###| 1.2G/1.2G [00:01<00:00, 500MB/s]",
        "\r 10%|#   | 1.23k/12.3k [00:01<00:09, 10.0it/s]",
        "\u2501" * 40,
        "   3    4.5 \u25bc",
        "{'loss': " + "9" * MAX_LINE_BYTES + ", 'epoch': 1}",
    ],
)
def test_what_looks_like_it_is_nothing(run: Run, text: str) -> None:
    run.prints(text + "\n")

    assert run.curves == {}
    assert run.progress is None


def test_bar_of_what_was_done_before_names_no_step(run: Run) -> None:
    run.prints(bar(3, 3) + f"\n{NUMBERS[0]}\n{NUMBERS[1]}\n")

    assert run.curves["loss"] == [(1, 2.5), (2, 1.5)]
    assert len(run.notes) == 1


def test_report_without_a_step_stands_beside_the_newest_that_named_one(run: Run) -> None:
    run.prints("step 10 loss 0.5\nval loss: 0.75\nstep 20 loss 0.25\n")

    assert run.curves == {"loss": [(10, 0.5), (20, 0.25)], "val_loss": [(10, 0.75)]}


def test_what_a_bar_carries_goes_on_beside_reports_of_something_else(run: Run) -> None:
    run.prints(bar(1, 9, more=", loss=0.5") + "\nval loss: 0.75\n" + bar(2, 9, more=", loss=0.4"))

    assert run.curves == {"loss": [(1, 0.5), (2, 0.4)], "val_loss": [(1, 0.75)]}


def test_time_left_follows_the_bar(tmp_path: Path) -> None:
    run = Run(tmp_path)
    clock = iter(range(0, 1000, 10))
    projector = LogProjector(run.folder.output_log, run.folder.projected_events, clock=lambda: float(next(clock)))
    for step in range(5):
        with run.folder.output_log.open("a") as file:
            file.write(bar(step, 20))
        projector.advance()

    assert run.progress is not None
    assert (run.progress.steps_per_second, run.progress.eta_seconds) == (0.1, 160.0)


def test_epochs_of_a_bar_that_begins_anew_follow_each_other(run: Run) -> None:
    run.prints("".join(bar(step, 3) + f"\nloss: {epoch}.{step}\n" for epoch in range(2) for step in range(1, 4)))

    assert [step for step, _ in run.curves["loss"]] == [1, 2, 3, 4, 5, 6]


_WORDS = st.sampled_from(
    ["loss", "'loss': ", "{'", "}", "%|", "| 1/2 [", "00:01<", "]", "[rank1]: ", "\u2501", " val ", "\u25bc",
     "Iter 1: ", "step ", "epoch", "1e-5", "nan", "9" * 50, "-", ".", ",", ": ", "=", " " * 30, "\x1b[A", "\r",
     "[log_data]:", "\ud800"]
)  # fmt: skip


@settings(deadline=None)
@given(parts=st.lists(_WORDS | st.text(max_size=20), max_size=200))
def test_no_line_raises(parts: list[str]) -> None:
    line = "".join(parts).encode("utf-8", "surrogatepass")

    for form in printed_forms(line):
        assert form is not None


@pytest.mark.parametrize(
    "unit",
    ["loss ", "{'a': 1, ", "'loss': ", "1", "1,000", "\u2501 ", "%|", " ", "step 1/", "a=1, ", "[rank0]: ", "train_",
     "val ", "epoch [", "9/", "loss: 1.", "|", "'", "e-", "lr "],
)  # fmt: skip
def test_no_line_is_slow(unit: str) -> None:
    long = (unit * MAX_LINE_BYTES).encode()[:MAX_LINE_BYTES]
    begun = _processor_seconds()
    for suffix in (b"", b"}", b"]", b" 1/2 [00:01<00:01, 1it/s]", b"\xe2\x96\xbc"):
        for prefix in (b"", b"{'loss': ", b" 10%|", b"Iter 1: Train loss ", b"step 1 "):
            printed_forms(prefix + long + suffix)

    assert _processor_seconds() - begun < 0.5  # 25 lines; where a pattern looks back and forth, one takes seconds


def _processor_seconds() -> float:
    return time.thread_time()


def test_patterns_are_looked_for_in_every_form() -> None:
    for text, _ in FORMS:
        assert WORTH_READING.search(text.encode()), text
    assert event_document(ProgressEvent(1.0, 1))["step"] == 1


TRAINER = """
import argparse, torch
from transformers import Trainer, TrainingArguments
p = argparse.ArgumentParser()
p.add_argument("--output_dir")
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def forward(self, x, labels):
        return {"loss": ((self.layer(x) - labels) ** 2).mean(), "logits": labels}
rows = [{"x": torch.ones(4), "labels": torch.ones(1)}] * 16
common = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "logging_steps": 2, "use_cpu": True}
common |= {"eval_strategy": "epoch", "save_strategy": "no"}
options = TrainingArguments(p.parse_args().output_dir, report_to=["tensorboard"], **common)
Trainer(Net(), options, train_dataset=rows, eval_dataset=rows).train()
"""


def test_real_trainer_shows_its_curves_printed_and_in_event_files(run: Run, tmp_path: Path) -> None:
    command = [str(ready()), "-u", "-c", TRAINER, "--output_dir", str(run.folder.output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with run.folder.output_log.open("wb") as output:
        subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True)

    run.prints("")
    printed = run.curves
    project_whole_log(run.folder)

    assert [step for step, _ in printed["loss"]] == [2, 4, 6, 8]
    assert [step for step, _ in printed["eval_loss"]] == [4, 8]
    assert (run.progress.step, run.progress.total) == (8, 8) if run.progress else False
    assert run.notes == []
    written = run.curves
    assert [step for step, _ in written["loss"]] == [2, 4, 6, 8]
    for (_, one), (_, other) in zip(printed["loss"], written["loss"], strict=True):
        assert one == pytest.approx(other, rel=1e-3)  # four digits are printed
