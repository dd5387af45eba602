"""`deepe dev`: the whole service on one machine, in the foreground."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from app.cli.client import Api, ServiceRefused
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, HomeFolder, typed
from app.cli.embedded import EmbeddedOptions, EmbeddedService
from app.cli.output import console, print_fields, print_json_line
from app.cli.private_redis import NO_REDIS, choices
from app.cli.service import Port, load_and_hide
from app.cli.watch import TERMINAL
from app.domain.plain_text import printable
from app.settings import Settings

LIVE_STATUSES = ("launching", "running", "stopping")
_CANCEL_SECONDS = 60.0
_HURRY_SECONDS = 0.5


def dev(
    port: Port = None,
    home: HomeFolder = None,
    no_redis: Annotated[bool, typer.Option("--no-redis", help="Run without any Redis.")] = False,
    stop_jobs: Annotated[
        bool, typer.Option("--stop-jobs", help="Cancel running jobs at the end; otherwise they go on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run everything on this machine.

    SQLite, API, one worker and a private Redis in the foreground; Ctrl-C stops them. Trainings that run at the end go
    on by themselves, and the next `deepe dev` finds them again.
    """
    started = time.monotonic()
    settings = load_and_hide(port=port, home=home)
    configured = settings.redis_url.get_secret_value() if settings.redis_url else None
    options = EmbeddedOptions(redis=(NO_REDIS,) if no_redis else choices(configured))
    service = EmbeddedService(settings, options, say=say)
    with ending_on_signals() as ending:
        try:
            service.start()
            _announce(service, settings, time.monotonic() - started, as_json=as_json)
            ending.wait()
            say("stopping (again Ctrl-C: at once)")
            _settle_jobs(service.url, settings, stop_jobs=stop_jobs)
        except Interrupted:
            service.stop(grace_seconds=_HURRY_SECONDS)
        finally:
            service.stop()
    say("stopped")


class Interrupted(BaseException):
    """A second signal: stop without waiting for running work."""


@contextmanager
def ending_on_signals(*, at_once: bool = False) -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT, SIGTERM or SIGHUP sets; the second one raises `Interrupted`.

    `at_once`: the first one raises, later ones are not heard, because what follows it is the cleaning up.
    """
    ending = threading.Event()

    def handle(_number: int, _frame: object) -> None:
        first = not ending.is_set()
        ending.set()
        if first is at_once:
            raise Interrupted

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    """Tell the person who watches."""
    print(f"deepe: {printable(line)}", file=sys.stderr, flush=True)


def _announce(service: EmbeddedService, settings: Settings, seconds: float, *, as_json: bool) -> None:
    if as_json:
        facts = {"url": service.url, "home": str(settings.home), "redis": service.redis.kind, "seconds": seconds}
        print_json_line({"event": "ready", **facts, "processes": service.pids})
        return
    database = settings.database_url.partition("+")[0]
    console().print(f"\n[bold green]DeepExtension is ready[/] after {seconds:.1f} s\n")
    print_fields(
        {
            "API": f"{service.url}/api/v1",
            "Documentation": f"{service.url}/docs",
            **_runner_address(settings),
            "Home": settings.home,
            "Database": database,
            "Redis": service.redis.describe(),
            # not the demo: it runs a service of its own in this home, which is taken now
            "Next": typed("presets show Custom01" + ("" if service.url == DEFAULT_URL else f" --url {service.url}")),
        }
    )
    console().print("\nCtrl-C stops the service; running jobs go on.\n", style="dim")


def _runner_address(settings: Settings) -> dict[str, str]:
    """Return where DeepExtension's backend is answered, if it is."""
    if settings.runner_port is None:
        return {}
    return {"Runner": f"{settings.runner_host}:{settings.runner_port}, for DeepExtension's backend"}


def cancel_jobs(api: Api, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Cancel jobs and wait for their end; one that ended meanwhile is fine."""
    for job in jobs:
        say(f"cancelling job {job['id']} ({job['name'] or job['stage']})")
        with suppress(ServiceRefused):
            api.post(f"/jobs/{job['id']}:cancel")
    deadline = time.monotonic() + _CANCEL_SECONDS
    left = [job["id"] for job in jobs]
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [job for job in left if api.get(f"/jobs/{job}")["status"] not in TERMINAL]
    for job in left:
        say(f"job {job} has not ended yet; the next start goes on with cancelling it")


def _settle_jobs(url: str, settings: Settings, *, stop_jobs: bool) -> None:
    """Say which jobs go on, or cancel them and wait for their end."""
    try:
        with Api(url, token=settings.token or "", project="", timeout=5.0) as api:
            live = [job for status in LIVE_STATUSES for job in api.items("/jobs", {"status": status})]
            if stop_jobs:
                cancel_jobs(api, live)
                return
    except CliFailure as failure:
        say(f"the running jobs could not be asked for: {failure.message}")
        return
    for job in live:
        say(f"job {job['id']} ({job['name'] or job['stage']}) goes on; the next start finds it again")
