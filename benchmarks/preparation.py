"""Rows to tokens: how fast a training's data is prepared, beside plain TRL.

    python -m benchmarks.preparation --python .cache/envs/trl-*/bin/python [--rows 36000,1000000] [--workers 2]

Conversations of about 200 tokens (`--words 20`), from the JSONL file to a trainer that could begin; imports and loading
the model are not counted. The peer is `load_dataset("json")` and an `SFTTrainer` with as many processes
(`dataset_num_proc`), which learns every token of `messages`; with `prompt` and `completion` it learns the answers, as
SFT-Demo does. Then the same again, as an attempt that goes on. Memory is what came on top of the imports, of the
process and its workers together, without pages of files, which the kernel takes back when it needs them. Disk is what
was written.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ("red", "small", "large", "number", "answer", "train", "question", "river", "seven", "before", "quickly")
HERE = Path(__file__).resolve()
PRESETS = HERE.parent.parent / "app/presets"
WAYS = {
    "TRL, `messages` (peer)": "trl-messages",
    "TRL, `prompt` and `completion`": "trl-completions",
    "SFT-Demo": "ours",
    "SFT-Demo, next attempt": "ours-again",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment `trl`")
    parser.add_argument("--rows", default="36000", help="numbers of rows, separated by commas")
    parser.add_argument("--words", type=int, default=20, help="words of a question and of an answer")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare")
    args = parser.parse_args()
    from benchmarks.reporting import print_machine, print_table, ratio

    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = root / "base"
        tiny = [args.python, PRESETS / "shared/tiny_base.py", "--output", base]
        subprocess.run(tiny, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        table = []
        for rows in map(int, args.rows.split(",")):
            write_rows(root, rows, args.words)
            found = {title: measured(args.python, way, root, args.workers) for title, way in WAYS.items()}
            peer = next(iter(found.values()))
            for title, one in found.items():
                times = (f"{one['wall']:.2f} s", ratio(one["wall"], peer["wall"]), f"{rows / one['wall']:,.0f}")
                work = (f"{one['cpu']:.2f} s", ratio(one["cpu"], peer["cpu"]))
                sizes = (f"{one['memory']:,.0f} MiB", f"{one['disk']:,.0f} MiB")
                table.append([title, f"{rows:,}", *times, *work, *sizes])
    heads = ["", "rows", "time", "/ peer", "rows/s", "processor", "/ peer", "memory", "disk"]
    print_table("rows to a trainer", heads, table)


def write_rows(root: Path, count: int, words: int) -> None:
    """Write the same conversations in both forms."""
    draw = random.Random(0)
    with (root / "messages.jsonl").open("w") as one, (root / "completions.jsonl").open("w") as other:
        for number in range(count):
            asked, said = (" ".join(draw.choices(WORDS, k=words)) for _ in range(2))
            turns = [{"role": "user", "content": f"{number} {asked}"}, {"role": "assistant", "content": said}]
            one.write(json.dumps({"messages": turns}) + "\n")
            other.write(json.dumps({"prompt": turns[:1], "completion": turns[1:]}) + "\n")


def measured(python: Path, way: str, root: Path, workers: int) -> dict[str, float]:
    """Return what a process of its own measures."""
    command = [str(python), str(HERE), way, str(root), str(workers)]
    hub = root / "hub"
    cache = {"HF_DATASETS_CACHE": str(hub)}
    # this folder has modules that are called as libraries are
    environment = os.environ | cache | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    shutil.rmtree(hub, ignore_errors=True)
    return found


# ---- in the environment of the training ------------------------------------------------------------------------------


def measure(way: str, root: Path, workers: int) -> dict[str, float]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.append(str(PRESETS / "shared/helpers"))
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(root / "base")
    settings = {"output_dir": str(root / "out"), "use_cpu": True, "report_to": "none", "max_length": 1024}

    def trainer(**more: Any) -> Callable[..., Any]:
        return lambda rows, tokenizer: SFTTrainer(
            model=model, args=SFTConfig(**settings, **more), train_dataset=rows, processing_class=tokenizer
        )

    prepare = of_trl if way.startswith("trl") else ours
    memory, stored = Memory(), disk(root)
    began, used = time.monotonic(), processor_time()
    with contextlib.redirect_stdout(io.StringIO()), memory:
        prepare(way, root, workers, trainer)
    wall, cpu = time.monotonic() - began, processor_time() - used
    return {"wall": wall, "cpu": cpu, "memory": memory.grown, "disk": disk(root) - stored}


def of_trl(way: str, root: Path, workers: int, trainer: Callable[..., Any]) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    rows = load_dataset("json", data_files=str(root / f"{way.removeprefix('trl-')}.jsonl"), split="train")
    trainer(dataset_num_proc=workers)(rows, AutoTokenizer.from_pretrained(root / "base"))


def ours(way: str, root: Path, workers: int, trainer: Callable[..., Any]) -> None:
    import deepe_llm as llm
    from deepe_preparation import Preparation, remove_prepared
    from deepe_rows import CONVERSATION, TEXT, Wanted

    places = {"dataset_path": str(root / "messages.jsonl"), "model_path": str(root / "base"), "output_dir": str(root)}
    limits = {"max_seq_length": 1024, "max_input_length": 1024, "max_content_length": 1024, "max_samples": -1}
    split = {"eval_fraction": 0.0, "eval_samples": 0, "seed": 42}
    job = {"train_id": "benchmark", "seq": 1, "preprocessing_workers": workers}
    args = argparse.Namespace(**places, **limits, **split, **job)
    if way == "ours":
        remove_prepared(args)
    preparation = Preparation(args, Wanted(kinds=frozenset({CONVERSATION, TEXT})))
    tokenizer = llm.load_tokenizer(args.model_path, args)
    learned, _ = preparation.sequences(tokenizer)
    trainer(**llm.preparing_settings(args))(learned.dataset(), tokenizer)


def processor_time() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def disk(root: Path) -> float:
    """Return how much stands in a folder, in MiB."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) / 2**20


class Memory:
    """Watches the memory of this process and of those that it starts; what they share counts once.

    `grown` is the most that came on top, in MiB.
    """

    def __init__(self) -> None:
        self._before = self._most = self._now()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._watcher.start()

    def __exit__(self, *_ended: object) -> None:
        self._over.set()
        self._watcher.join()

    @property
    def grown(self) -> float:
        return self._most - self._before

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self._most = max(self._most, self._now())
        self._most = max(self._most, self._now())

    def _now(self) -> float:
        import psutil

        here = psutil.Process()
        return sum(map(own_memory, (here.pid, *(child.pid for child in here.children(recursive=True)))))


def own_memory(process: int) -> float:
    """Return the memory of a process without pages of files, in MiB."""
    try:
        with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Pss_Anon:")) / 1024
    except OSError:  # it has ended
        return 0.0


if __name__ == "__main__":
    if __package__:
        main()
    else:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
