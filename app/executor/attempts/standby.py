"""Keep an interpreter ready that has imported what a stage will need; once an attempt comes, be its supervisor.

    python -I -S standby.py CHANNEL

The worker starts it and holds the other end of CHANNEL, a pipe. The first line that comes says what to start (`Recipe`
in `warm_starts.py`); the second, perhaps minutes later, is the folder of an attempt. When the pipe ends without one,
because the worker wants the interpreter no more or is gone itself, all ends here.

The processes are those of `supervisor.py`, in the same relation: supervisor, witness, stage. Only the order is another:
witness and stage are there before their attempt. The stage runs `warm.py` and waits at a pipe for the folder's path. It
gets it where a cold stage is released: after the lock, `started`, and its identity on disk. If it died while it waited,
the attempt starts cold.
"""

import contextlib
import json
import os
import select
import signal
import sys
from typing import NoReturn
from uuid import uuid4

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__":  # -I and -S leave out where we are
    sys.path.append(os.path.normpath(os.path.join(HERE, *3 * [os.pardir])))
from app.executor.attempts import supervisor  # noqa: E402

WARM_PROGRAM = os.path.join(HERE, "warm.py")
ROOM = 8192  # bytes each for the command line and the variables that the process table will show
OOM_SCORE = 1000  # while it waits, nothing is lost with it


def main(arguments: list[str]) -> int:
    """Wait for an attempt and see it to its end."""
    channel = int(arguments[0])
    os.set_inheritable(channel, False)
    for ignored in (signal.SIGHUP, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    recipe = supervisor.read_line(channel)
    if not recipe:
        return 0
    supervisor.become_subreaper()
    spare = prepare(json.loads(recipe), channel)
    try:
        folder = wait_for_attempt(channel, spare)
        if not folder:
            return 0
        os.close(channel)
        write_log_to(folder)
        return supervisor.main([folder], spare)
    finally:
        spare.end()


def prepare(recipe: supervisor.Record, channel: int) -> supervisor.Spare:
    """Fork the witness, which forks the interpreter."""
    mark = f"warm-{uuid4().hex}".ljust(ROOM, ".")
    stage_read, to_stage = os.pipe()
    witness_read, to_witness = os.pipe()
    report_read, report_write = os.pipe()
    witness = os.fork()
    if witness == 0:
        for descriptor in (channel, to_stage, to_witness, report_read):
            os.close(descriptor)
        bear_witness(recipe, mark, report=report_write, folder=witness_read, stage_folder=stage_read)
    for descriptor in (stage_read, witness_read, report_write):
        os.close(descriptor)
    stage = int(supervisor.read_line(report_read) or witness)  # a witness that cannot fork is gone, like its stage
    return supervisor.Spare(
        witness=supervisor.identity_of(witness),
        stage=supervisor.identity_of(stage),
        mark=mark,
        report=report_read,
        to_witness=to_witness,
        to_stage=to_stage,
    )


def wait_for_attempt(channel: int, spare: supervisor.Spare) -> str:
    """Return the folder of an attempt, an empty text if none will come."""
    watched = [spare.report]
    with contextlib.suppress(OSError):
        watched.append(os.pidfd_open(spare.stage["pid"]))
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([channel, *watched], [], [])
        if channel not in ready:  # it has died: what it held is given back now, and the attempt will start cold
            spare.end()
            watched = []
            continue
        piece = os.read(channel, 65536)
        if not piece:
            return ""
        line += piece
    return os.fsdecode(line[:-1])


def write_log_to(folder: str) -> None:
    """Let what the supervisor says stand in the attempt's folder, as if it had been started for it."""
    with contextlib.suppress(OSError):
        log = os.open(os.path.join(folder, "supervisor.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)


# --- the witness and the interpreter


def bear_witness(recipe: supervisor.Record, mark: str, *, report: int, folder: int, stage_folder: int) -> NoReturn:
    """Be the parent of an interpreter; should it become a stage, report its end as every witness does."""
    with contextlib.suppress(BaseException):
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        supervisor.become_subreaper()
        told_read, told_write = os.pipe()
        stage = os.fork()
        if stage == 0:
            become_interpreter(recipe, mark, folder=stage_folder, told=told_write)
        for descriptor in (stage_folder, told_write):
            os.close(descriptor)
        supervisor.set_oom_score(OOM_SCORE, stage)  # before anybody can take it and set its own
        os.write(report, b"%d\n" % stage)
        with open(told_read, "rb") as pipe:
            told = pipe.read()
        ending = supervisor.wait_for(stage)
        if told != supervisor.BEGUN:  # nothing of the script ran, whatever ended the process
            error = told.removeprefix(supervisor.BEGUN).decode(errors="replace") or None
            ending = {"released": False, "finished_at": ending["finished_at"], "error": error}
        path = supervisor.read_line(folder)
        if path:
            supervisor.fault_point("stage-ended")
            supervisor.deposit(supervisor.Folder(os.fsdecode(path)), report, ending)
    os._exit(0)


def become_interpreter(recipe: supervisor.Record, mark: str, *, folder: int, told: int) -> NoReturn:
    """Become the environment's Python with nothing but imports to do; what they print is kept for the output."""
    with contextlib.suppress(BaseException):
        supervisor.lead_session()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        said = os.memfd_create("deepe-warm")
        for stream in (1, 2):
            os.dup2(said, stream)
        for descriptor in (folder, told):
            os.set_inheritable(descriptor, True)
        os.chdir(recipe["cwd"])
        command = [*recipe["argv"], WARM_PROGRAM, str(folder), str(told), recipe["preload"], *[""] * ROOM]
        # last, so that who reads the environment up to its first empty entry finds all of it
        environment = {**recipe["env"], "DEEPE_ATTEMPT": mark}
        os.execve(command[0], command, environment)
    os._exit(127)


if __name__ == "__main__":
    if os.getpid() != os.getsid(0):
        with contextlib.suppress(OSError):
            os.setsid()
    sys.exit(main(sys.argv[1:]))
