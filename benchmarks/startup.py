"""What a start costs, and what the idle service holds.

    python -m benchmarks.startup [--runs 7] [--idle-seconds 20]

Fresh interpreters: importing the API and the worker and showing the help of `deepe`, beside an interpreter that imports
FastAPI alone. Then the service is started in a temporary home and left alone: time until it is ready, memory and
processor time of each process.
"""

import argparse
import re
import subprocess
import sys
import time

import psutil

from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio
from benchmarks.service import running_service

PEER = "import fastapi"
IMPORTS = {
    "nothing": "pass",
    f"{PEER} (peer)": PEER,
    "import app.main": "import app.main",
    "import app.worker": "import app.worker",
}
MEMORY = "\nimport psutil; print(psutil.Process().memory_info().rss)"
HEAVY = 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--idle-seconds", type=float, default=20.0)
    args = parser.parse_args()
    print_machine()
    measure_imports(args.runs)
    show_heavy_imports("app.main")
    for redis in (True, False):
        measure_service(redis=redis, idle_seconds=args.idle_seconds)


def measure_imports(runs: int) -> None:
    """Start fresh interpreters in turns."""
    commands = {name: [sys.executable, "-c", program + MEMORY] for name, program in IMPORTS.items()}
    commands["deepe --help"] = [sys.executable, "-P", "-m", "app.cli", "--help"]
    samples = {name: Samples() for name in commands}
    memory: dict[str, float] = {}
    for _ in range(runs + 1):
        for name, command in commands.items():
            with samples[name].measure():
                said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            if name != "deepe --help":
                memory[name] = int(said) / 2**20
    for measured in samples.values():
        measured.seconds.pop(0)  # the first one reads the files from disk
    peer = samples[f"{PEER} (peer)"].median
    rows = [
        [
            name,
            ms(found.median),
            ms(found.p99),
            f"{memory[name]:.0f}" if name in memory else "",
            ratio(found.median, peer),
        ]
        for name, found in samples.items()
    ]
    print_table(f"fresh interpreters, {runs} runs", ["", "median ms", "p99 ms", "RSS MiB", "/ peer"], rows)


def show_heavy_imports(module: str) -> None:
    """Print which modules cost most by themselves, without what they import."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stderr.splitlines()
    found = [
        (int(own), name) for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", "\n".join(lines))
    ]
    packages: dict[str, int] = {}
    for own, name in found:
        packages[name.partition(".")[0]] = packages.get(name.partition(".")[0], 0) + own
    heavy = sorted(packages.items(), key=lambda package: -package[1])[:HEAVY]
    rows = [[name, ms(own / 1e6)] for name, own in heavy]
    print_table(f"import {module}: {len(found)} modules; the heaviest packages", ["", "ms"], rows)


def measure_service(*, redis: bool, idle_seconds: float) -> None:
    """Start the service, leave it alone, and look at its processes."""
    begun = time.perf_counter()
    with running_service(redis=redis) as site:
        ready = time.perf_counter() - begun
        time.sleep(3)
        processes = {name: psutil.Process(pid) for name, pid in site.pids.items()}
        if redis:
            processes["redis"] = next(child for child in psutil.Process().children() if "redis" in child.name())
        before = {name: used_seconds(process) for name, process in processes.items()}
        time.sleep(idle_seconds)
        rows = []
        totals = [0.0, 0.0, 0.0]
        for name, process in processes.items():
            memory = process.memory_full_info()
            share = (used_seconds(process) - before[name]) / idle_seconds
            figures = [memory.rss / 2**20, memory.uss / 2**20, share]
            totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
            rows.append([name, *shown(figures)])
        rows.append(["together", *shown(totals)])
    print_table(
        f"idle service {'with' if redis else 'without'} Redis, {idle_seconds:g} s; first start (new home, schema, "
        f"presets, samples): {ready:.1f} s",
        ["", "RSS MiB", "own MiB", "of a core"],
        rows,
    )


def shown(figures: list[float]) -> list[str]:
    return [f"{figures[0]:.0f}", f"{figures[1]:.0f}", f"{figures[2]:.2%}"]


def used_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
