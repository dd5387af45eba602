"""Read the small files of a model from elsewhere: JSON documents and the headers of safetensors files.

A file may be anything: a pipe that never ends, a device, gigabytes of brackets, shapes whose product has a billion
digits. Everything is read up to a limit, and what is not regular is refused. Decoding holds the interpreter's lock, so
that a limit is also how long others wait. What is wrong with a file is an `UnusableFile`: a code with a sentence in
`texts/model_files.toml`.
"""

import json
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from app.domain.errors import Violation
from app.domain.plain_text import shown

MIB: Final = 1024 * 1024
MAX_HEADER_BYTES: Final = 16 * MIB
"""A header has about 100 bytes per tensor."""

MAX_DIMENSIONS: Final = 64
MAX_NUMBER: Final = 2**63
_METADATA: Final = "__metadata__"
_LFS_POINTER: Final = b"version https://git-lfs"
_PICKLE: Final = b"\x80"  # a file of torch before its archives (2020) begins with a pickle of protocol 2 or later
_BITS: Final = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


class UnusableFile(ValueError):
    """A file or folder of a model is not what it should be: a code, the values of its sentence, `file` among them."""

    def __init__(self, code: str, path: Path | str, **params: Any) -> None:
        name = path if isinstance(path, str) else path.name
        self.violation = Violation("/path", code, {"file": shown(name), **params})
        super().__init__(self.violation.detail())


class MissingFile(UnusableFile):
    """A file that the model needs is not there."""


@dataclass(frozen=True)
class TensorFile:
    """What the header of a safetensors file says, and where the tensors begin."""

    tensors: Mapping[str, Any]
    data_offset: int
    size_bytes: int


def read_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `UnusableFile`."""
    with open_regular(path) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnusableFile("model_file_too_large", path, mib=max_bytes // MIB)
    return _object(content, path)


def read_tensor_file(path: Path, *, max_bytes: int = MAX_HEADER_BYTES) -> TensorFile:
    """Return the header of a safetensors file; no tensor is read. Raises `UnusableFile`."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            refuse_pointer(path, prefix + stream.read(len(_LFS_POINTER)))
            raise UnusableFile("tensor_file_cut_off", path)
        if length > max_bytes:
            raise UnusableFile("tensor_header_too_large", path, mib=max_bytes // MIB)
        header = _object(stream.read(length), path)
    header.pop(_METADATA, None)
    return TensorFile(tensors=header, data_offset=8 + length, size_bytes=size)


def check_tensor_file(path: Path, *, max_bytes: int = MAX_HEADER_BYTES) -> TensorFile:
    """Return the header of a safetensors file. Raises `UnusableFile` unless header and size fit each other."""
    file = read_tensor_file(path, max_bytes=max_bytes)
    try:
        spans = [_span(entry) for entry in file.tensors.values()]
    except (ValueError, TypeError, KeyError) as exc:
        raise UnusableFile("tensor_header_unreadable", path) from exc
    if not spans:
        raise UnusableFile("tensor_file_empty", path)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise UnusableFile("tensor_file_gaps", path)
        position = end
    if (expected := file.data_offset + position) != file.size_bytes:
        raise UnusableFile("tensor_file_wrong_size", path, size=file.size_bytes, expected=expected)
    return file


def check_torch_file(path: Path) -> None:
    """Raise `UnusableFile` unless `path` is a file of torch by its container; the pickle in it is never loaded."""
    with open_regular(path) as stream:
        head = stream.read(len(_LFS_POINTER))
        refuse_pointer(path, head)
        whole = zipfile.is_zipfile(stream) if head.startswith(b"PK") else head.startswith(_PICKLE)
    if not whole:
        raise UnusableFile("torch_file_cut_off", path)


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raise `UnusableFile` if a file begins as a pointer of Git LFS does."""
    if head.startswith(_LFS_POINTER):
        raise UnusableFile("git_lfs_pointer", path)


def count_elements(shape: object) -> int:
    """Return how many numbers a tensor of `shape` has. Raises `ValueError` unless the shape is one."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("a shape is no short list")
    elements = 1
    for dimension in shape:
        if not isinstance(dimension, int) or not 0 <= dimension < MAX_NUMBER:
            raise ValueError("a dimension is no count")
        elements *= dimension
    return elements


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading. Raises `UnusableFile`, also for a pipe or a device, which could block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise MissingFile("model_file_missing", path) from exc
    except OSError as exc:
        raise UnusableFile("model_file_unreadable", path, problem=exc.strerror or type(exc).__name__) from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnusableFile("model_file_not_regular", path)
    with open(descriptor, "rb") as stream:  # noqa: PTH123 (a descriptor, not a path)
        yield stream


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise UnusableFile("model_file_not_json", path, problem="not UTF-8") from exc
    except RecursionError as exc:
        raise UnusableFile("model_file_not_json", path, problem="nested too deeply") from exc
    except ValueError as exc:
        refuse_pointer(path, content)
        raise UnusableFile("model_file_not_json", path, problem=shown(str(exc))) from exc
    if not isinstance(value, dict):
        raise UnusableFile("model_file_no_object", path)
    return value


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of one tensor; raises ValueError if they do not fit its shape."""
    begin, end = entry["data_offsets"]
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        raise ValueError("the type of the numbers has no name")
    bits = _BITS.get(dtype)  # a type newer than this list cannot be checked
    elements = count_elements(entry["shape"])
    if not isinstance(begin, int) or not isinstance(end, int) or not 0 <= begin <= end:
        raise ValueError("offsets out of order")
    if bits is not None and (end - begin) * 8 != elements * bits:
        raise ValueError("offsets do not fit the shape")
    return begin, end
