"""Send and fetch folders of models file by file; what broke off is continued."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import typer

from app.cli.client import Api, segment
from app.cli.command import CliFailure
from app.cli.output import errors, size

UNFINISHED: Final = ".incomplete"
_LEFT_OUT: Final = ("checkpoint-", ".")

Continue = Annotated[
    bool, typer.Option("--continue", help="Go on with what broke off: files that are whole are not sent again.")
]
Target = Annotated[
    Path | None, typer.Option("--to", metavar="FOLDER", help="Where to put the files. Default: a folder of its name.")
]


def upload_files(api: Api, address: str, folder: Path, *, go_on: bool) -> None:
    """Upload the files of `folder` below `address`; what lies there of an earlier upload goes unless `go_on`."""
    found = _files_to_send(folder)
    if not found:
        raise CliFailure(f"{folder} is no folder with files.")
    if not go_on:
        api.delete_at_once(f"{address}/files")
    for path in found:
        name = path.relative_to(folder).as_posix()
        target = f"{address}/files/{_quoted(name)}"
        total = path.stat().st_size
        there, complete = api.upload_offset(target) if go_on else (0, False)
        if complete and there == total:
            continue
        start = there if there < total and not complete else 0
        _say(f"{name}  {size(total)}" + (f", going on at {size(start)}" if start else ""))
        api.upload_rest(target, path, start=start, total=total)


def upload_archive(api: Api, address: str, archive: Path, *, go_on: bool) -> None:
    """Upload an archive, which the service unpacks; what lies there of an earlier upload goes unless `go_on`."""
    total, start = archive.stat().st_size, 0
    if go_on:
        start = api.get(f"{address}/files")["archive_offset"] or 0
    else:
        api.delete_at_once(f"{address}/files")
    _say(f"{archive.name}  {size(total)}" + (f", going on at {size(start)}" if start else ""))
    api.upload_rest(f"{address}/archive", archive, start=start if start < total else 0, total=total)


def download(api: Api, address: str, folder: Path, *, go_on: bool, digests: Mapping[str, str] | None = None) -> None:
    """Download every file below `address` into `folder`. `digests` are the sha256 that the service recorded."""
    if folder.exists() and any(folder.iterdir()) and not go_on:
        raise CliFailure(f"{folder} is not empty; name another folder with --to, or add --continue.")
    for file in api.get(f"{address}/files")["items"]:
        name, total = str(file["path"]), int(file["size_bytes"])
        place = _place(folder, name)
        if not (place.is_file() and place.stat().st_size == total):
            _fetch(api, f"{address}/files/{_quoted(name)}", place, name, total)
        if digests and name in digests and _sha256(place) != digests[name]:
            raise CliFailure(f"{name} is not what the service recorded (sha256 {digests[name]}); download it again.")


def _fetch(api: Api, address: str, place: Path, name: str, total: int) -> None:
    draft = place.with_name(place.name + UNFINISHED)
    place.parent.mkdir(parents=True, exist_ok=True)
    start = draft.stat().st_size if draft.is_file() else 0
    if start > total:
        draft.unlink()
        start = 0
    _say(f"{name}  {size(total)}" + (f", going on at {size(start)}" if start else ""))
    if start < total or not total:
        api.fetch(address, draft, start=start)
    if draft.stat().st_size != total:
        raise CliFailure(f"{name} has {total} bytes, {draft.stat().st_size} came; try again with --continue.")
    draft.replace(place)


def _files_to_send(folder: Path) -> list[Path]:
    """Return the files of a model; hidden ones, checkpoints and links to folders are no part of it, and are named."""
    found: list[Path] = []
    for directory, names, entries in os.walk(folder):
        here = Path(directory)
        kept = [name for name in names if not name.startswith(_LEFT_OUT) and not (here / name).is_symlink()]
        files = [name for name in entries if not name.startswith(".") and (here / name).is_file()]
        for name in sorted({*names, *entries} - {*kept, *files}):
            _say(f"left out: {(here / name).relative_to(folder)}")
        names[:] = kept
        found += [here / name for name in files]
    return sorted(found)


def _place(folder: Path, name: str) -> Path:
    """Return where a file goes; a service that names a place elsewhere is not obeyed."""
    place = folder / name
    if not name or ".." in Path(name).parts or not place.absolute().is_relative_to(folder.absolute()):
        raise CliFailure(f"The service names a file outside of the folder: {name}")
    return place


def _quoted(name: str) -> str:
    return "/".join(segment(part) for part in name.split("/"))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _say(line: str) -> None:
    errors().print(line, markup=False, highlight=False)
