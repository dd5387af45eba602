"""Copies of methods. A copy gets scripts of its own: adapting it must not change what it was copied from."""

import asyncio
from collections.abc import Iterator
from itertools import count
from pathlib import PurePosixPath
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind, VersionSource
from app.domain.names import normal_name
from app.registry.methods.files import MethodFiles, Pins
from app.registry.methods.record import Method
from app.registry.methods.runs import MethodRuns
from app.registry.methods.service import LicenceGate, MethodRegistry
from app.registry.scripts.names import SUFFIX, stem
from app.store import methods as store

_MAX_SLUG = 40


class MethodCopies:
    """Copies methods together with their scripts."""

    def __init__(self, *, registry: MethodRegistry, runs: MethodRuns, files: MethodFiles, licence: LicenceGate) -> None:
        self._registry = registry
        self._runs = runs
        self._files = files
        self._licence = licence

    async def copy(self, session: AsyncSession, method: str, name: str) -> Method:
        """Add a method that does what `method` does, under a new name and with copies of its scripts.

        A file edited on disk is copied as it is; a read-only example as it was shipped.
        """
        self._licence.require()
        await store.lock_scripts(session)
        source = await self._source(session, method)
        copied: dict[str, str] = {}
        try:
            await asyncio.to_thread(self._copy_scripts, source.files, name, copied)
            definition = _renamed(source, name, copied)
            return await self._registry.add(session, definition, source=VersionSource.COPY)
        except BaseException:
            for path in copied.values():
                self._files.scripts.remove(path)
            raise

    async def _source(self, session: AsyncSession, method: str) -> Method:
        found = await self._registry.get(session, method)
        return found if found.read_only else await self._runs.pin_for_run(session, found.id)

    def _copy_scripts(self, pins: Pins, name: str, copied: dict[str, str]) -> None:
        """Write each file once under a free name beside the original; `copied` maps old to new as it goes."""
        for pinned in pins.values():
            if pinned.file in copied:
                continue
            content = self._files.versions.get(pinned.sha256)
            for candidate in _names(pinned.file, name):
                if self._files.scripts.create(candidate, content):
                    copied[pinned.file] = candidate
                    break


def _names(original: str, method_name: str) -> Iterator[str]:
    """Yield names for a copy of the script, in its folder, so that what it imports beside it is still there."""
    base = PurePosixPath(original).with_name(f"{_slug(method_name)}_{stem(original)}"[:100])
    yield f"{base}{SUFFIX}"
    for number in count(2):
        yield f"{base}_{number}{SUFFIX}"


def _slug(name: str) -> str:
    kept = "".join(c if c.isalnum() or c in "_-" else "-" for c in normal_name(name).lower())
    return normal_name(kept)[:_MAX_SLUG].strip("-") or "copy"


def _renamed(source: Method, name: str, copied: dict[str, str]) -> MethodDefinition:
    wire: dict[str, Any] = source.definition.canonical() | {"name": name}
    wire["stages"] = {
        stage: config | {"file": copied[source.files[stage].file]} for stage, config in wire["stages"].items()
    }
    if JobKind.DEPLOYMENT in source.files:
        wire["deployment"] = wire["deployment"] | {"file": copied[source.files[JobKind.DEPLOYMENT].file]}
    return MethodDefinition.model_validate(wire)
