"""Pack an environment of this node for nodes without a network; the command of a job, run under the supervisor.

    python -m app.executor.environments.pack_environment --name NAME --envs DIR --archive DIR --node NODE [--spec FILE]

Exit status: 0 packed, 1 it failed, 2 there is nothing to pack here, 143 stopped.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from app.domain.errors import AppError, Invalid
from app.executor.environments.build_environment import (
    FAILED,
    REFUSED,
    BuildFailed,
    Order,
    add_torch_options,
    run,
    sole_build,
    stop,
)
from app.executor.environments.build_progress import Progress, say
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environment_archive import EnvironmentArchive, read_lock
from app.executor.environments.environments import LOCK, EnvironmentSource, find_environment
from app.executor.environments.packs import pack
from app.executor.environments.shipped import TorchSource
from app.registry.environments.specs import BASE_SPEC, parse_spec


class EnvironmentNotBuiltHere(Invalid):
    """Only what this node built from the present specification is packed."""

    code = "environment_not_built_here"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the command line's arguments and this process's environment."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, stop)
    progress = Progress(os.environ.get("DEEPE_EVENTS"))
    progress.total = 2
    try:
        _pack(options, progress)
    except AppError as error:
        say(error.detail())
        return REFUSED
    except (BuildFailed, OSError, UnicodeDecodeError) as error:
        say(str(error))
        return FAILED
    return 0


def _pack(options: argparse.Namespace, progress: Progress) -> None:
    spec = parse_spec(options.spec.read_text("utf-8") if options.spec else BASE_SPEC)
    found = find_environment(options.name, spec, envs_dir=options.envs, search=CondaSearch.of(os.environ))
    lock = read_lock(found.prefix / LOCK) if found.prefix is not None else None
    if found.prefix is None or found.build is None or found.source is not EnvironmentSource.BUILT or lock is None:
        raise EnvironmentNotBuiltHere(environment=options.name)
    order = Order(options.name, found.prefix, spec, Path.cwd(), node=options.node)
    archive = EnvironmentArchive(options.archive, options.name, spec)
    with sole_build(found.prefix) as held:
        progress.step(f"Packing {found.prefix}")
        made = pack(
            found.prefix,
            lock,
            archive,
            lambda step: run(step, order, progress, held),
            torch=TorchSource(options.torch_index, options.torch_find_links),
            cpu_torch=found.build.cpu_torch,
        )
    progress.done(f"Packed into {archive.path_of(made)} ({made.size_bytes} bytes, sha256 {made.sha256})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pack_environment", description="Pack an environment of this node.")
    parser.add_argument("--name", required=True, help="name of the environment")
    parser.add_argument("--envs", type=Path, required=True, help="folder of this node's environments")
    parser.add_argument("--archive", type=Path, required=True, help="folder of locks and packs that nodes share")
    parser.add_argument("--node", required=True, help="name of this node")
    parser.add_argument("--spec", type=Path, help="environment.yml; without it Python and pip only")
    add_torch_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
