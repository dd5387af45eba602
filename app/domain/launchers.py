"""How a stage's file is started: as one Python process, or as a group of equal ones.

The counts follow from what a job gets: one process for each of its accelerators; where it gets none, as many as the
method says. A job that does not say how many accelerators it wants gets one for each process where a node has any
(`app.domain.placement`).

A script that declares the parameter `vllm` may have a server started beside it, from another environment, with
accelerators of the job that its own processes do not get (`AnswerServer`).

A script that declares the parameter `distributed_strategy` says with it how the processes share a model; it is then
started by accelerate, with a configuration of its own (`accelerate_config`).
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import ConfigDict

from app.domain.values import Value

MAX_PROCESSES = 1024


class LauncherKind(StrEnum):
    """What starts the file. `python`: one process, which sees every accelerator of the job."""

    PYTHON = "python"
    TORCHRUN = "torchrun"
    ACCELERATE = "accelerate"


# starts a group of processes
GROUP_KINDS = (LauncherKind.TORCHRUN, LauncherKind.ACCELERATE)

# what the stage's environment must hold beside Python
PACKAGES = {LauncherKind.TORCHRUN: ("torch",), LauncherKind.ACCELERATE: ("accelerate", "torch")}


class Strategy(StrEnum):
    """How the processes of a group share a model: each has all of it, or they divide it."""

    DDP = "ddp"
    FSDP2 = "fsdp2"
    ZERO2 = "zero2"
    ZERO3 = "zero3"


STRATEGY_PARAMETER = "distributed_strategy"
STRATEGY_AUTO = "auto"
"""The launcher of the method decides; it is DDP where that starts one process for a job of several accelerators."""
SERVER_PARAMETER = "vllm"
DIVIDING = frozenset({Strategy.FSDP2, Strategy.ZERO2, Strategy.ZERO3})


class Launcher(Value):
    """The launcher of a stage. `processes` None: as many as the job has accelerators."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: LauncherKind = LauncherKind.PYTHON
    processes: int | None = None

    def count(self, accelerators: int, *, group: bool = False) -> int:
        """Return how many processes a job starts that leased so many accelerators; `group`: whatever the kind."""
        if self.kind is LauncherKind.PYTHON and not group:
            return 1
        return accelerators or self.processes or 1


class AnswerServer(Value):
    """A server that the stage itself starts: the environment that it needs, and accelerators that are left to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: str
    accelerators: int = 1


def answer_server(values: Mapping[str, Any]) -> AnswerServer | None:
    """Return the server that a stage starts with these parameters, None where it starts none."""
    if values.get(SERVER_PARAMETER) != "server" or values.get("vllm_server_base_url"):
        return None
    accelerators = values.get("vllm_tensor_parallel_size")
    return AnswerServer(
        environment=str(values.get("vllm_environment") or "vllm"),
        accelerators=accelerators if isinstance(accelerators, int) and accelerators > 0 else 1,
    )


def strategy_of(launcher: Launcher, asked: object, accelerators: int | None) -> Strategy | None:
    """Return the strategy of a job that asks for so many accelerators; None: the launcher starts it as it is.

    `asked` is the value of the script's parameter, None if it has none.
    """
    several = (accelerators or launcher.processes or 1) > 1
    if asked == STRATEGY_AUTO:
        return Strategy.DDP if several and launcher.kind is LauncherKind.PYTHON else None
    strategy = next((one for one in Strategy if one == asked), None)
    return strategy if several or strategy in DIVIDING else None


def accelerate_config(strategy: Strategy, processes: int) -> Mapping[str, Any]:
    """Return the configuration of accelerate with which a group of processes follows the strategy.

    The script decides on the precision. Checkpoints are written in parts, by each process its own.
    """
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": processes,
        "mixed_precision": "no",
        "use_cpu": False,
    }
    match strategy:
        case Strategy.DDP:
            return config | {"distributed_type": "MULTI_GPU"}
        case Strategy.FSDP2:
            return config | {
                "distributed_type": "FSDP",
                "fsdp_config": {
                    "fsdp_version": 2,
                    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                    "fsdp_reshard_after_forward": True,
                    "fsdp_cpu_ram_efficient_loading": True,
                    "fsdp_offload_params": False,
                    "fsdp_activation_checkpointing": False,
                    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
                },
            }
        case Strategy.ZERO2 | Strategy.ZERO3:
            whole = strategy is Strategy.ZERO3
            return config | {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {
                    "zero_stage": 3 if whole else 2,
                    "zero3_init_flag": whole,
                    "zero3_save_16bit_model": whole,
                    "gradient_accumulation_steps": "auto",
                    "gradient_clipping": "auto",
                    "offload_optimizer_device": "none",
                    "offload_param_device": "none",
                },
            }
