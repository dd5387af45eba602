"""Send files of models: one with `Range`, or a whole folder as a tar."""

import asyncio
import re
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import Header
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, StreamingResponse

from app.api.errors import RangeNotSatisfiable
from app.domain.plain_text import shown
from app.registry.base_models.uploads import Uploaded
from app.registry.models.archive import Archive

_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}
FILE_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The file.", "content": {"application/octet-stream": _BINARY}},
    206: {"description": "The part that `Range` names.", "content": {"application/octet-stream": _BINARY}},
}
ARCHIVE_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The files in one folder of a tar, uncompressed.", "content": {"application/x-tar": _BINARY}},
}
_RANGE: Final = re.compile(r"(?P<first>\d{1,18})-(?P<last>\d{0,18})|-(?P<suffix>\d{1,18})")
# a model may hold another author's HTML, which must not become a page of this service
_HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}


ModelFilePath = Annotated[
    str, PathParameter(description="Path as the list of files has it.", examples=["adapter_model.safetensors"])
]
"""`{path}` in the addresses."""


ByteRange = Annotated[
    str | None, Header(alias="Range", description="The part of the file to read.", examples=["bytes=0-1048575"])
]


class FileDownload(FileResponse):
    """A file in large pieces."""

    chunk_size = 1024 * 1024


async def file_answer(path: Path, name: str, wanted: str | None, **headers: str) -> FileDownload:
    """Return a file, or the part `wanted` by `Range`, as a download that is called as the last part of `name`."""
    status = await asyncio.to_thread(path.stat)
    if wanted is not None and not _is_range(wanted, status.st_size):
        raise RangeNotSatisfiable(given=shown(wanted), size=status.st_size)
    return FileDownload(
        path,
        media_type="application/octet-stream",
        filename=name.rpartition("/")[2],
        stat_result=status,
        headers={**_HEADERS, **headers},
    )


def _is_range(wanted: str, size: int) -> bool:
    """Say whether each part that a `Range` header names begins inside of a file of this size."""
    unit, _, parts = wanted.partition("=")
    found = [_RANGE.fullmatch(part.strip()) for part in parts.split(",")]
    if unit.strip().lower() != "bytes" or len(found) > FileDownload.max_ranges:
        return False
    return all(one is not None and _is_inside(one, size) for one in found)


def _is_inside(part: re.Match[str], size: int) -> bool:
    if part["suffix"]:
        return size > 0 and int(part["suffix"]) > 0
    first, last = int(part["first"]), int(part["last"] or size)
    return first < size and first <= last


def upload_headers(file: Uploaded) -> dict[str, str]:
    """Return how much of a file is there, in the words of resumable uploads over HTTP (an IETF draft)."""
    return {"Upload-Offset": str(file.size_bytes), "Upload-Complete": "?1" if file.complete else "?0"}


def archive_answer(archive: Archive, name: str) -> StreamingResponse:
    """Return a tar that is made while it is sent."""
    quoted = FileResponse("", filename=f"{name}.tar").headers["content-disposition"]
    headers = {**_HEADERS, "Content-Length": str(archive.size_bytes), "Content-Disposition": quoted}
    return StreamingResponse(archive.pieces(), media_type="application/x-tar", headers=headers)
