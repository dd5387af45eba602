"""Tell how far a build is: its steps, and the bytes that pip has downloaded, as lines and as events of the job."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

_WRITE_SECONDS = 1.0  # between two events that only count bytes
# how much of the bar the downloads take where their size is known: the rest is for making, installing and checking
_BEFORE_DOWNLOADS, _AFTER_DOWNLOADS, _CHECKING = 2.0, 80.0, 90.0
_UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_BEGINS = re.compile(
    r"^\s*(Downloading|Using cached) (\S+?)(?: \((\d+(?:\.\d+)?) (bytes|kB|MB|GB)\))?(?: \(from .*\))?\s*$"
)
_ON_DISK = re.compile(r"^\s*Processing (\S+\.whl)(?: \(from .*\))?\s*$")
_COUNT = re.compile(r"^\s*Progress (\d+) of (\d+)\s*$")  # pip's --progress-bar=raw
# what pip and conda say when they turn to the next thing
_SAID = re.compile(r"^\s*((?:Collecting|Downloading|Building|Installing|Solved|Preparing)\b.*?)\s*$")


class Downloads:
    """Bytes of the files that pip fetches, read from what it prints. A cached file is there at once."""

    def __init__(self) -> None:
        self.folder = Path()  # in which pip runs
        self._all_known = False
        self._sizes: dict[str, int] = {}
        self._here: dict[str, int] = {}
        self._current: str | None = None

    @property
    def done(self) -> int:
        """Bytes that are here."""
        return sum(self._here.values())

    @property
    def expected(self) -> int | None:
        """Bytes of all files. None: it is not known what else is to come."""
        return sum(self._sizes.values()) if self._all_known else None

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Take the sizes of all files that are to come, by file name."""
        self._sizes.update(sizes)
        self._all_known = True

    def read(self, line: str) -> bool:
        """Take a line of pip's; return whether it changed the count."""
        if counted := _COUNT.match(line):
            if self._current is None:
                return False
            self._add(self._current, int(counted[1]), size=int(counted[2]))
            return True
        if on_disk := _ON_DISK.match(line):
            with contextlib.suppress(OSError):
                file = self.folder / on_disk[1]
                size = file.stat().st_size
                self._add(file.name, size, size=size)
                return True
            return False
        begins = _BEGINS.match(line)
        if begins is None or begins[2].endswith(".metadata"):
            return False
        name = unquote(begins[2].rpartition("/")[2])
        said = round(float(begins[3]) * _UNITS[begins[4]]) if begins[3] else 0
        size = self._sizes.get(name, said)
        self._current = name
        self._add(name, 0 if begins[1] == "Downloading" else size, size=size)
        return True

    def _add(self, name: str, here: int, *, size: int) -> None:
        self._sizes.setdefault(name, size)
        self._here[name] = max(here, self._here.get(name, 0))


class Progress:
    """Tells how far the build is, on stdout and as events."""

    def __init__(self, events: str | None) -> None:
        self._events = events
        self._message = ""
        self._told_at = 0.0
        self._ready = False
        self.steps = 0
        self.total = 1
        self.downloads = Downloads()

    def step(self, message: str) -> None:
        """Begin the next step."""
        self.tell(message)
        self.steps += 1

    def done(self, message: str) -> None:
        """Say that everything is ready."""
        self.steps, self._ready = self.total, True
        self.tell(message)

    def output(self, line: str) -> None:
        """Take a line that a command of the build printed."""
        counted = self.downloads.read(line)
        if said := _SAID.match(line):
            self.tell(said[1][:200], aloud=False)
        elif counted and time.monotonic() - self._told_at >= _WRITE_SECONDS:
            self.tell(self._message, aloud=False)

    def tell(self, message: str, *, aloud: bool = True) -> None:
        """Say what happens now within the present step."""
        self._message, self._told_at = message, time.monotonic()
        if aloud:
            say(message)
        if self._events is None:
            return
        event = {
            "type": "progress",
            "time": time.time(),
            "step": self.steps,
            "total": self.total,
            "message": message,
            **self._bytes(),
        }
        with contextlib.suppress(OSError), Path(self._events).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def _bytes(self) -> Mapping[str, float]:
        done, expected = self.downloads.done, self.downloads.expected
        if not done and expected is None:
            return {}
        if not expected:
            return {"bytes_done": done}
        share = min(done / expected, 1.0)
        percent = _BEFORE_DOWNLOADS + share * (_AFTER_DOWNLOADS - _BEFORE_DOWNLOADS)
        if self.steps == self.total:  # checking, which comes last
            percent = 100.0 if self._ready else _CHECKING
        return {"bytes_done": done, "bytes_total": expected, "percent": round(percent, 2)}


def say(text: str) -> None:
    """Write a line to stdout at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
