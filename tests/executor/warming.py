"""Interpreters that wait for an attempt, for tests: as the worker has them, but one for each attempt, and at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from app.executor.attempts import standby
from app.executor.attempts.warm_starts import Recipe, Standby

PRELOAD = "import json\n"


def make_ready(folder: Path) -> Standby:
    """Start an interpreter that fits the prepared attempt."""
    recipe = Recipe.of(folder)
    assert recipe is not None
    return Standby.started(recipe, since=0.0)


def supervise_warm(recipe: Recipe, folder: Path, *, fault_point: str) -> "subprocess.Popen[bytes]":
    """Run the program as a child of the test, and give it the attempt."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", standby.__file__, str(read)],
        env=os.environ | {"DEEPE_FAULT_POINT": fault_point},
        pass_fds=[read],
    )
    os.close(read)
    with open(write, "wb") as pipe:
        pipe.write(json.dumps(recipe.order()).encode() + b"\n" + os.fsencode(folder) + b"\n")
    return process


def waiting(preload: Path) -> list[psutil.Process]:
    """Return the interpreters that have run this file of imports, or are about to, and have no attempt yet."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(preload) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
