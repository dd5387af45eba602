"""The command that starts a stage's file or module, alone or as a group of processes of one node.

A group is started by the environment's own torchrun or accelerate, on a free port of the loopback and without elastic
restarts: when one process ends badly the whole group ends, and a new attempt is the executor's decision. Rank 0 writes
straight to the stage's output like a process that is alone, so that what the platform reads there (log records, the
printed result) is whole; the others write to files of their own in the run folder, and the launcher copies them to the
output line by line, each with its rank before it.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.domain.launchers import Launcher, LauncherKind

_LOOPBACK = "127.0.0.1"
_BOTH_STREAMS = "3"
# `[rank1]: `, as torch itself marks the lines of an exception
_PREFIX = "[rank${rank}]: "


def stage_command(
    launcher: Launcher,
    *,
    python: Path,
    target: Sequence[str],
    arguments: Sequence[str],
    processes: int,
    ranks: Path,
    config: Path | None = None,
) -> tuple[str, ...]:
    """Return the argv of a stage; `ranks` is the folder for what the processes other than rank 0 write.

    `target` is the path of a file, or `-m` and a module, which launchers understand as Python does. `config` is a
    configuration of accelerate, which then starts the group whatever the launcher.
    """
    own = (str(python), "-u")
    # `-m` would look for modules in the working directory first; the processes that it starts do not inherit `-I`
    isolated = (*own, "-I")
    command = (*target, *arguments)
    if config is not None:
        options = (f"--config_file={config}", "--main_process_port=0", "--max_restarts=0", f"--log_dir={ranks}")
        return (*isolated, "-m", "accelerate.commands.launch", *options, *_tee("--tee", processes), *command)
    match launcher.kind:
        case LauncherKind.PYTHON:
            return (*own, *command)
        case LauncherKind.TORCHRUN:
            group = (
                *("--standalone", f"--local-addr={_LOOPBACK}", f"--nproc-per-node={processes}"),
                *("--max-restarts=0", f"--log-dir={ranks}", *_tee("--tee", processes)),
            )
            return (*isolated, "-m", "torch.distributed.run", *group, *command)
        case LauncherKind.ACCELERATE:
            group = (
                *("--num_machines=1", f"--num_processes={processes}", "--mixed_precision=no", "--dynamo_backend=no"),
                # without it processes on CPUs would not be a group; the port 0 is a free one
                *(("--multi_gpu", "--main_process_port=0", "--max_restarts=0") if processes > 1 else ()),
                *(f"--log_dir={ranks}", *_tee("--tee", processes)),
            )
            return (*isolated, "-m", "accelerate.commands.launch", *group, *command)


def group_variables(
    environment: Mapping[str, str], *, processes: int, grace_seconds: float, cores: int
) -> dict[str, str]:
    """Return what a group of processes gets beside the environment of its stage; what is set there stays."""
    wanted = {
        # they share the cores instead of fighting for them
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        # gloo would look for an interface by the host's name, which need not resolve
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    return {
        **{name: value for name, value in wanted.items() if name not in environment},
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": _PREFIX,
        # a stop gives every process the whole grace, not torchrun's 30 seconds
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_seconds)),
    }


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tee(option: str, processes: int) -> tuple[str, ...]:
    others = ",".join(f"{rank}:{_BOTH_STREAMS}" for rank in range(1, processes))
    return (f"{option}={others}",) if others else ()
