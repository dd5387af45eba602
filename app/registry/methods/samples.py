"""The samples of the installed presets: a data set and a base model for each, registered so that one can begin at once.

Safe to run at every start and by several processes at once, inside the lock of `app.store.presets`. A sample is
registered once. One that a person deleted stays away until its preset is installed again. What a person placed or
registered is neither changed nor claimed: a sample whose name is taken gets a number behind it, and so does a new
version of a sample, because jobs may have used the old one. The files lie in a folder of their own, under names that
change with their bytes.

A base model that is too large to ship is registered before there are files: a job makes them when the first training
needs them (`app.executor.jobs.base_model_builds`).
"""

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import SampleKind
from app.domain.errors import AppError
from app.domain.texts import DEFAULT_LANGUAGE
from app.presets.catalogue import (
    PresetManifest,
    SampleBaseModel,
    SampleDataset,
    folder_digest,
    sample_base_models,
    samples_of,
)
from app.presets.sample_data import write_with_pictures
from app.registry.base_models.card import BaseModelCard
from app.registry.base_models.service import BaseModels, Prepared
from app.registry.datasets import files as dataset_files
from app.registry.datasets.files import SUFFIX, UPLOAD_PREFIX, DatasetFileExists
from app.registry.datasets.service import Datasets
from app.store import named, presets
from app.store.home import Home
from app.store.presets import SampleKey
from app.store.tables import BaseModelRow, DatasetRow

logger = logging.getLogger(__name__)

FOLDER: Final = "samples"
_TABLES: Final[Mapping[SampleKind, type[DatasetRow] | type[BaseModelRow]]] = {
    SampleKind.DATASET: DatasetRow,
    SampleKind.BASE_MODEL: BaseModelRow,
}
UNMADE: Final = BaseModelCard(
    architecture=None,
    model_type=None,
    hidden_size=None,
    layers=None,
    vocabulary=None,
    context_length=None,
    dtype=None,
    parameters=None,
    weights=None,
    quantization=None,
    tokenizer=False,
    chat_template=False,
    size_bytes=0,
    components=(),
)
"""Card of a base model whose files are not there yet."""
_MAX_CHARACTERS: Final = 100_000  # of a row that the product ships
_MAX_BYTES: Final = 2**30

Sample = SampleDataset | SampleBaseModel


@dataclass(frozen=True)
class RegisteredSamples:
    """What a preset's samples are called here; `None`: not registered, or deleted."""

    dataset: DatasetRow | None
    base_model: BaseModelRow | None


class Samples:
    """Registers the samples of presets."""

    def __init__(self, *, home: Home, clock: Callable[[], datetime]) -> None:
        self._home = home
        self._datasets = Datasets(home=home, max_characters=_MAX_CHARACTERS, max_bytes=_MAX_BYTES, clock=clock)
        self._base_models = BaseModels(home=home, clock=clock)

    async def draw(self, manifest: PresetManifest) -> None:
        """Draw the pictures of a preset's data set, if it has any; it takes a moment, so no statement is run."""
        dataset, _ = samples_of(manifest)
        if dataset.with_pictures:
            with contextlib.suppress(OSError):  # registering meets the same disk, and says so
                await asyncio.to_thread(self._place_dataset, dataset)

    async def register(
        self, session: AsyncSession, manifests: Iterable[PresetManifest], *, deleted_too: bool = False
    ) -> None:
        """Register the samples of these presets that are not here in their present version.

        With `deleted_too` also those that were deleted. A disk that refuses a file keeps nothing else from working.
        """
        known = await presets.samples(session)
        for key, sample in _by_key(manifests).items():
            row = known.get(key)
            if row is not None and (deleted_too or row.digest != sample.digest):
                gone = await session.get(_TABLES[key[0]], row.resource_id) is None
                wanted = deleted_too if gone else row.digest != sample.digest
            else:
                wanted = row is None
            if not wanted:
                continue
            try:
                resource = await self._register(session, sample)
            except (OSError, AppError) as error:
                logger.warning("sample_not_registered", extra={"sample": sample.name, "error": str(error)})
                continue
            await presets.record_sample(session, key, digest=sample.digest, resource_id=resource.id)
            if resource.name != sample.name:
                logger.info("sample_has_another_name", extra={"sample": sample.name, "registered_as": resource.name})

    async def _register(self, session: AsyncSession, sample: Sample) -> DatasetRow | BaseModelRow:
        if isinstance(sample, SampleDataset):
            return await self._register_dataset(session, sample)
        return await self._register_base_model(session, sample)

    async def _register_dataset(self, session: AsyncSession, sample: SampleDataset) -> DatasetRow:
        mine = await named.find(session, DatasetRow, sample.name)
        if mine is not None and mine.digest == sample.digest:
            return mine  # the same rows, uploaded by hand
        place = await asyncio.to_thread(self._place_dataset, sample)
        name = await _free_name(session, DatasetRow, sample.name)
        path = place.relative_to(self._home.datasets).as_posix()
        prepared = await self._datasets.prepare(name=name, path=path)
        return await self._datasets.create(session, prepared, description=sample.description[DEFAULT_LANGUAGE])

    async def _register_base_model(self, session: AsyncSession, sample: SampleBaseModel) -> BaseModelRow:
        name, description = await _free_name(session, BaseModelRow, sample.name), sample.description[DEFAULT_LANGUAGE]
        place = await asyncio.to_thread(self._place_base_model, sample)
        if sample.folder is not None:
            path = place.relative_to(self._home.models).as_posix()
            prepared = await self._base_models.prepare(name=name, path=path)
            return await self._base_models.create(session, prepared, description=description)
        prepared = Prepared(name=name, folder=place, card=UNMADE)
        row = await self._base_models.create(session, prepared, description=description)
        row.recipe = {"sample": sample.name, "digest": sample.digest}
        await session.flush()
        return row

    # ---- files (in a thread) ----------------------------------------------------------------------------------------

    def _place_dataset(self, sample: SampleDataset) -> Path:
        """Return where the rows, and the pictures that they name, stand from now on."""
        for target in _places(self._home.datasets, sample, suffix="" if sample.with_pictures else SUFFIX):
            if sample.with_pictures:
                write_with_pictures(sample.path, target)
            elif not target.exists():
                self._copy_file(sample.path, target, digest=sample.digest)
            if dataset_files.digest_of(dataset_files.locate(target).rows)[0] == sample.digest:
                return target
        raise AssertionError("there is always another place")

    def _copy_file(self, source: Path, target: Path, *, digest: str) -> None:
        """Copy a file that is there as a whole or not at all; one that another process placed meanwhile is kept."""
        draft = self._home.datasets / f"{UPLOAD_PREFIX}{uuid4().hex}{SUFFIX}"  # what a crash leaves is removed
        try:
            with draft.open("xb") as stream:
                stream.write(source.read_bytes())
                stream.flush()
                os.fsync(stream.fileno())
            dataset_files.place(draft, target, digest=digest)
        except DatasetFileExists:
            pass
        finally:
            draft.unlink(missing_ok=True)

    def _place_base_model(self, sample: SampleBaseModel) -> Path:
        """Return where the shipped folder stands from now on, or where a job is going to put one."""
        for target in _places(self._home.models, sample):
            if sample.folder is None:
                if target.exists():
                    continue
                return target
            if not target.exists():
                draft = target.with_name(f".{target.name}.part")
                shutil.rmtree(draft, ignore_errors=True)
                shutil.copytree(sample.folder, draft)
                draft.rename(target)
            if folder_digest(target) == sample.digest:
                return target
        raise AssertionError("there is always another place")


def sample_that_makes(row: BaseModelRow) -> SampleBaseModel | None:
    """Return the sample whose program makes the files of a base model.

    None: they were placed as they are, or this version of the product makes other ones.
    """
    recipe = row.recipe or {}
    made = (one for one in sample_base_models() if one.name == recipe.get("sample"))
    return next((one for one in made if one.digest == recipe.get("digest")), None)


async def registered_samples(
    session: AsyncSession, manifests: Iterable[PresetManifest]
) -> Mapping[str, RegisteredSamples]:
    """Return preset → its samples as they are here now."""
    found = await presets.sample_resources(session)
    samples = {}
    for manifest in manifests:
        dataset = found.get((SampleKind.DATASET, manifest.demo.dataset))
        base_model = found.get((SampleKind.BASE_MODEL, manifest.demo.base_model))
        assert dataset is None or isinstance(dataset, DatasetRow)
        assert base_model is None or isinstance(base_model, BaseModelRow)
        samples[manifest.name] = RegisteredSamples(dataset, base_model)
    return samples


def _by_key(manifests: Iterable[PresetManifest]) -> dict[SampleKey, Sample]:
    """Return the samples of the presets, each once: several share some."""
    found: dict[SampleKey, Sample] = {}
    for manifest in manifests:
        dataset, base_model = samples_of(manifest)
        found[SampleKind.DATASET, dataset.name] = dataset
        found[SampleKind.BASE_MODEL, base_model.name] = base_model
    return found


async def _free_name(session: AsyncSession, table: type[named.RowT], name: str) -> str:
    for number in itertools.count(2):
        if not await named.name_is_taken(session, table, name):
            return name
        name = f"{name.removesuffix(f'-{number - 1}')}-{number}"
    raise AssertionError("there is always another number")


def _places(root: Path, sample: Sample, *, suffix: str = "") -> Iterator[Path]:
    """Yield where the sample may stand, the folder made: a person may have changed what stands at the first place."""
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    stem = f"{sample.name}-{sample.digest[:8]}"
    yield folder / f"{stem}{suffix}"
    for number in itertools.count(2):
        yield folder / f"{stem}-{number}{suffix}"
