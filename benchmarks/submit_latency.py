"""From a submit to the first line of the script's output, and where the time goes.

    python -m benchmarks.submit_latency [--runs 20]

Through the real API and worker, once without Redis (a touched file wakes the worker) and once with one (a notification
of arq wakes it). The peers start the same script with the same interpreter: `subprocess`, and `conda run` where a conda
is on PATH. All times are from the moment before the request or the start.
"""

import argparse
import asyncio
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlmodel import select

from app.domain.enums import JobStatus
from app.domain.projects import DEFAULT_SCOPE
from app.settings import database_url
from app.store.session import Database
from app.store.tables import AttemptRow, JobEventRow
from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio
from benchmarks.service import base_interpreter, running_service
from tests.e2e.installation import Installation

FILE = "first_line.py"
SCRIPT = "import time\nprint('first', time.time(), flush=True)\n"
ANSWERED, CLAIMED, STARTED, PRINTED, SEEN = (
    "submit is answered",
    "job is claimed",
    "supervisor starts the process",
    "script prints its first line",
    "a reader of the event stream has it",
)
STEPS = (ANSWERED, CLAIMED, STARTED, PRINTED, SEEN)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    print_machine()
    for redis in (False, True):
        with running_service(redis=redis) as site:
            add_method(site)
            steps: dict[str, Samples] = defaultdict(Samples)
            plain = Samples()
            measure(site)  # warms up both processes
            for _ in range(args.runs):
                for step, seconds in measure(site).items():
                    steps[step].seconds.append(seconds)
                plain.seconds.append(start([str(base_interpreter(site)), "-u"], site))
            conda = measure_conda(site, args.runs)
        report("with Redis" if redis else "without Redis", steps, plain, conda, runs=args.runs)


def add_method(site: Installation) -> None:
    """Register a method whose training says hello and ends."""
    site.put_script(FILE, SCRIPT)
    definition: dict[str, Any] = {
        "name": "hello",
        "training_type": "chat",
        "lifecycle": ["customized"],
        "stages": {"training": {"file": FILE, "conda_env": "base"}},
    }
    site.post("/methods", definition)


def measure(site: Installation) -> Mapping[str, float]:
    """Submit once and return when each step was reached."""
    begun = time.time()
    job = site.submit("hello")["id"]
    answered = time.time()
    seen = 0.0
    with site.events(job) as events:
        for event in events:
            if event.event == "log" and not seen:
                seen = time.time()
    printed = float(site.get(f"/jobs/{job}/logs")["text"].split()[1])
    claimed, started = asyncio.run(moments(site, job))
    moment = {ANSWERED: answered, CLAIMED: claimed, STARTED: started, PRINTED: printed, SEEN: seen}
    return {step: at - begun for step, at in moment.items()}


async def moments(site: Installation, job: str) -> tuple[float, float]:
    """Return when the job was claimed and when its process was started."""
    database = Database(database_url(f"sqlite:///{site.home / 'deepe.db'}"), scope=DEFAULT_SCOPE)
    try:
        async with database.reading() as session:
            wanted = select(JobEventRow).where(JobEventRow.job_id == job, JobEventRow.status == JobStatus.LAUNCHING)
            claimed = (await session.exec(wanted)).one().created_at
            attempt = (await session.exec(select(AttemptRow).where(AttemptRow.job_id == job))).one()
    finally:
        await database.close()
    assert attempt.exit is not None
    return claimed.astimezone(UTC).timestamp(), datetime.fromtimestamp(attempt.exit["started_at"], UTC).timestamp()


def start(command: list[str], site: Installation) -> float:
    """Run the script with the command; return the seconds until it prints."""
    begun = time.time()
    output = subprocess.run([*command, str(site.home / "scripts" / FILE)], capture_output=True, check=True, text=True)
    return float(output.stdout.split()[1]) - begun


def measure_conda(site: Installation, runs: int) -> Samples | None:
    """Start the script through `conda run` in conda's root environment, if there is a conda."""
    conda = shutil.which("conda")
    if conda is None:
        return None
    root = subprocess.run([conda, "info", "--base"], capture_output=True, check=True, text=True).stdout.strip()
    command = [conda, "run", "--no-capture-output", "--prefix", root, str(Path(root) / "bin" / "python"), "-u"]
    return Samples([start(command, site) for _ in range(runs)])


def report(name: str, steps: Mapping[str, Samples], plain: Samples, conda: Samples | None, *, runs: int) -> None:
    """Print when each step was reached, and how long each took."""
    rows = []
    before: list[float] = [0.0] * runs
    for step in STEPS:
        at = steps[step].seconds
        took = Samples([now - then for now, then in zip(at, before, strict=True)])
        rows.append(
            [
                step,
                ms(steps[step].median),
                ms(steps[step].p99),
                ms(took.median),
                ratio(steps[step].median, plain.median),
            ]
        )
        before = at
    rows.append(["peer: subprocess, first line", ms(plain.median), ms(plain.p99), "", "1.00 x"])
    if conda is not None:
        rows.append(
            ["peer: conda run, first line", ms(conda.median), ms(conda.p99), "", ratio(conda.median, plain.median)]
        )
    print_table(f"{name}, {runs} submits, ms", ["", "median", "p99", "step alone", "/ subprocess"], rows)
    if conda is None:
        print("  (no conda on PATH)")


if __name__ == "__main__":
    main()
