"""Models over the wire, with their lineage."""

from datetime import datetime
from typing import Any

from pydantic import AwareDatetime, Field

from app.api.errors import ProblemEntry, problem_entries
from app.api.schemas.common import ID, SHA256, RequestBody
from app.domain.enums import ModelState, TrainingType
from app.domain.texts import Language
from app.domain.values import Value
from app.executor.attempts.comparisons import Compared, answer_warnings
from app.executor.jobs.model_registration import ModelToRegister
from app.executor.jobs.requests import Parameters
from app.registry.models.folders import ModelFile
from app.registry.models.service import Lineage
from app.store.tables import ModelRow

_NAME = "Qwen2.5-1.5B_faq_20260301_5b0e"


class ModelReference(Value):
    """A model that another one was made from, or that was made from it."""

    id: str = Field(examples=[ID])
    name: str = Field(examples=[_NAME])
    state: ModelState
    deleted: bool
    created_at: datetime


class BaseModelReference(Value):
    """The base model as it was when the training was submitted; it may be gone."""

    id: str = Field(examples=[ID])
    name: str = Field(examples=["Qwen2.5-1.5B"])
    path: str = Field(examples=["models/Qwen2.5-1.5B"])


class DatasetReference(Value):
    """The data set with the digest of the bytes that were trained on; it may be gone."""

    id: str = Field(examples=[ID])
    name: str | None = Field(examples=["faq"])
    digest: str | None = Field(examples=[SHA256])


class ModelSummary(Value):
    """A model as a list shows it."""

    id: str = Field(examples=[ID])
    name: str = Field(examples=[_NAME])
    state: ModelState
    training_type: TrainingType
    base_model: BaseModelReference
    dataset: DatasetReference | None
    method_id: str = Field(examples=[ID])
    job_id: str | None = Field(description="Null: made elsewhere and registered.", examples=[ID])
    size_bytes: int
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime


class MethodReference(Value):
    """The method and the version that ran."""

    id: str = Field(examples=[ID])
    name: str | None = Field(examples=["SFT-Demo"])
    version: int
    deleted: bool


class JobReference(Value):
    """The job that made the model."""

    id: str = Field(examples=[ID])
    name: str | None


class ModelRead(Value):
    """A model and everything it comes from and became."""

    id: str = Field(examples=[ID])
    name: str = Field(examples=[_NAME])
    state: ModelState
    training_type: TrainingType
    path: str | None = Field(description="Relative to DEEPE_HOME; null for online models.")
    size_bytes: int
    base_model: BaseModelReference
    dataset: DatasetReference | None
    method: MethodReference
    job: JobReference | None = Field(description="Null: made elsewhere and registered.")
    parameters: dict[str, Any]
    details: dict[str, Any] = Field(
        description="Result manifest, evaluations, where the model is served; `origin` if it was made elsewhere."
    )
    parents: list[ModelReference] = Field(description="What it was made from, nearest first, down to the base model.")
    children: list[ModelReference] = Field(description="What was made from it.")
    warnings: list[ProblemEntry] = Field(description="What is unusual about its answers.")
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime


class ModelFileRead(Value):
    """One file of a model."""

    path: str = Field(description="Relative to the model's folder.", examples=["adapter_model.safetensors"])
    size_bytes: int


class ModelFileList(Value):
    """All files of a model."""

    items: list[ModelFileRead]
    size_bytes: int = Field(description="Of all files together.")


class ModelCreate(RequestBody):
    """A model that was made elsewhere. Base model, method, parent and data set: id or name."""

    name: str = Field(description="No other model has it.", examples=[_NAME])
    state: ModelState
    path: str | None = Field(
        default=None,
        description="Folder, relative to `models/` of DEEPE_HOME; needed unless the state is online.",
        examples=["adapters/faq"],
    )
    url: str | None = Field(
        default=None, description="Where an online model is served.", examples=["http://gpu-box:11434"]
    )
    quantize: str | None = Field(default=None, max_length=40, description="How an online model was quantized.")
    base_model: str = Field(examples=["Qwen2.5-1.5B"])
    method: str = Field(description="What made it; its inference stages answer.", examples=["SFT-Demo"])
    parent: str | None = Field(default=None, description="The model that it was made from.")
    dataset: str | None = Field(default=None, description="What it learned from.", examples=["faq"])
    parameters: Parameters = Field(default_factory=dict, description="What it was trained with.")
    origin: Parameters = Field(default_factory=dict, description="Where it comes from, in the caller's words.")
    made_at: AwareDatetime | None = Field(default=None, description="When it was made. Default: now.")

    def wanted(self) -> ModelToRegister:
        """Return what is to be registered."""
        return ModelToRegister(**dict(self))


class ModelValidation(Value):
    """Everything that registering a model would say."""

    valid: bool
    kind: str | None = Field(description="What lies in the folder.", examples=["adapter"])
    violations: list[ProblemEntry]


def model_summary(row: ModelRow) -> ModelSummary:
    """Return the model as a list shows it."""
    return ModelSummary(
        id=row.id,
        name=row.name,
        state=row.state,
        training_type=row.training_type,
        base_model=_base_model(row),
        dataset=_dataset(row),
        method_id=row.method_id,
        job_id=row.job_id,
        size_bytes=row.size_bytes,
        created_by=row.created_by,
        created_at=row.created_at,
    )


def model_read(lineage: Lineage, language: Language) -> ModelRead:
    """Return the model with its lineage."""
    compared = Compared.of(lineage.model)
    row, method, job = lineage.model, lineage.method, lineage.job
    return ModelRead(
        id=row.id,
        name=row.name,
        state=row.state,
        training_type=row.training_type,
        path=row.path,
        size_bytes=row.size_bytes,
        base_model=_base_model(row),
        dataset=_dataset(row),
        method=MethodReference(
            id=row.method_id,
            name=method and method.name,
            version=row.method_version,
            deleted=method is None or method.deleted_at is not None,
        ),
        job=None if row.job_id is None else JobReference(id=row.job_id, name=job and job.name),
        parameters=row.parameters,
        details=row.details,
        parents=[_reference(parent) for parent in lineage.parents],
        children=[_reference(child) for child in lineage.children],
        warnings=problem_entries(answer_warnings(compared.file if compared and compared.alike else None), language),
        created_by=row.created_by,
        created_at=row.created_at,
    )


def model_files(files: list[ModelFile]) -> ModelFileList:
    """Return the files as callers see them."""
    return ModelFileList(
        items=[ModelFileRead(path=file.path, size_bytes=file.size_bytes) for file in files],
        size_bytes=sum(file.size_bytes for file in files),
    )


def _base_model(row: ModelRow) -> BaseModelReference:
    return BaseModelReference(id=row.base_model_id, name=row.base_model_name, path=row.base_model_path)


def _dataset(row: ModelRow) -> DatasetReference | None:
    if row.dataset_id is None:
        return None
    return DatasetReference(id=row.dataset_id, name=row.dataset_name, digest=row.dataset_digest)


def _reference(row: ModelRow) -> ModelReference:
    return ModelReference(
        id=row.id, name=row.name, state=row.state, deleted=row.deleted_at is not None, created_at=row.created_at
    )
