"""`deepe reviews`: what is shown of code, and what a decision sends."""

import json

from typer.testing import CliRunner

from app.cli import app
from tests.cli.standin import Answer, Request, document, stand_in

DIGEST = "3f9c1a" + "0" * 58
ITEM = {
    "digest": DIGEST,
    "state": "waiting",
    "stage": "training",
    "file": "finance.py",
    "method": {"id": "1", "name": "finance", "version": 3},
    "created_at": "2026-12-01T00:00:00Z",
}
REVIEW = {
    **ITEM,
    "changed_by": [{"principal": "key:1", "name": "ada"}],
    "unknown_author": False,
    "approved_version": 2,
    "differences": [{"path": "finance.py", "change": "changed", "diff": "-a\n+eval(b)", "complete": False}],
    "not_compared": 4,
    "notes": [{"path": "finance.py", "line": 1, "detail": "It runs code.", "quoted": "eval(b)"}],
    "not_read": 0,
    "decisions": [],
    "running_jobs": ["job-1"],
}


def answers(request: Request) -> Answer:
    if request.path.startswith("/api/v1/code-reviews?"):
        return document({"items": [ITEM], "next_cursor": None})
    return document(REVIEW)


def test_shows_and_decides_by_the_beginning_of_a_digest() -> None:
    runner = CliRunner()
    with stand_in(answers) as (url, asked):
        listed = runner.invoke(app, ["reviews", "list", "--url", url])
        shown = runner.invoke(app, ["reviews", "show", "3f9c1a", "--url", url])
        approved = runner.invoke(app, ["reviews", "approve", "3f9c1a", "--note", "read", "--url", url])
        withdrawn = runner.invoke(app, ["reviews", "withdraw", DIGEST, "--url", url])
        unknown = runner.invoke(app, ["reviews", "reject", "ffffff", "--url", url])

    assert "finance v3" in listed.stdout
    for said in ("ada", "v2", "+eval(b)", "not all of it", "4 more files", "It runs code."):
        assert said in shown.stdout
    assert approved.exit_code == 0
    sent = next(one for one in asked if one.path.endswith(":approve"))
    assert (sent.path, json.loads(sent.body)) == (f"/api/v1/code-reviews/{DIGEST}:approve", {"note": "read"})
    assert "jobs cancel job-1" in withdrawn.stdout
    assert unknown.exit_code != 0
