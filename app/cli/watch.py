"""Follow jobs to their end: one stream after the other along the chain, resumed when a connection breaks."""

import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, Final, Protocol

from app.cli.client import Api, ConnectionLost, ServiceFailed, Unreachable, segment
from app.cli.exits import CliFailure
from app.cli.output import print_json_line, write
from app.cli.sse import StreamEvent
from app.cli.watching import TERMINAL, WatchedJob

PATIENCE_SECONDS: Final = 60.0
"""How long a service may be away before watching gives up."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0
_QUEUE_SECONDS = 0.2
_PASSING = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})

Clock = Callable[[], float]


class Screen(Protocol):
    """Shows what happens. `lines` are for readers without a terminal; others draw the job itself."""

    def begin(self, job: WatchedJob) -> None: ...

    def show(self, job: WatchedJob, event: StreamEvent, lines: list[str]) -> None: ...

    def finish(self, job: WatchedJob, document: dict[str, Any]) -> None: ...


class PlainScreen:
    """One line for each state, progress step and evaluation."""

    def __init__(self, *, indent: str = "") -> None:
        self._indent = indent

    def begin(self, job: WatchedJob) -> None:
        if job.status == "queued":
            self._write([f"{job.stage}: queued"])

    def show(self, job: WatchedJob, event: StreamEvent, lines: list[str]) -> None:
        self._write(lines)

    def finish(self, job: WatchedJob, document: dict[str, Any]) -> None:
        self._write(ending_lines(document))

    def _write(self, lines: list[str]) -> None:
        write("".join(f"{self._indent}{line}\n" for line in lines))


class JsonScreen:
    """One JSON object a line: every event as it came, at last the job."""

    def begin(self, job: WatchedJob) -> None:
        pass

    def show(self, job: WatchedJob, event: StreamEvent, lines: list[str]) -> None:
        print_json_line({"job": job.id, "event": event.event, "id": event.id, "data": event.data})

    def finish(self, job: WatchedJob, document: dict[str, Any]) -> None:
        print_json_line({"job": job.id, "event": "job", "data": document})


def watch_chain(api: Api, job_id: str, screen: Screen) -> list[dict[str, Any]]:
    """Watch a job and those that follow it in its chain; return how each ended. The first failure is the last seen."""
    first = api.get(f"/jobs/{segment(job_id)}")
    ids = [link["id"] for link in first["chain"]]
    ids = ids[ids.index(first["id"]) :] if first["id"] in ids else [first["id"]]
    ended = []
    for identity in ids:
        ended.append(watch_one(api, identity, screen))
        if ended[-1]["status"] != "succeeded":
            break
    return ended


def watch_one(api: Api, job_id: str, screen: Screen) -> dict[str, Any]:
    """Watch one job to its end and return it as it is then; the building of an environment it waits for comes first."""
    document = api.get(f"/jobs/{segment(job_id)}")
    job = WatchedJob(id=document["id"], stage=document["stage"], name=document["name"], status=document["status"])
    screen.begin(job)
    _watch_builds(api, document, screen)
    for event in follow(api, f"/jobs/{job.id}/events"):
        lines = list(job.apply(event))
        screen.show(job, event, lines)
    document = _patiently(lambda: _ended(api, job.id))
    job.status, job.reason, job.reason_detail = document["status"], document["reason"], document["reason_detail"]
    screen.finish(job, document)
    return document


def follow(
    api: Api, path: str, *, clock: Clock = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[StreamEvent]:
    """Yield a stream's events up to its `end`, resuming behind the last one when the connection breaks."""
    last_id: str | None = None
    pause, last_heard = _FIRST_PAUSE, clock()
    while True:
        try:
            for event in api.stream("GET", path, last_event_id=last_id):
                pause, last_heard = _FIRST_PAUSE, clock()
                if event.event == "problem":
                    break
                last_id = event.id or last_id
                yield event
                if event.event == "end":
                    return
        except (ConnectionLost, ServiceFailed) as failure:
            if _is_lasting(failure) or clock() - last_heard > PATIENCE_SECONDS:
                raise
        if clock() - last_heard > PATIENCE_SECONDS:
            raise ConnectionLost(f"The stream of {path} does not go on.")
        sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def ending_lines(document: dict[str, Any]) -> list[str]:
    """Return what a person should know of a job that has ended: nothing more after a success."""
    if document["status"] == "succeeded":
        return []
    lines = [f"{document['stage']}: {document['status']} ({document['reason']})"]
    if document.get("reason_detail"):
        lines.append(str(document["reason_detail"]))
    tail = [line for line in document.get("log_tail") or [] if line.strip()]
    if tail:
        lines += ["Last lines of its output:", *(f"  {line}" for line in tail)]
    lines.append(f"The whole output: deepe jobs logs {document['id']}")
    return lines


def _watch_builds(api: Api, document: dict[str, Any], screen: Screen) -> None:
    """Wait until a job leaves the queue; its stream does not tell that an environment is built for it meanwhile."""
    job_id, watched = document["id"], set[str]()
    while document["status"] == "queued":
        build = document["waiting_for"]
        if build is not None and build not in watched:
            watched.add(build)
            watch_one(api, build, screen)
        else:
            time.sleep(_QUEUE_SECONDS)
        document = _patiently(lambda: api.get(f"/jobs/{job_id}"))


def _is_lasting(failure: CliFailure) -> bool:
    """Say whether waiting is useless: a defect stays, a service or database that is away comes back."""
    return isinstance(failure, ServiceFailed) and failure.status not in _PASSING


def _ended(api: Api, job_id: str) -> dict[str, Any] | None:
    document: dict[str, Any] = api.get(f"/jobs/{job_id}")
    return document if document["status"] in TERMINAL else None


def _patiently(read: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """Return what `read` says once it says something; a service that is away meanwhile is waited for."""
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, _FIRST_PAUSE
    while True:
        try:
            document = read()
            if document is not None:
                return document
        except (Unreachable, ServiceFailed) as failure:
            if _is_lasting(failure) or time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise ConnectionLost("The job's end was announced, but the service does not show it.")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
