"""Models that were made elsewhere, entered with what they come from. Their files are checked and not moved."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.deploy_targets import normal_url, url_violations
from app.domain.enums import ModelState, TrainingType
from app.domain.errors import AppError, Invalid, InvalidRequest, Violation
from app.domain.names import normal_name
from app.domain.plain_text import shown, storable_document
from app.executor.attempts.artifacts import Artifact, complete_artifact, customized_artifact
from app.registry.models.files import UnusableFile
from app.registry.models.folders import list_files
from app.registry.resource_paths import resolve_inside
from app.store import methods as method_store
from app.store import models as store
from app.store.base_models import get_base_model
from app.store.datasets import get_dataset
from app.store.home import Home
from app.store.tables import BaseModelRow, DatasetRow, MethodRow, ModelRow

MAX_MODEL_NAME: Final = 300
_RowT = TypeVar("_RowT")


@dataclass(frozen=True)
class ModelToRegister:
    """What a caller says of a model; `path` is relative to `models/`. Base model, method and so on: id or name."""

    name: str
    state: ModelState
    base_model: str
    method: str
    path: str | None = None
    url: str | None = None
    quantize: str | None = None
    parent: str | None = None
    dataset: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    made_at: datetime | None = None


@dataclass(frozen=True)
class Looked:
    """What lies in the model's folder, or what is wrong with it."""

    folder: Path | None = None
    artifact: Artifact | None = None
    size_bytes: int = 0
    violations: Sequence[Violation] = ()


@dataclass(frozen=True)
class _Known:
    """The rows that a new model names."""

    base_model: BaseModelRow | None
    method: MethodRow | None
    parent: ModelRow | None
    dataset: DatasetRow | None
    unknown: Sequence[Violation]


class ModelRegistration:
    """Registers models that no job of this service made."""

    def __init__(self, *, home: Home, clock: Callable[[], datetime]) -> None:
        self._home = home
        self._clock = clock

    async def look(self, new: ModelToRegister) -> Looked:
        """Look into the folder; a large model takes a while, so no statement is run."""
        if new.state is ModelState.ONLINE or new.path is None:
            return Looked()
        return await asyncio.to_thread(self._look, new.path, complete=new.state is ModelState.COMPLETE)

    def _look(self, path: str, *, complete: bool) -> Looked:
        try:
            folder = resolve_inside(self._home.models, path)
            artifact = complete_artifact(folder) if complete else customized_artifact(folder)
            return Looked(folder, artifact, sum(file.size_bytes for file in list_files(folder)))
        except UnusableFile as error:
            return Looked(violations=[Violation("/path", error.violation.code, error.violation.params)])
        except Invalid as error:
            return Looked(violations=error.violations())

    async def violations(self, session: AsyncSession, new: ModelToRegister, looked: Looked) -> list[Violation]:
        """Return everything that is wrong with the model."""
        return await self._violations(session, new, looked, await _known(session, new))

    async def register(self, session: AsyncSession, new: ModelToRegister, looked: Looked) -> ModelRow:
        """Enter the model. Raises `InvalidRequest` with all that is wrong."""
        known = await _known(session, new)
        if found := await self._violations(session, new, looked, known):
            raise InvalidRequest(found)
        assert known.base_model is not None
        assert known.method is not None
        served = {"url": normal_url(new.url), "quantize": new.quantize} if new.url is not None else None
        row = store.NewModel(
            name=normal_name(new.name),
            state=new.state,
            training_type=TrainingType(known.method.training_type),
            path=None if looked.folder is None else self._home.relative(looked.folder),
            size_bytes=looked.size_bytes,
            base_model_id=known.base_model.id,
            base_model_name=known.base_model.name,
            base_model_path=known.base_model.path,
            parent_id=None if known.parent is None else known.parent.id,
            job_id=None,
            method_id=known.method.id,
            method_version=known.method.version,
            dataset_id=None if known.dataset is None else known.dataset.id,
            dataset_name=None if known.dataset is None else known.dataset.name,
            # the bytes that it learned from are not known, only the data set's name
            dataset_digest=None,
            parameters=storable_document(dict(new.parameters)),
            details={
                "kind": None if looked.artifact is None else looked.artifact.kind,
                "deployment": served,
                "origin": storable_document(dict(new.origin)),
            },
        )
        return await store.create_model(session, row, now=new.made_at or self._clock())

    async def _violations(
        self, session: AsyncSession, new: ModelToRegister, looked: Looked, known: _Known
    ) -> list[Violation]:
        found = _name_violations(new.name)
        if await store.name_is_taken(session, normal_name(new.name)):
            found.append(Violation("/name", "name_taken", {"name": normal_name(new.name)}))
        found += _place_violations(new)
        found += looked.violations
        return [*found, *known.unknown]


def _name_violations(name: str) -> list[Violation]:
    if not name.strip():
        return [Violation("/name", "missing_name")]
    if not name.isprintable() or "/" in name:
        return [Violation("/name", "invalid_name", {"characters": shown(name)})]
    if len(normal_name(name)) > MAX_MODEL_NAME:
        return [Violation("/name", "name_too_long", {"length": len(normal_name(name)), "limit": MAX_MODEL_NAME})]
    return []


def _place_violations(new: ModelToRegister) -> list[Violation]:
    """Return whether path and address fit the state: an online model is served somewhere, the others are files."""
    if new.state is not ModelState.ONLINE:
        found = [] if new.path is not None else [Violation("/path", "model_needs_path", {"state": new.state})]
        return found if new.url is None else [*found, Violation("/url", "model_takes_no_url", {"state": new.state})]
    found = [] if new.path is None else [Violation("/path", "online_model_takes_no_path")]
    return [*found, *(url_violations(new.url) if new.url is not None else [Violation("/url", "model_needs_url")])]


async def _known(session: AsyncSession, new: ModelToRegister) -> _Known:
    unknown: list[Violation] = []

    async def find(pointer: str, reading: Awaitable[_RowT]) -> _RowT | None:
        try:
            return await reading
        except AppError as error:
            unknown.append(Violation(pointer, error.code, error.params))
            return None

    return _Known(
        base_model=await find("/base_model", get_base_model(session, new.base_model)),
        method=await find("/method", method_store.get(session, new.method)),
        parent=None if new.parent is None else await find("/parent", store.get_model(session, new.parent)),
        dataset=None if new.dataset is None else await find("/dataset", get_dataset(session, new.dataset)),
        unknown=unknown,
    )
