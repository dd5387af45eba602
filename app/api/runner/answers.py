"""Answers as the backend knows them: compact JSON with sorted keys and a newline, errors of HTTP as HTML."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from starlette.responses import Response

from app.domain.texts import DEFAULT_LANGUAGE, text
from app.executor.attempts.results import json_objects
from app.executor.jobs.runner_calls import Outcome

MISSING: Final = "Missing required parameters"
_HTML = "<!doctype html>\n<html lang=en>\n<title>{status} {phrase}</title>\n<h1>{phrase}</h1>\n<p>{sentence}</p>\n"
STREAM_HEADERS: Final = {"Cache-Control": "no-cache", "Connection": "keep-alive", "X-Accel-Buffering": "no"}
STREAM_TYPE: Final = "application/x-ndjson"
HEARTBEAT: Final = b"\n"


def json_answer(document: Any, status: int = 200) -> Response:
    """Return a JSON document; keys are sorted."""
    return Response(f"{_compact(document)}\n".encode(), status_code=status, media_type="application/json")


def html_answer(status: int, sentence: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error of HTTP itself."""
    page = _HTML.format(status=status, phrase=HTTPStatus(status).phrase, sentence=sentence)
    return Response(page.encode(), status_code=status, media_type="text/html; charset=utf-8", headers=headers)


def accepted(task: Any) -> Response:
    """Return that a call was done, or has begun."""
    return json_answer({"status": "OK", "train_id": task, "error": ""})


def bad_request(task: Any, error: str = MISSING) -> Response:
    """Return that a call cannot be done."""
    return json_answer({"status": "Bad Request", "train_id": task, "error": error}, 400)


def saving_answer(outcome: Outcome, task: Any) -> Response:
    """Return how a saving ended."""
    if outcome.succeeded:
        return accepted(task)
    if _exited(outcome):
        return _judged(outcome, task)
    return bad_request(task, _output(outcome) or _reason(outcome))


def deployment_answer(outcome: Outcome, task: Any) -> Response:
    """Return how a deployment ended: the object of a script that prints nothing else, else that it is done."""
    if outcome.succeeded:
        printed = _document(outcome)
        return json_answer(printed) if isinstance(printed, dict) else accepted(task)
    if _exited(outcome):
        return _judged(outcome, task)
    output = _output(outcome)
    message = _reason(outcome)
    if outcome.exit_code is not None:
        message = f"Deployment script failed with return code {outcome.exit_code}"
    # one file holds both streams of a script
    return json_answer({"status": "error", "message": message, "stdout": output, "stderr": output}, 500)


def frame(**members: str) -> bytes:
    """Return one frame of an answer that is streamed; its JSON has spaces, that of other answers has none."""
    return f"data: {json.dumps(members, sort_keys=True)}\n\n\n\n".encode()


def _judged(outcome: Outcome, task: Any) -> Response:
    """Return why a script that ended in order did not succeed: its own object, else that it printed none."""
    found = next((one for one in reversed(json_objects(outcome.lines)) if "status" in one), None)
    if found is not None:
        return json_answer(found, 400)
    if isinstance(_document(outcome), list):
        return json_answer({"status": 400, "train_id": task, "error": "The script printed a list, not an object"}, 400)
    error = f"Invalid JSON output: {_output(outcome)}"
    return json_answer({"status": "Internal Server Error", "train_id": task, "error": error}, 500)


def _exited(outcome: Outcome) -> bool:
    return outcome.exit_code == 0


def _document(outcome: Outcome) -> Any:
    try:
        return json.loads(_output(outcome))
    except ValueError:
        return None


def _output(outcome: Outcome) -> str:
    return "\n".join(outcome.lines)


def _reason(outcome: Outcome) -> str:
    job = outcome.job
    return text(f"reason_{job.reason}", DEFAULT_LANGUAGE, **job.reason_params)


def _compact(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))
