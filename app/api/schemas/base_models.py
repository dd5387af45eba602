"""Base models over the wire."""

from datetime import datetime

from pydantic import Field

from app.api.schemas.common import ID, MAX_TEXT, RequestBody
from app.domain.enums import TrainingType
from app.domain.texts import Language
from app.domain.values import Value
from app.registry.base_models.card import BaseModelCard
from app.registry.base_models.findings import LoadingPermission, Severity, findings
from app.registry.base_models.service import BaseModelFiles, is_unmade
from app.registry.base_models.uploads import Uploaded
from app.store.tables import BaseModelRow


class BaseModelCreate(RequestBody):
    """A folder under `models/`, or files that were uploaded, to register."""

    name: str = Field(description="Technical name, unique.", examples=["Qwen2.5-1.5B"])
    path: str | None = Field(
        default=None,
        description="Folder, relative to `models/` of DEEPE_HOME. Without it, what was uploaded under the name.",
        examples=["Qwen2.5-1.5B"],
    )
    description: str = Field(default="", max_length=MAX_TEXT)


class BaseModelFinding(Value):
    """Something about a base model that matters to a training."""

    severity: Severity
    code: str = Field(examples=["base_model_without_tokenizer"])
    detail: str = Field(description="What follows and what helps, in the caller's language.")


class BaseModelDownload(RequestBody):
    """A model of a hub to download and register."""

    name: str = Field(description="Technical name, unique.", examples=["Qwen2.5-1.5B"])
    repository: str = Field(description="Name on the hub.", examples=["Qwen/Qwen2.5-1.5B"])
    revision: str = Field(default="main", description="Branch, tag or commit.", examples=["main"])
    description: str = Field(default="", max_length=MAX_TEXT)


class BaseModelLoading(RequestBody):
    """What of a base model's author may run when the platform's scripts load it."""

    pickled_weights: bool = Field(
        default=False, description="Load weights that are pickles (`*.bin`).", examples=[True]
    )
    custom_code: bool = Field(default=False, description="Run Python files that the model brings (`auto_map`).")


class BaseModelFileRead(Value):
    """A file of a base model, or what is there of one that is being uploaded."""

    path: str = Field(description="Relative to the model's folder.", examples=["model.safetensors"])
    size_bytes: int = Field(description="Bytes that are there.", examples=[3087467144])
    complete: bool = Field(description="False: the rest is still to be uploaded.")


class BaseModelFileList(Value):
    """All files of a base model."""

    items: list[BaseModelFileRead]
    registered: bool = Field(description="False: they were uploaded, and `POST /base-models` registers them.")
    size_bytes: int = Field(description="Of all files together.")
    archive_offset: int | None = Field(description="Bytes that are there of an archive that is being uploaded.")


class BaseModelRead(Value):
    """A registered base model."""

    id: str = Field(examples=[ID])
    name: str = Field(examples=["Qwen2.5-1.5B"])
    description: str
    path: str = Field(description="Relative to DEEPE_HOME.", examples=["models/Qwen2.5-1.5B"])
    card: BaseModelCard = Field(
        description="Read from the folder when it was registered, and again by a submit after files changed; "
        "null: it does not say."
    )
    made_on_first_use: bool = Field(
        description="The files are not there yet: a job makes or downloads them before the first training that starts "
        "from it. The card is empty until then."
    )
    findings: dict[TrainingType, list[BaseModelFinding]] = Field(
        description="What follows from the card for a training of each type. A submit refuses for an `error`; for "
        "what `loading_permission` can allow, only where a script of the platform loads the model."
    )
    loading_permission: LoadingPermission | None = Field(
        description="What of its author may run when the platform's scripts load it; null: nothing."
    )
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime


class UnregisteredBaseModels(Value):
    """Folders under `models/` that look like models and have no entry yet."""

    items: list[str] = Field(examples=[["Qwen2.5-7B"]])


def base_model_file(file: Uploaded) -> BaseModelFileRead:
    """Return a file of a base model as callers see it."""
    return BaseModelFileRead(path=file.path, size_bytes=file.size_bytes, complete=file.complete)


def base_model_files(files: BaseModelFiles) -> BaseModelFileList:
    """Return the files of a base model as callers see them."""
    return BaseModelFileList(
        items=[base_model_file(file) for file in files.files],
        registered=files.registered,
        size_bytes=sum(file.size_bytes for file in files.files),
        archive_offset=files.archive_offset,
    )


def base_model_read(row: BaseModelRow, language: Language) -> BaseModelRead:
    """Return the base model as callers see it."""
    card = BaseModelCard.model_validate(row.card)
    return BaseModelRead(
        id=row.id,
        name=row.name,
        description=row.description,
        path=row.path,
        card=card,
        made_on_first_use=is_unmade(row),
        findings={
            one: [
                BaseModelFinding(severity=f.severity, code=f.violation.code, detail=f.violation.detail(language))
                for f in findings(card, one, LoadingPermission.of(row))
                if not is_unmade(row)
            ]
            for one in TrainingType
        },
        loading_permission=LoadingPermission.of(row) if row.loading_permission else None,
        created_by=row.created_by,
        created_at=row.created_at,
    )
