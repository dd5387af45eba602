"""Build an environment in its final place; the command of an environment job, run under the supervisor.

    python -m app.executor.environments.build_environment --name NAME --envs DIR [--spec FILE]
        [--builder auto|conda|rattler|venv] [--archive DIR --node NODE] [--lock FILE] [--offline]
        [--accelerator cuda|apple]... [--torch-index URL] [--torch-find-links PLACE]

A packed environment of the same specification is preferred to the network, and the only way with --offline. With
--lock exactly those packages are installed, in a prefix of their own. A specification that the product ships has a
lock as well, and the accelerators of this machine decide which build of torch stands in it.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from app.domain.environment_locks import EnvironmentLock, LockedFile, PipPackage, differences
from app.domain.errors import AppError
from app.executor.environments.activation import activated, interpreter
from app.executor.environments.build_progress import Progress, say
from app.executor.environments.builders import (
    CHANNELS_UNREACHABLE,
    REQUIREMENTS,
    Builder,
    EnvironmentNeedsPack,
    Pip,
    Step,
    Tools,
    choose_builders,
    create_step,
    explicit_file,
    locked_builder,
    locked_create_step,
    locked_parts,
    locked_pip_step,
    needs_network,
    pip_step,
    requirements_of,
    torch_step,
)
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environment_archive import (
    WHEELS_PACK,
    EnvironmentArchive,
    Pack,
    read_lock,
    this_platform,
    write_durably,
)
from app.executor.environments.environments import LOCK, lock_path, planned_prefix, read_marker, write_marker
from app.executor.environments.installed import PIP_REPORTS, lock_of, pip_of, python_version
from app.executor.environments.lockfile import Lockfile, Machine, NotForMachine
from app.executor.environments.packs import PackDamaged, unpack
from app.executor.environments.shipped import (
    NO_SOURCE,
    EnvironmentNotForPlatform,
    LockPlan,
    TorchSource,
    accelerator_refusal,
    plan,
    shipped_as,
)
from app.presets.environments import Device, ShippedEnvironment
from app.registry.environments.specs import BASE_SPEC, EnvironmentSpec, parse_spec, spec_hash

FAILED = 1
REFUSED = 2
STOPPED = 128 + signal.SIGTERM

_SAY_VERSION = "import sys; print('Python', sys.version)"
# Not every builder compiles, and what was unpacked may be newer than its bytecode; where stages may not write, each of
# their starts would compile anew. What does not compile is passed over: packages hold files for other versions.
_COMPILE = "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"


class BuildFailed(Exception):
    """A command of the build did not succeed."""

    def __init__(self, step: Step, code: int) -> None:
        self.code = code
        super().__init__(f"{step.message} failed (exit {code}); its output stands above.")


class NotAsLocked(Exception):
    """What is installed differs from the lock."""

    def __init__(self, differing: Sequence[str]) -> None:
        super().__init__("Other packages than the lock says:\n" + "\n".join(differing))


@dataclass(frozen=True)
class Order:
    """What to build and where."""

    name: str
    prefix: Path
    spec: EnvironmentSpec
    folder: Path  # relative paths of the pip list start here
    channels: tuple[str, ...] = ()  # for a specification that names none
    archive: EnvironmentArchive | None = None
    node: str = ""
    lock: EnvironmentLock | None = None
    offline: bool = False
    plan: LockPlan | None = None  # of a specification that is shipped with a lock
    torch: TorchSource = NO_SOURCE  # that the operator names
    cuda: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the command line's arguments and this process's environment."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, stop)
    progress = Progress(os.environ.get("DEEPE_EVENTS"))
    try:
        order = _order(options)
        wanted = None if options.builder == "auto" else Builder(options.builder)
        if order.offline:
            os.environ["PIP_NO_INDEX"] = "1"  # what tries all the same fails at once
        build(order, Tools.found(CondaSearch.of(os.environ)), progress, wanted=wanted)
    except AppError as error:
        for line in [violation.detail() for violation in error.violations()] or [error.detail()]:
            say(line)
        return REFUSED
    except (BuildFailed, NotAsLocked, PackDamaged, OSError, UnicodeDecodeError) as error:
        say(str(error))
        return FAILED
    return 0


def _order(options: argparse.Namespace) -> Order:
    spec = parse_spec(options.spec.read_text("utf-8") if options.spec else BASE_SPEC)
    lock = EnvironmentLock.model_validate_json(options.lock.read_text("utf-8")) if options.lock else None
    digest = lock.digest if lock else ""
    devices: frozenset[Device] = frozenset({"cpu", *options.accelerator})
    shipped = shipped_as(spec) if lock is None else None
    if shipped is not None and (refusal := accelerator_refusal(shipped, devices)) is not None:
        raise refusal
    source = TorchSource(options.torch_index, options.torch_find_links)
    found = None if shipped is None else plan(shipped, devices, source)
    cpu_torch = found is not None and found.cpu_build
    prefix = options.prefix or planned_prefix(options.name, spec, options.envs, lock=digest, cpu_torch=cpu_torch)
    return Order(
        name=options.name,
        prefix=prefix.absolute(),
        spec=spec,
        folder=(options.spec or Path.cwd() / "-").absolute().parent,
        channels=tuple(options.default_channel),
        archive=EnvironmentArchive(options.archive, options.name, spec) if options.archive else None,
        node=options.node,
        lock=lock,
        offline=options.offline,
        plan=found,
        torch=source,
        cuda="cuda" in devices,
    )


def build(order: Order, tools: Tools, progress: Progress, *, wanted: Builder | None = None) -> None:
    """Make the environment ready, unless it is."""
    progress.downloads.folder = order.folder
    digest = order.lock.digest if order.lock else ""
    pack = order.archive.usable_pack(lock=digest, cuda=order.cuda) if order.archive else None
    builders = [] if pack else _builders(order, tools, wanted)
    with sole_build(order.prefix) as held:
        if read_marker(order.prefix) is not None:
            progress.done(f"{order.name} is ready in {order.prefix}")
            return
        if order.prefix.exists():
            progress.tell("Removing a build that did not finish")
            shutil.rmtree(order.prefix)
        try:
            builder = None if pack is None else _unpacked(order, pack, progress, held)
            expected: Sequence[PipPackage] = ()
            if builder is None:
                builder = _create(order, builders or _builders(order, tools, wanted), tools, progress, held)
                expected = _furnish(order, progress, held)
            _check(order, progress, held)
            lock = _locked(order, builder, expected)
            write_marker(
                order.prefix,
                name=order.name,
                spec=order.spec,
                builder=builder,
                packages=[f"{one.name}-{one.version}-{one.build}" for one in lock.conda]
                + [f"{one.name}=={one.version}" for one in lock.pip]
                + list(lock.bundled),
                python_version=lock.python,
                lock=lock.digest,
                cpu_torch=order.plan is not None and order.plan.cpu_build and lock.has_cpu_torch,
            )
        except BaseException:
            say(f"Removing {order.prefix}")
            shutil.rmtree(order.prefix, ignore_errors=True)
            raise
        count = len(lock.conda) + len(lock.pip) + len(lock.bundled)
        progress.done(f"{order.name} is ready in {order.prefix} ({count} packages, built by {builder})")


def _builders(order: Order, tools: Tools, wanted: Builder | None) -> Sequence[Builder]:
    if order.offline and needs_network(order.spec):
        raise EnvironmentNeedsPack(environment=order.name, platform=this_platform())
    if order.lock is not None:
        return [locked_builder(order.lock, tools, platform=this_platform())]
    return choose_builders(order.spec, tools, wanted=wanted, channels=order.channels)


def _unpacked(order: Order, pack: Pack, progress: Progress, held: int) -> str | None:
    """Make the prefix from a pack; None if it is damaged and the network may help."""
    assert order.archive is not None
    progress.total = 3
    progress.step(f"Unpacking what {pack.node} packed ({pack.size_bytes} bytes, {pack.kind})")
    try:
        unpack(pack, order.archive.path_of(pack), order.prefix, lambda step: run(step, order, progress, held))
    except PackDamaged as error:
        if order.offline:
            raise
        say(f"{error} Building it from its sources instead.")
        shutil.rmtree(order.prefix, ignore_errors=True)
        return None
    if pack.kind == WHEELS_PACK:
        _set_variables(order)
    return "pack"


def _create(order: Order, builders: Sequence[Builder], tools: Tools, progress: Progress, held: int) -> Builder:
    """Make the prefix with the first builder that reaches its sources."""
    progress.total = 3 if order.spec.pip else 2
    for builder in builders:
        if order.lock is None:
            step = create_step(builder, order.spec, order.prefix, tools, channels=order.channels)
        else:
            explicit_file(order.prefix).write_text(order.lock.explicit, "utf-8")
            step = locked_create_step(builder, order.lock, order.spec, order.prefix, tools, channels=order.channels)
        progress.step(f"{step.message} ({builder})")
        try:
            run(step, order, progress, held)
        except BuildFailed as failure:
            if failure.code != CHANNELS_UNREACHABLE or builder == builders[-1]:
                raise
            progress.steps -= 1
            shutil.rmtree(order.prefix, ignore_errors=True)
        else:
            return builder
        finally:
            explicit_file(order.prefix).unlink(missing_ok=True)
    raise AssertionError("choose_builders returns at least one")


def _furnish(order: Order, progress: Progress, held: int) -> Sequence[PipPackage]:
    """Add what is in the specification beside conda packages: variables and the pip list, or that of a lock.

    Return what a shipped lock says that was installed.
    """
    _set_variables(order)
    pip = pip_of(order.prefix)
    if order.lock is not None:
        _install_locked(order.lock.pip, order, pip, progress, held)
    elif order.plan is not None:
        return _install_shipped(order.plan, order, pip, progress, held)
    elif order.spec.pip:
        (order.prefix / REQUIREMENTS).write_text("\n".join(order.spec.pip) + "\n", "utf-8")
        step = pip_step(order.spec, order.prefix, pip)
        assert step is not None
        progress.step(step.message)
        run(step, order, progress, held)
    return ()


def _install_shipped(chosen: LockPlan, order: Order, pip: Pip, progress: Progress, held: int) -> Sequence[PipPackage]:
    """Install a shipped lock; torch comes first, from its source, so that a source without it costs no time."""
    files = _files_of(chosen.environment, order)
    torch, others = chosen.parts(files)
    if torch:
        assert chosen.torch is not None
        progress.tell(_about_torch(chosen, order.name))
        step = torch_step(torch, chosen.torch, order.prefix, pip, alone=chosen.cpu_build)
        try:
            run(step, order, progress, held)
        except BuildFailed:
            if chosen.otherwise is None:
                raise
            progress.tell(
                f"The CPU build of torch is not to be had from {chosen.torch} (DEEPE_TORCH_INDEX or "
                "DEEPE_TORCH_FIND_LINKS names another place). Taking the registry's build for CUDA: it runs here, "
                "and needs some gigabytes more."
            )
            return _install_shipped(LockPlan(chosen.otherwise), order, pip, progress, held)
    progress.downloads.expect({file.name: file.size for file in others})
    packages = [PipPackage(name=file.package, version=file.version, sha256=file.sha256) for file in others]
    _install_locked(packages, order, pip, progress, held)
    return packages


def _files_of(environment: ShippedEnvironment, order: Order) -> Sequence[LockedFile]:
    lock = Lockfile.parse(environment.lock_file.read_text("utf-8"))
    try:
        return lock.select(Machine.here(python_version(order.prefix)))
    except NotForMachine as error:
        raise EnvironmentNotForPlatform(
            environment=environment.name, platform=this_platform(), packages=str(error)
        ) from error


def _about_torch(chosen: LockPlan, name: str) -> str:
    if chosen.cpu_build:
        return f"This node has no NVIDIA GPU that {name} could use: it gets the CPU build of torch, from {chosen.torch}"
    assert chosen.torch is not None
    otherwise = "" if chosen.torch.index else ", and from the registry where that has no build of it"
    return (
        f"torch comes from {chosen.torch}, as the operator says{otherwise}; it is bound to its version, not to a digest"
    )


def _install_locked(packages: Sequence[PipPackage], order: Order, pip: Pip, progress: Progress, held: int) -> None:
    for number, part in enumerate(locked_parts(packages, order.torch)):
        requirements_of(part, order.prefix).write_text(part.lines, "utf-8")
        step = locked_pip_step(part, order.prefix, pip)
        if number == 0:
            progress.step(step.message)
        run(step, order, progress, held)


def _set_variables(order: Order) -> None:
    if order.spec.variables:
        folder = order.prefix / "etc" / "conda" / "env_vars.d"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "deepe.json").write_text(json.dumps(dict(order.spec.variables)), "utf-8")


def _check(order: Order, progress: Progress, held: int) -> None:
    progress.step("Checking the environment")
    python = str(interpreter(order.prefix))
    run(Step("Starting its Python", (python, "-c", _SAY_VERSION), True), order, progress, held)
    run(Step("Compiling what is not compiled", (python, "-c", _COMPILE), True), order, progress, held)


def _locked(order: Order, builder: str, expected: Sequence[PipPackage]) -> EnvironmentLock:
    """Write down what was installed, in the prefix and for the other nodes; raise `NotAsLocked` if it is another."""
    lock = read_lock(order.prefix / LOCK)  # came with a packed prefix
    if lock is None:
        digest = spec_hash(order.spec)
        lock = lock_of(order.prefix, environment=order.name, spec_hash=digest, node=order.node, builder=builder)
    lock = lock.model_copy(update={"node": order.node, "created_at": datetime.now(UTC)})
    if order.lock is not None and lock.digest != order.lock.digest:
        raise NotAsLocked(differences(order.lock, lock))
    if astray := [one.requirement for one in expected if one not in lock.pip]:
        raise NotAsLocked([f"{requirement} is not installed" for requirement in astray])
    text = lock.model_dump_json(indent=1)
    write_durably(order.prefix / LOCK, text)
    for report in order.prefix.glob(PIP_REPORTS):
        report.unlink()
    if order.archive is not None and order.node:
        try:
            write_durably(order.archive.lock_file(order.node), text)
        except OSError as error:
            say(f"Other nodes will not know what was installed: {error}")
    return lock


def run(step: Step, order: Order, progress: Progress, held: int) -> None:
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
        pass_fds=[held],
        bufsize=0,
    )
    assert process.stdout is not None
    try:
        line = b""
        while piece := process.stdout.read(65536):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            *lines, line = re.split(rb"[\r\n]", line + piece)
            for text in lines:
                progress.output(text.decode(errors="replace"))
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


@contextlib.contextmanager
def sole_build(prefix: Path) -> Iterator[int]:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="build_environment", description="Build an environment of this node.")
    parser.add_argument("--name", required=True, help="name of the environment")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--envs", type=Path, help="folder of this node's environments")
    place.add_argument("--prefix", type=Path, help="exact place, instead of --envs")
    parser.add_argument("--spec", type=Path, help="environment.yml; without it Python and pip only")
    parser.add_argument("--default-channel", action="append", default=[], help="if the specification names none")
    parser.add_argument("--archive", type=Path, help="folder of locks and packs that nodes share")
    parser.add_argument("--node", default="", help="name of this node, for its lock")
    parser.add_argument("--lock", type=Path, help="install exactly this")
    parser.add_argument("--offline", action="store_true", help="without any network: from a pack")
    parser.add_argument(
        "--accelerator", action="append", default=[], choices=["cuda", "apple", "cpu"], help="what this node has"
    )
    add_torch_options(parser)
    parser.add_argument("--builder", choices=["auto", *Builder], default="auto")
    return parser


def add_torch_options(parser: argparse.ArgumentParser) -> None:
    """Add what names another source of torch than the registry."""
    parser.add_argument("--torch-index", default="", help="index that torch comes from")
    parser.add_argument("--torch-find-links", default="", help="folder or page of links that torch comes from")


def stop(number: int, frame: FrameType | None) -> None:
    """End as a signal handler; what was begun is removed on the way out."""
    raise SystemExit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
