"""Pack an environment of this node into one file, and make an environment from such a file, without any network.

A conda prefix is packed as a whole by conda-pack and relocated where it is unpacked. A venv cannot be moved, its Python
is the machine's: packed are wheels of all that pip installed, with their digests, from which a venv is made anew.
"""

import importlib.util
import shutil
import sys
import tarfile
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory

from app.domain.environment_locks import EnvironmentLock
from app.domain.errors import Invalid
from app.executor.environments.activation import interpreter
from app.executor.environments.builders import Step, locked_parts, wheels_step
from app.executor.environments.environment_archive import CONDA_PACK, WHEELS_PACK, EnvironmentArchive, Pack
from app.executor.environments.environments import MARKER
from app.executor.environments.shipped import NO_SOURCE, TorchSource

REQUIREMENTS = "requirements.txt"
Run = Callable[[Step], None]


class EnvironmentPackerMissing(Invalid):
    """Conda prefixes are packed by a library that is not installed here."""

    code = "environment_packer_missing"


class PackDamaged(Exception):
    """The file is not what its description says."""


def pack(
    prefix: Path,
    lock: EnvironmentLock,
    archive: EnvironmentArchive,
    run: Run,
    *,
    torch: TorchSource = NO_SOURCE,
    cpu_torch: bool = False,
) -> Pack:
    """Pack a ready environment; blocks for minutes. `torch`: where builds of torch come from that no registry has."""
    kind = CONDA_PACK if lock.conda else WHEELS_PACK
    target = archive.pack_file(kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f".{lock.node}.{target.name}")
    try:
        if kind == CONDA_PACK:
            _pack_prefix(prefix, made, run)
        else:
            _pack_wheels(prefix, lock, made, run, torch)
        description = Pack(
            kind=kind,
            file=target.name,
            sha256=_digest(made),
            size_bytes=made.stat().st_size,
            spec_hash=lock.spec_hash,
            platform=lock.platform,
            python=lock.python,
            lock=lock.digest,
            node=lock.node,
            cpu_torch=cpu_torch,
        )
        archive.add(description, made)
    finally:
        made.unlink(missing_ok=True)
    return description


def unpack(described: Pack, path: Path, prefix: Path, run: Run) -> None:
    """Make `prefix` from a pack; raise `PackDamaged` before anything is made if the file is another."""
    try:
        found = _digest(path)
    except OSError as error:
        raise PackDamaged(f"{path} cannot be read: {error}.") from error
    if found != described.sha256:
        raise PackDamaged(f"{path} is damaged: its sha256 is {found}, not {described.sha256}.")
    if described.kind == CONDA_PACK:
        _extract(path, prefix)
        run(
            Step(
                "Relocating the prefix",
                (str(interpreter(prefix)), str(prefix / "bin" / "conda-unpack")),
                activated=True,
            )
        )
        return
    run(Step("Creating a virtual environment", (sys.executable, "-m", "venv", str(prefix))))
    wheels = prefix / ".deepe-wheels"
    _extract(path, wheels)
    if (wheels / REQUIREMENTS).stat().st_size:
        run(wheels_step(prefix, wheels))
    shutil.rmtree(wheels)


def _pack_prefix(prefix: Path, made: Path, run: Run) -> None:
    if importlib.util.find_spec("conda_pack") is None:
        raise EnvironmentPackerMissing()
    # the marker would declare a half-unpacked prefix ready
    program = (
        "import sys, conda_pack; conda_pack.pack(prefix=sys.argv[1], output=sys.argv[2], format='tar', force=True,"
    )
    program += " filters=[('exclude', sys.argv[3])])"
    run(Step("Packing the prefix", (sys.executable, "-P", "-c", program, str(prefix), str(made), f"*{MARKER}")))


def _pack_wheels(prefix: Path, lock: EnvironmentLock, made: Path, run: Run, torch: TorchSource) -> None:
    with TemporaryDirectory(prefix="deepe-wheels-", dir=made.parent) as folder:
        wheels = Path(folder)
        for part in locked_parts(lock.pip, torch):
            wanted = wheels / "wanted.txt"
            wanted.write_text(part.lines, "utf-8")
            options = ("--disable-pip-version-check", "--no-input", *part.options, "-w", folder, "-r", str(wanted))
            command = (str(interpreter(prefix)), "-m", "pip", "wheel", *options)
            run(Step(f"Collecting {len(part.packages)} wheels", command, activated=True))
            wanted.unlink()
        lines = [f"{_requirement(wheel)} --hash=sha256:{_digest(wheel)}\n" for wheel in sorted(wheels.glob("*.whl"))]
        (wheels / REQUIREMENTS).write_text("".join(lines), "utf-8")
        with tarfile.open(made, "w") as tar:
            for path in sorted(wheels.iterdir()):
                tar.add(path, arcname=path.name)


def _requirement(wheel: Path) -> str:
    name, version = wheel.name.split("-")[:2]
    return f"{name}=={version}"


def _extract(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "r:") as tar:  # never compressed, so that it is no larger than its file
        if hasattr(tarfile, "tar_filter"):  # not in the first releases of Python 3.11
            tar.extraction_filter = staticmethod(tarfile.tar_filter)
        tar.extractall(folder, members=[one for one in tar if Path(one.name).name != MARKER])  # noqa: S202


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
