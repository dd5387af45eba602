"""What only a GPU shows of the shipped trainings: eight checks, one after the other, in ten minutes at most.

    /path/to/envs/trl/bin/python benchmarks/gpu.py --folder /tmp/gpu           # on a machine with an NVIDIA GPU
    /path/to/envs/trl/bin/python benchmarks/gpu.py --folder /tmp/gpu --cpu     # the same with tiny models

It runs with the interpreter of the stages' environment and needs no service and no network: base models have random
weights, in the proportions of Qwen2.5. Each check is a process of its own with a time limit, so that one that fails or
hangs costs its own result only; the most telling come first, as those for which no time is left are left out. What was
found is printed as it comes, kept in `gpu.json` after every check, and printed as one table at the end, however that
comes.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).resolve().parent.parent / "app" / "presets"
HELPERS = PRESETS / "shared" / "helpers"
LIMIT = 540  # seconds of all checks together
PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "torchvision", "bitsandbytes", "flash-attn", "kernels"),
    *("liger-kernel", "deepspeed", "vllm"),
)
Row = dict[str, Any]


# --- what the checks work with ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Proportions of a base model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_values: int
    vocabulary: int = 151_936


@dataclass(frozen=True)
class Machine:
    """Where the checks run, and how large what they run may be."""

    folder: Path
    cpu: bool

    @property
    def small(self) -> Shape:
        """Return the shape of Qwen2.5-0.5B, or a tiny one."""
        return Shape(64, 176, 2, 4, 2, 512) if self.cpu else Shape(896, 4864, 24, 14, 2)

    @property
    def wide(self) -> Shape:
        """Return the width of Qwen2.5-7B in few layers, or a tiny one."""
        return Shape(128, 640, 2, 4, 2, 512) if self.cpu else Shape(3584, 18944, 4, 28, 4)

    def tokens(self, count: int) -> int:
        return min(count, 64) if self.cpu else count

    def base(self, name: str, shape: Shape) -> Path:
        """Return the folder of a base model with random weights; it is made once."""
        folder = self.folder / name
        if (folder / "done").exists():
            return folder
        import tiny_base
        import torch
        from transformers import AutoModelForCausalLM, Qwen2Config

        tokenizer = tiny_base.build_tokenizer(tiny_base.sums(["plain"]))
        config = Qwen2Config(
            vocab_size=max(shape.vocabulary, len(tokenizer)),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_values,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        device = "cpu" if self.cpu else "cuda"
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if self.cpu else torch.bfloat16)
        tiny_base.save(model, tokenizer, folder)
        (folder / "done").touch()
        return folder

    def rows(self, name: str, count: int, tokens: int, *, pairs: bool = False) -> Path:
        """Write rows whose answers have about so many tokens."""
        file = self.folder / f"{name}.jsonl"
        digits = "7 " * (tokens // 2)
        with file.open("w") as out:
            for number in range(count):
                answer = {"chosen": digits, "rejected": digits + str(number)} if pairs else {"completion": digits}
                out.write(json.dumps({"prompt": f"What is {number} + 1?", **answer}) + "\n")
        return file


@dataclass(frozen=True)
class Run:
    """What a script's process left."""

    code: int
    seconds: float
    events: list[Row]
    said: str

    def values(self, name: str) -> list[float]:
        found = (event["values"] for event in self.events if event["type"] == "metrics")
        return [float(values[name]) for values in found if values.get(name) is not None]

    @property
    def reason(self) -> str:
        """Return the last line that says what is wrong."""
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""

    def row(self, what: str, **more: Any) -> Row:
        """Return what a training is judged by."""
        if self.code != 0:
            outcome = "missing" if "needs the package" in self.reason else "failed"
            return {"what": what, "outcome": outcome, "why": self.reason, **more}
        loss, speed, peak = (self.values(name) for name in ("loss", "tokens_per_second", "memory_peak_mib"))
        expected = self.values("memory_expected_mib")
        found: Row = {"what": what, "outcome": "ok", "seconds": round(self.seconds, 1), "steps": len(loss)}
        if loss:
            found |= {"first loss": round(loss[0], 5), "last loss": round(loss[-1], 5)}
        if speed:
            found["tokens/s"] = round(max(speed))
        if peak:
            found["peak MiB"] = round(max(peak))
        if expected:
            found["expected MiB"] = round(expected[-1])
            found["peak/expected"] = round(max(peak) / expected[-1], 2)
        return found | more


def script(machine: Machine, name: str, *arguments: str, stop_at: str | None = None) -> Run:
    """Run a shipped script as the platform does; `stop_at`: the line after which it is asked to stop."""
    home = machine.folder / "home"
    for part in ("scripts", "logs"):
        (home / part).mkdir(parents=True, exist_ok=True)
    events = machine.folder / "events.jsonl"
    events.unlink(missing_ok=True)
    (path,) = [*PRESETS.glob(f"*/{name}")]
    environment = os.environ | {
        "PYTHONPATH": str(HELPERS),
        "DEEPE_EVENTS": str(events),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **({"OMP_NUM_THREADS": "1"} if machine.cpu else {}),
    }
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-u", str(path), *arguments],
        cwd=home / "scripts",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            if not line.startswith("[log_data]") and "Write Error" not in line:
                lines.append(line)
            if stop_at is not None and line.startswith(stop_at):
                process.send_signal(signal.SIGTERM)
    read = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return Run(process.returncode, time.monotonic() - began, read, "".join(lines))


def folders(machine: Machine, base: Path, rows: Path, output: str, *, keep: bool = False) -> list[str]:
    if not keep:
        shutil.rmtree(machine.folder / output, ignore_errors=True)
    return [f"--model_path={base}", f"--dataset_path={rows}", f"--output_dir={machine.folder / output}"]


SHORT = ("--eval_fraction=0", "--logging_steps=1", "--save_steps=1000", "--seed=3")


def lengths(tokens: int) -> tuple[str, ...]:
    """Return limits that rows of so many tokens keep to, for the scripts that limit the parts of a row."""
    return (f"--max_input_length={tokens + 128}", f"--max_content_length={tokens + 128}")


def there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# --- the checks ------------------------------------------------------------------------------------------------------


def memory(machine: Machine) -> Iterator[Row]:
    """The environment imports; peak of the memory beside its forecast, at the width of a 7B model."""
    import torch

    found = {name: version(name) for name in PACKAGES}
    device = "cpu" if machine.cpu else torch.cuda.get_device_name()
    yield {"what": "environment", "outcome": "ok", "device": device, **{k: v for k, v in found.items() if v}}
    tokens = machine.tokens(2048)
    base, rows = machine.base("wide", machine.wide), machine.rows("long", 16, tokens)
    for recompute in ("false", "true", "auto"):
        more = (f"--max_seq_length={2 * tokens}", *lengths(tokens), "--batch_size=2", "--max_steps=3", *SHORT)
        run = script(
            machine, "sft-demo.py", *folders(machine, base, rows, "o1"), *more, f"--gradient_checkpointing={recompute}"
        )
        yield run.row(f"LoRA, 2 x {tokens}, gradient_checkpointing={recompute}")


def packing(machine: Machine) -> Iterator[Row]:
    """Rows packed and padded: tokens a second, memory, and the first loss."""
    base = machine.base("small", machine.small)
    attentions = ["sdpa"] + ["flash_attention_2"] * (there("flash_attn") and not machine.cpu)
    for width in dict.fromkeys(map(machine.tokens, (1024, 4096))):
        rows = machine.rows(f"packed-{width}", 64, width // 4)
        for attention in attentions:
            for packed in ("false", "true")[attention != "sdpa" :]:  # padded, both are the same work
                more = (f"--max_seq_length={width}", *lengths(width), "--batch_size=8", "--max_steps=4", *SHORT)
                ways = (f"--packing={packed}", f"--attention={attention}")
                run = script(machine, "sft-demo.py", *folders(machine, base, rows, "o2"), *more, *ways)
                yield run.row(f"8 x {width}, {attention}, packing={packed}")


def four_bits(machine: Machine) -> Iterator[Row]:
    """QLoRA: train, stop, resume, save as a complete model, and compare with the adapter on the whole base."""
    tokens = machine.tokens(512)
    base, rows = machine.base("small", machine.small), machine.rows("four", 64, tokens // 2)
    asked = (f"--max_seq_length={2 * tokens}", *lengths(tokens), "--batch_size=4", "--max_steps=6", *SHORT)
    plain = [*folders(machine, base, rows, "o3"), *asked, "--save_steps=3", "--load_in_4bit=true"]
    whole = script(machine, "sft-demo.py", *plain)
    yield whole.row("nf4, 6 steps")
    if whole.code != 0:
        return
    stopped = script(machine, "sft-demo.py", *[*folders(machine, base, rows, "o3r"), *plain[3:]], stop_at="step 3/")
    resumed = script(machine, "sft-demo.py", *[*folders(machine, base, rows, "o3r", keep=True), *plain[3:]])
    yield resumed.row("nf4, stopped and resumed", stopped=stopped.code, gap=gap(whole, resumed))
    yield merged(machine, base, machine.folder / "o3")


def merged(machine: Machine, base: Path, adapter: Path) -> Row:
    """Save the adapter as a complete model, and compare its answers with the adapter on the base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    complete = machine.folder / "complete"
    shutil.rmtree(complete, ignore_errors=True)
    dtype = "float32" if machine.cpu else "bfloat16"
    environment = os.environ | {"PYTHONPATH": str(HELPERS), "HF_HUB_OFFLINE": "1"}
    words = [f"--base_path={base}", f"--adapter_path={adapter}", f"--save_path={complete}", f"--dtype_str={dtype}"]
    saved = subprocess.run(
        [sys.executable, str(PRESETS / "shared" / "save_model.py"), *words],
        cwd=machine.folder / "home" / "scripts",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if saved.returncode != 0:
        return {"what": "merged", "outcome": "failed", "why": saved.stderr.strip().splitlines()[-1][:200]}
    device = "cpu" if machine.cpu else "cuda"
    tokens = torch.arange(5, 37, device=device)[None]
    with torch.no_grad():
        load = {"dtype": getattr(torch, dtype), "device_map": device}
        one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **load), adapter)(tokens).logits
        two = AutoModelForCausalLM.from_pretrained(complete, **load)(tokens).logits
    away = ((one - two).float().norm() / one.float().norm()).item()
    return {"what": "merged model beside adapter", "outcome": "ok", "relative gap of logits": round(away, 6)}


def resuming(machine: Machine) -> Iterator[Row]:
    """A training that is stopped and resumed beside one that is not; the optimizers."""
    tokens = machine.tokens(512)
    base, rows = machine.base("small", machine.small), machine.rows("resume", 64, tokens // 2)
    optimizers = ["adamw_torch_fused", "adamw_torch"] + ["paged_adamw_8bit"] * there("bitsandbytes")
    for optimizer in optimizers[: 1 if machine.cpu else None]:
        asked = (f"--max_seq_length={2 * tokens}", *lengths(tokens), "--batch_size=4", "--max_steps=6", *SHORT)
        asked += (f"--optimizer={optimizer}", "--save_steps=3")
        whole = script(machine, "sft-demo.py", *folders(machine, base, rows, "o4"), *asked)
        yield whole.row(f"{optimizer}, 6 steps")
        if optimizer == "adamw_torch":  # it resumes as the fused one does
            continue
        stopped = script(machine, "sft-demo.py", *folders(machine, base, rows, "o4r"), *asked, stop_at="step 3/")
        resumed = script(machine, "sft-demo.py", *folders(machine, base, rows, "o4r", keep=True), *asked)
        yield resumed.row(f"{optimizer}, stopped and resumed", stopped=stopped.code, gap=gap(whole, resumed))


def gap(whole: Run, resumed: Run) -> float | None:
    """Return the largest difference of the losses that two runs have in common, at their ends."""
    one, two = whole.values("loss"), resumed.values("loss")
    count = min(len(one), len(two))
    return max(abs(a - b) for a, b in zip(one[-count:], two[-count:], strict=True)) if count else None


def answering(machine: Machine) -> Iterator[Row]:
    """GRPO: completions a second by the ways that are there."""
    base = machine.base("small", machine.small)
    rows = machine.folder / "questions.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"What is {n} + 2?", "answer": str(n + 2)}) + "\n" for n in range(64))
    )
    length = 16 if machine.cpu else 256
    batch, count = (8, 4) if machine.cpu else (64, 8)
    asked = (f"--batch_size={batch}", f"--num_generations={count}", f"--max_content_length={length}", "--max_steps=3")
    ways: list[tuple[str, tuple[str, ...]]] = [("generate", ("--vllm=false",))]
    if not machine.cpu:
        ways.append(("continuous batching", ("--vllm=false", "--use_transformers_continuous_batching=true")))
        ways += [("vLLM, colocated", ("--vllm=true",))] * there("vllm")
    for name, more in ways:
        run = script(machine, "grpo-demo.py", *folders(machine, base, rows, "o5"), *asked, *SHORT, *more)
        times = [event["time"] for event in run.events if event["type"] == "metrics"]
        speed = round(batch * (len(times) - 1) / (times[-1] - times[0]), 2) if len(times) > 1 else None
        yield run.row(f"GRPO by {name}", **({"completions/s": speed} if speed else {}))


def pictures(machine: Machine) -> Iterator[Row]:
    """torchvision, and a model that sees."""
    yield {
        "what": "torchvision",
        "outcome": "ok" if there("torchvision") else "missing",
        "version": version("torchvision"),
    }
    sys.path[:0] = [str(PRESETS.parent.parent), str(PRESETS / "vl-demo")]
    import tiny_vl

    from app.presets import sample_data

    base, rows = machine.folder / "tiny-vl", machine.folder / "pictures"
    processor = tiny_vl.build_processor()
    tiny_vl.save(tiny_vl.build_model(processor.tokenizer, 64, 0), processor, base)
    shutil.rmtree(rows, ignore_errors=True)
    sample_data.write_with_pictures(PRESETS / "vl-demo" / "vl-demo.jsonl", rows)
    asked = ("--batch_size=4", "--max_steps=3", "--max_samples=32", *SHORT)
    yield script(machine, "vl-demo.py", *folders(machine, base, rows, "o6"), *asked).row("VL-Demo, 3 steps")


def preferences(machine: Machine) -> Iterator[Row]:
    """DPO at a vocabulary of 151,936: memory of the logits, and with the reference calculated before."""
    tokens = machine.tokens(2048)
    base, rows = machine.base("small", machine.small), machine.rows("pairs", 24, tokens - 64, pairs=True)
    rows_at_once = 2 if machine.cpu else 8
    asked = (*lengths(tokens), f"--batch_size={rows_at_once}", "--max_steps=2", *SHORT)
    for before in ("false", "true"):
        more = (f"--precompute_ref_log_probs={before}",)
        run = script(machine, "dpo-demo.py", *folders(machine, base, rows, "o7"), *asked, *more)
        yield run.row(f"DPO, {rows_at_once} x {tokens}, precompute_ref_log_probs={before}")


def others(machine: Machine) -> Iterator[Row]:
    """Custom02 and Embedding-Demo; a batch in chunks learns what a whole one does."""
    tokens = machine.tokens(512)
    base, rows = machine.base("small", machine.small), machine.rows("custom", 64, tokens // 2)
    paths = [f"--base_path={base}", f"--dataset_path={rows}", f"--save_path={machine.folder / 'o8'}"]
    paths += [f"--output_dir={machine.folder / 'o8c'}", "--input_train_name=prompt", "--output_train_name=completion"]
    asked = (
        f"--max_seq_length={2 * tokens}",
        "--batch_size=4",
        "--max_steps=3",
        "--logging_steps=1",
        "--eval_fraction=0",
    )
    yield script(machine, "custom02.py", *paths, *asked).row("Custom02, 3 steps")
    texts = machine.folder / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"anchor": f"{n} + 1", "positive": f"{n + 1} in all"}) + "\n" for n in range(64))
    )
    runs = {}
    for size in (0, 4):
        more = ("--batch_size=16", "--max_steps=3", f"--chunk_size={size}", "--learning_rate=0.0001", *SHORT)
        runs[size] = script(machine, "embedding-demo.py", *folders(machine, base, texts, f"o8-{size}"), *more)
        yield runs[size].row(f"Embedding-Demo, chunk_size={size}", gap=gap(runs[0], runs[size]))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


CHECKS: Mapping[str, tuple[Callable[[Machine], Iterator[Row]], int]] = {
    "memory": (memory, 110),
    "packing": (packing, 110),
    "four-bits": (four_bits, 100),
    "resuming": (resuming, 100),
    "preferences": (preferences, 60),
    "others": (others, 60),
    "pictures": (pictures, 40),
    "answering": (answering, 100),
}
"""Name → the check, and the seconds that it may take; it needs about two thirds of them, most for imports."""

HEADS = ("check", "what", "outcome")


# --- one after the other ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where base models, rows and results lie")
    parser.add_argument("--cpu", action="store_true", help="tiny models, no GPU")
    parser.add_argument("--results", type=Path, help="file for what was found; default: gpu.json in the folder")
    parser.add_argument("--only", nargs="*", choices=CHECKS, default=list(CHECKS), help="checks to run")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of all checks together")
    parser.add_argument("--slower", type=float, default=1.0, help="multiply the limits of the checks")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.check:
        sys.path += [str(PRESETS / "shared"), str(HELPERS)]
        for row in CHECKS[args.check][0](Machine(args.folder, args.cpu)):
            print(json.dumps(row), flush=True)
        return
    results = args.results or args.folder / "gpu.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before its time"))
    end, found = time.monotonic() + args.limit, []
    try:
        for name in args.only:
            began, worked = time.monotonic(), processor_time()
            found += checked(name, args, min(CHECKS[name][1] * args.slower, end - began))
            took = {"seconds": round(time.monotonic() - began, 1), "processor": round(processor_time() - worked, 1)}
            found.append({"check": name, "what": "all of it", "outcome": "", **took})
            results.write_text(json.dumps(found, indent=1) + "\n")
            print_lines([row for row in found if row["check"] == name])
    finally:
        failed = sum(row["outcome"] == "failed" for row in found)
        print(f"\n{len(found)} results, {failed} failed: {results}\n")
        print_table(found)


def processor_time() -> float:
    """Return the processor time of all processes that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def checked(name: str, args: argparse.Namespace, seconds: float) -> list[Row]:
    """Run a check in a process group of its own, which is ended with everything in it when its time is over."""
    if seconds <= 0:
        return [{"check": name, "what": name, "outcome": "skipped", "why": "no time is left"}]
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(args.folder),
        "--check",
        name,
        *(["--cpu"] if args.cpu else []),
    ]
    out, err = args.folder / f"{name}.out", args.folder / f"{name}.err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    rows = [{"check": name, **json.loads(line)} for line in out.read_text().splitlines() if line.startswith("{")]
    if code != 0:
        lines = err.read_text().strip().splitlines() or ["it said nothing"]
        why = f"not done after {seconds:.0f} s" if code is None else lines[-1][:200]
        rows.append({"check": name, "what": name, "outcome": "failed", "why": why})
    return rows


def print_lines(rows: list[Row]) -> None:
    for row in rows:
        more = "  ".join(f"{key} {value}" for key, value in row.items() if key not in HEADS)
        print(f"{row['check']:12} {row['what']:48} {row['outcome']:8} {more}", flush=True)


def print_table(rows: list[Row]) -> None:
    """Print all results in the form of a page's table."""
    print(f"| {' | '.join(HEADS)} | |\n|{'---|' * (len(HEADS) + 1)}")
    for row in rows:
        more = ", ".join(f"{key} {value}" for key, value in row.items() if key not in HEADS)
        print("| " + " | ".join(str(cell).replace("|", "/") for cell in (*(row[head] for head in HEADS), more)) + " |")


if __name__ == "__main__":
    main()
