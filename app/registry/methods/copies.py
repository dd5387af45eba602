"""Copies of methods. A copy gets scripts of its own: adapting it must not change what it was copied from."""

import asyncio
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import PurePosixPath
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind, VersionSource
from app.domain.names import normal_name
from app.registry.methods.files import MethodFiles
from app.registry.methods.pins import Pins
from app.registry.methods.record import Method
from app.registry.methods.restoring import FileInTheWay
from app.registry.methods.runs import MethodRuns
from app.registry.methods.service import LicenceGate, MethodRegistry
from app.registry.methods.trees import MAX_BYTES
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
        """Write every file once under a free name; `copied` maps old to new as it goes.

        A file that runs alone is copied beside the original, others with all that they run into a folder of their own.
        """
        trees = [self._files.tree(pinned) for pinned in pins.values() if pinned.lies_in_root]
        together = {path: file for tree in trees if len(tree) > 1 for path, file in tree.items()}
        alone = {
            pinned.file: pinned.sha256
            for pinned in pins.values()
            if pinned.file not in together and not pinned.committed
        }
        for file, sha256 in alone.items():
            self._copy(file, self._files.versions.get(sha256), _names(file, name), copied)
        folder = next(one for one in _folders(name) if not self._files.scripts.absolute(one).exists())
        for path, one in together.items():
            content = self._files.versions.get(one.sha256)
            self._copy(path, content, iter([f"{folder}/{path}"]), copied, executable=one.executable)

    def _copy(
        self, file: str, content: bytes, names: Iterator[str], copied: dict[str, str], *, executable: bool = False
    ) -> None:
        for candidate in names:
            if self._files.scripts.create(candidate, content, most=MAX_BYTES, executable=executable):
                copied[file] = candidate
                return
        raise FileInTheWay(file=file)


def _names(original: str, method_name: str) -> Iterator[str]:
    """Yield names for a copy of a script that runs alone, in its folder."""
    base = PurePosixPath(original).with_name(f"{_slug(method_name)}_{stem(original)}"[:100])
    yield f"{base}{SUFFIX}"
    for number in count(2):
        yield f"{base}_{number}{SUFFIX}"


def _folders(method_name: str) -> Iterator[str]:
    yield _slug(method_name)
    for number in count(2):
        yield f"{_slug(method_name)}-{number}"


def _slug(name: str) -> str:
    kept = "".join(c if c.isalnum() or c in "_-" else "-" for c in normal_name(name).lower())
    return normal_name(kept)[:_MAX_SLUG].strip("-") or "copy"


def _renamed(source: Method, name: str, copied: dict[str, str]) -> MethodDefinition:
    wire: dict[str, Any] = source.definition.canonical() | {"name": name}
    wire["stages"] = {
        # a module of the environment is not copied
        stage: _moved(config, source.files[stage].file, copied) if stage in source.files else config
        for stage, config in wire["stages"].items()
    }
    if JobKind.DEPLOYMENT in source.files:
        wire["deployment"] = _moved(wire["deployment"], source.files[JobKind.DEPLOYMENT].file, copied)
    return MethodDefinition.model_validate(wire)


def _moved(config: Mapping[str, Any], file: str, copied: Mapping[str, str]) -> dict[str, Any]:
    """Return a stage with the copy of its file; patterns that begin at the script root begin at the copy's folder."""
    if file not in copied:
        return dict(config)  # of a commit, which both name
    moved = dict(config) | {"file": copied[file]}
    if "include" in moved and copied[file].endswith(f"/{file}"):
        folder = copied[file].removesuffix(f"/{file}")
        moved["include"] = [f"/{folder}{text}" if text.startswith("/") else text for text in moved["include"]]
    return moved
