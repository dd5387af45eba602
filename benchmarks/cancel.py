"""From the request to cancel a job until nothing of it is left, and where the time goes.

    python -m benchmarks.cancel [--runs 100] [--others 0]

Through the real API, database, notifier, worker and supervisor, once without Redis and once with one. The trees: a
script alone; four workers in sessions of their own, as torchrun starts them; children that left by setsid and a double
fork; a script that ignores TERM; 200 processes. `--others` starts that many processes beside, which the search for the
tree has to look past. All times are from the moment before the request. After each cancel the process table is
searched for what carries the attempt's id: it must be nothing.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import UTC
from typing import Any

import psutil
from sqlmodel import col, select

from app.domain.enums import JobStatus
from app.domain.projects import DEFAULT_SCOPE
from app.settings import database_url
from app.store.session import Database
from app.store.tables import AttemptRow, JobEventRow
from benchmarks.reporting import Samples, ms, print_machine, print_table
from benchmarks.service import running_service
from tests.e2e.installation import Installation

GRACE_SECONDS = 1.0
PATIENCE = 60.0

READY = "import time\nprint('ready', flush=True)\ntime.sleep(600)\n"
CHILD = "import time; time.sleep(600)"
TORCHRUN_LIKE = f"""
import subprocess, sys
for rank in range(4):
    subprocess.Popen([sys.executable, "-S", "-c", {CHILD!r}], start_new_session=True)
{READY}"""
ESCAPING = f"""
import os
for _ in range(4):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            import time
            time.sleep(600)
        os._exit(0)
    os.wait()
{READY}"""
STUBBORN = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY}"
MANY = f"""
import os, signal
for _ in range(200):
    if os.fork() == 0:
        signal.pause()
{READY}"""
TREES = {
    "alone": READY,
    "4 workers, each its own session": TORCHRUN_LIKE,
    "4 children by setsid and double fork": ESCAPING,
    f"TERM ignored, {GRACE_SECONDS:g} s grace": STUBBORN,
    "200 processes": MANY,
}
STEPS = ("request is answered", "node tells the supervisor", "script has ended", "tree is proven empty", "job is over")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="of each tree")
    parser.add_argument("--others", type=int, default=0, help="processes beside that have nothing to do with it")
    args = parser.parse_args()
    print_machine()
    with other_processes(args.others):
        for redis in (False, True):
            with running_service(redis=redis, DEEPE_STOP_GRACE_SECONDS=f"{GRACE_SECONDS:g}") as site:
                name = "with Redis" if redis else "without Redis"
                print_table(
                    f"{name}, {args.runs} cancels of each tree, {args.others} other processes, median (p99) ms",
                    ["", *STEPS],
                    [row(tree, measure_tree(site, tree, script, args.runs)) for tree, script in TREES.items()],
                )


def row(tree: str, steps: Mapping[str, Samples]) -> list[str]:
    return [tree, *(f"{ms(steps[step].median)} ({ms(steps[step].p99)})" for step in STEPS)]


def measure_tree(site: Installation, tree: str, script: str, runs: int) -> Mapping[str, Samples]:
    """Cancel a job with this tree again and again."""
    method = tree.split(",")[0].replace(" ", "-")
    file = f"{method}.py"
    site.put_script(file, script)
    stages = {"training": {"file": file, "conda_env": "base"}}
    definition: dict[str, Any] = {"training_type": "chat", "lifecycle": ["customized"], "stages": stages}
    site.post("/methods", {"name": method, **definition})
    steps: dict[str, Samples] = defaultdict(Samples)
    cancel_one(site, method)  # warms up both processes
    for _ in range(runs):
        for step, seconds in cancel_one(site, method).items():
            steps[step].seconds.append(seconds)
    return steps


def cancel_one(site: Installation, method: str) -> Mapping[str, float]:
    """Start a job, cancel it once its tree stands, and return when each step was reached."""
    job = site.submit(method)["id"]
    wait_until_ready(site, job)
    begun = time.time()
    site.call("POST", f"/jobs/{job}:cancel", status=200)
    answered = time.time()
    with site.events(job) as events:
        for _ in events:
            pass
    moments = asyncio.run(moments_of(site, job))
    return {step: at - begun for step, at in zip(STEPS, (answered, *moments), strict=True)}


def wait_until_ready(site: Installation, job: str) -> None:
    output = site.home / "runs" / job / "1" / "output.log"
    deadline = time.monotonic() + PATIENCE
    while not (output.exists() and b"ready" in output.read_bytes()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job} does not start")
        time.sleep(0.005)


async def moments_of(site: Installation, job: str) -> tuple[float, float, float, float]:
    """Return when the node told the supervisor, when the script ended, the tree was empty and the job was over."""
    database = Database(database_url(f"sqlite:///{site.home / 'deepe.db'}"), scope=DEFAULT_SCOPE)
    try:
        async with database.reading() as session:
            wanted = select(JobEventRow).where(JobEventRow.job_id == job).order_by(col(JobEventRow.id))
            events = {event.status: event.created_at for event in (await session.exec(wanted)).all()}
            attempt = (await session.exec(select(AttemptRow).where(AttemptRow.job_id == job))).one()
    finally:
        await database.close()
    told, over = (events[status].astimezone(UTC).timestamp() for status in (JobStatus.STOPPING, JobStatus.CANCELLED))
    assert attempt.exit is not None
    if left := processes_of(attempt.id):
        raise AssertionError(f"{len(left)} processes of {attempt.id} are left: {left}")
    return told, attempt.exit["finished_at"], attempt.exit["emptied_at"], over


def processes_of(attempt_id: str) -> list[int]:
    """Return what carries the attempt's id in its environment and is alive."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("DEEPE_ATTEMPT") == attempt_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@contextlib.contextmanager
def other_processes(count: int) -> Iterator[None]:
    """Have so many processes sleep beside."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.pause()
            os._exit(0)
        pids.append(pid)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
