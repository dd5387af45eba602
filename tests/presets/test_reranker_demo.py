"""Reranker-Demo for real: an encoder learns to order documents, is saved and asked; rows become what losses take."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue
from tests import training_environment
from tests.presets.conftest import NewHome
from tests.presets.curves import assert_went_on, run_whole_and_stopped
from tests.presets.stage import Finished, Home, dataset, demo_parameters

SCRIPT = "reranker-demo.py"
QUESTION = "How can I clear a paper jam?"
TEXTS = (
    "Dial nine before the number to call outside.",
    "Clear the tray, take out the sheet and close all doors of the printer.",
    "Deleted mails stay in the bin for thirty days.",
)
SHORT = (
    "--max_samples=60",
    "--max_steps=12",
    "--logging_steps=1",
    "--eval_samples=4",
    "--learning_rate=0.01",
    "--batch_size=4",
)
PROBE = """
import argparse, contextlib, json, runpy, sys
from datasets import Dataset
from deepe_llm import Machine
from deepe_options import Options
from deepe_reranking import Group, drawn, groups_of, measures, right_documents
from deepe_rows import Graded, Pair, Refused
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, losses
from transformers import set_seed

base, output = sys.argv[1:]
script = runpy.run_path("reranker-demo.py", run_name="script")
script["with_negatives"].__globals__["remark"] = lambda *_, **__: None
machine = Machine("cpu", "float32", None, four_bit=False, optimizer="adamw_torch")

def arguments(loss, *more):
    given = [f"--model_path={base}", f"--output_dir={output}", "--dataset_path=", f"--loss={loss}", "--num_negatives=2"]
    given += ["--finetuning_type=full", "--batch_size=2", "--max_steps=3", "--logging_steps=1", "--seed=1", *more]
    args, rest = script["make_parser"]().parse_known_args(given)
    args.options = Options(rest, script["LIBRARY_OPTIONS"], args)
    return args

pairs = [Pair("q", "A", ("n",)), Pair("q", "B"), Pair("r", "C", ("n", "m"))]
graded = [Graded("s", "A", 2.0), Graded("s", "B", 0.0), Graded("s", "C", 1.0), Graded("t", "A", 1.0)]
found = {}
for name, rows in {"pairs": pairs, "graded": graded}.items():
    for loss in ("binary_cross_entropy", "multiple_negatives_ranking", "list_net", "lambda"):
        args = arguments(loss)
        groups = groups_of(rows)
        right = right_documents(groups)
        documents = sorted({text for group in groups for text in group.documents})
        try:
            learned, _ = script["with_negatives"](groups, [], documents, right, args)
        except Refused as error:
            found[f"{name} {loss}"] = str(error)
            continue
        wrong = [(one.query, text) for one in learned for text in one.negatives if text in right[one.query]]
        assert not wrong, wrong
        trainer = script["build_trainer"](args, machine, learned, [], [], checkpointing=False)
        held = found[f"{name} {loss}"] = trainer.train_dataset.to_list()
        if loss == "multiple_negatives_ranking":  # the library would take documents of other queries, too
            continue
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        set_seed(args.seed)
        model = CrossEncoder(base, num_labels=1, device="cpu")
        of_library = getattr(losses, script["LOSSES"][loss])(model)
        rows_by_hand = Dataset.from_list(held)
        plain = CrossEncoderTrainer(model=model, args=trainer.args, train_dataset=rows_by_hand, loss=of_library)
        with contextlib.redirect_stdout(sys.stderr):
            plain.train()
        found[f"losses of {name} {loss}"] = [
            [line["loss"] for line in one.state.log_history if "loss" in line] for one in (trainer, plain)
        ]
orders = [Group("q", ("a", "b", "c"), (0.0, 2.0, 1.0))]
found["best"] = measures(orders, [[0.1, 0.9, 0.5]])
found["worst"] = measures(orders, [[0.9, 0.1, 0.5]])
found["constant"] = measures(orders, [[0.5, 0.5, 0.5]])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def encoder() -> Path:
    return training_environment.base_model("tiny-encoder")


def arguments(home: Home, base: Path, *more: str, rows: Path | None = None, output: str = "out") -> list[str]:
    data = rows or dataset("embedding-demo")
    paths = [f"--model_path={base}", f"--dataset_path={data}", f"--output_dir={home.path / output}"]
    return [*paths, *demo_parameters("Reranker-Demo"), *more]


def save(home: Home, base: Path, customized: Path) -> Path:
    folder = customized.with_name(f"{customized.name}-complete")
    paths = ("--base_path", str(base), "--adapter_path", str(customized), "--save_path", str(folder))
    run = home.run("save_model.py", *paths, "--dtype_str", "float32", "--model_usage_type", "embedding")
    assert run.json_lines[-1]["status"] == "success", run.stderr
    return folder


def ask(home: Home, base: Path, model: Path, prompt: str) -> Finished:
    return home.run("ask_reranker.py", f"--base_model_path={base}", f"--model_path={model}", f"--prompt={prompt}")


@pytest.fixture(scope="module")
def trained(new_home: NewHome, encoder: Path) -> tuple[Home, Finished]:
    """Return the home of a demo training of two thirds of its length, and what it reported."""
    home = new_home("reranker")
    run = home.run(SCRIPT, *arguments(home, encoder, "--max_steps=200", "--eval_steps=100"))
    assert run.code == 0, run.stderr
    return home, run


@pytest.mark.training
@pytest.mark.xdist_group("reranker_demo")
class TestTraining:
    def test_orders_documents_which_it_could_not_before(self, trained: tuple[Home, Finished], encoder: Path) -> None:
        home, run = trained

        # about half of the smallest gain among six seeds
        for measure, gain in {"mrr@10": 0.2, "ndcg@10": 0.2, "accuracy@1": 0.1}.items():
            assert run.score("after", measure) > run.score("before", measure) + gain
        run.lowered("eval_loss")
        assert run.curve("eval_mrr@10")[200] == pytest.approx(run.score("after", "mrr@10"))
        assert (home.path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644
        assert not (home.path / "out" / "eval").exists()
        assert any("are taken from other queries by chance" in note["message"] for note in run.of_type("note"))

        asked = ask(home, encoder, home.path / "out", json.dumps({"query": QUESTION, "documents": TEXTS}))

        assert asked.code == 0, asked.stdout
        scores, texts = zip(*(line.split("  ", 1) for line in asked.answer.splitlines()), strict=True)
        assert sorted(texts) == sorted(TEXTS)
        assert sorted(map(float, scores), reverse=True) == list(map(float, scores))

    def test_adapter_with_mined_documents_goes_on_and_is_saved_whole(self, torch_home: Home, encoder: Path) -> None:
        """The encoder itself finds the nearest documents; the checkpoint has the adapter and the head."""
        more = ("--finetuning_type=lora", "--loss=multiple_negatives_ranking", f"--hard_negatives_model_path={encoder}")
        short = arguments(torch_home, encoder, "--num_negatives=2", *more, *SHORT)

        whole, stopped, resumed = run_whole_and_stopped(torch_home, SCRIPT, short, at=5)

        assert any("are the nearest by the embedding model" in note["message"] for note in whole.of_type("note"))
        assert_went_on(whole, stopped, resumed, "loss", "grad_norm")
        files = [torch_home.path / name / "adapter_model.safetensors" for name in ("out", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()

        complete = save(torch_home, encoder, torch_home.path / "out")
        adapted, merged = (
            ask(torch_home, base, model, "\n".join((QUESTION, *TEXTS)))
            for base, model in ((encoder, torch_home.path / "out"), (complete, complete))
        )

        assert adapted.code == 0, adapted.stdout
        assert merged.answer == adapted.answer
        config = json.loads((complete / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]


@pytest.fixture(scope="module")
def prepared(new_home: NewHome, encoder: Path) -> dict[str, Any]:
    """Return what trainers hold of rows for each loss, their losses, and what measures say."""
    home = new_home("prepared")
    (home.scripts / "probe.py").write_text(PROBE)
    run = home.run("probe.py", str(encoder), str(home.path / "out"))
    assert run.code == 0, run.stderr
    found: dict[str, Any] = run.json_lines[-1]
    return found


@pytest.mark.training
@pytest.mark.xdist_group("reranker_demo")
class TestRows:
    def test_pairs_get_wrong_documents_of_other_queries(self, prepared: dict[str, Any]) -> None:
        single = prepared["pairs binary_cross_entropy"]
        tuples = prepared["pairs multiple_negatives_ranking"]

        assert {row["label"] for row in single} == {0.0, 1.0}
        assert {"query": "q", "document": "A", "label": 1.0} in single
        assert all({"negative_1", "negative_2"} <= row.keys() for row in tuples)
        assert [row["positive"] for row in tuples] == ["A", "B", "C"]
        assert {tuples[2]["negative_1"], tuples[2]["negative_2"]} == {"n", "m"}

    def test_graded_documents_of_a_query_are_one_list(self, prepared: dict[str, Any]) -> None:
        rows = {row["query"]: row for row in prepared["graded list_net"]}

        assert (rows["s"]["documents"], rows["s"]["label"]) == (["A", "B", "C"], [2.0, 0.0, 1.0])
        assert rows["t"]["label"][0] == 1.0
        assert set(rows["t"]["documents"][1:]) == {"B", "C"}

    @pytest.mark.parametrize(
        "rows",
        [
            *(f"pairs {loss}" for loss in ("binary_cross_entropy", "list_net", "lambda")),
            "graded list_net",
            "graded lambda",
        ],
    )
    def test_learns_what_the_library_learns_of_the_same_rows(self, prepared: dict[str, Any], rows: str) -> None:
        ours, by_hand = prepared[f"losses of {rows}"]

        assert len(ours) == 3
        assert ours == pytest.approx(by_hand, rel=1e-4)

    def test_what_a_loss_cannot_learn_is_refused(self, prepared: dict[str, Any]) -> None:
        assert "needs labels from 0 to 1, the highest is 2" in prepared["graded binary_cross_entropy"]
        assert (
            "needs 2 wrong documents for each query, there are 1 for 's'"
            in (prepared["graded multiple_negatives_ranking"])
        )

    def test_measures(self, prepared: dict[str, Any]) -> None:
        assert prepared["best"] == pytest.approx({"accuracy@1": 1, "mrr@10": 1, "ndcg@10": 1})
        assert prepared["worst"]["accuracy@1"] == 0
        assert prepared["worst"]["mrr@10"] == 0.5
        assert prepared["constant"] == prepared["worst"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "more", "sentence"),
        [
            ('{"a": "x"}', [], "line 1: the columns to learn from are missing; there are: a."),
            ('{"query": "x", "document": "y", "label": -1}', [], "label must be true, false or a number of at least 0"),
            ('{"query": "x", "positive": "y"}', ["--num_negatives=0"], "num_negatives must be at least 1"),
            (
                '{"query": "x", "positive": "y"}',
                ["--hard_negatives_skip=2"],
                "hard_negatives_skip has no effect without hard_negatives_model_path",
            ),
            (
                '{"query": "x", "positive": "y"}',
                ["--hard_negatives_model_path=nowhere"],
                "there is no embedding model in nowhere",
            ),
        ],
    )
    def test_gets_one_sentence(self, home: Home, row: str, more: list[str], sentence: str) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"

        run = home.run(SCRIPT, *arguments(home, base, *more, rows=home.write_rows(row)))

        assert (run.code, "Traceback" in run.stderr) == (1, False)
        assert sentence in run.stderr

    @pytest.mark.parametrize(
        ("prompt", "sentence"),
        [
            ("How do I print?", "one of the two is missing"),
            ('{"query": "q"', "begins like JSON and is none"),
            ('{"query": "q", "documents": []}', "one of the two is missing"),
            ('{"query": "q", "documents": "d"}', "documents are a list of texts"),
            ('{"query": "q", "documents": ["d"], "top": 3}', "top: not part of a question"),
        ],
    )
    def test_question_without_documents(self, home: Home, prompt: str, sentence: str) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"

        run = ask(home, base, base, prompt)

        assert (run.code, run.json_lines[-1]["status"]) == (1, "error")
        assert sentence in run.json_lines[-1]["error"]
