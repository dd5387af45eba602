"""What nodes share of environments, in `DEEPE_HOME/environments/<name>-<12 of the spec's hash>/`: locks and packs.

`locks/<node>.json` says what is installed on a node. `packs/<platform>-<kind>.tar` is an environment for nodes without
a network, and the `.json` beside it, written last, its description with the digest of the file.
"""

import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from pydantic import ConfigDict, ValidationError

from app.domain.environment_locks import EnvironmentLock
from app.domain.values import Value
from app.registry.environments.specs import EnvironmentSpec, spec_hash

CONDA_PACK = "conda"  # a whole prefix, relocated when it is unpacked
WHEELS_PACK = "wheels"  # all wheels of a venv, from which another one is made


class Pack(Value):
    """Description of a packed environment."""

    model_config = ConfigDict(frozen=True)

    kind: str
    file: str
    sha256: str
    size_bytes: int
    spec_hash: str
    platform: str
    python: str
    lock: str  # digest of what is in it
    node: str
    cpu_torch: bool = False  # as the marker of the build says


class EnvironmentArchive:
    """Locks and packs of one environment with one specification."""

    def __init__(self, root: Path, name: str, spec: EnvironmentSpec) -> None:
        self._spec_hash = spec_hash(spec)
        self.folder = root / folder_name(name, self._spec_hash)

    # ---- locks ------------------------------------------------------------------------------------------------------

    def lock_file(self, node: str) -> Path:
        return self.folder / "locks" / f"{node}.json"

    def lock(self, node: str) -> EnvironmentLock | None:
        """Return what is installed on the node; None if it never said."""
        return read_lock(self.lock_file(node))

    def locks(self) -> Sequence[EnvironmentLock]:
        """Return all locks, the newest first."""
        found = (read_lock(path) for path in sorted((self.folder / "locks").glob("*.json")))
        return sorted((lock for lock in found if lock is not None), key=lambda lock: lock.created_at, reverse=True)

    # ---- packs ------------------------------------------------------------------------------------------------------

    def pack_file(self, kind: str) -> Path:
        """Return where this machine writes a pack."""
        python = f"-py{sys.version_info.major}.{sys.version_info.minor}" if kind == WHEELS_PACK else ""
        return self.folder / "packs" / f"{this_platform()}-{kind}{python}.tar"

    def usable_pack(self, *, lock: str = "", cuda: bool = False) -> Pack | None:
        """Return a pack that this machine can unpack, of the lock with this digest if one is given.

        `cuda`: a CPU build of torch in place of the specified one is no use here.
        """
        for kind in (CONDA_PACK, WHEELS_PACK):
            pack = self._read_pack(self.pack_file(kind).with_suffix(".json"))
            if pack is not None and (not lock or pack.lock == lock) and not (cuda and pack.cpu_torch):
                return pack
        return None

    def path_of(self, pack: Pack) -> Path:
        return self.folder / "packs" / pack.file

    def add(self, pack: Pack, made: Path) -> None:
        """Publish a pack whose file lies beside its place; a reader sees the old pack or the new one."""
        made.replace(self.path_of(pack))
        write_durably(self.path_of(pack).with_suffix(".json"), pack.model_dump_json(indent=1))

    def _read_pack(self, path: Path) -> Pack | None:
        try:
            pack = Pack.model_validate_json(path.read_text("utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):
            return None
        there = pack.spec_hash == self._spec_hash and pack.file == path.with_suffix(".tar").name
        return pack if there and self.path_of(pack).is_file() else None


def folder_name(name: str, digest: str) -> str:
    """Return the folder of an environment: its name, cleaned, and the beginning of its specification's hash."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', name).lstrip('.')}-{digest[:12]}"


def read_lock(path: Path) -> EnvironmentLock | None:
    """Return the lock in a file; None if there is none that can be read."""
    try:
        return EnvironmentLock.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def write_durably(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def this_platform() -> str:
    """Return what packed environments are bound to."""
    return f"{sys.platform}-{platform.machine().lower()}"
