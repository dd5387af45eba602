"""The trainers of libraries on the rows of `benchmarks.trainers`, as their documentation does it: `NAME SETTINGS`.

Runs in the environments of the trainings.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32


def main() -> None:
    name, about = sys.argv[1], json.loads(sys.argv[2])
    rows = [json.loads(line) for line in Path(about["rows"]).read_text().splitlines()]
    {"sft": sft, "dpo": dpo, "grpo": grpo, "embedding": embedding, "mlx": mlx}[name](about, rows)


def settings(about: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": about["output"],
        "max_steps": about["steps"],
        "per_device_train_batch_size": about["batch"],
        "learning_rate": about["rate"],
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 42,
        "disable_tqdm": True,
    }


def lora(**more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **more)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def sft(about: dict[str, Any], rows: list[dict[str, str]]) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    given = [{"prompt": user(row["instruction"]), "completion": assistant(row["output"])} for row in rows]
    SFTTrainer(
        about["base"],
        args=SFTConfig(max_length=1024, activation_checkpointing=False, **settings(about)),
        train_dataset=Dataset.from_list(given),
        peft_config=lora(task_type="CAUSAL_LM"),
    ).train()


def dpo(about: dict[str, Any], rows: list[dict[str, str]]) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    given = [
        {
            "prompt": user(row["prompt"]),
            "chosen": assistant(row["chosen"]),
            "rejected": assistant(row["rejected"]),
        }
        for row in rows
    ]
    DPOTrainer(
        about["base"],
        args=DPOConfig(max_length=2048, activation_checkpointing=False, **settings(about)),
        train_dataset=Dataset.from_list(given),
        peft_config=lora(task_type="CAUSAL_LM"),
    ).train()


def grpo(about: dict[str, Any], rows: list[dict[str, str]]) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        return [float(text[-1]["content"].endswith(one)) for text, one in zip(completions, answer, strict=True)]

    def formed(completions: list[Any], **_: Any) -> list[float]:
        return [float("####" in text[-1]["content"]) for text in completions]

    GRPOTrainer(
        about["base"],
        reward_funcs=[right, formed],
        args=GRPOConfig(
            num_generations=8,
            max_completion_length=16,
            temperature=1.0,
            beta=0.0,
            loss_type="dapo",
            mask_truncated_completions=True,
            activation_checkpointing=False,
            **settings(about),
        ),
        train_dataset=Dataset.from_list([{"prompt": user(row["question"]), "answer": row["answer"]} for row in rows]),
        peft_config=lora(task_type="CAUSAL_LM"),
    ).train()


def embedding(about: dict[str, Any], rows: list[dict[str, str]]) -> None:
    from datasets import Dataset

    warnings.simplefilter("ignore")  # of names that releases change
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
        models,
    )

    words = models.Transformer(about["base"], max_seq_length=64)
    model = SentenceTransformer(modules=[words, models.Pooling(words.get_word_embedding_dimension())], device="cpu")
    model.add_adapter(lora(task_type="FEATURE_EXTRACTION"))
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**settings(about)),
        train_dataset=Dataset.from_list([{"anchor": row["anchor"], "positive": row["positive"]} for row in rows]),
        loss=losses.MultipleNegativesRankingLoss(model),
    ).train()


def mlx(about: dict[str, Any], rows: list[dict[str, str]]) -> None:
    from types import SimpleNamespace

    from mlx_lm import lora as tuning

    folder = Path(about["output"]) / "data"
    folder.mkdir()
    lines = [json.dumps({"messages": [*user(row["instruction"]), *assistant(row["output"])]}) + "\n" for row in rows]
    for part in ("train", "valid"):
        (folder / f"{part}.jsonl").write_text("".join(lines if part == "train" else lines[:8]))
    own = {
        "model": about["base"],
        "train": True,
        "data": str(folder),
        "iters": about["steps"],
        "batch_size": about["batch"],
        "learning_rate": about["rate"],
        "num_layers": -1,
        "steps_per_report": 1,
        "steps_per_eval": 1_000_000,
        "val_batches": 0,
        "save_every": 1_000_000,
        "adapter_path": str(folder / "adapter"),
        "mask_prompt": True,
        "lora_parameters": {"rank": RANK, "scale": 2.0, "dropout": 0.0},
        "optimizer": "adamw",
        "seed": 42,
    }
    tuning.run(SimpleNamespace(**tuning.CONFIG_DEFAULTS | own))


if __name__ == "__main__":
    main()
