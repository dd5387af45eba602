"""How a stage's file is started: as one Python process, or as a group of equal ones.

The counts follow from what a job gets: one process for each of its accelerators; where it gets none, as many as the
method says. A job that does not say how many accelerators it wants gets one for each process where a node has any
(`app.domain.placement`).
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

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


class Launcher(BaseModel):
    """The launcher of a stage. `processes` None: as many as the job has accelerators."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: LauncherKind = LauncherKind.PYTHON
    processes: int | None = None

    def count(self, accelerators: int) -> int:
        """Return how many processes a job starts that leased so many accelerators."""
        if self.kind is LauncherKind.PYTHON:
            return 1
        return accelerators or self.processes or 1
