"""`deepe doctor`: what is missing on this machine, and how to get it.

A check imports the parts of the service that it looks at by itself: what is missing there is its finding.
"""

import asyncio
import importlib
import importlib.util
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from app.cli.command import DEFAULT_URL, AsJson, ExitCode, HomeFolder, Url, typed
from app.cli.output import console, errors, print_json, styled, table
from app.cli.service import load
from app.domain.projects import EVERY_PROJECT
from app.settings import Settings

GIB: Final = 1024**3
COMFORTABLE_DISK: Final = 10 * GIB
OLDEST_PYTHON: Final = (3, 11)
SERVICE_MODULES: Final = ("uvicorn", "app.main", "app.worker")
CONDA_FAMILY: Final = ("conda", "mamba", "micromamba")
_PATIENCE_SECONDS = 10.0


class Verdict(StrEnum):
    """`fail`: the service cannot work; `warn`: something works worse or not at all."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what to do about it."""

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""


Check = Callable[[Settings], Finding]


def doctor(
    home: HomeFolder = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="Ask a running service which method could run on which node.")
    ] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say what is missing on this machine and how to get it.

    Ends with 1 when something is missing that the service cannot work without.
    """
    if methods:
        from app.cli.methods import readiness

        readiness(method=None, url=url, as_json=as_json)
        return
    findings = list(examine(load(home=home)))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


def examine(settings: Settings) -> Iterator[Finding]:
    """Run all checks; one that breaks is a finding, too."""
    for name, check in CHECKS.items():
        try:
            yield check(settings)
        except Exception as error:
            yield Finding(name, Verdict.FAIL, f"the check broke: {type(error).__name__}: {error}")


def python(_settings: Settings) -> Finding:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return Finding("Python", Verdict.FAIL, version, "Install Python 3.11 or newer and make a new environment.")
    return Finding("Python", Verdict.OK, f"{version} ({sys.executable})")


def packages(_settings: Settings) -> Finding:
    """Import what the API and the worker import: a package that is missing or broken is found before they start."""
    for module in SERVICE_MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            advice = "Install the service again into this Python environment, with all of its dependencies."
            return Finding("packages", Verdict.FAIL, f"{module} cannot be imported: {error}", advice)
    return Finding("packages", Verdict.OK, "the API and the worker can be imported")


def home(settings: Settings) -> Finding:
    folder = _existing(settings.home)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = f"Make {folder} writable for you, or set DEEPE_HOME to another folder."
        return Finding("home", Verdict.FAIL, f"{folder}: {error.strerror}", advice)
    detail = "is writable" if folder == settings.home else "will be made at the first start"
    return Finding("home", Verdict.OK, f"{settings.home} {detail}")


def privacy(settings: Settings) -> Finding:
    """Say who else on this machine can read what the service keeps."""
    from sqlalchemy.engine import make_url

    from app.store.home import is_open_to_others

    if not settings.home.is_dir():
        return Finding("privacy", Verdict.OK, "the home will be made for you alone (0700)")
    if is_open_to_others(settings.home):
        detail = f"other accounts can look into {settings.home} (mode {_mode(settings.home)})"
        advice = f"Run: chmod o-rwx {settings.home}; leave it only if another service has to read there."
        return Finding("privacy", Verdict.WARN, detail, advice)
    url = make_url(settings.database_url)
    elsewhere = [
        settings.node_home,
        *([Path(url.database)] if url.get_backend_name() == "sqlite" and url.database else []),
    ]
    exposed = [
        str(path)
        for path in elsewhere
        if not path.is_relative_to(settings.home) and path.exists() and is_open_to_others(path)
    ]
    if exposed:
        names = " ".join(exposed)
        return Finding("privacy", Verdict.WARN, f"other accounts can read {names}", f"Run: chmod o-rwx {names}")
    group = settings.home.stat().st_mode & 0o070
    who = f"your account and its group only (mode {_mode(settings.home)})" if group else "your account only"
    return Finding("privacy", Verdict.OK, f"what the service keeps is for {who}")


def database(settings: Settings) -> Finding:
    from app.store.migrate import DatabaseUnusable

    name = settings.database_url.partition("+")[0]
    try:
        state = asyncio.run(_schema_state(settings.database_url))
    except DatabaseUnusable as error:
        return Finding("database", Verdict.FAIL, str(error), error.advice)
    except Exception as error:
        advice = f"Look at DEEPE_DATABASE_URL with `{typed('settings')}`; is the server running?"
        return Finding("database", Verdict.FAIL, f"{name}: {type(error).__name__}: {error}", advice)
    detail = {
        "none": f"{name}: the file will be made at the first start",
        "missing": f"{name} answers and is empty",
        "older": f"{name} answers, its schema is older than this version",
        "current": f"{name} answers, its schema is up to date",
    }[state]
    if state in ("none", "current"):
        return Finding("database", Verdict.OK, detail)
    return Finding(
        "database", Verdict.WARN, detail, f"The next start of the service does it, or run: {typed('migrate')}"
    )


def redis(settings: Settings) -> Finding:
    from app.cli.private_redis import HOST, RedisKind, choices, socket_path

    choice = next(choices(settings.redis_url.get_secret_value() if settings.redis_url else None))
    if choice.kind is RedisKind.NONE:
        advice = "It works without. For less delay install redis-server (apt install redis-server, brew install redis)."
        return Finding("Redis", Verdict.WARN, "none: the worker looks for jobs every few seconds", advice)
    if choice.kind is RedisKind.CONFIGURED and choice.url:
        try:
            asyncio.run(_ping_redis(choice.url))
        except Exception as error:
            advice = (
                "Start that server or correct DEEPE_REDIS_URL; meanwhile the service works without it, more slowly."
            )
            return Finding("Redis", Verdict.WARN, f"{choice.describe()}: {type(error).__name__}", advice)
        return Finding("Redis", Verdict.OK, choice.describe())
    way = "a Unix socket in the home" if socket_path(settings.home / "redis") else f"{HOST} with a password"
    detail = f"{choice.describe()}; the service connects by {way}, other accounts reach status keys of scripts only"
    return Finding("Redis", Verdict.OK, detail)


def environments(settings: Settings) -> Finding:
    found = next((path for name in CONDA_FAMILY if (path := shutil.which(name))), None) or os.environ.get("CONDA_EXE")
    if found or settings.conda_root:
        return Finding("environments", Verdict.OK, f"conda family: {found or settings.conda_root}")
    lacking = [module for module in ("venv", "ensurepip") if importlib.util.find_spec(module) is None]
    if not lacking:
        return Finding("environments", Verdict.OK, "no conda; built with venv and pip")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    advice = f"Install one of: apt install python{version}-venv; micromamba; Miniforge."
    return Finding("environments", Verdict.FAIL, f"no conda, and Python lacks {' and '.join(lacking)}", advice)


def disk(settings: Settings) -> Finding:
    folder = _existing(settings.home)
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free at {folder}"
    if free < settings.min_free_bytes:
        advice = "Jobs are refused below DEEPE_MIN_FREE_BYTES. Delete files or choose another DEEPE_HOME."
        return Finding("disk", Verdict.FAIL, detail, advice)
    if free < COMFORTABLE_DISK:
        advice = "An environment with torch takes 1 to 7 GiB, a model of 7 billion weights about 15 GiB."
        return Finding("disk", Verdict.WARN, detail, advice)
    return Finding("disk", Verdict.OK, detail)


def machine(_settings: Settings) -> Finding:
    from app.executor.nodes.inventory import machine

    found = machine()
    memory = f"{found.memory_bytes / GIB:.1f} GiB memory"
    return Finding("machine", Verdict.OK, f"{found.system}, {found.processor}, {found.cpus} CPUs, {memory}")


def accelerator(settings: Settings) -> Finding:
    from app.executor.nodes.inventory import find_accelerators
    from app.executor.nodes.nvml import CardsUnreadable, NvmlCards

    cards = NvmlCards()
    try:
        cards.read()
    except CardsUnreadable as error:
        advice = "Run nvidia-smi: the driver may not fit the kernel, or a container lacks access to the GPU."
        return Finding("accelerator", Verdict.WARN, f"the NVIDIA driver does not answer: {error}", advice)
    found = find_accelerators(cards, os.environ, simulated=settings.simulated_accelerators)
    if not found:
        advice = "The demo and Custom01 need none. For large models install the NVIDIA driver."
        return Finding("accelerator", Verdict.OK, "none: jobs run on the CPU", advice)
    return Finding("accelerator", Verdict.OK, "; ".join(f"{one.name} ({_memory(one.memory_mib)})" for one in found))


def containment(settings: Settings) -> Finding:
    """Say what a stage script can see and touch on this machine, and find it out as a worker does."""
    from app.domain.containment import ContainmentMode, ContainmentReason
    from app.executor.containment.probe import AccountUnusable, ContainmentUnavailable, find_account, find_containment

    try:
        account = find_account(settings.stage_user)
        found, _ = find_containment(settings.containment, settings.stage_network, account)
    except (AccountUnusable, ContainmentUnavailable) as error:
        return Finding("containment", Verdict.FAIL, "the worker of this machine does not start", str(error))
    if found.mode is ContainmentMode.BUBBLEWRAP:
        who = f"; they run as {found.user}" if found.user is not None else ""
        return Finding("containment", Verdict.OK, f"bubblewrap; network of stages: {found.network}{who}")
    detail = f"stages can do what the worker's account can ({found.detail})"
    advice = {
        ContainmentReason.SWITCHED_OFF: "Set DEEPE_CONTAINMENT=auto, unless everyone who writes scripts may do that.",
        ContainmentReason.NOT_LINUX: "Let only people write scripts who may use the worker's account.",
        ContainmentReason.NOT_INSTALLED: "Install it: apt install bubblewrap (or your system's package of that name).",
        ContainmentReason.PROBE_FAILED: "Allow user namespaces and mounts to the worker (docs/containment.md).",
    }
    return Finding("containment", Verdict.WARN, detail, advice[found.reason] if found.reason is not None else "")


def port(settings: Settings) -> Finding:
    from app.cli.embedded import is_ready
    from app.cli.processes import is_free, next_free

    address = f"{settings.host}:{settings.port}"
    if settings.port == 0 or is_free(settings.host, settings.port):
        return Finding("port", Verdict.OK, f"{address} is free")
    if is_ready(f"http://{address}"):
        return Finding("port", Verdict.OK, f"a service answers at {address}")
    proposal = next_free(settings.host, settings.port + 1)
    return Finding("port", Verdict.WARN, f"{address} is taken by another program", f"Use --port {proposal}.")


def licence(settings: Settings) -> Finding:
    from app.access.guard import LicenceGuard
    from app.access.licence import licence_path, load_public_key
    from app.cli.client import language

    guard = LicenceGuard(
        path=licence_path(settings.home),
        public_key=load_public_key(settings.license_public_key),
        clock=lambda: datetime.now(UTC),
    )
    status = guard.status()
    if status.error is not None:
        return Finding("licence", Verdict.WARN, status.error.detail(language(os.environ)))
    if status.licence is None:
        advice = f"Needed to add and delete methods only: {typed('license install FILE')}"
        return Finding("licence", Verdict.OK, "none: Custom01 and Custom02 can be adapted", advice)
    if status.warning is not None:
        return Finding("licence", Verdict.WARN, status.warning.detail(language(os.environ)))
    return Finding("licence", Verdict.OK, f"{status.licence.licensee} ({', '.join(status.licence.features)})")


def variables(settings: Settings) -> Finding:
    from app.settings import unknown_variables

    if settings.is_open_to_others:
        advice = "Set DEEPE_API_TOKEN, or DEEPE_HOST=127.0.0.1. A worker needs neither."
        return Finding(
            "settings", Verdict.WARN, f"no service can be started on {settings.host} without a token", advice
        )

    unread = unknown_variables()
    if not unread:
        return Finding("settings", Verdict.OK, "all DEEPE_* variables are known")
    meant = "; ".join(f"{name}: did you mean {guess}?" for name, guess in unread.items() if guess)
    return Finding("settings", Verdict.WARN, f"nothing reads {', '.join(unread)}", meant or f"See: {typed('settings')}")


CHECKS: Final[dict[str, Check]] = {
    "Python": python,
    "packages": packages,
    "home": home,
    "privacy": privacy,
    "settings": variables,
    "database": database,
    "Redis": redis,
    "environments": environments,
    "disk": disk,
    "machine": machine,
    "accelerator": accelerator,
    "containment": containment,
    "port": port,
    "licence": licence,
}


def _mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


def _memory(mib: int | None) -> str:
    return "memory unknown" if mib is None else f"{mib / 1024:.1f} GiB"


def _existing(folder: Path) -> Path:
    """Return `folder`, or the nearest one above it that is there; looking must not make anything."""
    return next(path for path in (folder, *folder.parents) if path.exists())


async def _schema_state(url: str) -> str:
    """Return how the schema stands, after a look at the whole of a SQLite file; one that is not there is not made."""
    from app.store.migrate import check_integrity, schema_state
    from app.store.session import Database

    scheme, _, path = url.partition(":///")
    if scheme.startswith("sqlite") and not Path(path).is_file():
        return "none"
    database = Database(url, scope=EVERY_PROJECT)
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            state = await schema_state(database)
        await check_integrity(database)
        return state.value
    finally:
        await database.close()


async def _ping_redis(url: str) -> None:
    from redis.asyncio import Redis

    async with Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3) as client:
        await client.ping()


def _show(findings: list[Finding]) -> None:
    rows = [(styled(finding.verdict), finding.name, finding.detail, finding.advice) for finding in findings]
    console().print(table(("", "what", "how it is", "what to do"), rows))
    failed = [finding.name for finding in findings if finding.verdict is Verdict.FAIL]
    if failed:
        errors().print(f"[bold red]Missing:[/] {', '.join(failed)}")
    else:
        console().print(f"Everything needed is there. Start with: {typed('demo')}", style="green", markup=False)
