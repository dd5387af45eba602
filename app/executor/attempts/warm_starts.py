"""Warm starts: an interpreter that has imported what stages of an environment need waits for the next of them.

The imports of a training are most of what passes before its first step. A script that says `DEEPE_WARM = "warm_NAME"`
is started, once a script like it ran on this node, in an interpreter that has run warm_NAME.py beforehand, one of our
helpers: what runs before there is an attempt is ours. The script promises that what it sets in its environment before
its own imports is set there as well, or does not matter to them.

The interpreter is used once; then the next is made ready, with a pause that leaves the machine to the script that has
just begun. It fits an attempt whose interpreter, working directory and variables are the same, but for those that are
each attempt's own, and whose environment has not been touched on disk since. Whatever does not fit starts cold. The
processes belong to `standby.py`, which ends with the pipe that we hold: no worker, no interpreter. Linux only: other
systems cannot show an attempt's mark on a process that was there before it.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from app.executor.attempts import standby, supervision
from app.executor.environments.environments import MARKER

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 15.0  # at most, between a start and the imports for the next one
MOST = 2  # that wait at a time on a node
LEAST_FREE_BYTES = 2 * 1024**3  # of memory; with less none waits

_DECLARED = re.compile(rb"""^DEEPE_WARM = ["'](warm_[a-z0-9_]+)["']""", re.MULTILINE)
_INTERPRETER = 2  # python -u
_CARDS = "CUDA_VISIBLE_DEVICES"


class Starter(Protocol):
    """Starts prepared attempts. All of it blocks for moments."""

    def start(self, folder: Path) -> None:
        """Start the attempt in `folder`, or see that it was started."""

    def tend(self) -> None:
        """Do what is due; called every few seconds."""

    def close(self) -> None:
        """Leave nothing behind but attempts."""


class ColdStarts:
    """Every attempt begins with a new interpreter."""

    def start(self, folder: Path) -> None:
        supervision.start(folder)

    def tend(self) -> None:
        pass

    def close(self) -> None:
        pass


class WarmStarts:
    """Attempts begin in an interpreter that waits for them, if one does. `keep_seconds`: how long it waits."""

    def __init__(self, *, keep_seconds: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._keep_seconds = keep_seconds
        self._pause = min(PAUSE_SECONDS, keep_seconds / 10)
        self._monotonic = monotonic
        self._waiting: dict[str, Standby] = {}
        self._due: dict[str, tuple[float, Recipe]] = {}

    def start(self, folder: Path) -> None:
        recipe = Recipe.of(folder)
        waiting = self._waiting.pop(recipe.key, None) if recipe is not None else None
        if waiting is not None and waiting.take(folder):
            logger.info("started_warm", extra={"attempt": folder.name})
        else:
            supervision.start(folder)
        if recipe is not None:
            self._due[recipe.key] = (self._monotonic() + self._pause, recipe)

    def tend(self) -> None:
        now = self._monotonic()
        for key in [key for key, waiting in self._waiting.items() if now - waiting.since > self._keep_seconds]:
            self._waiting.pop(key).end()
        if psutil.virtual_memory().available < LEAST_FREE_BYTES:
            self.close()
            return
        for key in [key for key, (due, _) in self._due.items() if due <= now]:
            _, recipe = self._due.pop(key)
            if key not in self._waiting and recipe.key == key:
                self._prepare(recipe)

    def close(self) -> None:
        for waiting in self._waiting.values():
            waiting.end()
        self._waiting.clear()
        self._due.clear()

    def _prepare(self, recipe: "Recipe") -> None:
        while len(self._waiting) >= MOST:
            self._waiting.pop(min(self._waiting, key=lambda key: self._waiting[key].since)).end()
        try:
            self._waiting[recipe.key] = Standby.started(recipe, since=self._monotonic())
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("nothing_made_warm", extra={"error": str(error)})
            return
        logger.info("making_warm", extra={"python": recipe.argv[0], "imports": recipe.preload})


def preload_of(script: Path, helpers: Path) -> Path | None:
    """Return the file of imports that a script may find done, None if it says nothing of it or there is none."""
    try:
        declared = _DECLARED.search(script.read_bytes())
    except OSError:
        return None
    path = helpers / f"{declared[1].decode()}.py" if declared is not None else None
    return path if path is not None and path.is_file() else None


@dataclass(frozen=True)
class Recipe:
    """What an interpreter is started with before its attempt is known."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    preload: str

    @classmethod
    def of(cls, folder: Path) -> "Recipe | None":
        """Return what fits the attempt in `folder`; None if it can only start cold.

        The file counts, not what we would write now: an earlier worker may have prepared the folder.
        """
        try:
            spec = json.loads((folder / "spec.json").read_bytes())
            preload, argv, given, cwd = spec["preload"], spec["argv"], spec["env"], spec["cwd"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if len(argv) <= _INTERPRETER:
            return None
        env = {name: value for name, value in given.items() if not _is_of_each_attempt(name)}
        env |= {name: given[name] for name in (_CARDS,) if name in given}
        return cls(tuple(argv[:_INTERPRETER]), env, cwd, preload)

    def order(self) -> Mapping[str, Any]:
        """Return what `standby.py` reads first."""
        return {"argv": self.argv, "env": dict(self.env), "cwd": self.cwd, "preload": self.preload}

    @property
    def key(self) -> str:
        """Return what is equal for attempts that the same interpreter fits, as long as its environment is the same."""
        cards = self.env.get(_CARDS)
        described: dict[str, Any] = {
            "argv": self.argv,
            "env": {name: value for name, value in self.env.items() if name != _CARDS},
            # libraries remember how many there are
            "cards": None if cards is None else len([card for card in cards.split(",") if card]),
            "cwd": self.cwd,
            "preload": self.preload,
            "stamps": [_stamp(path) for path in self._sources()],
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def _sources(self) -> Sequence[Path]:
        """Return files and folders one of which changes whenever something is installed, removed or built anew."""
        python = Path(self.argv[0])
        prefix = python.parent.parent
        marks = (MARKER, "pyvenv.cfg", "conda-meta/history")
        packages = sorted(prefix.glob("lib/python3*/site-packages"))
        return [python, Path(self.preload), *(prefix / mark for mark in marks), *packages]


class Standby:
    """One interpreter that waits, seen from the worker: the pipe that keeps it."""

    def __init__(self, channel: int, *, since: float) -> None:
        self._channel = channel
        self.since = since

    @classmethod
    def started(cls, recipe: Recipe, *, since: float) -> "Standby":
        read, write = os.pipe()
        try:
            supervision.spawn(standby.__file__, str(read), log=Path(os.devnull), keep=[read])
            waiting = cls(write, since=since)
            if not waiting._send(json.dumps(recipe.order()).encode()):
                raise BrokenPipeError(standby.__file__)
        except BaseException:
            os.close(write)
            raise
        finally:
            os.close(read)
        return waiting

    def take(self, folder: Path) -> bool:
        """Let the attempt be started there; False if nobody is there any more."""
        taken = self._send(os.fsencode(folder.absolute()))
        self.end()
        return taken

    def end(self) -> None:
        """Let go: who waits ends, who has got an attempt is on its own anyway."""
        os.close(self._channel)

    def _send(self, line: bytes) -> bool:
        with contextlib.suppress(BrokenPipeError), open(self._channel, "wb", closefd=False) as pipe:
            pipe.write(line + b"\n")
            pipe.flush()
            return True
        return False


def _is_of_each_attempt(name: str) -> bool:
    return name.startswith("DEEPE_") or name in ("PYTHONPATH", _CARDS)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        known = path.stat()
    except OSError:
        return None
    return known.st_mtime_ns, known.st_size, known.st_ino


def starts(*, keep_seconds: float) -> Starter:
    """Return how this node starts attempts; 0 seconds, and any system but Linux: cold."""
    return WarmStarts(keep_seconds=keep_seconds) if keep_seconds > 0 and sys.platform == "linux" else ColdStarts()
