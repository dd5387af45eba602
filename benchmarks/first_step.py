"""From the start of a process to the first step of a training: by hand, under the supervisor, and warm.

    python -m benchmarks.first_step --python .cache/envs/trl-*/bin/python [--runs 5]

SFT-Demo on its tiny base model, one step. By hand is `python -u sft-demo.py` as a plain subprocess; supervised is what
a worker does with a prepared attempt; warm is the same where an interpreter with the imports done was waiting. The ways
take turns. Then what the imports are made of, by `-X importtime`, and what the interpreter that waits costs.
"""

import argparse
import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from app.executor.attempts import supervision
from app.executor.attempts.supervision import AttemptPhase, LaunchSpec
from app.executor.attempts.warm_starts import Recipe, Standby
from app.presets.catalogue import helpers_dir, script_path
from app.presets.sample_data import DATA
from benchmarks.reporting import Samples, print_machine, print_table, ratio

PATIENCE = 300.0
HEAVY = 12
PRELOAD = helpers_dir() / "warm_trl.py"
SCRIPT = script_path("sft-demo.py")
BASE = SCRIPT.parents[1] / "tiny_base.py"
DATASET = DATA / "sft-demo.jsonl"
# what the output says, and which phase of the start is over then
MARKS = {
    b'"msg": 200002': "interpreter, arguments",  # HandleWithDataset
    b'"msg": 200001': "rows read",  # InitializingModel
    b'"msg": 200003': "imports, tokenizer, model loaded",  # ConfigTrainingParams
    b'"msg": 200004': "rows encoded, trainer built",  # StartTraining
    b"step 1/1": "first step",
}


@dataclass
class Site:
    """Where the runs take place."""

    root: Path
    python: Path

    def command(self) -> tuple[str, ...]:
        output = self.root / "out" / uuid4().hex
        return (
            *(str(self.python), "-u", str(SCRIPT), f"--model_path={self.root / 'base'}"),
            *(f"--dataset_path={DATASET}", f"--output_dir={output}"),
            *("--max_steps=1", "--batch_size=8", "--eval_fraction=0"),
        )

    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.root), "PYTHONPATH": str(helpers_dir())}


class Run:
    """One run of the script, and when each of its phases was over."""

    def __init__(self, output: Path, begin: Callable[[], None], ended: Callable[[], bool]) -> None:
        begun = time.perf_counter()
        begin()
        self.phases: dict[str, float] = {}
        deadline = begun + PATIENCE
        while len(self.phases) < len(MARKS):
            said = output.read_bytes() if output.exists() else b""
            now = time.perf_counter()
            for mark, phase in MARKS.items():
                if mark in said:
                    self.phases.setdefault(phase, now - begun)
            if now > deadline or (ended() and len(self.phases) < len(MARKS) and said == output.read_bytes()):
                raise RuntimeError(f"the script did not come to its first step:\n{said.decode(errors='replace')}")
            time.sleep(0.001)
        while not ended():
            time.sleep(0.01)


def by_hand(site: Site) -> Run:
    output = site.root / f"{uuid4().hex}.log"
    started: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        with output.open("wb") as stream:
            command, env = site.command(), site.environment()
            started.append(subprocess.Popen(command, env=env, cwd=site.root, stdout=stream, stderr=stream))

    return Run(output, begin, lambda: started[0].poll() is not None)


def supervised(site: Site, *, warm: bool) -> Run:
    folder, output = prepared(site)
    waiting = make_ready(folder) if warm else None

    def begin() -> None:
        if waiting is None:
            supervision.start(folder)
        else:
            assert waiting.take(folder)

    return Run(output, begin, lambda: supervision.observe(folder).phase is AttemptPhase.EXITED)


def prepared(site: Site) -> tuple[Path, Path]:
    """Return the folder of an attempt that may start, and its output."""
    folder = site.root / "attempts" / uuid4().hex
    output = site.root / f"{folder.name}.log"
    spec = LaunchSpec(folder.name, site.command(), site.root, site.environment(), output, preload=PRELOAD)
    supervision.prepare(folder, spec)
    return folder, output


def make_ready(folder: Path) -> Standby:
    """Return an interpreter that has done its imports."""
    recipe = Recipe.of(folder)
    assert recipe is not None
    waiting = Standby.started(recipe, since=0.0)
    wait_for_imports()
    return waiting


def wait_for_imports() -> psutil.Process:
    """Wait until the interpreter has nothing to do any more."""
    deadline, used, quiet = time.monotonic() + PATIENCE, -1.0, 0
    while quiet < 10:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)
        found = [process for process in psutil.process_iter() if is_waiting(process)]
        now = sum(sum(process.cpu_times()[:2]) for process in found)
        quiet = quiet + 1 if found and now == used else 0
        used = now
    return found[0]


def is_waiting(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return str(PRELOAD) in process.cmdline()
    return False


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment `trl`")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        site = Site(Path(name), Path(os.path.abspath(args.python)))
        command = [site.python, BASE, "--output", site.root / "base", "--steps=5"]
        subprocess.run(command, check=False, capture_output=True)  # it complains that it has not learnt: it need not
        measure_starts(site, args.runs)
        show_imports(site)
        show_costs(site)


def measure_starts(site: Site, runs: int) -> None:
    ways: dict[str, Callable[[], Run]] = {
        "by hand (peer)": lambda: by_hand(site),
        "supervised, cold": lambda: supervised(site, warm=False),
        "supervised, warm": lambda: supervised(site, warm=True),
    }
    found: dict[str, list[Run]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, run in ways.items():
            found[way].append(run())
    peer = median_of(found["by hand (peer)"], "first step")
    rows = []
    for way, done in found.items():
        medians = [median_of(done, phase) for phase in MARKS.values()]
        rows.append([way, *(f"{seconds:.2f}" for seconds in medians), ratio(medians[-1], peer)])
    print_table(f"seconds since the start until ..., medians of {runs} runs", ["", *MARKS.values(), "/ peer"], rows)


def median_of(runs: Sequence[Run], phase: str) -> float:
    return Samples([run.phases[phase] for run in runs]).median


def show_imports(site: Site) -> None:
    """Print what the imports are made of."""
    command = [str(site.python), "-X", "importtime", str(PRELOAD)]
    said = subprocess.run(command, capture_output=True, check=True, text=True, env=site.environment()).stderr
    packages: dict[str, float] = {}
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", said):
        package = name.partition(".")[0]
        packages[package] = packages.get(package, 0.0) + int(own) / 1e6
    heavy = sorted(packages.items(), key=lambda package: -package[1])[:HEAVY]
    total = sum(packages.values())
    rows = [[name, f"{seconds:.2f}", f"{seconds / total:.0%}"] for name, seconds in heavy]
    print_table(f"{total:.1f} s of imports, by package (own time)", ["", "seconds", "of all"], rows)


def show_costs(site: Site) -> None:
    """Print what waits, and what it holds."""
    folder, _ = prepared(site)
    begun = time.perf_counter()
    waiting = make_ready(folder)
    seconds = time.perf_counter() - begun - 1.0  # of quiet
    process = wait_for_imports()
    witness = process.parent()
    assert witness is not None
    keeper = witness.parent()
    assert keeper is not None
    family = {"interpreter": process, "witness": witness, "supervisor": keeper}
    before = {name: sum(one.cpu_times()[:2]) for name, one in family.items()}
    time.sleep(10)
    rows = []
    for name, one in family.items():
        memory, used = one.memory_full_info(), sum(one.cpu_times()[:2]) - before[name]
        rows.append([name, f"{memory.rss / 2**20:.0f}", f"{memory.uss / 2**20:.0f}", f"{used / 10:.2%}"])
    waiting.end()
    print_table(f"what waits, ready after {seconds:.1f} s", ["", "RSS MiB", "own MiB", "of a core"], rows)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
