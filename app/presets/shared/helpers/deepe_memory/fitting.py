"""Decide whether a training fits into the memory, and what to change if it does not."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .base import Base
from .forecast import Head, Step, forecast, in_words

CERTAIN = 1.15
"""A training is refused if its tensors need more than this multiple of the free memory: less may be an error."""
KEPT_BELOW = 0.9
"""Share of the free memory up to which `gradient_checkpointing=auto` keeps the activations."""
LARGE = 4 * 2**30
"""Weights of more bytes than this are compared with the main memory where there is no GPU."""


def step_of(
    method: str,
    values: Mapping[str, Any],
    *,
    device: str,
    dtype: str | None = None,
    tokens: int | None = None,
    processes: int = 1,
) -> Step:
    """Return the steps that a script makes of its parameters, activations kept unless they say otherwise.

    `dtype` is needed where the script has decided on it; `tokens` are those of the longest sequence, if known.
    `processes` share the model by `distributed_strategy`.
    """
    strategy = values.get("distributed_strategy")
    cuda = device == "cuda"
    batch = int(values["batch_size"])
    kind = str(values.get("finetuning_type") or "lora")
    whole = method == "full" or kind != "lora"
    in_float = whole or method in ("embedding", "reranking")
    compares = values.get("objective") != "orpo" if method == "preferences" else bool(values.get("kl_coef"))
    given = dtype or str(values.get("dtype", "auto"))
    match method:
        case "preferences":
            head = Head.ODDS if values.get("objective") == "orpo" else Head.FUSED
            rows = batch if values.get("objective") == "kto" else 2 * batch
        case "reranking":  # query and document are one sequence; with most losses all documents of a query are kept
            documents = 1 if values.get("loss") == "binary_cross_entropy" else 1 + int(values.get("num_negatives") or 4)
            head, rows = Head.NONE, batch * documents
        case "reward":
            head, rows = Head.NONE, 2 * batch
        case "embedding":  # the anchors and the texts that they are compared with, or a part of them
            head, rows = Head.NONE, min(2 * batch, int(values.get("chunk_size") or 2 * batch))
        case _:
            head = {"ppo": Head.POLICY, "full": Head.CROSS_ENTROPY}.get(method, Head.FUSED)
            rows = batch
    return Step(
        rows=rows,
        tokens=tokens or longest_allowed(values),
        head=head,
        scored=int(values["max_content_length"]) + 1 if method == "ppo" else None,
        rank=None if whole else int(values.get("lora_rank") or 16),
        trained_layers=int(values.get("freeze_trainable_layers") or 2) if kind == "freeze" else None,
        reference=kind != "lora" and compares,
        adapter=str(values.get("adapter") or "lora"),
        dropout=bool(values.get("lora_dropout")),
        dtype="float32" if in_float else given if given != "auto" else "bfloat16" if cuda else "float32",
        autocast=in_float and cuda,
        device=device,
        optimizer=str(values.get("optimizer") or "adamw_torch"),
        four_bit=bool(values.get("load_in_4bit")),
        attention="eager" if values.get("attention") == "eager" else "sdpa",
        checkpointing=values.get("gradient_checkpointing") == "true",
        weights_among=processes if strategy in ("fsdp2", "zero3") else 1,
        states_among=processes if strategy in ("fsdp2", "zero2", "zero3") else 1,
    )


def longest_allowed(values: Mapping[str, Any]) -> int:
    """Return how many tokens a sequence may have."""
    if values.get("max_seq_length"):
        return int(values["max_seq_length"])
    return int(values["max_input_length"]) + int(values["max_content_length"])


def recomputes(base: Base, step: Step, asked: str, free: float) -> bool:
    """Return whether activations are recomputed; `asked` is "true", "false" or "auto"."""
    if asked != "auto":
        return asked == "true"
    return step.device == "cuda" and forecast(base, step).total > KEPT_BELOW * free


def fitting_batch(base: Base, step: Step, batch: int, free: float, *, least: int = 1) -> int:
    """Return the largest batch size up to `batch` whose steps fit. 0: none of at least `least` does."""
    each = step.rows / batch
    sizes = range(batch, least - 1, -1)
    return next((one for one in sizes if _fits(base, replace(step, rows=math.ceil(each * one)), free)), 0)


def same_step(batch: int, accumulation: int, most: int, *, least: int = 1) -> tuple[int, int] | None:
    """Return batch size and accumulation with the rows of a step unchanged, the batch size `least` to `most`."""
    rows = batch * accumulation
    smaller = next((size for size in range(most, least - 1, -1) if rows % size == 0), None)
    return None if smaller is None else (smaller, rows // smaller)


def refusal(base: Base, step: Step, values: Mapping[str, Any], free: float) -> str | None:
    """Return why a training cannot fit, and the cure. None: it fits, or it may."""
    memory = forecast(base, step)
    if memory.peak <= CERTAIN * free:
        return None
    needs = f"the training needs about {memory.sentence()}, and {in_words(free)} are free: "
    changes = cure(base, step, values, free)
    if changes is None:
        lean = " and gradient_checkpointing" if "gradient_checkpointing" in values else ""
        shorter = f"shorten the rows (the longest has {step.tokens} tokens)"
        return f"{needs}it does not fit with batch_size 1{lean} either; {shorter}, or take a smaller base model"
    cured = " and ".join(f"{name} to {str(value).lower()}" for name, value in changes.items())
    return f"{needs}set {cured}{'' if 'load_in_4bit' in changes else ', which learns the same'}"


def cure(base: Base, step: Step, values: Mapping[str, Any], free: float) -> dict[str, Any] | None:
    """Return parameters with which the training fits, as few as possible. Empty: it fits. None: nothing helps.

    What learns the same comes first: recomputing, then a smaller batch with more passes in a step, then 4 bits.
    """
    batch = int(values["batch_size"])
    lean, changes = step, dict[str, Any]()
    if _fits(base, step, free):
        return changes
    if "gradient_checkpointing" in values and not step.checkpointing:
        lean, changes = replace(step, checkpointing=True), {"gradient_checkpointing": "true"}
    ways = [(lean, changes)]
    if step.device == "cuda" and "load_in_4bit" in values and not step.four_bit and step.rank is not None:
        ways.append((replace(lean, four_bit=True), changes | {"load_in_4bit": True}))
    least = 2 if values.get("objective") == "kto" else 1  # the rows of a batch are compared
    for way, changed in ways:
        most = fitting_batch(base, way, batch, free, least=least)
        smaller = {} if most == batch else _smaller(step, values, batch, most, least)
        if most and smaller is not None:
            return changed | smaller
    return None


def _fits(base: Base, step: Step, free: float) -> bool:
    return forecast(base, step).total <= free


def _smaller(step: Step, values: Mapping[str, Any], batch: int, most: int, least: int) -> dict[str, Any] | None:
    if "chunk_size" in values:  # a smaller batch has fewer wrong texts to tell apart
        return {"chunk_size": max(1, step.rows * most // batch)}
    same = same_step(batch, int(values.get("grad_accum_steps") or 1), most, least=least)
    return None if same is None else {"batch_size": same[0], "grad_accum_steps": same[1]}


def free_main_memory() -> float:
    """Return the bytes of main memory that are free, for the container if it has a limit. Infinite: unknown."""
    found = [math.inf]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text("ascii").strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text("ascii")))
    except (OSError, ValueError):
        pass
    return min(found)
