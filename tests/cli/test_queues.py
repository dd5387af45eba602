"""`deepe queues`, and what `deepe jobs` says and shows of places."""

import json

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.cli.jobs import resources
from tests.cli.standin import Answer, Request, document, stand_in

QUEUE = {"name": "research", "max_live": 4, "max_live_per_user": None, "running": 3, "waiting": 9, "updated_at": None}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "200")
    return CliRunner()


def answers(request: Request) -> Answer:
    if request.path.startswith("/api/v1/queues?"):
        return document({"items": [QUEUE], "next_cursor": None})
    if request.path == "/api/v1/jobs":
        chain = [{"id": "1", "stage": "training", "status": "queued"}]
        return document({"id": "1", "chain": chain, "warnings": []}, status=201)
    if request.method == "DELETE":
        return Answer(204)
    return Answer(200, json.dumps(QUEUE).encode(), headers={"ETag": '"7"'})


def test_queues_are_listed_set_and_cleared_as_they_were_read(runner: CliRunner) -> None:
    with stand_in(answers) as (url, asked):
        listed = runner.invoke(app, ["queues", "list", "--url", url])
        made = runner.invoke(app, ["queues", "set", "research", "--max", "4", "--url", url])
        cleared = runner.invoke(app, ["queues", "clear", "research", "--json", "--url", url])

    assert [word in listed.stdout for word in ("research", "9", "any number")] == [True] * 3
    assert "4 at once" in made.stdout
    assert json.loads(cleared.stdout) == {"name": "research"}
    put = next(one for one in asked if one.method == "PUT")
    assert (put.headers["if-match"], json.loads(put.body)) == ('"7"', {"max_live": 4, "max_live_per_user": None})
    assert next(one for one in asked if one.method == "DELETE").headers["if-match"] == '"7"'


def test_submit_says_what_the_job_needs(runner: CliRunner) -> None:
    options = ["--accelerators", "2", "--memory", "40000", "--label", "gpu=a100", "--priority", "-5"]
    with stand_in(answers) as (url, asked):
        result = runner.invoke(
            app, ["jobs", "submit", "M", *options, "--queue", "research", "--user", "ann", "--url", url]
        )

    assert result.exit_code == 0, result.output
    body = json.loads(asked[-1].body)
    assert body["resources"] == {
        "accelerators": 2, "accelerator_memory_mib": 40000, "labels": {"gpu": "a100"},
    }  # fmt: skip
    assert (body["priority"], body["queue"], body["user"]) == (-5, "research", "ann")


def test_label_that_is_none_is_refused(runner: CliRunner) -> None:
    result = runner.invoke(app, ["jobs", "submit", "M", "--label", "gpu"])

    assert result.exit_code == 2
    assert "NAME=VALUE" in result.stderr
    assert resources(None, None, []) is None
