"""What supervising and watching cost a step of a real training.

    python -m benchmarks.training_step --python .cache/envs/trl-*/bin/python [--minutes 4] [--core 0]

One training (PyTorch, one thread, a step of some 15 ms that reports its loss every tenth time) runs as a job of the
real service. Everything of ours (supervisor, reaper, worker, API) is frozen for a second, let go for a second, and so
on: neighbouring windows of the same process are compared, which leaves out what else differs between two runs. The
second table says what ours used of a core meanwhile, which holds on a busy machine, too. With `--core` the training and
ours share one core: what they use is missing to the training.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from app.executor.supervisor.program import REAPER_KEY
from benchmarks.reporting import print_machine, print_table
from benchmarks.service import running_service
from tests.e2e.installation import Installation

WINDOW_SECONDS = 1.0
PATIENCE = 120.0
FILE = "steps.py"
SCRIPT = """
import json, os, sys, time
os.environ["OMP_NUM_THREADS"] = "1"
import deepe, torch
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(*(layer for _ in range(4) for layer in (torch.nn.Linear(512, 512), torch.nn.GELU())))
optimizer = torch.optim.AdamW(model.parameters())
rows = torch.randn(64, 512)
deepe.catch_stop()
steps, number = [], 0
print("ready", flush=True)
while not deepe.stop_requested():
    number += 1
    wall, cpu = time.perf_counter(), time.process_time()
    loss = (model(rows) - rows).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if number % 10 == 0:
        deepe.metrics(number, loss=loss)
        deepe.progress(number, None)
        print(f"step {number} loss {loss.item():.4f}", flush=True)
    steps.append((time.time(), time.perf_counter() - wall, time.process_time() - cpu))
with open(os.path.join(os.environ["DEEPE_OUTPUT_DIR"], "steps.json"), "w") as file:
    json.dump(steps, file)
"""

Step = tuple[float, float, float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of an environment with torch")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--core", type=int, default=None, help="run everything on this core only")
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    print_machine()
    prefix = Path(os.path.abspath(args.python)).parents[1]
    with running_service(redis=False, environments={"trl": prefix}) as site:
        job = start(site)
        ours = processes_of_ours(site, job)
        before = {name: used(process) for name, process in ours.items()}
        begun, windows = time.time(), alternate(list(ours.values()), args.minutes * 60)
        seconds = (time.time() - begun) / 2
        shares = {name: (used(process) - before[name]) / seconds for name, process in ours.items()}
        memory = {name: process.memory_full_info() for name, process in ours.items()}
        site.call("POST", f"/jobs/{job}:cancel")
        site.wait(job)
        steps = json.loads((site.home / "runs" / job / "1" / "output" / "steps.json").read_text())
    report(steps, windows)
    rows = [
        [name, f"{memory[name].rss / 2**20:.1f}", f"{memory[name].uss / 2**20:.1f}", f"{share:.2%}"]
        for name, share in shares.items()
    ]
    print_table("while it trained", ["", "RSS MiB", "own MiB", "of a core"], rows)


def start(site: Installation) -> str:
    """Start the training and wait until it steps."""
    site.put_script(FILE, SCRIPT)
    stages = {"training": {"file": FILE, "conda_env": "trl"}}
    definition: dict[str, Any] = {"training_type": "chat", "lifecycle": ["customized"], "stages": stages}
    site.post("/methods", {"name": "steps", **definition})
    job: str = site.submit("steps")["id"]
    output = site.home / "runs" / job / "1" / "output.log"
    deadline = time.monotonic() + PATIENCE
    while not (output.exists() and b"step 50 " in output.read_bytes()):
        if time.monotonic() > deadline:
            raise TimeoutError(site.story(job))
        time.sleep(0.05)
    return job


def processes_of_ours(site: Installation, job: str) -> dict[str, psutil.Process]:
    """Return all that is not the training itself."""
    state = json.loads(next((site.node_home / "attempts").glob("*/state.json")).read_text())
    pids = {"supervisor": state["supervisor_pid"], "reaper": state[REAPER_KEY]["pid"], **site.pids}
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def alternate(ours: Sequence[psutil.Process], seconds: float) -> list[tuple[float, float, bool]]:
    """Freeze and let go in turns; return the windows: begin, end, whether ours ran."""
    windows = []
    running = True
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            running = not running
            for process in ours:
                process.send_signal(signal.SIGCONT if running else signal.SIGSTOP)
            begun = time.time()
            time.sleep(WINDOW_SECONDS)
            windows.append((begun, time.time(), running))
    finally:
        for process in ours:
            process.send_signal(signal.SIGCONT)
    return windows


def report(steps: Sequence[Step], windows: Sequence[tuple[float, float, bool]]) -> None:
    """Compare each window in which ours ran with its neighbours in which they did not."""
    of_window = [[step for step in steps if begun < step[0] - step[1] and step[0] < end] for begun, end, _ in windows]
    rows = []
    for column, what in ((1, "by the clock"), (2, "of processor time")):
        means = [statistics.fmean(step[column] for step in found) if found else None for found in of_window]
        ratios = []
        for index in range(1, len(windows) - 1):
            here, left, right = means[index], means[index - 1], means[index + 1]
            if windows[index][2] and here and left and right:
                ratios.append(here / ((left + right) / 2))
        alone = statistics.median(mean for mean, window in zip(means, windows, strict=True) if mean and not window[2])
        spread = statistics.stdev(ratios) / len(ratios) ** 0.5
        rows.append(
            [
                f"{what}, {len(ratios)} windows",
                f"{alone * 1000:.2f}",
                f"{statistics.median(ratios) - 1:+.2%}",
                f"{statistics.fmean(ratios) - 1:+.2%}",
                f"{spread:.2%}",
            ]
        )
    print_table(
        f"a step of the training, {len(steps)} steps",
        ["", "ours frozen, ms", "ours running: median", "mean", "standard error"],
        rows,
    )


def used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
