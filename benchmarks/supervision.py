"""What it costs a stage to be supervised, and how fast it is stopped.

    python -m benchmarks.supervision [--runs 20] [--busy-loops 20000000]

Start: until the stage's process is recorded, and until its first line, beside `subprocess` of the same interpreter.
Work: a script that keeps one core busy, supervised and plain in turns. Idle: memory and processor time of supervisor
and reaper. Stop: from the request until the end is written, that is after the tree was proven empty.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import psutil

from app.executor.supervisor import client
from app.executor.supervisor.client import AttemptPhase, LaunchSpec
from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio

PATIENCE = 60.0
IDLE_SECONDS = 10.0
GRACE_SECONDS = 1.0

HELLO = "print('hello', flush=True)\n"
SLEEP = "print('hello', flush=True)\nimport time\ntime.sleep(600)\n"
BUSY = """
import sys, time
begun = time.perf_counter(), time.process_time()
total = 0
for number in range(int(sys.argv[1])):
    total += number * number % 7
print(time.perf_counter() - begun[0], time.process_time() - begun[1], flush=True)
"""
CHILDREN = """
import subprocess, sys, time
for _ in range(3):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("hello", flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("hello", flush=True)
while True:
    time.sleep(600)
"""
STOPS = {
    "TERM is obeyed": SLEEP,
    "three children in sessions of their own": CHILDREN,
    f"TERM is ignored ({GRACE_SECONDS:g} s grace)": STUBBORN,
}


class Attempt:
    """One supervised script in a folder of its own."""

    def __init__(self, root: Path, script: str, *arguments: str) -> None:
        self.folder = root / "attempts" / uuid4().hex
        self.output = root / f"{self.folder.name}.log"
        client.prepare(
            self.folder,
            LaunchSpec(
                attempt_id=self.folder.name,
                argv=(sys.executable, "-u", "-c", script, *arguments),
                cwd=root,
                env={"PATH": os.environ.get("PATH", os.defpath)},
                output=self.output,
                grace_seconds=GRACE_SECONDS,
            ),
        )

    def start(self) -> None:
        client.start(self.folder)

    def wait_until_recorded(self) -> None:
        wait(lambda: client.observe(self.folder).process is not None)

    def wait_for_line(self) -> None:
        wait(lambda: self.output.exists() and b"\n" in self.output.read_bytes())

    def wait_for_end(self) -> None:
        wait(lambda: client.observe(self.folder).phase is AttemptPhase.EXITED)

    def stop(self) -> None:
        client.request_stop(self.folder, "benchmark")
        self.wait_for_end()

    def processes(self) -> dict[str, psutil.Process]:
        """Return the supervisor and the reaper, which is the stage's parent."""
        process = client.observe(self.folder).process
        assert process is not None
        reaper = psutil.Process(process.pid).parent()
        assert reaper is not None
        supervisor = reaper.parent()
        assert supervisor is not None
        return {"supervisor": supervisor, "reaper": reaper}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--busy-loops", type=int, default=20_000_000, help="work of the busy script")
    args = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        measure_start(root, args.runs)
        measure_work(root, max(args.runs // 4, 3), args.busy_loops)
        measure_idle(root)
        measure_stop(root, args.runs)


def measure_start(root: Path, runs: int) -> None:
    plain, recorded, line = Samples(), Samples(), Samples()
    for _ in range(runs):
        with plain.measure(), subprocess.Popen([sys.executable, "-u", "-c", HELLO], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
        attempt = Attempt(root, SLEEP)
        begun = time.perf_counter()
        attempt.start()
        attempt.wait_until_recorded()
        recorded.seconds.append(time.perf_counter() - begun)
        attempt.wait_for_line()
        line.seconds.append(time.perf_counter() - begun)
        attempt.stop()
    rows = [
        ["first line, plain subprocess (peer)", plain],
        ["supervised: process recorded", recorded],
        ["supervised: first line", line],
    ]
    print_samples(f"start, {runs} runs, ms", rows, peer=plain)


def measure_work(root: Path, runs: int, loops: int) -> None:
    plain, supervised = (Samples(), Samples()), (Samples(), Samples())
    for _ in range(runs):
        command = [sys.executable, "-u", "-c", BUSY, str(loops)]
        note(plain, subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        attempt = Attempt(root, BUSY, str(loops))
        attempt.start()
        attempt.wait_for_end()
        note(supervised, attempt.output.read_text())
    for column, what in enumerate(("by the clock", "of processor time")):
        rows: list[list[object]] = [["plain subprocess (peer)", plain[column]], ["supervised", supervised[column]]]
        print_samples(f"a busy script, {runs} alternating runs, ms {what}", rows, peer=plain[column])


def note(samples: tuple[Samples, Samples], line: str) -> None:
    for column, figure in zip(samples, line.split(), strict=True):
        column.seconds.append(float(figure))


def measure_idle(root: Path) -> None:
    attempt = Attempt(root, SLEEP)
    attempt.start()
    attempt.wait_for_line()
    time.sleep(1)
    processes = attempt.processes()
    before = {name: used_seconds(process) for name, process in processes.items()}
    time.sleep(IDLE_SECONDS)
    rows = []
    for name, process in processes.items():
        memory = process.memory_full_info()
        share = (used_seconds(process) - before[name]) / IDLE_SECONDS
        rows.append([name, f"{memory.rss / 2**20:.1f}", f"{memory.uss / 2**20:.1f}", f"{share:.2%}"])
    attempt.stop()
    print_table(f"while the stage sleeps, {IDLE_SECONDS:g} s", ["", "RSS MiB", "own MiB", "of a core"], rows)


def measure_stop(root: Path, runs: int) -> None:
    plain = Samples()
    for _ in range(runs):
        with subprocess.Popen([sys.executable, "-u", "-c", SLEEP], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with plain.measure():
                process.terminate()
                process.wait()
    rows = [["plain subprocess: terminate and wait (peer)", plain]]
    for name, script in STOPS.items():
        samples = Samples()
        for _ in range(runs):
            attempt = Attempt(root, script)
            attempt.start()
            attempt.wait_for_line()
            with samples.measure():
                attempt.stop()
        rows.append([name, samples])
    print_samples(f"from the request to stop until the tree is proven empty, {runs} runs, ms", rows, peer=plain)


def print_samples(title: str, rows: list[list[object]], *, peer: Samples) -> None:
    lines = []
    for name, samples in rows:
        assert isinstance(samples, Samples)
        lines.append([str(name), ms(samples.median), ms(samples.p99), ratio(samples.median, peer.median)])
    print_table(title, ["", "median", "p99", "/ peer"], lines)


def used_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.0005)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
