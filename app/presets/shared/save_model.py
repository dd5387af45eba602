"""Saving: merge an adapter into its base model and write a complete model that needs neither.

    python app/presets/shared/save_model.py --base_path tiny-base --adapter_path sft-out --save_path sft-complete \
        --dtype_str float32

The base is loaded in full precision, also when the training ran in 4 bits: merging into quantized weights loses what
was learned. The last line on stdout is the result, `{"status": "success", "message", "dtype_used", "model_type"}`.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
import deepe_loading as loading
from deepe_adapter_kinds import KINDS
from deepe_chat import stop_at_turn_ends
from deepe_log import log
from deepe_rows import Refused
from deepe_tokens import grow_for

SMALL_BYTES = 8 * 2**30  # a base model up to this size is merged in float32 and rounded once, at the end
UNMERGED = [name for name, kind in KINDS.items() if not kind.merges]
DTYPES = ("float16", "float32", "bfloat16")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Merge an adapter into its base model.", allow_abbrev=False)
    parser.add_argument("--train_id", default="manual", help="id of the job, for the log")
    parser.add_argument("--seq", default="1", help="number of the step in the job, for the log")
    parser.add_argument("--base_path", required=True, help="folder of the base model")
    parser.add_argument("--adapter_path", required=True, help="folder that the training wrote")
    parser.add_argument("--save_path", required=True, help="folder for the complete model")
    parser.add_argument(
        "--dtype_str", default="bfloat16", help="float16, float32 or bfloat16; anything else means bfloat16"
    )
    parser.add_argument(
        "--model_usage_type",
        default="chat",
        choices=["chat", "vision-language", "embedding"],
        help="kind of the model",
    )
    parser.add_argument("--max_shard_size", default="10GB", help="largest file of weights")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    log("SaveModelTaskStarts", args.save_path, args)
    try:
        check(args)
        merged = merge(args)
    except Exception as error:
        reason = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        log("SaveModelTaskFailed", reason, args, level="ERROR")
        deepe.result("failed", message=reason)
        if isinstance(error, Refused):
            sys.exit(1)
        raise
    log("SaveModelTaskSuccess", args.save_path, args)
    deepe.artifact(args.save_path, "model")
    deepe.result(message=f"the model is complete in {args.save_path}", **merged)


def check(args: argparse.Namespace) -> None:
    if not (Path(args.base_path) / "config.json").is_file():
        raise Refused(f"there is no config.json in {args.base_path}")
    if not is_adapter(args) and not (Path(args.adapter_path) / "config.json").is_file():
        raise Refused(f"there is no adapter_config.json in {args.adapter_path}, and no config.json of a whole model")
    if Path(args.save_path).resolve() in (Path(args.base_path).resolve(), Path(args.adapter_path).resolve()):
        raise Refused("save_path must be another folder than base_path and adapter_path")


def is_adapter(args: argparse.Namespace) -> bool:
    """Say whether the customized model is an adapter; else it is a whole model, by a full fine-tuning."""
    return (Path(args.adapter_path) / "adapter_config.json").is_file()


def merge(args: argparse.Namespace) -> dict[str, str]:
    """Merge, write, and put in place when all is written."""
    import torch

    dtype = args.dtype_str if args.dtype_str in DTYPES else "bfloat16"
    model = with_merged_adapter(args, dtype) if is_adapter(args) else whole(args)
    model = model.to(getattr(torch, dtype))

    draft = Path(args.save_path).with_name(f".{Path(args.save_path).name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    save_processor(args, model, draft)
    model.save_pretrained(draft, max_shard_size=args.max_shard_size)
    for weights in draft.glob("*.safetensors"):
        weights.chmod(0o644)  # written as 0600, whatever the umask says
    publish(draft, Path(args.save_path))
    log("MergeSuccess", args.save_path, args)
    return {"dtype_used": dtype, "model_type": str(model.config.model_type)}


def whole(args: argparse.Namespace) -> Any:
    """Return the weights of a full fine-tuning, which need no base."""
    import torch

    log("MergeLoadingBaseModel", args.adapter_path, args)
    return load(args, args.adapter_path, torch.float32)


def with_merged_adapter(args: argparse.Namespace, dtype: str) -> Any:
    """Return the base model with the adapter merged into it."""
    import torch
    from peft import PeftModel

    log("MergeLoadingBaseModel", args.base_path, args)
    size = sum(file.stat().st_size for file in Path(args.base_path).glob("*.safetensors"))
    precision = torch.float32 if size <= SMALL_BYTES else getattr(torch, dtype)
    loading.weights(args.adapter_path)  # PEFT would load pickles as well
    base = load(args, args.base_path, precision)
    log("MergeAdapters", f"{args.base_path}, {args.adapter_path}", args)
    grow_for(base, Path(args.adapter_path))
    adapted = PeftModel.from_pretrained(base, args.adapter_path)
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = adapted.peft_config[adapted.active_adapter].peft_type.value.lower()
        if hasattr(adapted, "merge_and_unload") and kind not in UNMERGED:
            raise
        raise Refused(
            f"an adapter of the kind {kind} cannot be merged; use the customized model, base and adapter"
        ) from error


def load(args: argparse.Namespace, folder: str, precision: Any) -> Any:
    """Return the weights in a folder as a model of the kind that was trained."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    if gives_numbers(args):
        from deepe_reward_model import classifier
        from transformers import AutoTokenizer

        return classifier(
            folder, AutoTokenizer.from_pretrained(args.adapter_path, **loading.code(folder)), dtype=precision
        )
    classes = {"vision-language": AutoModelForImageTextToText, "embedding": AutoModel}
    return classes.get(args.model_usage_type, AutoModelForCausalLM).from_pretrained(
        folder, dtype=precision, **loading.weights(folder)
    )


def gives_numbers(args: argparse.Namespace) -> bool:
    """Say whether a classifier was trained, such as a reward model, whatever kind of model its base is."""
    folder = Path(args.adapter_path)
    config = json.loads((folder / ("adapter_config.json" if is_adapter(args) else "config.json")).read_text("utf-8"))
    kinds = config.get("architectures") or [""]
    return config.get("task_type") == "SEQ_CLS" or kinds[0].endswith("ForSequenceClassification")


def save_processor(args: argparse.Namespace, model: Any, target: Path) -> None:
    """Take the tokenizer from the adapter: it has the chat format of the training. Else the base model's.

    The model's answers end where the chat format says.
    """
    from transformers import AutoProcessor, AutoTokenizer

    processor = None
    source = args.adapter_path if (Path(args.adapter_path) / "tokenizer_config.json").is_file() else args.base_path
    if args.model_usage_type == "vision-language":
        processor = AutoProcessor.from_pretrained(source, **loading.code(source))
        processor.save_pretrained(target)
        size_of_pictures = Path(args.adapter_path) / "deepe-pictures.json"
        if size_of_pictures.is_file():
            shutil.copyfile(size_of_pictures, target / size_of_pictures.name)
    tokenizer = AutoTokenizer.from_pretrained(source, **loading.code(source))
    tokenizer.save_pretrained(target)
    if gives_numbers(args):
        return
    if args.model_usage_type == "embedding":
        describe_vectors(Path(args.adapter_path), target, model.config.hidden_size)
    else:
        stop_at_turn_ends(model, tokenizer, processor)


def describe_vectors(adapter: Path, target: Path, size: int) -> None:
    """Say how a vector is made of a text: for ask_embedding.py, and in the form that sentence-transformers loads."""
    import dataclasses

    from text_vectors import FILE, How

    how = How.of(adapter)
    modes = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
    module = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{module}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{module}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{module}.Normalize"},
    ]
    prompts = {"query": how.query_prefix, "document": how.document_prefix}
    documents = {
        FILE: dataclasses.asdict(how),
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": size, modes[how.pooling]: True},
        "sentence_bert_config.json": {"max_seq_length": how.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": prompts, "similarity_fn_name": "cosine"},
    }
    for name, document in documents.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(json.dumps(document, ensure_ascii=False, indent=1), "utf-8")


def publish(draft: Path, target: Path) -> None:
    """Move what is new into place; the folder may exist already, as long as it holds no other model."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.safetensors*"):
        old.unlink()
    files = [path.relative_to(draft) for path in draft.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: file.name == "config.json"):  # last: it makes a model of it
        (target / file).parent.mkdir(exist_ok=True)
        os.replace(draft / file, target / file)
    shutil.rmtree(draft)


if __name__ == "__main__":
    main()
