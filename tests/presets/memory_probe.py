"""Measure what torch keeps for trainings of small models: for the activations, and at the peak of a training step.

    python memory_probe.py FOLDER-OF-THE-PRESETS BASE-MODEL OUTPUT

Runs in the stage's environment. Written is JSON: for each case its config.json, what of the step the forecast is told,
and the bytes that were measured.
"""

import importlib.util
import json
import os
import sys
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

torch.set_num_threads(1)
logging.set_verbosity_error()

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
WIDTHS = (
    {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
    {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
)
VOCABULARY = 6000


class Peak(TorchDispatchMode):  # type: ignore[misc]
    """The most bytes of storages that were made since it was entered and lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in tree_iter(result):
            if isinstance(one, torch.Tensor):
                self._add(one.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def config_of(family: str, **values: Any) -> Any:
    return CONFIG_MAPPING[family](**{"vocab_size": 300, "num_hidden_layers": 2, **values})


def lora(rank: int) -> Any:
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def kept(config: Any, *, tokens: int, rank: int | None, dtype: str, autocast: bool, attention: str) -> int:
    """Return the bytes of what a forward pass keeps for the backward pass, the weights apart."""
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    if rank is not None:
        model = get_peft_model(model, lora(rank))
    model.train()
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    found: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other gets its address
        return tensor

    whole = model.get_base_model() if rank is not None else model
    half = autocast or dtype != "float32"
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        whole.model(input_ids=torch.randint(0, 290, (1, tokens)), use_cache=False)
    return sum(size for size, _ in found.values())


def activations() -> list[dict[str, Any]]:
    """Measure each family at two widths and ranks, and the other ways of a step in one family."""
    ways: list[tuple[str, dict[str, int], dict[str, Any]]] = [
        (family, width, {"rank": rank, "dtype": "bfloat16"})
        for family in FAMILIES
        for width, rank in zip(WIDTHS, (16, 64), strict=True)
    ]
    for family in ("llama", "gemma3_text"):
        ways += [
            (family, WIDTHS[1], {"rank": 16, "dtype": "float32"}),
            (family, WIDTHS[1], {"rank": 16, "dtype": "float32", "autocast": True}),
            (family, WIDTHS[1], {"rank": None, "dtype": "float32", "autocast": True}),
            (family, WIDTHS[1], {"rank": None, "dtype": "float32"}),
            (family, WIDTHS[1], {"rank": 16, "dtype": "bfloat16", "attention": "eager"}),
        ]
    cases = []
    for family, width, way in ways:
        config = config_of(family, **width)
        step: dict[str, Any] = {"tokens": 256, "attention": "sdpa", "autocast": False} | way
        cases.append(
            {"name": family, "config": config.to_dict(), "step": {"rows": 1} | step, "bytes": kept(config, **step)}
        )
    return cases


# --- peaks of a step ------------------------------------------------------------------------------------------------


def peak_of(kind: str, base: str, *, tokens: int = 256, batch: int = 2) -> dict[str, Any]:
    """Return the peak of the first step of a TRL trainer, whose logits outweigh the rest."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    width = WIDTHS[0] | {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "eos_token_id": tokenizer.eos_token_id}
    config = config_of("qwen2", **width)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    half = tokens // 4  # the numbers below are two tokens each
    prompt, better, worse = "3 " * half, "8 " * half, "7 " * half
    shared: dict[str, Any] = {"max_length": tokens}
    pairs = [{"prompt": prompt, "chosen": better, "rejected": worse}] * batch
    match kind:
        case "sft":
            from trl import SFTConfig as Config
            from trl import SFTTrainer as Trainer

            ids = [5] * tokens
            rows: Any = [{"input_ids": ids, "labels": ids}] * batch
        case "dpo":
            from trl import DPOConfig as Config
            from trl import DPOTrainer as Trainer

            rows = pairs
        case "kto":
            from trl import KTOConfig as Config
            from trl import KTOTrainer as Trainer

            rows = [{"prompt": prompt, "completion": better, "label": bool(one % 2)} for one in range(batch)]
        case "orpo":
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Trainer

            rows = pairs
        case _:
            from trl import GRPOConfig as Config
            from trl import GRPOTrainer as Trainer

            rows = [{"prompt": prompt}] * batch
            shared = {"num_generations": 2, "max_completion_length": tokens // 2}
    if kind == "grpo":
        shared["reward_funcs_given"] = [lambda completions, **_: [float(len(one)) for one in completions]]
    rewards = {"reward_funcs": shared.pop("reward_funcs_given")} if kind == "grpo" else {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Config(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=True,
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            **shared,
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora(8),
            **rewards,
        )
        seen: dict[str, Any] = {}
        # what GRPO does before the loss makes answers; the pass that learns is what is measured
        name = "_compute_loss" if kind == "grpo" else "training_step"
        inner = getattr(trainer, name)

        def measured(model: Any, inputs: Any, *more: Any, **others: Any) -> Any:
            shapes = [
                tuple(value.shape)
                for key, value in inputs.items()
                if isinstance(value, torch.Tensor)
                and value.dim() == 2
                and key.endswith(("input_ids", "prompt_ids", "completion_ids"))
            ]
            with Peak() as peak:
                result = inner(model, inputs, *more, **others)
                if kind == "grpo":
                    result.backward()
            seen.update(peak=peak.peak, shapes=shapes)
            return result.detach() if kind == "grpo" else result

        setattr(trainer, name, measured)
        if kind == "grpo":
            trainer.accelerator.backward = lambda *_args, **_kwargs: None
        trainer.train()
    step = {"rank": 8, "dtype": "bfloat16", "head": "odds" if kind == "orpo" else "fused"}
    return {"name": kind, "config": config.to_dict(), "step": step, "bytes": seen["peak"], "shapes": seen["shapes"]}


def own_losses(presets: Path) -> list[dict[str, Any]]:
    """Measure the loss of a model itself, as Custom02 takes it, and the one of PPO-Demo."""
    cases = []
    rows, tokens, scored = 2, 256, 128
    config = config_of("qwen2", **WIDTHS[0] | {"num_hidden_layers": 1, "vocab_size": VOCABULARY})
    for autocast in (False, True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        ids = torch.randint(0, 290, (rows, tokens))
        with Peak() as peak, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=ids).loss.backward()
        step = {"rows": rows, "tokens": tokens, "rank": None, "autocast": autocast, "head": "cross-entropy"}
        cases.append({"name": "custom02", "config": config.to_dict(), "step": step, "bytes": peak.peak})
    for folder in (presets / "shared" / "helpers", presets / "ppo-demo"):
        sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("ppo_demo", presets / "ppo-demo" / "ppo-demo.py")
    assert spec is not None
    assert spec.loader is not None
    ppo = importlib.util.module_from_spec(spec)
    sys.modules["ppo_demo"] = ppo
    spec.loader.exec_module(ppo)
    for dtype in ("float32", "bfloat16"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)), lora(8))
        head = torch.nn.Linear(config.hidden_size, 1)
        learner = SimpleNamespace(policy=model, value_head=head, args=SimpleNamespace(temperature=1.0))
        ids = torch.randint(0, 290, (rows, tokens))
        with Peak() as peak:
            chosen, values, entropy = ppo.Learner._look_at_few(learner, ids, torch.ones_like(ids), scored)
            (chosen.exp().sum() + values.sum()).backward()
            del entropy
        step = {"rows": rows, "tokens": tokens, "rank": 8, "dtype": dtype, "head": "policy", "scored": scored}
        cases.append({"name": "ppo", "config": config.to_dict(), "step": step, "bytes": peak.peak})
    return cases


if __name__ == "__main__":
    presets, base, output = sys.argv[1:]
    peaks = [peak_of(kind, base) for kind in ("sft", "dpo", "kto", "orpo", "grpo")]
    long = peak_of("sft", base, tokens=6144, batch=1) | {"name": "sft beyond a tile"}
    found = {"activations": activations(), "peaks": [*peaks, long, *own_losses(Path(presets))]}
    Path(output).write_text(json.dumps(found))
