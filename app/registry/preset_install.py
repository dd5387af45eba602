"""Shipped methods become methods of this installation.

Safe to run at every start and by several processes at once. A read-only example pins what was shipped, whatever stands
on disk; a template that everybody adapts (Custom01, Custom02) pins what stands on disk and is never upgraded. No file
that was there before is overwritten: an upgrade replaces a file only if it still is what the version before shipped.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import MethodDefinition
from app.domain.enums import Platform, VersionSource
from app.domain.errors import NotFound
from app.domain.names import BASE_ENVIRONMENT
from app.presets import catalogue
from app.presets.catalogue import PresetManifest
from app.registry.environment_spec import BASE_SPEC, parse_spec, spec_hash
from app.registry.method_files import MethodFiles, PinnedFile, Pins, stage_files
from app.registry.method_record import Method, method_of
from app.registry.methods import Clock, MethodRegistry
from app.registry.platforms import PlatformChoice, wanted_platforms
from app.registry.script_paths import script_path
from app.registry.scripts import digest_of
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
    ) -> None:
        self._registry = registry
        self._files = files
        self._clock = clock
        self._choice = choice
        self._machine = machine

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
        return changed

    async def install(self, session: AsyncSession, name: str) -> Method:
        """Install one preset, also one that was deleted or belongs to another platform; return its method."""
        manifest = _manifest(name)
        await presets.lock_installation(session)
        await self._install_environments(session)
        row = next((row for row in await presets.all_rows(session) if row.name == name), None)
        if row is not None and row.removed_at is None and row.method_id is not None:
            return await self._registry.get(session, row.method_id)
        return await self._install(session, manifest)

    async def statuses(self, session: AsyncSession) -> list[PresetStatus]:
        """Return everything the product ships, by name."""
        rows = {row.name: row for row in await presets.all_rows(session)}
        return [_status(manifest, rows.get(manifest.name)) for manifest in catalogue.load_manifests()]

    async def status(self, session: AsyncSession, name: str) -> PresetStatus:
        """Return what became of one preset here."""
        manifest = _manifest(name)
        return _status(manifest, {row.name: row for row in await presets.all_rows(session)}.get(name))

    async def _install_environments(self, session: AsyncSession) -> None:
        specs = {name: file.read_text("utf-8") for name, file in catalogue.environment_specs().items()}
        for name, spec in {BASE_ENVIRONMENT: BASE_SPEC, **specs}.items():
            digest, now = spec_hash(parse_spec(spec)), self._clock()
            await environments.ensure_shipped(session, name, spec=spec, spec_hash=digest, now=now)

    async def _install(self, session: AsyncSession, manifest: PresetManifest) -> Method:
        if await method_store.name_is_taken(session, manifest.name):
            raise NameTaken(name=manifest.name)
        await method_store.lock_scripts(session)
        definition = _definition(manifest)
        pins = await asyncio.to_thread(self._pin, manifest, definition, {})
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
            await method_store.lock_scripts(session)
            row = await method_store.get(session, known.method_id, lock=True)
            before = method_of(row, await method_store.get_version(session, row)).files
            definition = _definition(manifest)
            pins = await asyncio.to_thread(self._pin, manifest, definition, {p.file: p for p in before.values()})
            values = {"preset_version": manifest.version}
            await self._registry.new_version(session, row, definition, pins, source=VersionSource.PRESET, values=values)
        await presets.record(session, manifest.name, method_id=known.method_id, version=manifest.version)

    def _pin(self, manifest: PresetManifest, definition: MethodDefinition, before: Mapping[str, PinnedFile]) -> Pins:
        """Put the shipped files where nothing of somebody else's stands; return what the method pins."""
        shipped = {path: self._put(file, path, before.get(path)) for file, path in _installed_paths(manifest).items()}
        pins = {stage: shipped[script_path(file)] for stage, file in stage_files(definition).items()}
        if manifest.read_only:
            return pins
        check = self._files.check(definition)
        self._files.keep(check)
        return pins if check.violations else check.pins

    def _put(self, shipped: str, path: str, before: PinnedFile | None) -> PinnedFile:
        content = catalogue.script_path(shipped).read_bytes()
        self._files.versions.put(content)
        if not self._files.scripts.create(path, content) and before is not None:
            present = self._files.scripts.digest(path)
            if present is not None and present.sha256 == before.sha256:
                self._files.scripts.write(path, content)
        digest = digest_of(content)
        return PinnedFile(file=path, sha256=digest.sha256, size=digest.size)


def _manifest(name: str) -> PresetManifest:
    manifest = next((manifest for manifest in catalogue.load_manifests() if manifest.name == name), None)
    if manifest is None:
        raise PresetNotFound(preset=name)
    return manifest


def _installed_paths(manifest: PresetManifest) -> dict[str, str]:
    """Return where each shipped file of the preset stands in the script root.

    What a template shares with a read-only example becomes a file of its own: adapting one must not break the other.
    """
    if manifest.read_only:
        return {file: script_path(file) for file in manifest.files}
    examples = {file for other in catalogue.load_manifests() if other.read_only for file in other.files}
    own = manifest.name.casefold()
    return {file: script_path(f"{own}_{file}" if file in examples else file) for file in manifest.files}


def _definition(manifest: PresetManifest) -> MethodDefinition:
    """Return the preset's definition, with its files where they are installed."""
    paths = _installed_paths(manifest)
    wire = dict(manifest.definition)
    wire["stages"] = {name: _moved(config, paths) for name, config in wire.get("stages", {}).items()}
    if "deployment" in wire:
        wire["deployment"] = _moved(wire["deployment"], paths)
    return MethodDefinition.model_validate(wire)


def _moved(config: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    return {**config, "file": paths[config["file"]]} if "file" in config else dict(config)


def _status(manifest: PresetManifest, row: PresetRow | None) -> PresetStatus:
    installed = row is not None and row.removed_at is None
    return PresetStatus(
        manifest=manifest,
        installed=installed,
        installed_version=row.version if row is not None and installed else None,
        removed=row is not None and row.removed_at is not None,
        method_id=row.method_id if row is not None and installed else None,
    )
