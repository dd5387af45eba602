"""A step of the shipped methods beside other programs that do the same: TRL itself, LLaMA-Factory, ms-swift, ...

    python -m benchmarks.trainers --python .cache/envs/trl-*/bin/python [--mlx-python PYTHON] [--rounds 3] [--steps 60]
        [--methods sft,dpo,grpo,embedding,mlx] [--llamafactory PYTHON] [--swift PYTHON] [--sentence-transformers PYTHON]

The same base, rows, batch, length, numbers, optimizer and one thread for all of them; every step is logged, nothing is
held out, gradients are not checkpointed. In each round all ways take turns, a process each. Processor time of a step is
the median over its run without the first ten; the ratio is the median over the rounds of what a round's runs give, so
that other work on the machine touches both sides. `through the service` is the same script as a job of a real one.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from app.presets.catalogue import ROOM, helpers_dir, script_path
from benchmarks.reporting import print_machine, print_table, ratio
from benchmarks.service import running_service
from tests.e2e.installation import Installation

CLOCK = Path(__file__).with_name("step_clock.py")
PLAIN = Path(__file__).with_name("plain_trainers.py")
WARM_UP = 10


Options = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Method:
    """A shipped method, how it is set up for the comparison, and the library whose own trainer does the same."""

    script: str
    data: str
    batch: int
    options: Options
    peer: str = "TRL"
    environment: str = "trl"
    peer_environment: str = "trl"
    base: str = "tiny_base.py"
    training_type: str = "chat"


COMMON: Options = {"eval_fraction": 0, "save_steps": 100_000, "logging_steps": 1, "lora_rank": 16}
TRAINER: Options = {
    **COMMON,
    **{"lora_alpha": 32, "grad_accum_steps": 1, "dtype": "float32", "gradient_checkpointing": "false"},
    "warmup_steps": 0,
}
ANSWERS: Options = {"num_generations": 8, "max_content_length": 16, "vllm": "false", "system_prompt": ""}
METHODS = {
    "sft": Method("sft-demo.py", "sft-demo", 32, {**TRAINER, "packing": "false", "learning_rate": 0.01}),
    "dpo": Method("dpo-demo.py", "dpo-demo", 16, {**TRAINER, "learning_rate": 0.0001}),
    "grpo": Method("grpo-demo.py", "grpo-demo", 16, {**TRAINER, **ANSWERS, "learning_rate": 1e-6}),
    "embedding": Method(
        "embedding-demo.py",
        "embedding-demo",
        32,
        {**COMMON, "lora_alpha": 32, "learning_rate": 0.002, "max_seq_length": 64},
        peer="sentence-transformers",
        peer_environment="sentence-transformers",
        base="tiny_encoder.py",
        training_type="embedding",
    ),
    "mlx": Method(
        "mlx-demo.py",
        "sft-demo",
        8,
        {**COMMON, "lora_scale": 2, "learning_rate": 0.002, "warmup_steps": 0},
        peer="mlx-lm",
        environment="mlx",
        peer_environment="mlx",
    ),
}


@dataclass
class Site:
    """Where the runs take place, and with which interpreters."""

    root: Path
    steps: int
    pythons: Mapping[str, Path]
    clock: str
    service: Installation | None = None
    made: dict[str, Path] = field(default_factory=dict)

    def base(self, program: str) -> Path:
        """Return the base model that a program of ours makes, made once."""
        if program not in self.made:
            found = next(ROOM.rglob(program))
            self.made[program] = self.root / "models" / Path(program).stem
            command = [str(self.pythons["trl"]), str(found), "--output", str(self.made[program])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self.made[program]

    def rows(self, method: Method) -> Path:
        return ROOM / method.data / f"{method.data}.jsonl"

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.root))


@dataclass(frozen=True)
class Measured:
    """What a run took: processor seconds and seconds of a step, processor seconds until the first one has ended."""

    cpu: float
    wall: float
    first: float
    beside: float = 0.0
    """Processor seconds of the service's own processes from the submit to the end, this program's requests included."""


def measured(clock: Path, beside: float = 0.0) -> Measured:
    """Return what a clock wrote."""
    steps = json.loads(clock.read_text())
    wall, cpu = (
        [later[at] - earlier[at] for earlier, later in zip(steps[WARM_UP:], steps[WARM_UP + 1 :], strict=False)]
        for at in (0, 1)
    )
    return Measured(statistics.median(cpu), statistics.median(wall), steps[0][1], beside)


# ---- ours ------------------------------------------------------------------------------------------------------------


def by_hand(site: Site, method: Method) -> Measured:
    folder = site.fresh()
    paths = {
        "model_path": site.base(method.base),
        "dataset_path": site.rows(method),
        "output_dir": folder / "out",
    }
    arguments = [f"--{name}={value}" for name, value in {**paths, **parameters(site, method)}.items()]
    return run(site, [site.pythons[method.environment], "-u", script_path(method.script), *arguments], folder)


def parameters(site: Site, method: Method) -> Options:
    return {**method.options, "max_steps": site.steps, "batch_size": method.batch}


def through_the_service(site: Site, method: Method) -> Measured:
    service = site.service
    assert service is not None
    file = f"clocked-{method.script}"
    if not (service.home / "scripts" / file).exists():
        service.put_script(file, f"{site.clock}\n\n{script_path(method.script).read_text()}")
        stages = {"training": {"file": file, "conda_env": method.environment}}
        definition = {"training_type": method.training_type, "lifecycle": ["customized"], "stages": stages}
        service.post("/methods", {"name": file, **definition})
        target = service.home / "models" / file
        shutil.copytree(site.base(method.base), target)
        service.post("/base-models", {"name": file, "path": file})
        service.call("PUT", f"/datasets/{file}/file", status=201, content=site.rows(method).read_bytes())
    ours = [psutil.Process(pid) for pid in service.pids.values()]
    before = sum(map(used, ours))
    job = service.submit(file, base_model=file, dataset=file, parameters=parameters(site, method))["id"]
    ended = service.wait(job)
    clock = service.home / "runs" / job / "1" / "output" / "step-clock.json"
    if ended["status"] != "succeeded" and not clock.exists():
        raise RuntimeError(service.story(job))
    return measured(clock, sum(map(used, ours)) - before)


def used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


# ---- the others ------------------------------------------------------------------------------------------------------


def plain(site: Site, method: Method) -> Measured:
    """Run the library's own trainer, as its documentation does it."""
    folder = site.fresh()
    about = {"base": str(site.base(method.base)), "rows": str(site.rows(method)), "output": str(folder)}
    settings = {"steps": site.steps, "batch": method.batch, "rate": method.options["learning_rate"]}
    arguments = [method.script.partition("-")[0], json.dumps({**about, **settings})]
    return run(site, [site.pythons[method.peer_environment], "-u", PLAIN, *arguments], folder)


def messages(site: Site, method: Method, folder: Path) -> Path:
    """Write the rows as conversations."""
    target = folder / "rows.jsonl"
    with target.open("w") as file:
        for row in map(json.loads, site.rows(method).read_text().splitlines()):
            turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return target


def training_arguments(site: Site, method: Method, folder: Path) -> dict[str, Any]:
    """Return what peers on transformers' Trainer are told alike."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": method.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": method.options["learning_rate"],
        "max_steps": site.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
    }


def llamafactory(site: Site, method: Method) -> Measured:
    folder = site.fresh()
    rows = messages(site, method, folder)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    shape = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": rows.name, **shape}}))
    settings = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(site.base(method.base)),
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "chatml",
        "cutoff_len": 1024,
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_target": "all",
        **training_arguments(site, method, folder),
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "preprocessing_num_workers": 1,
        "overwrite_cache": True,
    }
    (folder / "train.yaml").write_text(json.dumps(settings))
    program = "from llamafactory.train.tuner import run_exp; run_exp()"
    return run(site, [site.pythons["llamafactory"], "-u", "-c", program, folder / "train.yaml"], folder)


def swift(site: Site, method: Method) -> Measured:
    folder = site.fresh()
    settings = {
        "model": site.base(method.base),
        "model_type": "qwen3",
        "template": "chatml",
        "dataset": messages(site, method, folder),
        "torch_dtype": "float32",
        "tuner_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        **training_arguments(site, method, folder),
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "split_dataset_ratio": 0,
        "dataloader_num_workers": 0,
    }
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    program = "from swift.pipelines import sft_main; sft_main()"
    return run(site, [site.pythons["swift"], "-u", "-c", program, *arguments], folder)


def run(site: Site, command: Sequence[Any], folder: Path) -> Measured:
    """Run a command with the clock."""
    hook = site.root / "hook"
    if not hook.is_dir():
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(site.clock)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR")}
    environment = kept | {
        "HOME": str(site.root),
        "PYTHONPATH": os.pathsep.join(map(str, (hook, helpers_dir()))),
        "STEP_CLOCK": str(folder / "clock.json"),
        "PYTHONSAFEPATH": "1",  # this folder has modules that are called as libraries are
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    words = list(map(str, command))
    with (folder / "output").open("w") as output:
        # a session of its own, as a stage has: kernels share the processor among sessions
        subprocess.run(
            words, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True, check=False
        )
    if not (folder / "clock.json").exists():
        raise RuntimeError((folder / "output").read_text()[-4000:])
    return measured(folder / "clock.json")


# ---- the comparison --------------------------------------------------------------------------------------------------

Way = Callable[[Site, Method], Measured]
OURS: dict[str, Way] = {"ours, by hand": by_hand, "ours, through the service": through_the_service}


def ways_of(name: str, site: Site) -> dict[str, Way]:
    found = dict(OURS)
    if site.service is None:
        del found["ours, through the service"]
    if METHODS[name].peer_environment in site.pythons:
        found[METHODS[name].peer] = plain
    if name == "sft":
        found |= {one: way for one, way in (("llamafactory", llamafactory), ("swift", swift)) if one in site.pythons}
    return found


def compare(name: str, site: Site, rounds: int) -> None:
    method, ways = METHODS[name], ways_of(name, site)
    runs: dict[str, list[Measured]] = {title: [] for title in ways}
    for number in range(rounds):
        for title in [*ways][:: 1 if number % 2 == 0 else -1]:
            try:
                runs[title].append(ways[title](site, method))
            except RuntimeError as error:
                print(f"{title}: {error}", file=sys.stderr)
    hand = runs["ours, by hand"]
    peers = [found for title, found in runs.items() if title not in OURS and len(found) == rounds]
    quickest = min(peers, key=lambda found: statistics.median(one.cpu for one in found)) if peers else hand
    table = []
    for title, found in runs.items():
        if len(found) < rounds:
            table.append([title, *["-"] * 8])
            continue
        cells = [f"{statistics.median(one.cpu for one in found) * 1000:.1f}"]
        cells += [ratio(ratios(found, other, "cpu"), 1) for other in (hand, quickest)]
        cells += [f"{statistics.median(one.wall for one in found) * 1000:.1f}"]
        cells += [ratio(ratios(found, other, "wall"), 1) for other in (hand, quickest)]
        beside = statistics.median(one.beside for one in found)
        start = statistics.median(one.first for one in found)
        table.append([title, *cells, f"{start:.1f}", f"{beside:.1f}" if beside else ""])
    each = ["/ by hand", "/ quickest peer"]
    heads = ["", "processor ms/step", *each, "ms/step", *each, "start, processor s", "beside, processor s"]
    print_table(f"{name}: {site.steps} steps, batch {method.batch}, {rounds} rounds", heads, table)


def ratios(found: Sequence[Measured], other: Sequence[Measured], what: str) -> float:
    """Return the median over the rounds of what a step took of the other's."""
    pairs = zip(found, other, strict=True)
    return float(statistics.median(getattr(one, what) / getattr(two, what) for one, two in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment `trl`")
    parser.add_argument("--mlx-python", type=Path, help="interpreter of the environment `mlx`")
    for peer in ("llamafactory", "swift", "sentence-transformers"):
        parser.add_argument(f"--{peer}", type=Path, help=f"interpreter of an environment with {peer}")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    help_ = "of the trainings' sessions on Linux, from -20: other work disturbs them less; needs root"
    parser.add_argument("--priority", type=int, default=0, help=help_)
    parser.add_argument("--without-service", action="store_true")
    args = parser.parse_args()
    found = {"trl": args.python, "mlx": args.mlx_python, "llamafactory": args.llamafactory, "swift": args.swift}
    found["sentence-transformers"] = args.sentence_transformers
    pythons = {name: Path(os.path.abspath(path)) for name, path in found.items() if path}
    print_machine()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        site = Site(root, args.steps, pythons, CLOCK.read_text().replace("PRIORITY = 0", f"PRIORITY = {args.priority}"))
        if not args.without_service:
            environments = {name: path.parents[1] for name, path in pythons.items() if name in ("trl", "mlx")}
            site.service = stack.enter_context(running_service(redis=False, environments=environments))
        for name in args.methods.split(","):
            if name != "mlx" or "mlx" in pythons:
                compare(name, site, args.rounds)


if __name__ == "__main__":
    main()
