"""Put a method back to what it was: a template to what was shipped, any method to one of its versions.

What stands in the script root and no version holds yet becomes a version first, so that everything that is overwritten
can be restored in turn. A file that the method never ran is not overwritten at all.
"""

import asyncio
from collections.abc import Sequence

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import VersionSource
from app.domain.errors import Conflict
from app.registry.methods.files import MethodFiles
from app.registry.methods.pins import Pins, pins_from_json
from app.registry.methods.preset_install import manifest_named, template_of
from app.registry.methods.record import Method, method_of
from app.registry.methods.service import MethodRegistry, PresetReadOnly
from app.registry.methods.trees import MAX_BYTES
from app.registry.scripts.root import digest_of
from app.store import methods as store
from app.store import presets
from app.store.tables import MethodRow


class NotATemplate(Conflict):
    """The method was not shipped, so that there is nothing to reset it to."""

    code = "not_a_template"


class FileInTheWay(Conflict):
    """Another file is where one of the method's files has to be written."""

    code = "file_in_the_way"


class MethodRestoring:
    """Resets and restores methods."""

    def __init__(self, *, registry: MethodRegistry, files: MethodFiles) -> None:
        self._registry = registry
        self._files = files

    async def restore(self, session: AsyncSession, method: str, number: int | None = None) -> Method:
        """Make the version `number` the newest again, by default bring the newest one's files back; return it.

        The method keeps its name. A read-only example has nothing in the script root that could be brought back.
        """
        row, newest = await self._locked(session, method)
        if row.read_only:
            if number is not None:
                raise PresetReadOnly(method=row.name)
            return newest
        wanted = newest if number is None else method_of(row, await store.get_version(session, row, number))
        definition = wanted.definition.model_copy(update={"name": row.name})
        if number is not None:
            await self._registry.require_valid(session, definition)
        await self._bring_back(session, row, newest, wanted.files)
        return await self._registry.new_version(session, row, definition, wanted.files, source=VersionSource.RESTORE)

    async def reset(self, session: AsyncSession, method: str) -> Method:
        """Make the method what was shipped, under the name that it has; return its newest version."""
        row, newest = await self._locked(session, method)
        if row.preset is None:
            raise NotATemplate(method=row.name)
        manifest = manifest_named(row.preset)
        if row.read_only:
            return newest
        first = method_of(row, await store.get_version(session, row, 1))
        shipped, pins = await asyncio.to_thread(template_of, manifest, self._files, installed=first.files)
        definition = shipped.model_copy(update={"name": row.name})
        await self._registry.require_valid(session, definition)
        await self._bring_back(session, row, newest, pins)
        await presets.record(session, manifest.name, method_id=row.id, version=manifest.version)
        values = {"preset_version": manifest.version} if row.preset_version != manifest.version else None
        return await self._registry.new_version(
            session, row, definition, pins, source=VersionSource.RESET, values=values
        )

    async def _locked(self, session: AsyncSession, method: str) -> tuple[MethodRow, Method]:
        await store.lock_scripts(session)
        row = await store.get(session, method, lock=True)
        return row, method_of(row, await store.get_version(session, row))

    async def _bring_back(self, session: AsyncSession, row: MethodRow, newest: Method, pins: Pins) -> None:
        """Write the bytes of `pins` to the script root; what was edited there becomes a version first."""
        edited = await asyncio.to_thread(self._edited, newest)
        if edited:
            kept = {**newest.files, **edited}
            await self._registry.new_version(session, row, newest.definition, kept, source=VersionSource.DISK)
        versions = [pins_from_json(files) for files in await store.files_of_versions(session, row.id)]
        await asyncio.to_thread(self._write, pins, versions)

    def _edited(self, newest: Method) -> Pins:
        """Return pins of what stands on disk instead of the newest version's files, and keep those bytes."""
        changed = [status for status in self._files.states(newest.definition, newest.files) if status.changed]
        edited: Pins = {}
        for status in changed:
            if status.pinned.lies_in_root:
                edited[status.stage] = self._files.keep_as_it_is(newest.definition, status.stage, status.pinned)
        return edited

    def _write(self, pins: Pins, versions: Sequence[Pins]) -> None:
        files = {
            path: file
            for pinned in pins.values()
            if pinned.lies_in_root
            for path, file in self._files.tree(pinned).items()
        }
        changed = {path: file for path, file in files.items() if not self._files.holds(path, file)}
        if not changed:
            return
        own = {
            (path, file.sha256)
            for version in versions
            for pinned in version.values()
            if pinned.lies_in_root
            for path, file in self._files.tree(pinned).items()
        }
        for path in changed:
            present = self._files.scripts.read(path, most=MAX_BYTES)
            if present is not None and (path, digest_of(present).sha256) not in own:
                raise FileInTheWay(file=path)
        for path, file in changed.items():
            content = self._files.versions.get(file.sha256)
            self._files.scripts.write(path, content, most=MAX_BYTES, executable=file.executable)
