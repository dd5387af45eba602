"""Base models: folders placed under `models/`, registered with a technical name and a card.

A folder is checked when it is registered and again whenever it is used: one that changed on disk gets a new card, and
one that is no whole model any more is refused.
"""

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Final
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import AppError, Conflict, InvalidRequest, Violation, together_with
from app.domain.names import name_key, name_violations, normal_name
from app.domain.plain_text import MAX_PATH_LENGTH, shown
from app.registry.base_models.card import BaseModelCard, NotABaseModel, read_card
from app.registry.base_models.findings import POINTER, LoadingPermission
from app.registry.base_models.uploads import BaseModelUploads, Uploaded
from app.registry.models.archive import Archive, archive_of
from app.registry.models.check import CONFIG, PIPELINE
from app.registry.models.files import UnusableFile
from app.registry.models.folders import (
    ModelFileNotFound,
    existing_file,
    existing_folder,
    list_files,
    remove_folder,
    walk,
)
from app.registry.resource_paths import resolve_inside, stays_inside
from app.store import named
from app.store.base_models import (
    BaseModelNotFound,
    customized_models,
    get_base_model,
    paths_besides,
    registered_paths,
)
from app.store.home import Home
from app.store.methods import NameTaken
from app.store.paging import PageRequest, Slice
from app.store.tables import BaseModelRow
from app.store.usage import unfinished_jobs

_DEPTH: Final = 3  # models/<organisation>/<model>, and one more
_REMEMBERED: Final = 1024
_MAX_NAME_BYTES: Final = 200
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)


class BaseModelInUse(Conflict):
    """Unfinished jobs use the base model."""

    code = "base_model_in_use"


class BaseModelFilesNeeded(Conflict):
    """Another base model has the folder, or customized models were made from it."""

    code = "base_model_files_needed"


@dataclass(frozen=True)
class Prepared:
    """A folder whose card was read and that can be registered."""

    name: str
    folder: Path
    card: BaseModelCard
    uploaded: Path | None = None
    """Where the files are until the model is registered."""


@dataclass(frozen=True)
class Plan:
    """What a create will register, or the error that refuses it."""

    prepared: Prepared | None = None
    error: AppError | None = None

    def outcome(self) -> Prepared:
        """Return what was prepared, or raise what is wrong."""
        if self.error is not None:
            raise self.error
        assert self.prepared is not None
        return self.prepared


@dataclass(frozen=True)
class BaseModelFiles:
    """The files of a base model, or those that are uploaded of one to be."""

    files: Sequence[Uploaded]
    registered: bool
    archive_offset: int | None = None
    """How many bytes are there of an archive that is being uploaded."""


def hub_recipe(repository: str, revision: str) -> dict[str, str]:
    """Return what a base model's row says of a model on a hub."""
    return {"repository": repository, "revision": revision}


def is_unmade(row: BaseModelRow) -> bool:
    """Say whether a job is going to make the files (`app.registry.methods.samples`)."""
    return row.recipe is not None and row.built_at is None


class BaseModels:
    """What can be done with base models."""

    def __init__(self, *, home: Home, clock: Callable[[], datetime], max_upload_bytes: int = 0) -> None:
        self.uploads = BaseModelUploads(home=home, max_bytes=max_upload_bytes)
        self._home = home
        self._clock = clock
        self._checked: dict[str, tuple[int, BaseModelCard]] = {}

    @property
    def _roots(self) -> tuple[Path, ...]:
        """Folders that links in a base model may lead to."""
        return (self._home.models, self._home.runs)

    async def get(self, session: AsyncSession, base_model: str) -> BaseModelRow:
        """Return the base model with this id or technical name."""
        return await get_base_model(session, base_model)

    async def page(self, session: AsyncSession, wanted: PageRequest, *, text: str | None = None) -> Slice[BaseModelRow]:
        """Return one page of the base models."""
        return await named.page(session, BaseModelRow, wanted, text=text)

    async def prepare(self, *, name: str, path: str | None) -> Prepared:
        """Read the card of the folder `path` of `models/`, without one of what was uploaded under the name.

        It may take a while, so no statement is run.
        """
        with together_with(name_violations(name)):
            return await asyncio.to_thread(self._prepare, name, path)

    async def plan(self, *, name: str, path: str | None) -> Plan:
        """Prepare, and keep what is wrong: a repeated Idempotency-Key gets its first answer whatever became since."""
        try:
            return Plan(prepared=await self.prepare(name=name, path=path))
        except AppError as error:
            return Plan(error=error)

    async def create(self, session: AsyncSession, planned: Prepared | Plan, *, description: str = "") -> BaseModelRow:
        """Register what was prepared; what was uploaded gets its place among the models."""
        prepared = planned.outcome() if isinstance(planned, Plan) else planned
        row = BaseModelRow(
            id=str(uuid4()),
            name=prepared.name,
            name_key=name_key(prepared.name),
            description=description,
            path=self._home.relative(prepared.folder),
            card=prepared.card.model_dump(mode="json"),
            created_at=self._clock(),
        )
        await named.insert(session, row)
        if prepared.uploaded is not None:  # the row first: it decides who of two may have the name
            await asyncio.to_thread(prepared.uploaded.rename, prepared.folder)
        return row

    async def register_of_hub(
        self, session: AsyncSession, *, name: str, recipe: Mapping[str, str], card: BaseModelCard, description: str
    ) -> BaseModelRow:
        """Register a model that is going to be downloaded; the one of this name if it is the same model."""
        with together_with([*name_violations(name), *_hub_violations(recipe)]):
            known = await named.find(session, BaseModelRow, name)
        if known is not None and known.recipe == recipe:
            return known
        place = await asyncio.to_thread(_free_place, self._home.models, normal_name(name))
        prepared = Prepared(name=normal_name(name), folder=place, card=card)
        row = await self.create(session, prepared, description=description)
        row.recipe = dict(recipe)
        await session.flush()
        return row

    def current_card(self, row: BaseModelRow) -> BaseModelCard:
        """Return the card of the folder as it is now. Raises `InvalidRequest` if it is no whole model any more.

        Only a folder in which something changed since it was last read is read again. Blocks: call it in a thread.
        """
        try:
            return self._current_card(row)
        except UnusableFile as exc:
            raise InvalidRequest([Violation(POINTER, exc.violation.code, exc.violation.params)]) from exc
        except AppError as exc:
            raise InvalidRequest([Violation(POINTER, exc.code, exc.params)]) from exc

    async def record(self, session: AsyncSession, base_model: str, card: BaseModelCard) -> None:
        """Write down the card of a folder that changed."""
        row = await get_base_model(session, base_model)
        row.card = card.model_dump(mode="json")
        session.add(row)

    async def allow_loading(
        self, session: AsyncSession, base_model: str, *, pickled_weights: bool, custom_code: bool, by: str
    ) -> BaseModelRow:
        """Say what of its author may run when the platform's scripts load the base model; False forbids it again."""
        row = await get_base_model(session, base_model)
        permission = LoadingPermission(
            pickled_weights=pickled_weights, custom_code=custom_code, allowed_by=by, allowed_at=self._clock()
        )
        row.loading_permission = permission.model_dump(mode="json") if permission.permits else None
        session.add(row)
        await session.flush()
        return row

    async def require_unregistered(self, session: AsyncSession, name: str) -> None:
        """Raise `NameTaken` if a base model has the name: its files are not replaced one by one."""
        if await named.name_is_taken(session, BaseModelRow, name):
            raise NameTaken(name=normal_name(name), pointer="{base_model}")

    async def files_or_upload(self, session: AsyncSession, base_model: str) -> BaseModelFiles:
        """Return the files of the base model, else what was uploaded under the name. Raises `BaseModelNotFound`."""
        row = await named.find(session, BaseModelRow, base_model)
        if row is None:
            uploaded = await asyncio.to_thread(self.uploads.list, base_model)
            offset = await asyncio.to_thread(self.uploads.archive_offset, base_model)
            if not uploaded and offset is None:
                raise BaseModelNotFound(base_model=base_model)
            return BaseModelFiles(uploaded, registered=False, archive_offset=offset)
        folder = self._home.absolute(row.path)
        listed = await asyncio.to_thread(list_files, folder, roots=self._roots)
        files = [Uploaded(file.path, file.size_bytes, complete=True, place=folder) for file in listed]
        return BaseModelFiles(files, registered=True)

    async def file_or_upload(self, session: AsyncSession, base_model: str, path: str) -> Uploaded:
        """Return a file of the base model, else what was uploaded of it. Raises `ModelFileNotFound`."""
        row = await named.find(session, BaseModelRow, base_model)
        if row is None:
            found = await asyncio.to_thread(self.uploads.find, base_model, path)
            if found is None:
                raise ModelFileNotFound(model=shown(base_model), path=shown(path))
            return found
        folder = self._home.absolute(row.path)
        place = await asyncio.to_thread(existing_file, folder, row.name, path, roots=self._roots)
        size = (await asyncio.to_thread(place.stat)).st_size
        return Uploaded(path, size, complete=True, place=place)

    async def archive(self, row: BaseModelRow) -> Archive:
        """Return the files of the base model as a tar."""
        folder = existing_folder(self._home.absolute(row.path), row.name)
        return await asyncio.to_thread(archive_of, folder, row.name, roots=self._roots)

    async def unregistered(self, session: AsyncSession) -> list[str]:
        """Return the folders under `models/` that look like models and have no entry, relative to `models/`."""
        known = await registered_paths(session)
        return await asyncio.to_thread(self._unregistered, known)

    async def delete(
        self, session: AsyncSession, base_model: str, *, with_files: bool = False
    ) -> Callable[[], Awaitable[None]]:
        """Delete the entry; return what removes the folder, to be called once the transaction is committed.

        Without `with_files` the folder stays. It also has to stay while another base model or a customized model
        needs it: `BaseModelFilesNeeded`.
        """
        row = await get_base_model(session, base_model)
        if jobs := await unfinished_jobs(session, base_model_id=row.id):
            raise BaseModelInUse(base_model=row.name, count=len(jobs), jobs=", ".join(jobs[:5]))
        if with_files:
            others = [path for path in await paths_besides(session, row.id) if _overlap(path, row.path)]
            needed_by = [*others, *await customized_models(session, row.path)]
            if needed_by:
                raise BaseModelFilesNeeded(base_model=row.name, needed_by=", ".join(needed_by[:5]))
        await named.delete(session, row)
        self._checked.pop(row.path, None)

        async def remove() -> None:
            if with_files:
                folder = self._home.absolute(row.path)
                await asyncio.to_thread(remove_folder, folder, root=self._home.models)

        return remove

    def _prepare(self, name: str, path: str | None) -> Prepared:
        uploaded = self.uploads.require_whole(name) if path is None else None
        folder = uploaded if path is None else resolve_inside(self._home.models, path)
        assert folder is not None
        if not folder.is_dir():
            raise NotABaseModel(path=path, pointer="/path")
        try:
            card = read_card(folder, roots=self._roots)
        except UnusableFile as exc:
            raise InvalidRequest([exc.violation]) from exc
        place = folder if uploaded is None else _free_place(self._home.models, normal_name(name))
        return Prepared(name=normal_name(name), folder=place, card=card, uploaded=uploaded)

    def _current_card(self, row: BaseModelRow) -> BaseModelCard:
        folder = self._home.absolute(row.path)
        signature = _signature(folder, self._roots)
        remembered = self._checked.get(row.path)
        if remembered is not None and remembered[0] == signature:
            return remembered[1]
        card = read_card(folder, roots=self._roots)
        if len(self._checked) >= _REMEMBERED:
            self._checked.clear()
        self._checked[row.path] = (signature, card)
        return card

    def _unregistered(self, known: Collection[str]) -> list[str]:
        root = self._home.models
        found = _model_folders(root, root, depth=_DEPTH)
        new = (folder.relative_to(root).as_posix() for folder in found if self._home.relative(folder) not in known)
        return sorted(shown(path, limit=MAX_PATH_LENGTH) for path in new)


def _model_folders(root: Path, folder: Path, *, depth: int) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith(".") or not entry.is_dir() or not stays_inside(root, entry):
            continue
        if _is_model(entry):
            yield entry
        elif depth > 1 and not entry.is_symlink():
            yield from _model_folders(root, entry, depth=depth - 1)


def _overlap(one: str, other: str) -> bool:
    """Say whether two folders are the same, or one lies in the other."""
    return PurePath(one).is_relative_to(other) or PurePath(other).is_relative_to(one)


def _hub_violations(recipe: Mapping[str, str]) -> list[Violation]:
    return [
        Violation(f"/{name}", "invalid_hub_name", {"given": shown(recipe[name])})
        for name, form in (("repository", _REPOSITORY), ("revision", _REVISION))
        if not form.fullmatch(recipe[name]) or ".." in recipe[name]
    ]


def _free_place(models: Path, name: str) -> Path:
    """Return where the folder of a new base model goes: it is called like the model where a file system takes that."""
    plain = name if len(name.encode()) <= _MAX_NAME_BYTES and not name.startswith((".", "-")) else uuid4().hex
    places = (models / (plain if number == 1 else f"{plain}-{number}") for number in itertools.count(1))
    return next(place for place in places if not place.exists() and not place.is_symlink())


def _signature(folder: Path, roots: Sequence[Path]) -> int:
    """Return a number that changes when a file of the model does; cheap."""
    found = walk(folder, roots=roots)
    states = [
        (path, status.st_size, status.st_mtime_ns, status.st_ino) for path in found.files if (status := path.stat())
    ]
    return hash((*states, *found.leaving, *found.broken, *found.folders))


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / PIPELINE).is_file()
