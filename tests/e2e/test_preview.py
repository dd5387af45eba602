"""Previews over HTTP: what is shown of a row is what the training holds, and what a template does to it is said."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.presets.catalogue import ROOM, helpers_dir
from tests.e2e.installation import Installation
from tests.fork_server import ForkServer
from tests.presets import families

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("e2e-preview")]

BASES = ("llama 3", "chatml with another eos", "gemma", "qwen 3", "none")
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "1 + 2? 🙂"}, {"role": "assistant", "content": "3 é\n"}]},
    {
        "messages": [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "silent", "weight": 0},
            {"role": "user", "content": "second"},
            {"role": "assistant", "content": "spoken"},
            {"role": "user", "content": "third"},
            {"role": "assistant", "content": "spoken too"},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "I."},
        ]
    },
    {"instruction": "extract", "output": {"name": "Bob", "n": None}, "id": 7},
    {"text": "A text of some words, all of which are learned."},
    {"prompt": "x", "completion": None},
    {"messages": [{"role": "ghost", "content": "boo"}]},
]
LEARNED = range(1, 6)
MAKE_BASES = """
import json
from pathlib import Path
import families
models, presets, *names = sys.argv[1:]
folders = [name.replace(" ", "-") for name in names]
for name, folder in zip(names, folders):
    families.save_base(name, Path(presets), Path(models, folder))
print(json.dumps(folders))
"""
TRAINER_HOLDS = """
import json
from pathlib import Path
import families
presets, base, rows = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = families.script(presets / "sft-demo/sft-demo.py").llm.load_tokenizer(str(base), families.MANUAL)
print(json.dumps([
    {"tokens": len(one["tokens"]), "text": tokenizer.decode(one["tokens"]),
     "learned": sum(label != -100 for label in one["labels"]),
     "learned_text": tokenizer.decode([label for label in one["labels"] if label != -100])}
    for one in families.held_by_sft(presets, base, rows)
]))
"""


@pytest.fixture(scope="module")
def site(
    base: Path, training_python: Path, worker_forks: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """Run an installation with base models in the shapes of families, and the rows as a data set."""
    environments = {"base": base, "trl": training_python.parents[1]}
    site = Installation(tmp_path_factory.mktemp("preview"), environments, forks=worker_forks)
    try:
        site.start()
        made = run_python(training_python, MAKE_BASES, site.home / "models", ROOM, *BASES)
        shutil.copytree(site.home / "models/none", site.home / "models/no-beginning")
        (site.home / "models/no-beginning/chat_template.jinja").write_text(families.CHATML)
        for folder in [*made, "no-beginning"]:
            site.post("/base-models", {"name": folder, "path": folder})
        body = "".join(json.dumps(row) + "\n" for row in ROWS)
        site.request("PUT", "/datasets/shown/file", content=body.encode()).raise_for_status()
        yield site
    finally:
        site.close()


def run_python(python: Path, code: str, *arguments: object) -> Any:
    """Run code in the stage's environment, with the families and the shipped helper modules; return what it printed."""
    paths = f"import sys; sys.path[:0] = {[str(Path(families.__file__).parent), str(helpers_dir())]!r}\n"
    command = [str(python), "-c", paths + code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def previewed(site: Installation, base: str, *lines: int, **members: Any) -> Any:
    body = {"base_model": base, "dataset": "shown", **members}
    return site.post("/methods/SFT-Demo:preview", body | ({"rows": list(lines)} if lines else {}), status=200)


class TestTokens:
    def test_are_those_that_the_trainer_holds(self, site: Installation, training_python: Path) -> None:
        rows = json.dumps([ROWS[line - 1] for line in LEARNED])
        held = run_python(training_python, TRAINER_HOLDS, ROOM, site.home / "models/llama-3", rows)

        preview = previewed(site, "llama-3", *LEARNED)

        shown = [
            {
                "tokens": one["tokens"],
                "text": "".join(span["text"] for span in one["spans"]),
                "learned": sum(span["tokens"] for span in one["spans"] if span["learned"]),
                "learned_text": "".join(span["text"] for span in one["spans"] if span["learned"]),
            }
            for row in preview["rows"]
            for one in row["sequences"]
        ]
        assert preview["exact"]
        assert sorted(shown, key=str) == sorted(held, key=str)

    def test_are_counted_for_all_rows_as_the_trainer_counts_them(
        self, site: Installation, training_python: Path
    ) -> None:
        held = run_python(training_python, TRAINER_HOLDS, ROOM, site.home / "models/llama-3", json.dumps(ROWS[:5]))

        preview = previewed(site, "llama-3", 1, parameters={"max_seq_length": 60})

        found = preview["lengths"]
        assert (found["measured"], found["total"], found["refused"]) == (len(ROWS), len(ROWS), 1)
        assert found["tokens"]["p100"] == max(one["tokens"] for one in held)
        assert found["learned_share"] == round(
            sum(one["learned"] for one in held) / sum(one["tokens"] for one in held), 4
        )
        over = [one for one in held if one["tokens"] > 60]
        assert over
        assert [(limit["parameter"], limit["value"]) for limit in found["too_long"]] == [("max_seq_length", 60)]
        assert "measured_rows_refused" in {note["code"] for note in preview["notes"]}
        query = "method=SFT-Demo&base_model=llama-3"
        assert site.get(f"/datasets/shown/profile?{query}")["lengths"]["tokens"] == found["tokens"]

    def test_are_cut_where_a_limit_is(self, site: Installation) -> None:
        (row,) = previewed(site, "llama-3", 1, parameters={"max_seq_length": 12})["rows"]

        (one,) = row["sequences"]
        kept = sum(span["tokens"] for span in one["spans"] if not span["cut"])
        assert (one["used"], one["exceeded"], kept) == (False, [{"parameter": "max_seq_length", "value": 12}], 12)
        assert row["notes"] == ["row_too_long"]


class TestRows:
    def test_say_what_becomes_of_them(self, site: Installation) -> None:
        preview = previewed(site, "llama-3", 4, 6, 7, 99)

        odd, left_out, wrong, missing = preview["rows"]
        assert (odd["form"], odd["kind"], odd["notes"]) == (
            "instruction-output", "conversation", ["answer_not_text", "column_unused"],
        )  # fmt: skip
        assert '{"name": "Bob", "n": null}' in odd["sequences"][0]["spans"][1]["text"]
        assert (left_out["left_out"], left_out["sequences"], left_out["raw"]) == ("no_answer", [], json.dumps(ROWS[5]))
        assert (wrong["problem"]["code"], wrong["problem"]["pointer"]) == ("turn_role_unknown", "/messages/0/role")
        assert missing["problem"]["code"] == "line_without_row"
        told = {note["code"] for note in preview["notes"]}
        assert told == {"answer_not_text", "column_unused", "no_answer", "measured_rows_refused"}

    def test_are_the_first_ones_unless_others_are_named(self, site: Installation) -> None:
        preview = previewed(site, "llama-3")

        assert [row["line"] for row in preview["rows"]] == [1, 2, 3]
        assert preview["total"] == len(ROWS)


class TestTemplates:
    """What is easily overlooked in a base model."""

    def test_answer_that_ends_with_another_token(self, site: Installation) -> None:
        preview = previewed(site, "chatml-with-another-eos", 1)

        (note,) = [note for note in preview["notes"] if note["code"] != "measured_rows_refused"]
        assert (note["code"], preview["rows"][0]["notes"]) == ("turn_end_is_not_eos", [])
        assert "ends a turn with <|im_end|>, the tokenizer's own end is <|endoftext|>" in note["detail"]

    def test_system_turn_that_is_not_taken(self, site: Installation) -> None:
        plain, system = previewed(site, "gemma", 1, 3)["rows"]

        assert "turns_merged" not in plain["notes"]
        assert "turns_merged" in system["notes"]
        assert system["sequences"][0]["spans"][0]["text"].startswith("<bos><start_of_turn>user\nBe brief.")

    def test_empty_block_of_reasoning(self, site: Installation) -> None:
        (row,) = previewed(site, "qwen-3", 1)["rows"]

        assert "think_block_added" in row["notes"]
        assert row["sequences"][0]["spans"][1]["text"].startswith("<think>\n\n</think>\n\n3")

    def test_template_without_the_first_token(self, site: Installation) -> None:
        (row,) = previewed(site, "no-beginning", 1)["rows"]

        assert "bos_missing" in row["notes"]

    def test_base_without_template(self, site: Installation) -> None:
        preview = previewed(site, "none", 1)

        assert "preview_with_plain_template" in {note["code"] for note in preview["notes"]}
        assert preview["rows"][0]["sequences"][0]["spans"][0]["text"].startswith("<|begin_of_text|>### user:")
