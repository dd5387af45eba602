"""From the start of a process to the first step of a training, and to the answer to a question.

    python -m benchmarks.first_step --python .cache/envs/trl-*/bin/python [--runs 5]

SFT-Demo on its tiny base model, one step; then a question to that model. By hand is `python -u SCRIPT` as a plain
subprocess; supervised is what a worker does with a prepared attempt. The ways take turns. Then what the imports are
made of, by `-X importtime`.
"""

import argparse
import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from app.executor.supervisor import client
from app.executor.supervisor.client import AttemptPhase, LaunchSpec
from app.presets.catalogue import ROOM, SHARED, helpers_dir, script_path
from benchmarks.reporting import Samples, print_machine, print_table, ratio

PATIENCE = 300.0
HEAVY = 12
IMPORTS = "import datasets, peft, torch, transformers, trl"
BASE = SHARED / "tiny_base.py"
DATASET = ROOM / "sft-demo" / "sft-demo.jsonl"


@dataclass(frozen=True)
class Work:
    """A script with its arguments; `marks`: what its output says, and which phase of the start is over then."""

    title: str
    script: str
    arguments: tuple[str, ...]
    marks: Mapping[bytes, str]


TRAINING = Work(
    title="training",
    script="sft-demo.py",
    arguments=(
        *("--model_path={root}/base", f"--dataset_path={DATASET}", "--output_dir={root}/out/{fresh}"),
        *("--max_steps=1", "--batch_size=8", "--eval_fraction=0"),
    ),
    marks={
        b'"msg": 200002': "first words",  # HandleWithDataset
        b'"msg": 200001': "rows read",  # InitializingModel
        b'"msg": 200003': "imports, tokenizer, model loaded",  # ConfigTrainingParams
        b'"msg": 200004': "rows encoded, trainer built",  # StartTraining
        b"step 1/1": "first step",
    },
)
QUESTION = Work(
    title="question",
    script="ask_model.py",
    arguments=("--base_model_path={root}/base", "--prompt=What is 3 + 4?", "--temperature=0", "--max_length=8"),
    marks={b'"status": "resp"': "imports, model loaded, answered"},
)


@dataclass
class Site:
    """Where the runs take place."""

    root: Path
    python: Path

    def command(self, work: Work) -> tuple[str, ...]:
        fresh = uuid4().hex
        arguments = (argument.format(root=self.root, fresh=fresh) for argument in work.arguments)
        return (str(self.python), "-u", str(script_path(work.script)), *arguments)

    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.root), "PYTHONPATH": str(helpers_dir())}


class Run:
    """One run of the script, and when each of its phases was over."""

    def __init__(self, work: Work, output: Path, begin: Callable[[], None], ended: Callable[[], bool]) -> None:
        begun = time.perf_counter()
        begin()
        self.phases: dict[str, float] = {}
        deadline = begun + PATIENCE
        while len(self.phases) < len(work.marks):
            over = ended()  # first: what was said before is read then
            said = output.read_bytes() if output.exists() else b""
            now = time.perf_counter()
            for mark, phase in work.marks.items():
                if mark in said:
                    self.phases.setdefault(phase, now - begun)
            if now > deadline or (over and len(self.phases) < len(work.marks)):
                raise RuntimeError(f"{work.script} did not come so far:\n{said.decode(errors='replace')}")
            time.sleep(0.001)
        while not ended():
            time.sleep(0.01)


def by_hand(site: Site, work: Work) -> Run:
    output = site.root / f"{uuid4().hex}.log"
    started: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        with output.open("wb") as stream:
            # a session of its own, as a stage has: kernels share the processor among sessions
            process = subprocess.Popen(
                site.command(work), env=site.environment(), cwd=site.root,
                stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
            started.append(process)

    return Run(work, output, begin, lambda: started[0].poll() is not None)


def supervised(site: Site, work: Work) -> Run:
    folder, output = prepared(site, work)
    ended = lambda: client.observe(folder).phase is AttemptPhase.EXITED  # noqa: E731
    return Run(work, output, lambda: client.start(folder), ended)


def prepared(site: Site, work: Work) -> tuple[Path, Path]:
    """Return the folder of an attempt that may start, and its output."""
    folder = site.root / "attempts" / uuid4().hex
    output = site.root / f"{folder.name}.log"
    spec = LaunchSpec(folder.name, site.command(work), site.root, site.environment(), output)
    client.prepare(folder, spec)
    return folder, output


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment `trl`")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        site = Site(Path(name), Path(os.path.abspath(args.python)))
        command = [str(site.python), str(BASE), "--output", str(site.root / "base"), "--steps=5"]
        subprocess.run(command, check=False, capture_output=True)  # it complains that it has not learnt: it need not
        for work in (TRAINING, QUESTION):
            measure_starts(site, work, args.runs)
        show_imports(site)


def measure_starts(site: Site, work: Work, runs: int) -> None:
    ways: dict[str, Callable[[], Run]] = {
        "by hand (peer)": lambda: by_hand(site, work),
        "supervised": lambda: supervised(site, work),
    }
    found: dict[str, list[Run]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, run in ways.items():
            found[way].append(run())
    phases = list(work.marks.values())
    peer = median_of(found["by hand (peer)"], phases[-1])
    rows = []
    for way, done in found.items():
        medians = [median_of(done, phase) for phase in phases]
        rows.append([way, *(f"{seconds:.2f}" for seconds in medians), ratio(medians[-1], peer)])
    print_table(
        f"{work.title}: seconds from the start until ..., medians of {runs} runs", ["", *phases, "/ peer"], rows
    )


def median_of(runs: Sequence[Run], phase: str) -> float:
    return Samples([run.phases[phase] for run in runs]).median


def show_imports(site: Site) -> None:
    """Print what the imports are made of."""
    command = [str(site.python), "-X", "importtime", "-c", IMPORTS]
    said = subprocess.run(command, capture_output=True, check=True, text=True, env=site.environment()).stderr
    packages: dict[str, float] = {}
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", said):
        package = name.partition(".")[0]
        packages[package] = packages.get(package, 0.0) + int(own) / 1e6
    heavy = sorted(packages.items(), key=lambda package: -package[1])[:HEAVY]
    total = sum(packages.values())
    rows = [[name, f"{seconds:.2f}", f"{seconds / total:.0%}"] for name, seconds in heavy]
    print_table(f"{total:.1f} s of imports, by package (own time)", ["", "seconds", "of all"], rows)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
