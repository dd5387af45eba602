"""Embedding-Demo for real: an encoder is built, trained by contrast, saved and asked in the `trl` environment."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue
from tests import training_environment
from tests.presets.conftest import NewHome
from tests.presets.curves import SHORT, assert_stops_early_over_a_kill, assert_went_on, run_whole_and_stopped
from tests.presets.stage import Finished, Home, dataset

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("embedding")]

TEXTS = (
    "Bring the battery back, it is changed while you wait.",
    "Clear the tray, take out the sheet and close all doors of the printer.",
    "Dial nine before the number to call outside.",
)
PROBE = """
import argparse, json, runpy
script = runpy.run_path("embedding-demo.py", run_name="script")
Pair = script["Pair"]
batch = [Pair("q", "A", ("n", "B")), Pair("q", "B", ("m",)), Pair("r", "C", ("A", "n"))]
texts = script["candidates"](batch)
own, wrong = script["targets"](batch, texts, script["right_texts"](batch))
import torch
vectors = torch.eye(len(texts))
loss, accuracy = script["contrast"](vectors[own], vectors, own, wrong, scale=20.0)
batches = script["Batches"]([Pair(f"q{n}", f"d{n}") for n in range(10)], argparse.Namespace(batch_size=4, seed=1))
epochs = [[[pair.anchor for pair in batches.of_step(3 * epoch + step)] for step in (1, 2, 3)] for epoch in (0, 1)]
rows = [Pair(f"q{n}", f"d{n % 20}") for n in range(60)]
of_several = script["Batches"](rows, argparse.Namespace(batch_size=8, seed=1))
apart = [[pair.positive for pair in of_several.of_step(step)] for step in range(1, 17)]
same = script["Batches"]([Pair("q", f"d{n}") for n in range(8)], argparse.Namespace(batch_size=4, seed=1))
found = {"texts": texts, "own": own, "wrong": wrong, "loss": loss.item(), "accuracy": accuracy, "epochs": epochs}
found |= {"apart": apart, "same": [[pair.positive for pair in same.of_step(step)] for step in (1, 2)]}
print(json.dumps(found))
"""
QUESTION = "Please help me pull out a stuck sheet of paper."


@pytest.fixture(scope="module")
def encoder() -> Path:
    return training_environment.base_model("tiny-encoder")


@pytest.fixture(scope="module")
def trained(new_home: NewHome, encoder: Path) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported."""
    home = new_home("trained")
    return home, train(home, encoder)


def arguments(home: Home, base: Path, *more: str, rows: Path | None = None, output: str = "out") -> list[str]:
    (manifest,) = [manifest for manifest in catalogue.load_manifests() if manifest.name == "Embedding-Demo"]
    return [
        "--train_id=job-1",
        "--seq=1",
        f"--model_path={base}",
        f"--dataset_path={rows or dataset('embedding-demo')}",
        f"--output_dir={home.path / output}",
        *(f"--{name}={value}" for name, value in manifest.demo.parameters.items()),
        *more,
    ]


def train(home: Home, base: Path, *more: str, rows: Path | None = None, output: str = "out") -> Finished:
    return home.run("embedding-demo.py", *arguments(home, base, *more, rows=rows, output=output))


def ask(home: Home, base: Path, model: Path, prompt: str) -> Finished:
    paths = (f"--base_model_path={base}", f"--model_path={model}")
    return home.run("ask_embedding.py", *paths, f"--prompt={prompt}", "--top_p=None")


def score(run: Finished, name: str, phase: str) -> float:
    (found,) = [one for one in run.of_type("evaluation") if (one["name"], one["phase"]) == (name, phase)]
    return float(found["value"])


def losses(run: Finished) -> dict[int, float]:
    return {event["step"]: event["values"]["loss"] for event in run.of_type("metrics")}


class TestLearning:
    def test_finds_the_right_text_which_it_did_not_before(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        assert run.code == 0, run.stderr
        assert score(run, "accuracy@1", "before") < 0.4
        assert score(run, "accuracy@1", "after") >= 0.95
        assert score(run, "mrr@10", "after") >= 0.95
        run.lowered("eval_loss")
        assert losses(run)[200] < losses(run)[1] / 10
        assert run.of_type("progress")[-1]["step"] == run.of_type("progress")[-1]["total"] == 200

    def test_saved_model_gives_the_vectors_of_the_adapter(self, trained: tuple[Home, Finished], encoder: Path) -> None:
        home, _ = trained
        paths = ("--base_path", str(encoder), "--adapter_path", str(home.path / "out"))
        complete = home.path / "complete"

        saved = home.run(
            "save_model.py", *paths, "--save_path", str(complete), "--dtype_str", "float32",
            "--model_usage_type", "embedding",
        )  # fmt: skip

        assert saved.json_lines[-1]["status"] == "success", saved.stderr
        (adapted, merged) = (
            json.loads(ask(home, base, model, QUESTION).answer)
            for base, model in ((encoder, home.path / "out"), (complete, complete))
        )
        assert len(merged) == 64
        assert merged == pytest.approx(adapted, abs=1e-4)
        assert sum(value * value for value in merged) == pytest.approx(1, abs=1e-3)
        modules = json.loads((complete / "modules.json").read_text())
        assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Normalize"]

    def test_several_lines_are_a_question_and_texts_to_rank(
        self, trained: tuple[Home, Finished], encoder: Path
    ) -> None:
        home, _ = trained

        run = ask(home, encoder, home.path / "out", "\n".join((QUESTION, *TEXTS)))

        assert run.code == 0, run.stderr
        assert run.answer.splitlines()[0].endswith(TEXTS[1])
        assert len(run.answer.splitlines()) == 3

    def test_chunks_of_a_batch_learn_the_same(self, torch_home: Home, encoder: Path) -> None:
        whole = train(torch_home, encoder, "--max_steps=5", "--logging_steps=1", output="whole")
        chunks = train(torch_home, encoder, "--max_steps=5", "--logging_steps=1", "--chunk_size=7", output="chunks")

        assert losses(chunks) == pytest.approx(losses(whole), abs=1e-4)


@pytest.fixture(scope="module")
def compared(new_home: NewHome) -> dict[str, Any]:
    """Return what functions of the script say about batches."""
    home = new_home("batch")
    (home.scripts / "probe.py").write_text(PROBE)
    run = home.run("probe.py")
    assert run.code == 0, run.stderr
    found: dict[str, Any] = run.json_lines[-1]
    return found


class TestBatch:
    def test_every_text_is_a_candidate_once_and_right_ones_are_no_wrong_ones(self, compared: dict[str, Any]) -> None:
        assert compared["texts"] == ["A", "B", "C", "n", "m"]
        assert compared["own"] == [0, 1, 2]
        wrong = [
            [text for text, is_wrong in zip(compared["texts"], row, strict=True) if is_wrong]
            for row in compared["wrong"]
        ]
        assert wrong == [["C", "n", "m"], ["C", "n", "m"], ["A", "B", "n", "m"]]

    def test_perfect_vectors_have_no_loss_although_a_negative_is_the_right_text_of_another(
        self, compared: dict[str, Any]
    ) -> None:
        assert compared["loss"] == pytest.approx(0, abs=1e-3)
        assert compared["accuracy"] == 1

    def test_every_row_comes_once_in_an_epoch(self, compared: dict[str, Any]) -> None:
        first, second = compared["epochs"]
        assert sorted(row for batch in first for row in batch) == sorted(row for batch in second for row in batch)
        assert sorted(row for batch in first for row in batch) == sorted(f"q{number}" for number in range(10))
        assert [len(batch) for batch in first] == [3, 3, 4]
        assert first != second

    def test_rows_that_share_a_text_come_into_different_batches(self, compared: dict[str, Any]) -> None:
        epochs = compared["apart"][:8], compared["apart"][8:]
        assert all(len(set(batch)) == len(batch) for epoch in epochs for batch in epoch[:-1])  # the last takes the rest
        assert [len(batch) for batch in compared["apart"]] == [7, 8, 7, 8, 7, 8, 7, 8] * 2

    def test_rows_that_all_share_a_text_are_learned_nevertheless(self, compared: dict[str, Any]) -> None:
        assert sorted(text for batch in compared["same"] for text in batch) == [f"d{number}" for number in range(8)]


POOLING = "pooling_mode_"
MODULES = (
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {
        "idx": 1,
        "path": "1_Pooling",
        "type": "sentence_transformers.models.Pooling",
    },
)
DENSE = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "bge": (MODULES, {f"{POOLING}cls_token": True, f"{POOLING}mean_tokens": False}, {}),
    "qwen3": (
        MODULES,
        {f"{POOLING}lasttoken": True, "include_prompt": True},
        {"prompts": {"query": "Instruct: find\nQuery:", "document": ""}},
    ),
    "e5": (MODULES, {f"{POOLING}mean_tokens": True}, {"prompts": {"query": "query: ", "passage": "passage: "}}),
    "newer": (MODULES, {"pooling_mode": "lasttoken"}, {"prompts": {"all": "x: "}, "default_prompt_name": "all"}),
    "gemma": ((*MODULES, DENSE), {f"{POOLING}mean_tokens": True}, {}),
    "two": (MODULES, {f"{POOLING}cls_token": True, f"{POOLING}max_tokens": True}, {}),
}
CHOICE = """
import json, runpy, sys
from deepe_rows import Refused
script = runpy.run_path("embedding-demo.py", run_name="script")
for arguments in json.loads(sys.argv[1]):
    try:
        how = script["chosen_how"](script["make_parser"]().parse_args(arguments))
        print(json.dumps([how.pooling, how.query_prefix, how.document_prefix]))
    except Refused as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def chosen(new_home: NewHome) -> dict[str, Any]:
    """Return how vectors are made of texts on bases of several families."""
    home = new_home("bases")
    (home.scripts / "probe.py").write_text(CHOICE)
    runs: dict[str, tuple[Path, tuple[str, ...]]] = {"none": (home.path / "none", ())}
    for name, (modules, pooling, prompts) in FAMILIES.items():
        folder = home.path / name
        (folder / "1_Pooling").mkdir(parents=True)
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
        runs[name] = folder, ()
    runs["gemma, asked"] = home.path / "gemma", ("--pooling=mean",)
    runs["e5, asked"] = home.path / "e5", ("--pooling=cls", "--query_prefix=", "--document_prefix=d ")
    more = ("--dataset_path=x", "--output_dir=x")
    arguments = [[f"--model_path={folder}", *more, *asked] for folder, asked in runs.values()]
    run = home.run("probe.py", json.dumps(arguments))
    assert run.code == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if not line.startswith("[log_data]")]
    return dict(zip(runs, map(json.loads, lines), strict=True)) | {"notes": run.of_type("note")}


class TestVectorsOfTheBase:
    def test_are_made_as_its_own_files_say(self, chosen: dict[str, Any]) -> None:
        assert chosen["bge"] == ["cls", "", ""]
        assert chosen["qwen3"] == ["last", "Instruct: find\nQuery:", ""]
        assert chosen["e5"] == ["mean", "query: ", "passage: "]
        assert chosen["newer"] == ["last", "x: ", "x: "]

    def test_of_a_base_that_says_nothing_are_the_mean_and_that_is_told(self, chosen: dict[str, Any]) -> None:
        assert chosen["none"] == ["mean", "", ""]
        assert "does not say how it makes a vector" in json.dumps(chosen["notes"])

    def test_are_made_as_asked_for(self, chosen: dict[str, Any]) -> None:
        assert chosen["e5, asked"] == ["cls", "", "d "]
        assert chosen["gemma, asked"] == ["mean", "", ""]

    def test_that_this_method_cannot_make_are_refused(self, chosen: dict[str, Any]) -> None:
        assert "(Dense in modules.json)" in chosen["gemma"]
        assert f"({POOLING}cls_token, {POOLING}max_tokens)" in chosen["two"]


class TestStopAndResume:
    def test_stopped_run_has_the_curves_and_the_weights_of_an_undisturbed_one(
        self, torch_home: Home, encoder: Path
    ) -> None:
        short = arguments(torch_home, encoder, *SHORT)
        runs = run_whole_and_stopped(torch_home, "embedding-demo.py", short, at=6)

        assert_went_on(*runs, "loss", "learning_rate", "grad_norm", "in_batch_accuracy")
        files = [torch_home.path / name / "adapter_model.safetensors" for name in ("out", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_early_stopping_keeps_the_best_step_over_a_kill(self, torch_home: Home, encoder: Path) -> None:
        # which text belongs to which is nothing that other rows would teach
        words = ("printer", "mail", "battery", "phone", "screen", "paper", "number", "door")
        pairs = [
            (f"{a} {b}", f"{words[(5 * i + 3 * j) % 8]} {words[(i * j + 1) % 8]}")
            for i, a in enumerate(words)
            for j, b in enumerate(words)
        ]
        rows = torch_home.write_rows(*(json.dumps({"anchor": a, "positive": b}) for a, b in pairs))
        more = ("--batch_size=16", "--eval_steps=2", "--save_steps=100", "--early_stopping_patience=3")
        measured = ("--logging_steps=1", "--eval_fraction=0.25")
        names = ("whole", "cut")
        whole, cut = (arguments(torch_home, encoder, *more, *measured, rows=rows, output=name) for name in names)
        first, second = (torch_home.path / name / "adapter_model.safetensors" for name in names)

        assert_stops_early_over_a_kill(torch_home, "embedding-demo.py", whole, cut, weights=(first, second))


class TestRefusals:
    @pytest.mark.parametrize(
        ("rows", "more", "sentence"),
        [
            (['{"a": "x", "b": "y"}'], (), "line 1: the columns to learn from are missing; there are: a, b."),
            (
                ['{"anchor": "x", "positive": ""}'],
                (),
                "rows.jsonl has no rows to learn from: there is no text to learn",
            ),
            (['{"anchor": "x", "positive": 5}'], (), "line 1: /positive: a text is expected, this is 5"),
            (['{"anchor": "x", "positive": "y"}', "no"], (), "line 2: not valid JSON"),
            (['{"anchor": "x", "positive": "y"}'] * 4, ("--eval_fraction=0",), "all rows have the same text"),
            (['{"anchor": "x", "positive": "y"}'], ("--batch_size=1",), "batch_size must be at least 2"),
        ],
        ids=["columns", "empty", "number", "json", "nothing to tell apart", "batch"],
    )
    def test_gets_one_sentence(
        self, torch_home: Home, encoder: Path, rows: list[str], more: tuple[str, ...], sentence: str
    ) -> None:
        run = train(torch_home, encoder, *more, rows=torch_home.write_rows(*rows))

        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006


def test_vocabulary_of_the_small_encoder_is_the_same_in_each_process(training_python: Path) -> None:
    """Else every machine would have a base model of its own, and a training would end elsewhere on each."""
    code = (
        "import json, runpy, sys; program = runpy.run_path(sys.argv[1]);"
        "rows = map(json.loads, program['SAMPLE'].open());"
        "words = [word for row in rows for text in row.values() for word in text.split()];"
        "print(json.dumps(program['word_pieces'](words, 600), sort_keys=True))"
    )
    program = catalogue.ROOM / "embedding-demo" / "tiny_encoder.py"
    command = [str(training_python), "-c", code, str(program)]

    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))

    assert first == second
    assert "##" in first
