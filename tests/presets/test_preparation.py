"""Rows are prepared once, by any number of processes; a changed input is prepared anew; the user is told the same."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from app.presets import catalogue
from tests.presets import families, preparation_probe
from tests.presets.conftest import NewHome

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("labels")]

LONG = " ".join(["word"] * 60)
REFUSED = {"messages": [{"role": "tool", "content": "t"}, {"role": "assistant", "content": "a"}]}


def rows() -> Iterator[dict[str, Any]]:
    """Yield rows with one and several answers, too long ones, texts that are split, turns that are merged."""
    for number in range(1200):
        question, answer = {"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}
        match number % 10:
            case 0:
                yield {"text": f"{number} {LONG}"}
            case 1:
                yield {"messages": [question, {"role": "assistant", "content": f"{number} {LONG}"}]}
            case 2:
                yield {"messages": [question, answer, {"role": "user", "content": "more"}, answer]}
            case 3:
                yield {"messages": [{"role": "system", "content": "s"}, question, question, answer]}
            case 4:
                yield {"messages": [question, {"role": "assistant", "content": ""}]}
            case _:
                yield {"prompt": f"q{number}", "completion": f"a{number}", "source": "unused"}


CASES: dict[str, dict[str, Any]] = {  # prepared one after the other
    "first": {},
    "next attempt": {"output_dir": "next"},
    "by two": {"preprocessing_workers": 2, "afresh": True},
    "by one, of two": {"preprocessing_workers": 1},
    "other limit": {"max_seq_length": 60},
    "other template": {"chat_template": "none"},
    "other seed": {"seed": 7},
    "other rows": {"rows": [{"prompt": "new", "completion": "row"}]},
    "other template of the base": {"base": {"chat_template.jinja": "{# changed #}"}},
    "other tokenizer": {"base": {"tokenizer_config.json": "\n"}},
    "refused": {"rows": [REFUSED] * 5},
    "refused by two": {"rows": [REFUSED] * 5, "preprocessing_workers": 2},
    "all too long": {"only": [{"prompt": "q", "completion": LONG}] * 5, "eval_fraction": 0},
}


def methods() -> dict[str, Any]:
    """Return what other methods are given: the method, its rows and options."""
    turns = [[{"role": "user", "content": text} for text in ("q", f"asked {n}")] for n in range(700)]
    pairs = [
        {"prompt": prompt, "chosen": "good", "rejected": LONG if n % 9 == 0 else f"bad {n}"}
        for n, prompt in enumerate(turns)
    ]
    asked = [{"question": f"{LONG if n % 9 == 0 else 'q'} {n}", "answer": f"#### {n}", "more": [n]} for n in range(700)]
    texts = [{"anchor": f"a{n}", "positive": f"{LONG if n % 9 == 0 else 'p'} {n}"} for n in range(700)]
    short = ["--max_input_length=80", "--max_content_length=80"]
    judged = {one: {"rows": pairs, "options": [f"--objective={one}", *short]} for one in ("dpo", "kto", "orpo")}
    return {name: {"method": "dpo-demo"} | one for name, one in judged.items()} | {
        "grpo": {"method": "grpo-demo", "rows": asked, "options": ["--system_prompt=", *short]},
        "embedding": {"method": "embedding-demo", "rows": texts, "options": ["--max_seq_length=64"]},
    }


@pytest.fixture(scope="module")
def found(new_home: NewHome) -> dict[str, Any]:
    home = new_home("preparation")
    for module in (families, preparation_probe):
        shutil.copy(str(module.__file__), home.scripts)
    cases = home.path / "cases.json"
    cases.write_text(json.dumps({"rows": list(rows()), "cases": CASES, "methods": methods()}))

    run = home.run("preparation_probe.py", str(catalogue.ROOM), str(cases))

    assert run.code == 0, run.stderr
    answers: dict[str, Any] = run.json_lines[-1]
    return answers


@pytest.mark.parametrize("name", CASES)
def test_is_what_rendering_row_by_row_gives_and_tells(found: dict[str, Any], name: str) -> None:
    assert found[name]["differences"] == []


def test_tells_what_became_of_the_rows(found: dict[str, Any]) -> None:
    told = "\n".join(found["first"]["told"])

    assert found["first"]["sequences"] > 1000
    assert found["first"]["held out"] > 100
    for words in ("is learned in several pieces", "longer than allowed and is left out", "questions in a row are one"):
        assert words in told
    assert "and is left out (" in told
    assert " held-out rows: rows.jsonl, line " in told


def test_is_made_once(found: dict[str, Any]) -> None:
    assert found["next attempt"]["made"] == found["first"]["made"]
    assert found["by one, of two"]["made"] == found["by two"]["made"] != found["first"]["made"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("other")])
def test_a_changed_input_is_prepared_anew(found: dict[str, Any], name: str) -> None:
    assert found[name]["made"] not in [found[other]["made"] for other in CASES if other != name]


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo", "grpo", "embedding"])
def test_other_methods_prepare_once_and_the_same_by_any_number_of_processes(found: dict[str, Any], name: str) -> None:
    by_one, by_two, again = found["methods"][name]

    table, held_out, told, rows, _longest = by_one["rows"]

    assert by_one["rows"] == by_two["rows"] == again["rows"]
    assert by_one["made"] != by_two["made"] == again["made"]
    assert 0 < len(held_out) < len(table)
    assert rows > 600
    assert any("longer" in note for note in told)


def test_refuses_with_the_first_lines(found: dict[str, Any]) -> None:
    for name in ("refused", "refused by two"):
        assert "rows.jsonl, line 120" in found[name]["refused"]
        assert "; and " in found[name]["refused"]
    assert found["all too long"]["refused"].startswith(
        "refused: all 5 rows are longer than allowed; raise max_input_length"
    )
