"""The tables. One chain of migrations creates them on SQLite and on Postgres.

`table=True` classes do not validate on construction: rows are built by the repositories in this room, from values
that were checked before. The API never returns a row.
"""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.domain.access import Role
from app.domain.audit import AuditKind
from app.domain.code_review import ReviewState
from app.domain.enums import (
    DeliveryState,
    EndReason,
    JobKind,
    JobStatus,
    ModelState,
    Platform,
    SampleKind,
    TrainingType,
    VersionSource,
)
from app.store.types import JsonDocument, UtcDateTime, enum_type

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
SQLModel.metadata.naming_convention = NAMING_CONVENTION

# conditions of partial indexes; a query uses the index only when it says the very same words
CLAIMABLE = "status = 'queued' AND blocked_by IS NULL"
LIVE_JOB = "status IN ('launching', 'running', 'stopping')"
RESERVING = "status = 'queued' AND reserved_node_id IS NOT NULL"
BUILDING = "kind = 'environment' AND status IN ('queued', 'launching', 'running', 'stopping')"
BUILDING_BASE_MODEL = "kind = 'base-model' AND status IN ('queued', 'launching', 'running', 'stopping')"
NAMED_OUTSIDE = "external_id IS NOT NULL"
MEASURED = "memory IS NOT NULL"
LIVE_ATTEMPT = "live"
LIVE_LEASE = "live"
PENDING_DELIVERY = "state = 'pending'"

Json = dict[str, Any]


def _time(*, nullable: bool = False) -> Any:
    return Field(default=None, sa_type=UtcDateTime, nullable=nullable)


def _partial_index(condition: str, name: str, *columns: str, unique: bool = False) -> sa.Index:
    """Return an index of the rows for which the condition holds."""
    where = sa.text(condition)
    return sa.Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


class OfProject(SQLModel):
    """What belongs to a project: a session sees such rows of its own project only (`app.store.session`)."""

    project_id: str = Field(default=None, max_length=40)


class Owned(OfProject):
    """What callers make in a project."""

    created_by: str = Field(default="", max_length=200, description="name of the caller; empty: the service itself")


class ProjectRow(SQLModel, table=True):
    """Whose methods, data and jobs something is. Its id stands in addresses and names its folder."""

    __tablename__ = "project"

    id: str = Field(primary_key=True, max_length=40)
    title: str = Field(default="", max_length=200)
    limits: Json = Field(default_factory=dict, sa_type=JsonDocument, description="`app.domain.projects.ProjectLimits`")
    created_by: str = Field(default="", max_length=200)
    created_at: datetime = _time()
    updated_at: datetime = _time()


class ProjectMemberRow(SQLModel, table=True):
    """The role that a caller has in a project."""

    __tablename__ = "project_member"

    project_id: str = Field(primary_key=True, foreign_key="project.id", max_length=40)
    principal: str = Field(primary_key=True, max_length=300, description="`app.domain.access.Caller.principal`")
    role: Role = Field(sa_type=enum_type(Role))
    name: str = Field(default="", max_length=200, description="by which people know the caller")
    created_by: str = Field(default="", max_length=200)
    created_at: datetime = _time()


class MethodRow(Owned, table=True):
    """A method; what it is stands in its versions. The columns beside `version` repeat the newest for filters."""

    __tablename__ = "method"
    __table_args__ = (
        # a name may be used again after deletion
        _partial_index("deleted_at IS NULL", "uq_method_name_key_live", "project_id", "name_key", unique=True),
        sa.Index("ix_method_project_id_created_at_id", "project_id", "created_at", "id"),
    )

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=100)
    name_key: str = Field(max_length=300)
    description: str = ""
    training_type: TrainingType = Field(sa_type=enum_type(TrainingType))
    technique: str = Field(max_length=100)
    lifecycle: str = Field(max_length=64, description="the path's states joined by commas")
    version: int
    preset: str | None = Field(default=None, max_length=100, description="name of the preset it was installed from")
    preset_version: int | None = None
    read_only: bool = False
    created_at: datetime = _time()
    updated_at: datetime = _time()
    deleted_at: datetime | None = _time(nullable=True)


class MethodVersionRow(SQLModel, table=True):
    """One immutable version: the definition and the digest of every file it runs."""

    __tablename__ = "method_version"

    method_id: str = Field(primary_key=True, foreign_key="method.id", max_length=36)
    number: int = Field(primary_key=True)
    definition: Json = Field(sa_type=JsonDocument)
    files: Json = Field(sa_type=JsonDocument, description="stage -> {file, sha256, size}")
    source: VersionSource = Field(sa_type=enum_type(VersionSource))
    created_by: str = Field(default="", max_length=200)
    created_at: datetime = _time()


class PresetRow(OfProject, table=True):
    """What was installed of the shipped methods; a deleted preset stays away until it is installed again."""

    __tablename__ = "preset"

    project_id: str = Field(default=None, primary_key=True, max_length=40)
    name: str = Field(primary_key=True, max_length=100)
    method_id: str | None = Field(default=None, foreign_key="method.id", max_length=36)
    version: int
    removed_at: datetime | None = _time(nullable=True)


class SampleRow(OfProject, table=True):
    """A sample of the presets that was registered; one whose data set or base model was deleted stays away."""

    __tablename__ = "sample"

    project_id: str = Field(default=None, primary_key=True, max_length=40)
    kind: SampleKind = Field(primary_key=True, sa_type=enum_type(SampleKind))
    name: str = Field(primary_key=True, max_length=100, description="in the product; here it may have another")
    digest: str = Field(max_length=64, description="sha256 of what the product ships; another one is a new version")
    resource_id: str = Field(max_length=36, description="data set or base model; no foreign key: it may be deleted")


class OptionClassRow(SQLModel, table=True):
    """A configuration class of a library, as some environment of a node has it; never changed."""

    __tablename__ = "option_class"

    digest: str = Field(primary_key=True, max_length=64, description="sha256 of the document")
    path: str = Field(max_length=300)
    document: Json = Field(sa_type=JsonDocument)
    created_at: datetime = _time()


class DeployTargetRow(Owned, table=True):
    """A configured place where online models are served."""

    __tablename__ = "deploy_target"
    __table_args__ = (sa.UniqueConstraint("project_id", "name_key"),)

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=100)
    name_key: str = Field(max_length=300)
    kind: str = Field(max_length=32)
    url: str = Field(max_length=2000)
    settings: Json = Field(default_factory=dict, sa_type=JsonDocument)
    file: str | None = Field(default=None, max_length=1000, description="script for methods that bring none")
    conda_env: str | None = Field(default=None, max_length=300)
    created_at: datetime = _time()


class EnvironmentRow(SQLModel, table=True):
    """A conda environment known by name. Without a spec it is looked up on the nodes only."""

    __tablename__ = "environment"

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=100)
    name_key: str = Field(max_length=300, unique=True)
    spec: str | None = Field(default=None, sa_type=sa.Text)
    spec_hash: str | None = Field(default=None, max_length=64)
    shipped: bool = Field(default=False, description="part of the product; not deletable")
    created_by: str = Field(default="", max_length=200)
    created_at: datetime = _time()
    updated_at: datetime = _time()


class BaseModelRow(Owned, table=True):
    """A folder under `models/` that trainings start from."""

    __tablename__ = "base_model"
    __table_args__ = (sa.UniqueConstraint("project_id", "name_key"),)

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=100, description="technical name")
    name_key: str = Field(max_length=300)
    description: str = ""
    path: str = Field(max_length=1000, description="relative to DEEPE_HOME")
    card: Json = Field(sa_type=JsonDocument)
    recipe: Json | None = Field(
        default=None, sa_type=JsonDocument, description="sample and digest, if a program makes the files; else placed"
    )
    built_at: datetime | None = _time(nullable=True)
    loading_permission: Json | None = Field(
        default=None,
        sa_type=JsonDocument,
        description="what of its author may run when it is loaded, and who allowed it",
    )
    created_at: datetime = _time()


class DatasetRow(Owned, table=True):
    """A JSONL file, or a folder with one, under `datasets/`."""

    __tablename__ = "dataset"
    __table_args__ = (sa.UniqueConstraint("project_id", "name_key"),)

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=100)
    name_key: str = Field(max_length=300)
    description: str = ""
    path: str = Field(max_length=1000, description="relative to DEEPE_HOME; file or folder")
    digest: str = Field(max_length=64, description="sha256 of the JSONL file")
    rows: int
    size_bytes: int = Field(sa_type=sa.BigInteger)
    columns: list[str] = Field(sa_type=JsonDocument)
    report: dict[str, Any] | None = Field(default=None, sa_type=JsonDocument, description="what the check counted")
    source: dict[str, Any] | None = Field(
        default=None, sa_type=JsonDocument, description="file of another format: what it is and how it was read"
    )
    created_at: datetime = _time()


class ModelRow(Owned, table=True):
    """A model that a job made, or that was made elsewhere and registered, with its lineage."""

    __tablename__ = "model"
    __table_args__ = (
        sa.Index("ix_model_project_id_created_at_id", "project_id", "created_at", "id"),
        sa.Index("ix_model_parent_id", "parent_id"),
        sa.Index("uq_model_job_id", "job_id", unique=True),
    )

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=300)
    state: ModelState = Field(sa_type=enum_type(ModelState))
    training_type: TrainingType = Field(sa_type=enum_type(TrainingType))
    path: str | None = Field(default=None, max_length=1000, description="relative to DEEPE_HOME; null for online")
    size_bytes: int = Field(default=0, sa_type=sa.BigInteger)
    base_model_id: str = Field(max_length=36, description="kept after the base model is deleted: no foreign key")
    base_model_name: str = Field(max_length=100)
    base_model_path: str = Field(max_length=1000)
    parent_id: str | None = Field(default=None, foreign_key="model.id", max_length=36)
    job_id: str | None = Field(
        default=None, foreign_key="job.id", max_length=36, description="null: made elsewhere and registered"
    )
    method_id: str = Field(foreign_key="method.id", max_length=36, index=True)
    method_version: int
    dataset_id: str | None = Field(default=None, max_length=36)
    dataset_name: str | None = Field(default=None, max_length=100)
    dataset_digest: str | None = Field(default=None, max_length=64)
    parameters: Json = Field(sa_type=JsonDocument)
    details: Json = Field(sa_type=JsonDocument, description="result manifest, evaluations, where it is served")
    created_at: datetime = _time()
    deleted_at: datetime | None = _time(nullable=True)


class NodeRow(SQLModel, table=True):
    """A machine with a worker."""

    __tablename__ = "node"

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=100, unique=True)
    platform: Platform = Field(sa_type=enum_type(Platform))
    home_id: str = Field(
        default="", max_length=36, description="of its node home: another machine of this name is refused"
    )
    accelerators: list[Json] = Field(sa_type=JsonDocument)
    inventory: Json = Field(default_factory=dict, sa_type=JsonDocument, description="CPU, memory, disk, system")
    labels: dict[str, str] = Field(
        default_factory=dict, sa_type=JsonDocument, description="those of the worker, overlaid with the extra ones"
    )
    worker_labels: dict[str, str] = Field(default_factory=dict, sa_type=JsonDocument)
    extra_labels: dict[str, str] = Field(
        default_factory=dict, sa_type=JsonDocument, description="set by people; the worker does not touch them"
    )
    environments: list[str] = Field(sa_type=JsonDocument, description="names found or built on the node")
    environment_states: list[Json] = Field(
        default_factory=list, sa_type=JsonDocument, description="what the node knows of each environment"
    )
    slots: int
    boot_id: str = Field(max_length=64)
    created_at: datetime = _time()
    heartbeat_at: datetime = _time()
    draining_at: datetime | None = _time(nullable=True)
    dead_at: datetime | None = _time(nullable=True)
    removed_at: datetime | None = _time(nullable=True)
    refusal: Json | None = Field(
        default=None, sa_type=JsonDocument, description="code and params of why it accepts no jobs"
    )
    allowed: Json | None = Field(default=None, sa_type=JsonDocument, description="`app.domain.allow_lists`; None: all")


class JobRow(Owned, table=True):
    """A request to run one stage of one method version. `status` has one writer, in `app.store.job_status`."""

    __tablename__ = "job"
    __table_args__ = (
        _partial_index(CLAIMABLE, "ix_job_queue", "kind", "demand", "priority", "created_at", "id"),
        # for people: what comes before a job, whatever it asks for
        _partial_index(
            CLAIMABLE,
            "ix_job_order",
            "status",  # always the same: makes SQLite take this index, in whose order nothing is left to sort
            "priority",
            "created_at",
            "id",
        ),
        _partial_index(LIVE_JOB, "ix_job_live", "node_id"),
        # a node keeps its accelerators for one job at a time
        _partial_index(RESERVING, "uq_job_reserved_node_id", "reserved_node_id", unique=True),
        # never two builds of one environment on a node at once
        _partial_index(BUILDING, "uq_job_environment_node_id_building", "environment", "node_id", unique=True),
        # never two builds of one base model at once
        _partial_index(BUILDING_BASE_MODEL, "uq_job_base_model_id_building", "base_model_id", unique=True),
        sa.Index("ix_job_project_id_created_at_id", "project_id", "created_at", "id"),
        sa.Index("ix_job_project_id_status_created_at_id", "project_id", "status", "created_at", "id"),
        sa.Index("ix_job_chain_id_position", "chain_id", "position"),
        sa.Index("ix_job_blocked_by", "blocked_by"),
        _partial_index(NAMED_OUTSIDE, "ix_job_external_id", "external_id", "created_at"),
        sa.Index("ix_job_method_id_created_at_id", "method_id", "created_at", "id"),
        _partial_index(MEASURED, "ix_job_measured", "method_id", "base_model_id", "created_at"),
    )

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=300)
    kind: JobKind = Field(sa_type=enum_type(JobKind))
    status: JobStatus = Field(sa_type=enum_type(JobStatus))
    reason: EndReason | None = Field(default=None, sa_type=enum_type(EndReason))
    reason_params: Json = Field(sa_type=JsonDocument, description="values for the text of the reason; log tail")
    priority: int = Field(default=0, description="smaller runs first")
    demand: str = Field(
        default="", sa_type=sa.Text, description="what it asks of a node (`app.domain.demand`); written at insert"
    )
    queue: str = Field(default="default", max_length=100)
    submitted_by: str = Field(default="", max_length=100, description="whose limits it counts against")
    not_before: datetime | None = _time(nullable=True)
    reserved_node_id: str | None = Field(
        default=None, max_length=36, description="node that keeps accelerators for it; a hint that delays no job"
    )

    chain_id: str = Field(max_length=36)
    position: int = 0
    blocked_by: str | None = Field(default=None, max_length=36, description="job that must succeed before")
    external_id: str | None = Field(
        default=None, max_length=200, description="the task's id at DeepExtension's backend; several jobs may share it"
    )
    retry_of: str | None = Field(default=None, max_length=36)
    copied_from: str | None = Field(default=None, max_length=36)

    method_id: str | None = Field(default=None, foreign_key="method.id", max_length=36)
    method_name: str | None = Field(default=None, max_length=100)
    method_version: int | None = None
    environment: str = Field(max_length=100, description="conda environment the stage runs in")
    base_model_id: str | None = Field(default=None, max_length=36)
    dataset_id: str | None = Field(default=None, max_length=36)
    model_id: str | None = Field(default=None, max_length=36, description="model the stage works on; null until known")
    result_model_id: str | None = Field(default=None, max_length=36)
    parameters: Json = Field(sa_type=JsonDocument, description="as the caller gave them")
    launch: Json = Field(sa_type=JsonDocument, description="everything else that the stage's arguments are made of")
    resources: Json = Field(default_factory=dict, sa_type=JsonDocument, description="`app.domain.demand.Resources`")
    retry: Json = Field(default_factory=dict, sa_type=JsonDocument, description="policy: budget, back-off, reasons")
    limits: Json = Field(default_factory=dict, sa_type=JsonDocument, description="seconds to run, seconds of silence")
    memory: Json | None = Field(
        default=None, sa_type=JsonDocument, description="of a training that succeeded: peak, forecast, device"
    )

    node_id: str | None = Field(default=None, foreign_key="node.id", max_length=36)
    token: str | None = Field(default=None, max_length=36, description="fence: guards every write of the claimer")
    attempts: int = 0
    retries: int = Field(default=0, description="attempts charged to the policy's budget")
    recoveries: int = Field(default=0, description="attempts made again because a node or a supervisor was lost")
    cancel_requested_at: datetime | None = _time(nullable=True)
    created_at: datetime = _time()
    started_at: datetime | None = _time(nullable=True)
    finished_at: datetime | None = _time(nullable=True)
    updated_at: datetime = _time()


class AttemptRow(SQLModel, table=True):
    """One launch of a job's process on one node."""

    __tablename__ = "attempt"
    __table_args__ = (
        sa.UniqueConstraint("job_id", "number"),
        # two live attempts of one job are impossible, whatever the code does
        _partial_index(LIVE_ATTEMPT, "uq_attempt_job_id_live", "job_id", unique=True),
        _partial_index(LIVE_ATTEMPT, "ix_attempt_node_id_live", "node_id"),
    )

    id: str = Field(primary_key=True, max_length=36)
    job_id: str = Field(foreign_key="job.id", max_length=36)
    number: int
    node_id: str = Field(foreign_key="node.id", max_length=36)
    token: str = Field(max_length=36)
    live: bool = True
    lease_expires_at: datetime = _time()
    accelerators: list[str] = Field(default_factory=list, sa_type=JsonDocument, description="ids of what it leased")
    expected_end_at: datetime | None = _time(nullable=True)
    resumed_from: Json | None = Field(default=None, sa_type=JsonDocument, description="attempt, checkpoint, step")
    reason: EndReason | None = Field(default=None, sa_type=enum_type(EndReason))
    reason_params: Json = Field(default_factory=dict, sa_type=JsonDocument, description="values for the reason's text")
    exit: Json | None = Field(default=None, sa_type=JsonDocument)
    created_at: datetime = _time()
    started_at: datetime | None = _time(nullable=True)
    finished_at: datetime | None = _time(nullable=True)


class LeaseRow(SQLModel, table=True):
    """An accelerator that an attempt holds; freed only after the proof that nothing of the attempt is left."""

    __tablename__ = "lease"
    __table_args__ = (
        # two holders of one accelerator are impossible, whatever the code does
        _partial_index(LIVE_LEASE, "uq_lease_node_id_accelerator_live", "node_id", "accelerator", unique=True),
        sa.Index("ix_lease_attempt_id", "attempt_id"),
    )

    id: str = Field(primary_key=True, max_length=36)
    node_id: str = Field(foreign_key="node.id", max_length=36)
    accelerator: str = Field(max_length=100, description="its id on the node: the card's uuid")
    attempt_id: str = Field(foreign_key="attempt.id", max_length=36)
    live: bool = True
    quarantined_at: datetime | None = _time(nullable=True)
    created_at: datetime = _time()
    released_at: datetime | None = _time(nullable=True)


class QueueRow(SQLModel, table=True):
    """Limits of a queue; one without a row has none."""

    __tablename__ = "job_queue"

    name: str = Field(primary_key=True, max_length=100)
    max_live: int | None = None
    max_live_per_user: int | None = None
    created_by: str = Field(default="", max_length=200)
    created_at: datetime = _time()
    updated_at: datetime = _time()


class InstallationRow(SQLModel, table=True):
    """What all processes of an installation must agree on, by key."""

    __tablename__ = "installation"

    key: str = Field(primary_key=True, max_length=100)
    value: Json = Field(sa_type=JsonDocument)
    updated_at: datetime = _time()


class AccessKeyRow(SQLModel, table=True):
    """An API key: whoever sends its secret has its name and its role. Of the secret the digest is kept."""

    __tablename__ = "access_key"
    __table_args__ = (
        # a name may be used again after revocation
        _partial_index("revoked_at IS NULL", "uq_access_key_name_key_live", "name_key", unique=True),
        sa.Index("uq_access_key_digest", "digest", unique=True),
    )

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=100)
    name_key: str = Field(max_length=300)
    role: Role = Field(sa_type=enum_type(Role), description="in its project, else in the installation")
    project_id: str | None = Field(default=None, max_length=40, description="the only one it opens; null: all")
    prefix: str = Field(max_length=16, description="first characters of the secret, by which people know it again")
    digest: str = Field(max_length=64, description="SHA-256 of the secret in hexadecimal digits")
    created_by: str = Field(max_length=100, description="name of the caller that made it")
    created_at: datetime = _time()
    changed_at: datetime = _time()
    expires_at: datetime | None = _time(nullable=True)
    last_used_at: datetime | None = _time(nullable=True)
    revoked_at: datetime | None = _time(nullable=True)


class WebhookRow(Owned, table=True):
    """An address that receives a message when a job ends."""

    __tablename__ = "webhook"

    id: str = Field(primary_key=True, max_length=36)
    url: str = Field(max_length=2000)
    secret: str = Field(max_length=200, description="key of the signature")
    events: list[str] = Field(sa_type=JsonDocument)
    active: bool = True
    created_at: datetime = _time()
    updated_at: datetime = _time()


class DeliveryRow(SQLModel, table=True):
    """One message of a webhook, written in the transaction of the change itself."""

    __tablename__ = "delivery"
    __table_args__ = (
        _partial_index(PENDING_DELIVERY, "ix_delivery_pending", "webhook_id", "next_try_at"),
        sa.Index("ix_delivery_webhook_id_created_at_id", "webhook_id", "created_at", "id"),
    )

    id: str = Field(primary_key=True, max_length=36)
    webhook_id: str = Field(foreign_key="webhook.id", max_length=36)
    job_id: str = Field(max_length=36)
    event: str = Field(max_length=50)
    body: Json = Field(sa_type=JsonDocument)
    state: DeliveryState = Field(default=DeliveryState.PENDING, sa_type=enum_type(DeliveryState))
    tries: int = 0
    next_try_at: datetime | None = _time(nullable=True)
    last_status: int | None = None
    last_error: str | None = Field(default=None, sa_type=sa.Text)
    created_at: datetime = _time()
    delivered_at: datetime | None = _time(nullable=True)


class JobEventRow(SQLModel, table=True):
    """One row per transition of a job; `id` orders them and is the state part of the stream's event ids."""

    __tablename__ = "job_event"
    __table_args__ = (sa.Index("ix_job_event_job_id_id", "job_id", "id"),)

    id: int | None = Field(default=None, primary_key=True)
    job_id: str = Field(foreign_key="job.id", max_length=36)
    attempt: int
    status: JobStatus = Field(sa_type=enum_type(JobStatus))
    reason: EndReason | None = Field(default=None, sa_type=enum_type(EndReason))
    created_at: datetime = _time()


class SecretRow(OfProject, table=True):
    """A value that processes of stages get by its name; here it is ciphertext (`app.access.secrets`)."""

    __tablename__ = "secret"
    __table_args__ = (sa.Index("uq_secret_project_id_name", "project_id", "name", unique=True),)

    id: str = Field(primary_key=True, max_length=36)
    name: str = Field(max_length=100)
    value: str = Field(default="", sa_type=sa.Text, description="encrypted, together with the name")
    created_by: str = Field(max_length=100)
    created_at: datetime = _time()
    changed_by: str = Field(default="", max_length=100)
    changed_at: datetime = _time()


class CodeReviewRow(OfProject, table=True):
    """Code that a second person approves or rejects, by its digest (`app.domain.code_review`)."""

    __tablename__ = "code_review"
    __table_args__ = (sa.Index("ix_code_review_project_id_created_at_digest", "project_id", "created_at", "digest"),)

    project_id: str = Field(default=None, primary_key=True, max_length=40)
    digest: str = Field(primary_key=True, max_length=64)
    code: Json = Field(sa_type=JsonDocument)
    state: ReviewState = Field(sa_type=enum_type(ReviewState))
    stage: str = Field(max_length=100, description="or the parameter that names the file")
    method_id: str | None = Field(default=None, max_length=36, description="that ran it first; no foreign key")
    method_name: str | None = Field(default=None, max_length=100)
    method_version: int | None = None
    created_at: datetime = _time()
    decided_by: str | None = Field(default=None, sa_type=sa.Text, description="principal")
    decided_name: str | None = Field(default=None, max_length=100)
    decided_at: datetime | None = _time(nullable=True)
    note: str = Field(default="", sa_type=sa.Text)


class CodeDecisionRow(OfProject, table=True):
    """One decision on code; none is ever changed."""

    __tablename__ = "code_decision"
    __table_args__ = (
        sa.ForeignKeyConstraint(["project_id", "digest"], ["code_review.project_id", "code_review.digest"]),
        sa.Index("ix_code_decision_project_id_digest_id", "project_id", "digest", "id"),
    )

    id: int | None = Field(default=None, primary_key=True)
    digest: str = Field(max_length=64)
    state: ReviewState = Field(sa_type=enum_type(ReviewState))
    principal: str = Field(sa_type=sa.Text)
    name: str = Field(max_length=100)
    note: str = Field(default="", sa_type=sa.Text)
    created_at: datetime = _time()


class CodeChangeRow(OfProject, table=True):
    """A caller changed a file of the script root, or what a stage of a method runs; none is ever changed."""

    __tablename__ = "code_change"
    __table_args__ = (
        sa.Index("ix_code_change_project_id_digest", "project_id", "digest"),
        sa.Index("ix_code_change_project_id_place_created_at", "project_id", "place", "created_at"),
    )

    id: int | None = Field(default=None, primary_key=True)
    place: str = Field(max_length=64, description="sha256 of the path, or of method and stage")
    digest: str = Field(max_length=64, description="of the file's bytes, or of the code; empty: it was deleted")
    principal: str = Field(sa_type=sa.Text)
    name: str = Field(max_length=100)
    created_at: datetime = _time()


class EnvironmentRuleRow(SQLModel, table=True):
    """What may use an environment. It need not be registered: `base` never is."""

    __tablename__ = "environment_rule"

    environment: str = Field(primary_key=True, max_length=300)
    allowed: Json = Field(sa_type=JsonDocument, description="`app.domain.allow_lists.AllowList`")
    changed_by: str = Field(max_length=200)
    changed_at: datetime = _time()


class IdempotencyRow(SQLModel, table=True):
    """The answer to a create with an `Idempotency-Key`, written in the same transaction as what it created."""

    __tablename__ = "idempotency"

    scope: str = Field(primary_key=True, max_length=200)
    key: str = Field(primary_key=True, max_length=200)
    fingerprint: str = Field(max_length=64)
    status_code: int
    body: Json = Field(sa_type=JsonDocument)
    created_at: datetime = _time()


class AuditRecordRow(SQLModel, table=True):
    """A record of the audit trail (`app.domain.audit`); never changed, and removed from the oldest on."""

    __tablename__ = "audit_record"
    __table_args__ = (
        sa.Index("ix_audit_record_caller_number", "caller", "number"),
        sa.Index("ix_audit_record_operation_number", "operation", "number"),
        sa.Index("ix_audit_record_at", "at"),
    )

    number: int = Field(primary_key=True, sa_type=sa.BigInteger, sa_column_kwargs={"autoincrement": False})
    at: datetime = _time()
    kind: AuditKind = Field(sa_type=enum_type(AuditKind))
    caller_kind: str = Field(max_length=32)
    caller: str = Field(max_length=200)
    principal: str = Field(max_length=500)
    address: str | None = Field(default=None, max_length=100)
    request_id: str | None = Field(default=None, max_length=200)
    operation: str = Field(max_length=100)
    project_id: str | None = Field(default=None, max_length=40)
    things: str = Field(sa_type=sa.Text, description="kind, id and name of each thing, for filters")
    details: str = Field(sa_type=sa.Text, description="canonical JSON; the hash is over these very characters")
    previous: str = Field(max_length=64)
    hash: str = Field(max_length=64)
