"""Build an environment in its final place; the command of an environment job, run under the supervisor.

    python -m app.executor.build_environment --name NAME --envs DIR [--spec FILE] [--builder auto|conda|rattler|venv]

One build of a prefix at a time, by a lock that its child processes hold as well: the second build waits and then finds
everything ready. A prefix without marker is a build that did not finish and is deleted first; so is the prefix when the
build fails or is stopped. Everything goes to stdout as it happens, progress also to the file that DEEPE_EVENTS names.
Exit status: 0 ready, 1 the build failed, 2 the specification cannot be built here, 143 stopped.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from app.domain.errors import AppError
from app.executor.activation import activated, interpreter
from app.executor.builders import (
    CHANNELS_UNREACHABLE,
    REQUIREMENTS,
    Builder,
    Step,
    Tools,
    choose_builders,
    create_step,
    pip_step,
)
from app.executor.conda import CondaSearch
from app.executor.environments import lock_path, planned_prefix, read_marker, write_marker
from app.registry.environment_spec import BASE_SPEC, EnvironmentSpec, parse_spec

FAILED = 1
REFUSED = 2
STOPPED = 128 + signal.SIGTERM

# What pip and conda say when they turn to the next thing; shown as the progress message.
_TELLING = re.compile(r"^\s*((?:Collecting|Downloading|Building|Installing|Solved|Preparing)\b.*?)\s*$")


class BuildFailed(Exception):
    """A command of the build did not succeed."""

    def __init__(self, step: Step, code: int) -> None:
        self.code = code
        super().__init__(f"{step.message} failed (exit {code}); its output stands above.")


@dataclass(frozen=True)
class Order:
    """What to build and where."""

    name: str
    prefix: Path
    spec: EnvironmentSpec
    folder: Path  # relative paths of the pip list start here
    channels: tuple[str, ...] = ()  # for a specification that names none


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the command line's arguments and this process's environment."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    progress = Progress(os.environ.get("DEEPE_EVENTS"))
    try:
        text = options.spec.read_text("utf-8") if options.spec else BASE_SPEC
        spec = parse_spec(text)
        prefix = (options.prefix or planned_prefix(options.name, spec, options.envs)).absolute()
        folder = (options.spec or Path.cwd() / "-").absolute().parent
        order = Order(options.name, prefix, spec, folder, tuple(options.default_channel))
        wanted = None if options.builder == "auto" else Builder(options.builder)
        build(order, Tools.found(CondaSearch.of(os.environ)), progress, wanted=wanted)
    except AppError as error:
        for line in [violation.detail() for violation in error.violations()] or [error.detail()]:
            say(line)
        return REFUSED
    except (BuildFailed, OSError, UnicodeDecodeError) as error:
        say(str(error))
        return FAILED
    return 0


def build(order: Order, tools: Tools, progress: "Progress", *, wanted: Builder | None = None) -> None:
    """Make the environment ready, unless it is."""
    builders = choose_builders(order.spec, tools, wanted=wanted, channels=order.channels)
    with _sole_build(order.prefix) as lock:
        if read_marker(order.prefix) is not None:
            progress.done(f"{order.name} is ready in {order.prefix}")
            return
        if order.prefix.exists():
            progress.tell("Removing a build that did not finish")
            shutil.rmtree(order.prefix)
        try:
            builder = _create(order, builders, tools, progress, lock)
            _furnish(order, progress, lock)
            packages = _installed(order.prefix)
            write_marker(order.prefix, name=order.name, spec=order.spec, builder=builder, packages=packages)
        except BaseException:
            say(f"Removing {order.prefix}")
            shutil.rmtree(order.prefix, ignore_errors=True)
            raise
        progress.done(f"{order.name} is ready in {order.prefix} ({len(packages)} packages, built by {builder})")


def _create(order: Order, builders: Sequence[Builder], tools: Tools, progress: "Progress", lock: int) -> Builder:
    """Make the prefix with the first builder that reaches its sources."""
    progress.total = 3 if order.spec.pip else 2
    for builder in builders:
        step = create_step(builder, order.spec, order.prefix, tools, channels=order.channels)
        progress.step(f"{step.message} ({builder})")
        try:
            _run(step, order, progress, lock)
        except BuildFailed as failure:
            if failure.code != CHANNELS_UNREACHABLE or builder == builders[-1]:
                raise
            progress.steps -= 1
            shutil.rmtree(order.prefix, ignore_errors=True)
        else:
            return builder
    raise AssertionError("choose_builders returns at least one")


def _furnish(order: Order, progress: "Progress", lock: int) -> None:
    """Add what is in the specification beside conda packages: variables and the pip list."""
    if order.spec.variables:
        folder = order.prefix / "etc" / "conda" / "env_vars.d"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "deepe.json").write_text(json.dumps(dict(order.spec.variables)), "utf-8")
    step = pip_step(order.spec, order.prefix)
    if step is not None:
        (order.prefix / REQUIREMENTS).write_text("\n".join(order.spec.pip) + "\n", "utf-8")
        progress.step(step.message)
        _run(step, order, progress, lock)
    progress.step("Checking the environment")
    check = "import sys; print('Python', sys.version)"
    _run(Step("Starting its Python", (str(interpreter(order.prefix)), "-c", check), True), order, progress, lock)


def _run(step: Step, order: Order, progress: "Progress", lock: int) -> None:
    """Run a command, its output passing through as it comes."""
    say("$ " + " ".join(step.argv))
    environment: Mapping[str, str] = activated(os.environ, order.prefix) if step.activated else os.environ
    process = subprocess.Popen(
        step.argv,
        cwd=order.folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[lock],
        bufsize=0,
    )
    assert process.stdout is not None
    try:
        line = b""
        while piece := process.stdout.read(65536):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            *lines, line = re.split(rb"[\r\n]", line + piece)
            for told in filter(None, (_TELLING.match(text.decode(errors="replace")) for text in lines)):
                progress.tell(told[1][:200], aloud=False)
        code = process.wait()
    finally:
        process.stdout.close()
        if process.poll() is None:
            _end(process)
    if code != 0:
        raise BuildFailed(step, code)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _installed(prefix: Path) -> Sequence[str]:
    """Return what is in the environment: pip's list, and conda's packages with version and build."""
    command = [str(interpreter(prefix)), "-m", "pip", "freeze", "--all", "--disable-pip-version-check"]
    frozen = subprocess.run(command, capture_output=True, text=True, check=False)
    packages = frozen.stdout.splitlines() if frozen.returncode == 0 else []
    return packages + sorted(file.stem for file in (prefix / "conda-meta").glob("*.json"))


@contextlib.contextmanager
def _sole_build(prefix: Path) -> Iterator[int]:
    """Hold the lock of the prefix; wait for another build of it."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_path(prefix), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another build of this environment is under way; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


class Progress:
    """Tells how far the build is, on stdout and as events."""

    def __init__(self, events: str | None) -> None:
        self._events = events
        self.steps = 0
        self.total = 1

    def step(self, message: str) -> None:
        """Begin the next step."""
        self.tell(message)
        self.steps += 1

    def done(self, message: str) -> None:
        """Say that everything is ready."""
        self.steps = self.total
        self.tell(message)

    def tell(self, message: str, *, aloud: bool = True) -> None:
        """Say what happens now within the present step."""
        if aloud:
            say(message)
        if self._events is None:
            return
        event = {"type": "progress", "time": time.time(), "step": self.steps, "total": self.total, "message": message}
        with contextlib.suppress(OSError), Path(self._events).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def say(text: str) -> None:
    """Write a line to stdout at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="build_environment", description="Build an environment of this node.")
    parser.add_argument("--name", required=True, help="name of the environment")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--envs", type=Path, help="folder of this node's environments")
    place.add_argument("--prefix", type=Path, help="exact place, instead of --envs")
    parser.add_argument("--spec", type=Path, help="environment.yml; without it Python and pip only")
    parser.add_argument("--default-channel", action="append", default=[], help="if the specification names none")
    parser.add_argument("--builder", choices=["auto", *Builder], default="auto")
    return parser


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
