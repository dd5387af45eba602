"""Projects: what each owns, and which of them a session of the database sees."""

import re
from dataclasses import dataclass
from typing import Final

from pydantic import ConfigDict, Field

from app.domain.demand import QueueName
from app.domain.errors import InvalidRequest, Violation
from app.domain.values import Value

DEFAULT_PROJECT: Final = "default"
"""The project of whoever names none. A single person never sees the word."""
MAX_PROJECT_ID: Final = 40
_PROJECT_ID: Final = re.compile(rf"[a-z0-9](?:[a-z0-9-]{{0,{MAX_PROJECT_ID - 2}}}[a-z0-9])?")


@dataclass(frozen=True)
class Scope:
    """Whose rows a session sees and writes: one project's, or with None those of all projects.

    Workers and maintenance see all; a request sees one.
    """

    project: str | None


class ProjectLimits(Value):
    """What an administrator of the installation grants a project. What is None is not limited."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    jobs: int | None = Field(default=None, ge=0, description="Stages that wait or run at once.", examples=[20])
    jobs_per_person: int | None = Field(
        default=None, ge=0, description="Stages that wait or run at once of one caller, by its name.", examples=[5]
    )
    accelerators_per_job: int | None = Field(default=None, ge=0, description="Most that a job may take.", examples=[4])
    disk_bytes: int | None = Field(
        default=None, ge=0, le=2**63 - 1, description="Data sets and models together.", examples=[500_000_000_000]
    )
    queue: QueueName | None = Field(
        default=None,
        description="The queue that all jobs of the project go into: its limits say how many of them run at once.",
        examples=["bikes"],
    )


NO_LIMITS: Final = ProjectLimits()
EVERY_PROJECT: Final = Scope(None)
DEFAULT_SCOPE: Final = Scope(DEFAULT_PROJECT)


def is_project_id(text: str) -> bool:
    """Say whether it can stand in an address and name a folder."""
    return _PROJECT_ID.fullmatch(text) is not None


def check_project_id(project_id: str) -> None:
    """Raise `InvalidRequest` unless it can be the id of a project."""
    if not is_project_id(project_id):
        raise InvalidRequest([Violation("/id", "project_id_wrong", {"id": project_id, "limit": MAX_PROJECT_ID})])
