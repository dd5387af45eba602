"""Secrets of an attempt do not stand in what it left.

A stage writes to its files itself. While it runs, its run folder holds `.redactions.json` with what must not be seen,
and every reader puts asterisks there, as many as the bytes that they stand for: positions in the files stay what they
are. When nothing of the attempt lives any more, the same is done to the files, and the list is removed with them.

A secret is found as it is, line by line, and as JSON, `repr`, URLs and Base64 write it. What a script divides, encrypts
or writes otherwise is not found, nor is anything in its output folder looked at.
"""

import base64
import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final
from urllib.parse import quote, quote_plus

from app.executor.runs.run_folder import RunFolder
from app.store.home import is_shared

LEAST_BYTES: Final = 8  # shorter parts of a secret would be found in words that are none of it
_BLOCK: Final = 1024 * 1024
_EVERYTHING: Final = re.compile(rb"[^\n]")


class Redaction:
    """Replaces secrets by asterisks, byte for byte."""

    def __init__(self, forms: Iterable[bytes] = (), *, everything: bool = False) -> None:
        self._forms = sorted({form for form in forms if len(form) >= LEAST_BYTES}, key=len, reverse=True)
        self._everything = everything

    @classmethod
    def of(cls, path: Path) -> "Redaction":
        """Return what is redacted in a file of a run folder.

        A list that cannot be read hides everything: what it names may stand in the file.
        """
        try:
            with (path.parent / RunFolder.REDACTIONS).open("rb", buffering=0) as file:
                return cls(forms_of(json.loads(file.read())))
        except FileNotFoundError:
            return NOTHING
        except (OSError, ValueError, TypeError):
            return cls(everything=True)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is redacted."""
        return not self._forms and not self._everything

    @property
    def reach(self) -> int:
        """Return how many bytes beside a part of a file tell whether something in it belongs to a secret."""
        return len(self._forms[0]) - 1 if self._forms else 0

    def apply(self, data: bytes) -> bytes:
        """Return `data` of the same length without secrets."""
        return data if self.is_empty else self._pattern.sub(lambda found: b"*" * len(found[0]), data)

    def read(self, descriptor: int, limit: int, offset: int) -> bytes:
        """Return what `os.pread` does, without secrets, also those that begin before or end after it."""
        if self.is_empty:
            return os.pread(descriptor, limit, offset)
        start = max(offset - self.reach, 0)
        data = self.apply(os.pread(descriptor, offset - start + limit + self.reach, start))
        return data[offset - start : offset - start + limit]

    def begun(self, data: bytes) -> int:
        """Return how many bytes at the end of `data` may be the beginning of a secret that is being written."""
        return max((self._overlap(form, data) for form in self._forms), default=0)

    @staticmethod
    def _overlap(form: bytes, data: bytes) -> int:
        most = min(len(form) - 1, len(data))
        return next((size for size in range(most, 0, -1) if data.endswith(form[:size])), 0)

    @cached_property
    def _pattern(self) -> re.Pattern[bytes]:
        return _EVERYTHING if self._everything else re.compile(b"|".join(map(re.escape, self._forms)))


NOTHING: Final = Redaction()


def read_at(path: Path, offset: int, limit: int) -> bytes:
    """Return at most `limit` bytes of a file of a run folder, without secrets; one that is not there is empty."""
    redaction = Redaction.of(path)
    try:
        with path.open("rb", buffering=0) as file:
            data = redaction.read(file.fileno(), limit, offset)
    except FileNotFoundError:
        return b""
    return data[: len(data) - redaction.begun(data)]


def forms_of(values: Sequence[str]) -> Iterator[bytes]:
    """Yield how secrets may stand in a text."""
    for value in values:
        # many a library writes a key without the newline at its end, and a log writes every line for itself
        for text in dict.fromkeys(map(str.strip, (value, *value.split("\n")))):
            content = text.encode()
            whole = content[: len(content) // 3 * 3]  # what the rest becomes depends on what follows it
            plain = (
                text,
                json.dumps(text)[1:-1],
                json.dumps(text, ensure_ascii=False)[1:-1],
                repr(text)[1:-1],
                quote(text),
                quote(text, safe=""),
                quote_plus(text),
            )
            yield from (form.encode() for form in plain)
            yield from (base64.b64encode(whole), base64.urlsafe_b64encode(whole))


def begin(run: RunFolder, values: Iterable[str]) -> None:
    """Write down what no reader of the run folder may see, before anything is written there. Blocks."""
    mode = 0o640 if is_shared(run.path) else 0o600
    draft = run.redactions.with_name(f"{run.redactions.name}.draft")
    with open(draft, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, mode)) as file:
        json.dump(sorted(values), file)
    draft.replace(run.redactions)


def finish(run: RunFolder) -> None:
    """Take secrets out of the files of a run folder, its output folder apart, and remove the list of them. Blocks.

    Nothing of the attempt may live any more. Safe to repeat.
    """
    redaction = Redaction.of(run.output_log)
    if redaction.is_empty:
        return
    for path in _files(run):
        with contextlib.suppress(FileNotFoundError):
            _redact(path, redaction)
    run.redactions.unlink(missing_ok=True)


def _files(run: RunFolder) -> Iterator[Path]:
    for entry in os.scandir(run.path):
        if entry.is_file(follow_symlinks=False) and Path(entry.path) != run.redactions:
            yield Path(entry.path)
    for folder, _, names in os.walk(run.ranks):
        yield from (Path(folder, name) for name in names)


def _redact(path: Path, redaction: Redaction) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        if path.is_symlink() or not path.is_file():
            return
        raise
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            return
        offset = 0
        while offset < state.st_size:
            start = max(offset - redaction.reach, 0)
            data = os.pread(descriptor, offset - start + _BLOCK, start)
            clean = redaction.apply(data)
            if clean != data:
                os.pwrite(descriptor, clean, start)
            offset += _BLOCK
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
