"""What would run for a stage, as the API says it."""

from pydantic import Field

from app.api.errors import ProblemEntry, problem_entries
from app.domain.texts import Language
from app.domain.values import Value
from app.executor.jobs.stage_commands import ShownCommand


class CommandFile(Value):
    """A file that is written before the process starts."""

    path: str
    content: str


class StageCommandRead(Value):
    """The process of a stage. The zeros stand for the id of the job, the ones for that of the job before it."""

    stage: str
    conda_env: str
    command: list[str] = Field(
        examples=[["/envs/trl/bin/python", "-u", "-m", "mlx_lm.lora", "--config", "/home/runs/0000/1/lora.yaml"]]
    )
    environment: dict[str, str] = Field(
        description="Variables on top of those of the environment and of the node, which adds the accelerators that "
        "the process sees."
    )
    working_directory: str
    files: list[CommandFile]
    notes: list[ProblemEntry] = Field(description="What was decided: filled in, kept from the script, left out.")


def stage_command_read(found: ShownCommand, language: Language) -> StageCommandRead:
    """Return the command in the caller's language."""
    return StageCommandRead(
        stage=found.stage,
        conda_env=found.environment,
        command=list(found.process.argv),
        environment=dict(found.process.variables),
        working_directory=str(found.process.working_directory),
        files=[CommandFile(path=str(path), content=content) for path, content in found.process.files.items()],
        notes=problem_entries(found.notes, language),
    )
