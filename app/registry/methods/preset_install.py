"""Shipped methods become methods of this installation, and their samples data sets and base models.

Safe to run at every start and by several processes at once. A read-only example runs from the product's own folder. The
files of a template that everybody adapts (Custom01, Custom02) are written to the script root once and never upgraded.
No file that was there before is overwritten or taken over: the template's own goes into a folder beside it.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import MethodDefinition
from app.domain.enums import Platform, VersionSource
from app.domain.errors import Invalid, NotFound
from app.domain.names import BASE_ENVIRONMENT
from app.presets import catalogue
from app.presets.catalogue import PresetManifest
from app.registry.environments.specs import BASE_SPEC, parse_spec, spec_hash
from app.registry.methods.files import MethodFiles
from app.registry.methods.pins import PinnedFile, Pins, pin
from app.registry.methods.record import Method
from app.registry.methods.samples import RegisteredSamples, Samples, registered_samples
from app.registry.methods.service import Clock, MethodRegistry
from app.registry.methods.stage_members import stage_files
from app.registry.nodes.platforms import PlatformChoice, wanted_platforms
from app.registry.scripts.names import script_path
from app.registry.scripts.root import digest_of
from app.store import environments, presets, registry_facts
from app.store import methods as method_store
from app.store.methods import NameTaken
from app.store.tables import PresetRow

logger = logging.getLogger(__name__)


class PresetNotFound(NotFound):
    """The product ships no method of this name."""

    code = "preset_not_found"


@dataclass(frozen=True)
class PresetStatus:
    """A shipped method and what became of it here."""

    manifest: PresetManifest
    installed: bool
    installed_version: int | None
    removed: bool
    method_id: str | None
    samples: RegisteredSamples


class PresetInstaller:
    """Installs and upgrades the shipped methods."""

    def __init__(
        self,
        *,
        registry: MethodRegistry,
        files: MethodFiles,
        clock: Clock,
        choice: PlatformChoice,
        machine: Platform,
        samples: Samples | None = None,
    ) -> None:
        self._registry = registry
        self._files = files
        self._clock = clock
        self._choice = choice
        self._machine = machine
        self._samples = samples

    async def install_presets(self, session: AsyncSession) -> list[str]:
        """Install and upgrade what belongs here; return the names of what changed. Nothing new: nothing is done.

        Call it at start and when a node registers: a node of another platform brings that platform's methods.
        """
        await presets.lock_installation(session)
        await self._install_environments(session)
        nodes = {node.platform for node in (await registry_facts.load(session)).nodes}
        wanted = wanted_platforms(self._choice, machine=self._machine, nodes=nodes)
        known = {row.name: row for row in await presets.all_rows(session)}
        changed = []
        for manifest in catalogue.load_manifests():
            if wanted.isdisjoint(manifest.platforms):
                continue
            row = known.get(manifest.name)
            if row is None and wanted.isdisjoint(manifest.default_platforms):
                continue
            try:
                if row is None:
                    await self._install(session, manifest)
                elif row.removed_at is not None or row.version >= manifest.version:
                    continue
                else:
                    await self._upgrade(session, manifest, row)
            except NameTaken:
                logger.warning("preset_name_taken", extra={"preset": manifest.name})
                continue
            changed.append(manifest.name)
        if self._samples is not None:
            here = {name for name, row in known.items() if row.removed_at is None} | set(changed)
            await self._samples.register(session, [one for one in catalogue.load_manifests() if one.name in here])
        return changed

    async def install(self, session: AsyncSession, name: str) -> Method:
        """Install one preset, also one that was deleted or belongs to another platform; return its method.

        Its samples come with it, also those that were deleted.
        """
        manifest = manifest_named(name)
        if self._samples is not None:
            await self._samples.draw(manifest)
        await presets.lock_installation(session)
        await self._install_environments(session)
        row = next((row for row in await presets.all_rows(session) if row.name == name), None)
        if row is not None and row.removed_at is None and row.method_id is not None:
            method = await self._registry.get(session, row.method_id)
        else:
            method = await self._install(session, manifest)
        if self._samples is not None:
            await self._samples.register(session, [manifest], deleted_too=True)
        return method

    async def statuses(self, session: AsyncSession) -> list[PresetStatus]:
        """Return everything the product ships, by name."""
        return await self._statuses(session, catalogue.load_manifests())

    async def status(self, session: AsyncSession, name: str) -> PresetStatus:
        """Return what became of one preset here."""
        (found,) = await self._statuses(session, [manifest_named(name)])
        return found

    async def origin(self, session: AsyncSession, method: Method) -> PresetStatus | None:
        """Return the preset that a method was installed from, if it was and the product still ships it."""
        shipped = [manifest for manifest in catalogue.load_manifests() if manifest.name == method.preset]
        return (await self._statuses(session, shipped))[0] if shipped else None

    async def _statuses(self, session: AsyncSession, manifests: Sequence[PresetManifest]) -> list[PresetStatus]:
        rows = {row.name: row for row in await presets.all_rows(session)}
        samples = await registered_samples(session, manifests)
        return [_status(manifest, rows.get(manifest.name), samples[manifest.name]) for manifest in manifests]

    async def _install_environments(self, session: AsyncSession) -> None:
        # no method pins it; jobs that deploy do
        await asyncio.to_thread(_kept, catalogue.OLLAMA_SCRIPT, self._files)
        specs = {name: file.read_text("utf-8") for name, file in catalogue.environment_specs().items()}
        for name, spec in {BASE_ENVIRONMENT: BASE_SPEC, **specs}.items():
            digest, now = spec_hash(parse_spec(spec)), self._clock()
            await environments.ensure_shipped(session, name, spec=spec, spec_hash=digest, now=now)

    async def _install(self, session: AsyncSession, manifest: PresetManifest) -> Method:
        if await method_store.name_is_taken(session, manifest.name):
            raise NameTaken(name=manifest.name)
        await method_store.lock_scripts(session)
        definition, pins = await asyncio.to_thread(self._prepare, manifest)
        method = await self._registry.insert(
            session,
            definition,
            pins,
            source=VersionSource.PRESET,
            preset=manifest.name,
            preset_version=manifest.version,
            read_only=manifest.read_only,
        )
        await presets.record(session, manifest.name, method_id=method.id, version=manifest.version)
        return method

    async def _upgrade(self, session: AsyncSession, manifest: PresetManifest, known: PresetRow) -> None:
        assert known.method_id is not None
        if manifest.read_only:
            row = await method_store.get(session, known.method_id, lock=True)
            definition, pins = await asyncio.to_thread(example_of, manifest, self._files)
            values = {"preset_version": manifest.version}
            await self._registry.new_version(session, row, definition, pins, source=VersionSource.PRESET, values=values)
        await presets.record(session, manifest.name, method_id=known.method_id, version=manifest.version)

    def _prepare(self, manifest: PresetManifest) -> tuple[MethodDefinition, Pins]:
        if manifest.read_only:
            return example_of(manifest, self._files)
        definition, pins = template_of(manifest, self._files, installed={})
        for pinned in pins.values():
            self._files.scripts.create(pinned.file, self._files.versions.get(pinned.sha256))
        return definition, pins


def manifest_named(name: str) -> PresetManifest:
    """Return the shipped method of this name or raise `PresetNotFound`."""
    manifest = next((manifest for manifest in catalogue.load_manifests() if manifest.name == name), None)
    if manifest is None:
        raise PresetNotFound(preset=name)
    return manifest


def example_of(manifest: PresetManifest, files: MethodFiles) -> tuple[MethodDefinition, Pins]:
    """Return a read-only example, which runs from the product's folder. Blocks."""
    pins = {file: pin(script_path(file), _kept(file, files), shipped=True) for file in manifest.files}
    return _placed(manifest, pins)


def template_of(manifest: PresetManifest, files: MethodFiles, *, installed: Pins) -> tuple[MethodDefinition, Pins]:
    """Return a template, with the places in the script root where its files are or may be. Blocks; writes nothing.

    A file stays where it was `installed`; else it gets a place that is free or holds the same bytes.
    """
    stages = stage_files(MethodDefinition.model_validate(manifest.definition))
    places = {file: installed[stage].file for stage, file in stages.items() if stage in installed}
    pins = {}
    for file in manifest.files:
        content = _kept(file, files)
        pins[file] = files.keep_alone(places.get(file) or _free_place(manifest, file, content, files), content)
    return _placed(manifest, pins)


def _kept(file: str, files: MethodFiles) -> bytes:
    content = catalogue.script_path(file).read_bytes()
    files.versions.put(content)
    return content


def _free_place(manifest: PresetManifest, file: str, content: bytes, files: MethodFiles) -> str:
    """Return a free path in the script root: in the root, else in a folder of the template."""
    own = manifest.name.casefold()
    # what a template shares with an example is called after the template, so that the two are not mixed up
    examples = {file for other in catalogue.load_manifests() if other.read_only for file in other.files}
    name = script_path(f"{own}_{file}" if file in examples else file)
    folders = ("", f"{own}/", *(f"{own}-{number}/" for number in range(2, 100)))
    return next((path for folder in folders if _is_free(path := folder + name, content, files)), name)


def _is_free(path: str, content: bytes, files: MethodFiles) -> bool:
    try:
        present = files.scripts.digest(path)
    except Invalid:  # such as a link that leaves the script root
        return False
    return present is None or present == digest_of(content)


def _placed(manifest: PresetManifest, pins: Mapping[str, PinnedFile]) -> tuple[MethodDefinition, Pins]:
    """Return the definition with the files where they stand, and what each stage pins."""
    wire = dict(manifest.definition)
    wire["stages"] = {name: _moved(config, pins) for name, config in wire.get("stages", {}).items()}
    if "deployment" in wire:
        wire["deployment"] = _moved(wire["deployment"], pins)
    named = stage_files(MethodDefinition.model_validate(manifest.definition))
    return MethodDefinition.model_validate(wire), {stage: pins[file] for stage, file in named.items()}


def _moved(config: Mapping[str, Any], pins: Mapping[str, PinnedFile]) -> dict[str, Any]:
    return {**config, "file": pins[config["file"]].file} if "file" in config else dict(config)


def _status(manifest: PresetManifest, row: PresetRow | None, samples: RegisteredSamples) -> PresetStatus:
    installed = row is not None and row.removed_at is None
    return PresetStatus(
        manifest=manifest,
        installed=installed,
        installed_version=row.version if row is not None and installed else None,
        removed=row is not None and row.removed_at is not None,
        method_id=row.method_id if row is not None and installed else None,
        samples=samples,
    )
