"""Allow-lists: which methods and projects may use an environment, and what a node may run."""

import hashlib
import json
from typing import Final

from pydantic import ConfigDict, Field

from app.domain.enums import JobKind
from app.domain.kinds import STAGES
from app.domain.values import Value

MAX_ALLOWED: Final = 200


class AllowedMethod(Value):
    """A method by its id, which stays; `name` and `project` are those of when it was allowed."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str = Field(examples=["finance-sft"])
    project: str = Field(examples=["default"])


class AllowList(Value):
    """What is allowed. An empty list allows everything; of several lists each has to allow a job."""

    model_config = ConfigDict(frozen=True)

    methods: tuple[AllowedMethod, ...] = ()
    projects: tuple[str, ...] = Field(default=(), examples=[["default"]])
    environments: tuple[str, ...] = Field(default=(), description="Of a node only.", examples=[["trl"]])

    @property
    def version(self) -> str:
        """What changes with every change; the ETag."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def permits(self, kind: JobKind, *, method_id: str | None, project_id: str | None, environment: str) -> bool:
        """Say whether a job may run. Builds, downloads and previews run programs of the product, of no method."""
        of_method = kind in STAGES
        return (
            (not self.methods or not of_method or method_id in {method.id for method in self.methods})
            and (not self.projects or project_id in self.projects)
            and (not self.environments or environment in self.environments)
        )


EVERYTHING: Final = AllowList()
