"""`deepe datasets preview`."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import app, row_preview
from tests.cli.standin import Answer, Request, document, stand_in

GIVEN = {
    "text": "user: 1 + 2?\n", "characters": 13, "tokens": 5, "learned": False, "weight": 0, "cut": False,
}  # fmt: skip
LEARNED = {"text": "3<end>", "characters": 6, "tokens": 2, "learned": True, "weight": 1, "cut": False}
HIDDEN = {"text": None, "characters": 900, "tokens": 300, "learned": True, "weight": 1, "cut": True}
SEQUENCE = {
    "role": "answer", "used": False, "exceeded": [{"parameter": "max_seq_length", "value": 7}], "tokens": 307,
    "given": 5, "learned": 302, "spans": [GIVEN, LEARNED, HIDDEN],
}  # fmt: skip
EMPTY: dict[str, Any] = {
    "form": None, "kind": None, "problem": None, "left_out": None, "notes": [], "raw": None, "raw_characters": None,
    "sequences": [], "sequence_count": 0,
}  # fmt: skip
ROWS = [
    EMPTY
    | {"line": 1, "form": "messages", "kind": "conversation", "sequences": [SEQUENCE, SEQUENCE], "sequence_count": 9},
    EMPTY
    | {
        "line": 2,
        "problem": {"pointer": "", "code": "turns_empty", "detail": "Line 2: no turns."},
        "raw": "{}",
        "raw_characters": 40,
    },
    EMPTY | {"line": 3, "left_out": "no_answer", "raw": "{}", "raw_characters": 2},
]
LENGTHS = {
    "measured": 1000, "total": 20000, "tokens": {"p50": 40, "p90": 80, "p99": 120, "p100": 130}, "learned_share": 0.314,
    "too_long": [], "refused": 0,
}  # fmt: skip
TOKENS = "tokens: p50 40, p90 80, p99 120, p100 130; 31% of all are learned (sample: 1000 of 20000 rows)"
PROFILE = {
    "rows": 20000, "forms": {"messages": 20000}, "kinds": {}, "roles": {}, "features": {}, "turns": None, "scripts": {},
    "estimated_tokens": {"p50": 38}, "lengths": LENGTHS, "duplicates": 0, "problem_count": 0, "problems": [],
    "remarks": [],
}  # fmt: skip
NOTES = [{"pointer": "/dataset", "code": "bos_missing", "detail": "1 of 3 rows (lines 1): [no] first token."}]


def answers(request: Request) -> Answer:
    if request.method == "POST":
        return document({"rows": ROWS, "lengths": LENGTHS, "notes": NOTES})
    if "/profile" in request.path:
        return document(PROFILE)
    return document({"items": [{"question": "größer?"}], "offset": 0, "total": 1})


def test_tells_given_and_learned_apart_by_marks() -> None:
    options = ["--method", "M", "--base-model", "b", "--row", "1", "-r", "2", "-p", "max_seq_length=7"]
    with stand_in(answers) as (url, asked):
        shown = CliRunner().invoke(app, ["datasets", "preview", "faq", *options, "--url", url])

    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[:4] == [
        "line 1  messages as conversation",
        "answer: 307 tokens, 5 given, 302 learned; left out: over max_seq_length (7)",
        "[given]user: 1 + 2?",
        "[learned]3<end>[cut] ... 300 tokens, 900 characters ... ",
    ]
    assert lines[-9:] == [
        "and 7 more sequences",
        "line 2",
        "refused: Line 2: no turns.",
        "{} ... 38 more characters",
        "line 3",
        "left out: no_answer",
        "{}",
        f"all rows: {TOKENS}",
        "note: 1 of 3 rows (lines 1): [no] first token.",
    ]
    assert (asked[-1].path, json.loads(asked[-1].body)) == (
        "/api/v1/methods/M:preview",
        {"base_model": "b", "dataset": "faq", "rows": [1, 2], "parameters": {"max_seq_length": 7}},
    )


def test_tells_them_apart_by_colours_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_preview, "is_terminal", lambda: True)
    with stand_in(answers) as (url, _asked):
        shown = CliRunner().invoke(app, ["datasets", "preview", "faq", "-m", "M", "-b", "b", "--url", url])

    assert shown.stdout.splitlines()[0].split() == ["given", "learned", "unlearned", "cut"]
    assert "[given]" not in shown.stdout


def test_without_a_method_shows_the_rows_of_the_file() -> None:
    with stand_in(answers) as (url, asked):
        shown = CliRunner().invoke(app, ["datasets", "preview", "faq", "--row", "7", "--url", url])
        half = CliRunner().invoke(app, ["datasets", "preview", "faq", "--method", "M", "--url", url])

    assert shown.stdout == '{"question": "größer?"}\n'
    assert asked[-1].path == "/api/v1/datasets/faq/preview?offset=6&limit=1"
    assert half.exit_code == 2


def test_profile_has_the_lengths_that_were_measured() -> None:
    options = ["--method", "M", "--base-model", "b"]
    with stand_in(answers) as (url, asked):
        shown = CliRunner().invoke(app, ["datasets", "profile", "faq", *options, "--url", url])

    assert shown.exit_code == 0, shown.output
    assert asked[-1].path == "/api/v1/datasets/faq/profile?method=M&base_model=b"
    assert TOKENS in " ".join(shown.stdout.split())
