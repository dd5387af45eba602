"""Over the wire: projects and who works in them."""

from datetime import datetime

from pydantic import ConfigDict, Field

from app.access.projects import MAX_TITLE
from app.api.schemas.common import RequestBody
from app.domain.access import Role
from app.domain.projects import MAX_PROJECT_ID, ProjectLimits
from app.domain.values import Value
from app.store.projects import Use
from app.store.tables import ProjectMemberRow, ProjectRow

_PRINCIPAL = "person:https://idp.example.com/realms/lab#4711"


class ProjectCreate(RequestBody):
    """A project to make."""

    id: str = Field(
        max_length=MAX_PROJECT_ID,
        description="Small letters a-z, digits and hyphens; it stands in addresses and never changes.",
        examples=["bikes"],
    )
    title: str = Field(default="", max_length=MAX_TITLE, examples=["Bike hire"])


class ProjectChange(RequestBody):
    """What changes of a project."""

    title: str = Field(max_length=MAX_TITLE, examples=["Bike hire"])


class ProjectRead(Value):
    """A project. Its address is `/projects/{id}`, followed by that of a route: `/projects/bikes/api/v1/jobs`."""

    id: str = Field(examples=["bikes"])
    title: str = Field(examples=["Bike hire"])
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime
    updated_at: datetime


class UseRead(Value):
    """What a project uses now."""

    jobs: int = Field(description="Its stages that wait or run.")
    jobs_of_yours: int = Field(description="Those of them that you submitted.")
    disk_bytes: int = Field(description="Its data sets and models together.")


class ProjectDetails(ProjectRead):
    """A project, what it may use and what it does."""

    limits: ProjectLimits
    use: UseRead


class LimitsWrite(ProjectLimits):
    """What the project may use; a member that is missing is not limited."""

    model_config = ConfigDict(defer_build=False)  # FastAPI needs a body's at once


class MemberWrite(RequestBody):
    """The role of a caller in this project."""

    principal: str = Field(
        max_length=300,
        description="Who: `principal` of `GET /me`; `key:ID` of a key, `person:ISSUER#SUBJECT` of a person.",
        examples=[_PRINCIPAL],
    )
    role: Role
    name: str = Field(default="", max_length=200, description="By which people know the member.", examples=["ada"])


class MemberRead(Value):
    """A member of this project."""

    principal: str = Field(examples=[_PRINCIPAL])
    role: Role
    name: str = Field(examples=["ada"])
    created_by: str = Field(description="Name of the caller that made it a member.", examples=["token"])
    created_at: datetime


class Members(Value):
    """The members of this project."""

    items: list[MemberRead]


def project_read(row: ProjectRow) -> ProjectRead:
    """Return a project as it is shown."""
    return ProjectRead(**{name: getattr(row, name) for name in ProjectRead.model_fields})


def project_details(row: ProjectRow, use: Use) -> ProjectDetails:
    """Return a project as it is shown to who works in it."""
    said = UseRead(jobs=use.jobs, jobs_of_yours=use.jobs_of_caller, disk_bytes=use.disk_bytes)
    return ProjectDetails(**project_read(row).model_dump(), limits=ProjectLimits(**row.limits), use=said)


def member_read(row: ProjectMemberRow) -> MemberRead:
    """Return a member as it is shown."""
    return MemberRead(**{name: getattr(row, name) for name in MemberRead.model_fields})
