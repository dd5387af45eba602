"""`deepe jobs submit`, `retry`, `show` and `samples` against a scripted server."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli.command import typed
from app.cli.main import app
from tests.cli.standin import Answer, Request, document, stand_in

LINK = {"id": "2", "stage": "training", "status": "queued"}
SUBMITTED = {**LINK, "chain": [LINK], "warnings": []}
ATTEMPT = {"number": 1, "node": "gpu-1", "reason": "signal", "resumed_from": None}
FAILED: dict[str, Any] = {
    **LINK,
    **dict.fromkeys(
        ("reason_detail", "base_model", "dataset", "model", "result_model", "waiting_for", "waiting", "node_silent")
    ),
    **dict.fromkeys(("created_at", "started_at", "finished_at", "progress")),
    **dict.fromkeys(("node", "priority", "queue", "user")),
    "accelerators": [],
    "resources": {},
    "name": "faq",
    "status": "failed",
    "reason": "cuda_out_of_memory",
    "environment": "trl",
    "method": {"name": "SFT-Demo", "version": 1},
    "parameters": {},
    "metrics": {},
    "evaluations": [],
    "chain": [LINK],
    "log_tail": [],
    "fix": {"changes": {"batch_size": 4}, "detail": "Train with batch_size 4."},
    "history": [ATTEMPT, {**ATTEMPT, "number": 2, "resumed_from": {"step": 40}}],
}


def run(*arguments: str, answer: dict[str, Any]) -> tuple[str, Any]:
    """Return what the command printed, and the body that it sent."""

    def script(_: Request) -> Answer:
        return document(answer)

    with stand_in(script) as (url, asked):
        result = CliRunner().invoke(app, ["jobs", *arguments, "--url", url])
    assert result.exit_code == 0, result.output
    return result.output, json.loads(asked[-1].body) if asked[-1].body else None


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (("-d", "faq"), {"dataset": "faq"}),
        (
            ("-d", "my faq:100=0.5", "-d", "b", "--validation", "held"),
            {
                "datasets": [{"dataset": "my faq", "max_rows": 100, "weight": 0.5}, {"dataset": "b"}],
                "validation_dataset": "held",
            },
        ),
        (("-d", "faq=2"), {"datasets": [{"dataset": "faq", "weight": 2}]}),
    ],
)
def test_submit_names_one_data_set_or_several(options: tuple[str, ...], body: dict[str, Any]) -> None:
    _, sent = run("submit", "SFT-Demo", *options, answer=SUBMITTED)

    assert sent == {"method": "SFT-Demo", "parameters": {}, **body}


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ((), {}),
        (("--fix",), {"fix": True}),
        (("--no-resume",), {"resume": False}),
        (("--resume", "--fix", "-p", "seed=7"), {"resume": True, "fix": True, "parameters": {"seed": 7}}),
    ],
)
def test_retry_sends_what_was_chosen(options: tuple[str, ...], body: Any) -> None:
    _, sent = run("retry", "1", *options, answer=SUBMITTED)

    assert sent == body


def test_submit_sends_policy_and_limits_only_when_given() -> None:
    options = ("--max-retries", "3", "--retry-on", "signal", "--retry-on", "stalled", "--time-limit", "60")

    _, plain = run("submit", "SFT-Demo", answer=SUBMITTED)
    _, chosen = run("submit", "SFT-Demo", *options, answer=SUBMITTED)

    assert plain == {"method": "SFT-Demo", "parameters": {}}
    assert chosen["retry"] == {"max_retries": 3, "on": ["signal", "stalled"]}
    assert chosen["limits"] == {"seconds": 60.0}


def test_show_offers_the_fix_and_tells_of_the_attempts() -> None:
    shown, _ = run("show", "2", answer=FAILED)

    assert f"Train with batch_size 4. {typed('jobs retry 2 --fix')}" in shown
    assert "1 on gpu-1, signal" in shown
    assert "2 on gpu-1, signal, from step 40" in shown


@pytest.mark.parametrize(
    ("answers", "lines"),
    [
        ([{"prompt": "3 or 8?", "wanted": "8", "before": "[bold]11", "after": None}], ("3 or 8?", "[bold]11")),
        ([], ("The job keeps no answers.",)),
    ],
)
def test_samples_are_shown_as_they_were_given(answers: list[Any], lines: tuple[str, ...]) -> None:
    shown, _ = run("samples", "2", answer={"samples": answers})

    assert all(line in shown for line in lines)
