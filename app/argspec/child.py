"""The process that reads scripts for others.

It is started once and answers any number of requests, one after the other: a length and as many bytes of source on its
standard input, a length and as many bytes of JSON on its standard output. The source of a script to read has those of
modules beside it before it; an answer names the modules whose sources would have helped. A request that meets a limit
ends the process, and its exit status tells the parent which limit it was. It ends by itself when its standard input
does.

What a script is made of is evaluated with functions of Python that hold the interpreter's lock until they are done, so
that only a process of its own can be stopped.
"""

import contextlib
import json
import os
import resource
import signal
import struct
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.argspec.differences import read_difference
from app.argspec.imports import read_imports
from app.argspec.inputs import read_inputs
from app.argspec.modules import Modules, unpacked
from app.argspec.reader import read_arguments
from app.argspec.risks import read_risks
from app.argspec.source import NotPython, parse

CHECK, READ, INPUTS, RISKS, DIFFERENCE = b"c", b"r", b"i", b"k", b"d"
HEADER = struct.Struct("!cI")
"""What a request begins with: its kind and the length of what follows."""

LENGTH = struct.Struct("!I")
"""What an answer begins with."""

OUT_OF_MEMORY, TOO_MUCH_OUTPUT = 71, 72
CPU_TIME_SIGNAL = signal.SIGPROF


def serve(*, cpu_seconds: float, memory_bytes: int, output_bytes: int) -> None:
    """Answer requests until there are no more."""
    # a platform that has no such limit (macOS) is left with those of time
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        kind, length = HEADER.unpack(header)
        try:
            request = requests.read(length)
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # ends the process, whatever it is doing
            document = _answer(kind, request, memory_bytes=memory_bytes)
            answer = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
            signal.setitimer(signal.ITIMER_PROF, 0)
            if len(answer) > output_bytes:
                os._exit(TOO_MUCH_OUTPUT)
            answers.write(LENGTH.pack(len(answer)) + answer)
            answers.flush()
        except MemoryError:
            os._exit(OUT_OF_MEMORY)


def _answer(kind: bytes, request: bytes, *, memory_bytes: int) -> dict[str, Any]:
    if kind == DIFFERENCE:
        return {"difference": asdict(read_difference(request))}
    source, sources, package = unpacked(request) if kind == READ else (request, {}, "")
    try:
        tree = parse(source)
    except NotPython as error:
        if isinstance(error.__cause__, MemoryError) and _peak_address_space() > memory_bytes / 2:
            raise MemoryError from error  # else Python says so of its parser's stack, which is small
        return {"problem": asdict(error.problem)}
    if kind == CHECK:
        return {"imports": asdict(read_imports(tree))}
    if kind == INPUTS:
        return {"inputs": asdict(read_inputs(tree))}
    if kind == RISKS:
        return {"risks": asdict(read_risks(tree, source))}
    modules = Modules(sources, package=package)
    arguments = read_arguments(tree, modules)
    return {"imports": asdict(read_imports(tree)), "arguments": asdict(arguments), "wanted": modules.wanted}


def _peak_address_space() -> int:
    """Return the peak size of the process; 0 except on Linux, the only system with the limit."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return 0
    peak = next((line for line in status.splitlines() if line.startswith("VmPeak:")), "VmPeak: 0 kB")
    return int(peak.split()[1]) * 1024
