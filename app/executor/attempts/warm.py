"""Import what a stage will need, learn which stage that is, and become it.

    python -u warm.py FOLDER TOLD PRELOAD [nothing, many times: room for another command line]

`standby.py` starts it with the environment's own Python, so: standard library only, and nothing that Python 3.8 lacks.
It runs PRELOAD, a file of imports, and waits at the pipe FOLDER for the path of an attempt; the pipe's end without one
ends it. Nothing is forked here: the process that has imported is the one that runs the script, so threads that a
library starts when it is imported are still there, and every attempt has random numbers of its own.

Then it makes itself what `python -u SCRIPT ARGUMENTS` would be: the same output, working directory, environment,
`sys.argv`, `sys.path` and `__main__`. Where that cannot be had it becomes exactly that, by `exec`: when the imports
failed or touched an accelerator, when a file beside the script has the name of a module that is imported already, when
the script cannot be read. On the pipe TOLD it says that the script begins, or what is in the way, in the words of
`supervisor.py`.
"""

from __future__ import annotations

import sys

AT_THE_START = frozenset(sys.modules)  # what every interpreter imports before it looks at any path of ours

import os  # noqa: E402
from typing import Any  # noqa: E402

MARK = b"DEEPE_ATTEMPT="
BEGUN = b"begun\n"
NOT_RELEASED = 124
NOT_STARTED = 127
ACCELERATORS = ("/dev/nvidia", "/dev/dri/", "/dev/kfd", "/dev/accel", "/dev/davinci")
SAFE_PATH = getattr(sys.flags, "safe_path", False)
AT_EVERY_START = frozenset({"sitecustomize", "usercustomize"})


class Unfit(Exception):
    """Why the script must be started cold."""


def main() -> None:
    folder_pipe, told = (int(number) for number in sys.argv[1:3])
    for descriptor in (folder_pipe, told):
        os.set_inheritable(descriptor, False)
    if not SAFE_PATH:
        del sys.path[0]  # our own folder, whose files are nobody's modules
    trouble = preload(sys.argv[3])
    folder = read_line(folder_pipe)
    if not folder:  # nobody wants us, or the supervisor died before it recorded us
        os._exit(NOT_RELEASED)
    os.close(folder_pipe)
    become(folder, told, trouble)


def preload(path: str) -> str:
    """Run the file of imports; return what went wrong."""
    import runpy

    try:
        runpy.run_path(path, run_name="deepe_warm")
    except BaseException as error:
        return f"{os.path.basename(path)}: {error!r}"
    return ""


def become(folder: str, told: int, trouble: str) -> None:
    """Be the stage of the attempt in `folder`."""
    import json

    with open(os.path.join(folder, "spec.json"), encoding="utf-8") as file:
        spec = json.load(file)
    command = spec["argv"]
    environment = {**spec["env"], "DEEPE_ATTEMPT": spec["attempt_id"]}
    set_since = variables_set_since()
    target = spec["output"]
    try:
        output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        said = take_over_output(output)
        target = spec["cwd"]
        os.chdir(target)
        os.environ.clear()
        os.environ.update({**set_since, **environment})
        try:
            if trouble:
                raise Unfit(trouble)
            path = module_path(command[2], environment)
            check(path)
            code = compiled(command[2])
            sign(command, environment)
        except Exception as reason:  # nothing of the script has run: whatever it is, a new interpreter does without
            note(folder, "started cold: %s" % reason)
            os.write(told, BEGUN)
            target = command[0]
            os.execvpe(target, command, environment)
    except OSError as problem:
        os.write(told, ("%s: %s" % (target, problem.strerror)).encode()[:4096])
        os._exit(NOT_STARTED)
    if said:
        os.write(1, said)
    os.write(told, BEGUN)
    os.close(told)
    run(code, command, path)


def variables_set_since() -> dict[str, str]:
    """Return the variables that interpreter and libraries have set, as they do for a script that imports them."""
    with open("/proc/self/environ", "rb") as file:
        given = {entry.partition(b"=")[0] for entry in file.read().split(b"\0")}
    return {name: value for name, value in os.environ.items() if os.fsencode(name) not in given}


def take_over_output(output: int) -> bytes:
    """Let both streams go to the attempt's output; return what was said so far."""
    said = os.pread(1, os.fstat(1).st_size, 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    return said


# --- may it be warm?


def check(path: list[str]) -> None:
    """Refuse where something is not as it would be in an interpreter that is new."""
    if touched := [name for name in open_files() if name.startswith(ACCELERATORS)]:
        raise Unfit("the imports opened %s" % touched[0])
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise Unfit("the imports initialised CUDA")
    imported = {name.partition(".")[0] for name in sys.modules if name not in AT_THE_START} | AT_EVERY_START
    for folder in path:
        for name in modules_in(folder) if folder not in sys.path else ():
            if name in imported:
                raise Unfit("%s has a module of its own called %s" % (folder, name))


def open_files() -> list[str]:
    """Return what our descriptors lead to."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink("/proc/self/fd/" + descriptor))
        except OSError:  # the one of the list itself
            continue
    return found


def modules_in(folder: str) -> list[str]:
    """Return the names of modules that an import would find in a folder."""
    from importlib.machinery import all_suffixes

    found: list[str] = []
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return found
    for entry in entries:
        name = entry.name.partition(".")[0]
        if entry.name[len(name) :] in all_suffixes() or os.path.exists(os.path.join(entry.path, "__init__.py")):
            found.append(name)
    return found


def module_path(script: str, environment: dict[str, str]) -> list[str]:
    """Return `sys.path` as it would be: the script's folder, PYTHONPATH, and what it is without them."""
    given = environment.get("PYTHONPATH")
    entries = [os.path.abspath(entry) for entry in given.split(os.pathsep)] if given else []
    head = [] if SAFE_PATH else [os.path.dirname(os.path.realpath(script))]
    return head + list(dict.fromkeys([*entries, *sys.path]))


def compiled(script: str) -> Any:
    """Return the script's code; what is wrong with it is told best by a Python that is told to run it."""
    try:
        with open(script, "rb") as file:
            return compile(file.read(), script, "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError) as error:
        raise Unfit(repr(error)) from error


# --- becoming it


def sign(command: list[str], environment: dict[str, str]) -> None:
    """Let the process table show our attempt and our script: the kernel reads both where it put them at our start.

    Of the variables only the room of DEEPE_ATTEMPT is written to, which is long enough for all that are the attempt's
    own: a library may remember where the others stand.
    """
    import ctypes

    with open("/proc/self/environ", "rb") as file:
        block = file.read()
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    arguments, arguments_end, variables = (int(field) for field in fields[45:48])
    place = block.rfind(MARK)
    room = block.find(b"\0", place) - place
    given = block.split(b"\0")
    entries = [os.fsencode("%s=%s" % variable) for variable in environment.items()]
    own = sorted((entry for entry in entries if entry not in given), key=lambda entry: not entry.startswith(MARK))
    while len(own) > 1 and len(b"\0".join(own)) > room:
        own.pop()
    shown = b"\0".join(own)
    if place < 0 or not shown.startswith(MARK) or len(shown) > room or not 0 < arguments < arguments_end:
        raise Unfit("the process cannot be marked")
    ctypes.memmove(variables + place, shown.ljust(room, b"\0"), room)
    room = arguments_end - arguments
    line = b"\0".join(os.fsencode(part) for part in command)[: room - 1]
    ctypes.memmove(arguments, line.ljust(room, b"\0"), room)


def run(code: Any, command: list[str], path: list[str]) -> None:
    """Run the script as the interpreter's main module."""
    import builtins
    import importlib
    import types
    from importlib.machinery import SourceFileLoader

    script = command[2]
    sys.argv = command[2:]
    sys.orig_argv = list(command)
    sys.path[:] = path
    importlib.invalidate_caches()
    module = types.ModuleType("__main__")
    module.__dict__.update(
        __file__=os.path.abspath(script),
        __cached__=None,
        __loader__=SourceFileLoader("__main__", script),
        __builtins__=builtins,
        __annotations__={},
    )
    sys.modules["__main__"] = module
    failed = False
    try:
        exec(code, module.__dict__)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        trace = error.__traceback__
        error = error.with_traceback(trace.tb_next if trace is not None else None)  # without this very frame
        sys.excepthook(type(error), error, error.__traceback__)
        failed = True
    if failed:
        sys.exit(1)


# --- small things


def read_line(descriptor: int) -> str:
    """Return a line without its end; empty if the pipe ends before."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(descriptor, 4096)
        if not piece:
            return ""
        line += piece
    return os.fsdecode(line[:-1])


def note(folder: str, sentence: str) -> None:
    """Write a line for who wonders, beside what the supervisor says."""
    try:
        with open(os.path.join(folder, "supervisor.log"), "a", encoding="utf-8") as file:
            file.write(sentence + "\n")
    except OSError:
        pass


if __name__ == "__main__":
    main()
