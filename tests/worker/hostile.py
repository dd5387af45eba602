"""A stage script that tries what a script should not, and writes down what came of it: `{name: what it got, or ""}`.

It is a file of its own so that it stands in the documentation as what was run; the test fills in TARGETS.
"""

import ctypes
import functools
import glob
import importlib
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS: dict[str, Any] = json.loads("{}")
FOUND: dict[str, str] = {}


def attempt(name: str) -> Callable[[Callable[[], object]], None]:
    """Run the function; what it returns is what it got."""

    def run(function: Callable[[], object]) -> None:
        try:
            FOUND[name] = str(function() or "")
        except Exception:
            FOUND[name] = ""

    return run


def readable(path: object) -> str:
    return "read" if Path(str(path)).read_bytes() else ""


def listed(path: str) -> str:
    """Say whether the folder shows something, by the path of that."""
    return "listed" if os.path.basename(path) in os.listdir(os.path.dirname(path)) else ""


def written(path: str) -> str:
    with open(path, "ab"):
        return "written"


@attempt("environment of the worker")
def _() -> object:
    os.stat(f"/proc/{TARGETS['worker']}")
    return readable(f"/proc/{TARGETS['worker']}/environ")


@attempt("environment of another stage")
def _() -> object:
    mine = os.environ["DEEPE_ATTEMPT"].encode()
    for file in glob.glob("/proc/[0-9]*/environ"):
        try:
            content = Path(file).read_bytes()
        except OSError:
            continue
        if b"DEEPE_ATTEMPT=" in content and mine not in content:
            return "read"
    return None


@attempt("number of processes of others")
def _() -> object:
    return sum(1 for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, 2, os.getpid()))


@attempt("signal to the worker")
def _() -> object:
    os.kill(TARGETS["worker"], 0)
    return "sent"


@attempt("signal to a supervisor")
def _() -> object:
    os.kill(TARGETS["supervisor"], 0)
    return "sent"


@attempt("ptrace of the supervisor")
def _() -> object:
    if ctypes.CDLL(None).ptrace(0x4206, TARGETS["supervisor"], 0, 0) == 0:  # PTRACE_SEIZE, which stops nothing
        ctypes.CDLL(None).ptrace(17, TARGETS["supervisor"], 0, 0)
        return "attached"
    return None


for name, path in TARGETS.get("read", {}).items():
    attempt(f"read {name}")(functools.partial(readable, path))
for name, path in TARGETS.get("list", {}).items():
    attempt(f"list {name}")(functools.partial(listed, path))
for name, path in TARGETS.get("write", {}).items():
    attempt(f"write {name}")(functools.partial(written, path))


@attempt("link out of the output folder")
def _() -> object:
    link = Path(os.environ["DEEPE_OUTPUT_DIR"], "link")
    link.symlink_to(TARGETS["read"]["the database"])
    try:
        return readable(link)
    finally:
        link.unlink()


@attempt("put a link in the place of its own log")
def _() -> object:
    log = Path(os.environ["DEEPE_OUTPUT_DIR"]).parent / "output.log"
    if log.exists():
        os.rename(log, log.with_name("moved"))
        os.rename(log.with_name("moved"), log)
        return "replaced"
    return None


@attempt("rights of root (CAP_SYS_ADMIN)")
def _() -> object:
    held = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    return "held" if held >> 21 & 1 else ""


@attempt("connect to a port of this machine")
def _() -> object:
    socket.create_connection(("127.0.0.1", TARGETS["port"])).close()
    return "connected"


(Path(os.environ["DEEPE_OUTPUT_DIR"]) / "report.json").write_text(json.dumps(FOUND))
sys.path.insert(0, os.getcwd())
importlib.import_module("play").adapter()
