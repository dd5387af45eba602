"""Read the small files of a model from elsewhere: JSON documents and the headers of safetensors files.

A file may be anything: a pipe that never ends, a device, gigabytes of brackets, shapes whose product has a billion
digits. Everything is read up to a limit, and what is not regular is refused. Decoding holds the interpreter's lock, so
that a limit is also how long others wait.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

MIB: Final = 1024 * 1024
MAX_HEADER_BYTES: Final = 16 * MIB
"""A header has about 100 bytes per tensor."""

MAX_DIMENSIONS: Final = 64
MAX_NUMBER: Final = 2**63
_METADATA: Final = "__metadata__"


class UnusableFile(ValueError):
    """The file is not what it should be; the message says why."""


@dataclass(frozen=True)
class TensorFile:
    """What the header of a safetensors file says, and where the tensors begin."""

    tensors: Mapping[str, Any]
    data_offset: int
    size_bytes: int


def read_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `UnusableFile` and `OSError`."""
    with open_regular(path) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnusableFile(f"it is larger than {max_bytes // MIB} MiB")
    return _object(content)


def read_tensor_file(path: Path, *, max_bytes: int = MAX_HEADER_BYTES) -> TensorFile:
    """Return the header of a safetensors file; no tensor is read. Raises `UnusableFile` and `OSError`."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise UnusableFile("it is cut off or no safetensors file")
        if length > max_bytes:
            raise UnusableFile(f"its header is larger than {max_bytes // MIB} MiB")
        header = _object(stream.read(length))
    header.pop(_METADATA, None)
    return TensorFile(tensors=header, data_offset=8 + length, size_bytes=size)


def count_elements(shape: object) -> int:
    """Return how many numbers a tensor of `shape` has. Raises `UnusableFile` unless the shape is one."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise UnusableFile("a shape is no short list")
    elements = 1
    for dimension in shape:
        if not isinstance(dimension, int) or not 0 <= dimension < MAX_NUMBER:
            raise UnusableFile("a dimension is no count")
        elements *= dimension
    return elements


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; raise `UnusableFile` for a pipe or a device, which could block or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnusableFile("it is no regular file")
    with open(descriptor, "rb") as stream:  # noqa: PTH123 (a descriptor, not a path)
        yield stream


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise UnusableFile("it is not UTF-8 text") from exc
    except RecursionError as exc:
        raise UnusableFile("it is nested too deeply") from exc
    except ValueError as exc:
        raise UnusableFile(str(exc)) from exc
    if not isinstance(value, dict):
        raise UnusableFile("it is no JSON object")
    return value
