"""Over the wire: nodes."""

from datetime import datetime

from pydantic import Field

from app.api.schemas.common import ID, AllowListWrite, RequestBody
from app.api.schemas.environments import NodeEnvironmentRead, node_environment_read
from app.domain.accelerators import AcceleratorKind
from app.domain.allow_lists import MAX_ALLOWED, AllowList
from app.domain.demand import LabelName, LabelValue
from app.domain.enums import JobKind, JobStatus, Platform
from app.domain.inventory import Inventory
from app.domain.texts import Language
from app.domain.values import Value
from app.registry.nodes.service import AcceleratorState, AcceleratorView, NodeState, NodeView
from app.store.allow_lists import of_node
from app.store.node_work import LiveJob

_CARD = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


class NodePatch(RequestBody):
    """What people change on a node (JSON merge patch)."""

    extra_labels: dict[LabelName, LabelValue | None] | None = Field(
        default=None,
        description="Labels to set beside those of the worker; null takes one away, or all of them.",
        examples=[{"zone": "b", "old": None}],
    )


class NodeAllowListWrite(AllowListWrite):
    """What a node may run."""

    environments: list[str] = Field(default=[], max_length=MAX_ALLOWED, examples=[["trl"]])


class NodeDeclaration(RequestBody):
    """A person's word that the processes of a node are gone."""

    confirm: str = Field(description="Name of the node, once more.", examples=["gpu-1"])


class AcceleratorRead(Value):
    """An accelerator, and who has it."""

    id: str = Field(examples=[_CARD])
    index: int = Field(description="Its number on the machine, as the driver counts.", examples=[0])
    kind: AcceleratorKind
    name: str = Field(examples=["NVIDIA L4"])
    memory_mib: int | None = Field(examples=[23_034])
    driver: str | None = Field(examples=["550.54.15"])
    state: AcceleratorState = Field(
        description="`quarantined`: processes of the job it was leased to may be left. `occupied`: processes that are "
        "not of the service use its memory. `missing`: the driver does not list it. None of these is leased."
    )
    job: str | None = Field(description="Id of the job that it is leased to.", examples=[ID])
    attempt: int | None = Field(description="Which attempt of that job.", examples=[1])
    used_mib: int | None = Field(description="Memory that others use, where they use much.", examples=[None])
    pids: list[int] = Field(description="Processes of those others, as far as the driver names them.", examples=[[]])


class NodeJobRead(Value):
    """A job that the node is at."""

    id: str = Field(examples=[ID])
    name: str = Field(examples=["SFT-Demo"])
    stage: JobKind
    status: JobStatus
    attempt: int = Field(examples=[1])
    accelerators: list[str] = Field(description="Ids of what it holds.", examples=[[_CARD]])
    claimed_at: datetime
    cancel_requested: bool


class NodeRead(Value):
    """A machine with a worker."""

    id: str = Field(examples=[ID])
    name: str = Field(examples=["gpu-1"])
    state: NodeState = Field(
        description="`draining`: takes no more jobs; `drained`: and has none left. `refusing`: takes none by itself. "
        "`unknown`: no heartbeat for a minute; its jobs stay with it. `dead`: a person said so."
    )
    state_detail: str = Field(description="The state in the caller's language, and what to do.")
    platform: Platform
    inventory: Inventory
    accelerators: list[AcceleratorRead]
    labels: dict[str, str] = Field(
        description="By which jobs choose: those of the worker, overlaid with the extra ones.",
        examples=[{"node": "gpu-1", "platform": "cuda", "accelerator": "NVIDIA-L4", "zone": "b"}],
    )
    worker_labels: dict[str, str] = Field(
        description="Found on the machine, or set by DEEPE_NODE_LABELS.",
        examples=[{"node": "gpu-1", "platform": "cuda", "accelerator": "NVIDIA-L4"}],
    )
    extra_labels: dict[str, str] = Field(
        description="Set over the API; they survive restarts.", examples=[{"zone": "b"}]
    )
    environments: list[str] = Field(description="Ready on the node.", examples=[["base", "trl"]])
    environment_states: list[NodeEnvironmentRead] = Field(description="Everything that is ready or could be.")
    restricted: bool = Field(
        description="It may run some methods, projects or environments only (`/nodes/{node}/allowed`)."
    )
    slots: int = Field(description="Jobs at once that hold no accelerator.")
    jobs: list[NodeJobRead] = Field(description="What it is at, the longest first.")
    heartbeat_at: datetime
    heartbeat_age_seconds: float = Field(description="By the database's clock.", examples=[1.5])
    draining_at: datetime | None = Field(description="Since when it takes no more jobs because a person said so.")
    dead_at: datetime | None = Field(description="When it was declared dead.")
    created_at: datetime


def node_read(view: NodeView, language: Language) -> NodeRead:
    """Return the node as callers see it."""
    row = view.row
    return NodeRead(
        id=row.id,
        name=row.name,
        state=view.state,
        state_detail=view.reason.detail(language),
        platform=row.platform,
        inventory=view.inventory,
        accelerators=[_accelerator(one) for one in view.accelerators],
        labels=row.labels,
        worker_labels=row.worker_labels,
        extra_labels=row.extra_labels,
        environments=row.environments,
        environment_states=[node_environment_read(environment, language) for environment in view.environments],
        restricted=of_node(row) != AllowList(),
        slots=row.slots,
        jobs=[_job(job) for job in view.jobs],
        heartbeat_at=row.heartbeat_at,
        heartbeat_age_seconds=round(view.heartbeat_age.total_seconds(), 3),
        draining_at=row.draining_at,
        dead_at=row.dead_at,
        created_at=row.created_at,
    )


def _accelerator(view: AcceleratorView) -> AcceleratorRead:
    holder, foreign = view.holder, view.foreign
    return AcceleratorRead(
        **view.accelerator.document(),
        state=view.state,
        job=holder.job_id if holder else None,
        attempt=holder.attempt if holder else None,
        used_mib=foreign.used_mib if foreign else None,
        pids=list(foreign.pids) if foreign else [],
    )


def _job(job: LiveJob) -> NodeJobRead:
    return NodeJobRead(
        id=job.id,
        name=job.name,
        stage=job.kind,
        status=job.status,
        attempt=job.attempt,
        accelerators=list(job.accelerators),
        claimed_at=job.claimed_at,
        cancel_requested=job.cancel_requested,
    )
