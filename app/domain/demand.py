"""What a job asks of a node. Jobs that ask for the same have the same text, so that a node looks at each demand once.

A queue of 100,000 jobs has a few dozen different demands; the index of the queue begins with the text.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import ConfigDict, Field, StringConstraints

from app.domain.enums import JobKind
from app.domain.errors import Violation
from app.domain.values import Value

DEFAULT_QUEUE = "default"
LEAST_PRIORITY, MOST_PRIORITY = -100, 100
COMPARISON_PRIORITY = MOST_PRIORITY + 1  # of comparisons of answers alone: nobody waits for them
MAX_ACCELERATORS = 1024
MAX_LABELS = 8

LabelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$")]
QUEUE_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?$"
QueueName = Annotated[str, StringConstraints(pattern=QUEUE_NAME)]
UserName = Annotated[str, StringConstraints(strip_whitespace=True, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]


class Resources(Value):
    """What a caller may ask of the node beside the environment.

    `accelerators` None means: one for each process of the stage where the node has any, none elsewhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accelerators: int | None = Field(
        default=None,
        ge=0,
        le=MAX_ACCELERATORS,
        description="How many the stage gets for itself, on one node. Default: one for each of its processes on a node "
        "that has any, none on others.",
        examples=[2],
    )
    accelerator_memory_mib: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="Least memory of each of them, in MiB; only a node with accelerators will do.",
        examples=[40_000],
    )
    labels: dict[LabelName, LabelValue] = Field(
        default_factory=dict, max_length=MAX_LABELS, description="Labels that the node must carry."
    )

    def document(self) -> dict[str, object]:
        """Return the JSON that a job keeps."""
        return self.model_dump(mode="json", exclude_defaults=True)


def resource_violations(resources: Resources) -> list[Violation]:
    """Return what cannot be meant."""
    if resources.accelerators == 0 and resources.accelerator_memory_mib is not None:
        return [Violation("/resources/accelerator_memory_mib", "memory_without_accelerators", {})]
    return []


class Demand(Value):
    """Everything that decides where a job may run, and whose limits it counts against."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: JobKind
    environment: str
    resources: Resources = Resources()
    processes: int | None = (
        None  # of the stage; as many accelerators where a node has any and the caller named no number
    )
    modules: tuple[str, ...] = ()  # that the environment must have for the values of the parameters
    cuda: bool = False  # the accelerators must be NVIDIA GPUs
    queue: str = DEFAULT_QUEUE
    submitted_by: str = ""
    node_id: str | None = None  # only this node may; the building of an environment
    method_id: str | None = None  # of a stage; nodes may allow some methods only
    project_id: str | None = None

    @property
    def most_accelerators(self) -> int:
        """How many accelerators the job holds where a node has any."""
        named = self.resources.accelerators
        return named if named is not None else self.processes or 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `text` wrote."""
        return cls.model_validate_json(text)

    @property
    def text(self) -> str:
        """The one form of this demand: JSON without defaults, names sorted."""
        document: Mapping[str, object] = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(document, sort_keys=True, separators=(",", ":"))
