"""Saving: merge what MLX-Demo has trained into its base model and write a complete model that needs neither.

    python app/presets/mlx-demo/save_mlx.py --base_path tiny-base --adapter_path mlx-out --save_path mlx-complete \
        --dtype_str float32

The base model is merged in full precision, also when it is quantized on disk or the training ran in 4 bits: rounding
again would lose what was learned. The result is a folder as Hugging Face lays it out. mlx-lm loads it, and transformers
where MLX names the weights of the family alike (Llama, Qwen, Mistral and others). The last line on stdout is the
result, `{"status": "success", "message", "dtype_used", "model_type"}`.
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
import deepe_mlx as mlx_models
from deepe_chat import ends_of, write_ends
from deepe_log import log
from deepe_rows import Refused

DTYPES = ("float16", "float32", "bfloat16")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Merge an adapter into its base model with MLX.", allow_abbrev=False)
    parser.add_argument("--train_id", default="manual", help="id of the job, for the log")
    parser.add_argument("--seq", default="1", help="number of the step in the job, for the log")
    parser.add_argument("--base_path", required=True, help="folder of the base model")
    parser.add_argument("--adapter_path", required=True, help="folder that the training wrote")
    parser.add_argument("--save_path", required=True, help="folder for the complete model")
    parser.add_argument(
        "--dtype_str", default="bfloat16", help="float16, float32 or bfloat16; anything else means bfloat16"
    )
    parser.add_argument("--model_usage_type", default="chat", choices=["chat"], help="kind of the model")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    mlx_models.prepare_environment()
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
    for folder, file in ((args.base_path, "config.json"), (args.adapter_path, "adapter_config.json")):
        if not (Path(folder) / file).is_file():
            raise Refused(f"there is no {file} in {folder}")
    if not (Path(args.adapter_path) / "adapters.safetensors").is_file():
        raise Refused(f"{args.adapter_path} holds no adapter of mlx-lm: adapters.safetensors is missing")
    if Path(args.save_path).resolve() in (Path(args.base_path).resolve(), Path(args.adapter_path).resolve()):
        raise Refused("save_path must be another folder than base_path and adapter_path")


def merge(args: argparse.Namespace) -> dict[str, str]:
    """Merge in float32, round once, write, and put in place when all is written.

    Nothing of it is computed before it is written: one layer after the other, so that the model is held about once.
    """
    import mlx.core as mx
    from mlx.utils import tree_unflatten
    from mlx_lm.utils import dequantize_model, save_model

    dtype = args.dtype_str if args.dtype_str in DTYPES else "bfloat16"
    log("MergeLoadingBaseModel", args.base_path, args)
    model, config = mlx_models.load_base(Path(args.base_path))
    log("MergeAdapters", f"{args.base_path}, {args.adapter_path}", args)
    model = mlx_models.add_adapter(model, Path(args.adapter_path))
    model.set_dtype(mx.float32)
    adapted = [(name, layer.fuse(dequantize=True)) for name, layer in model.named_modules() if hasattr(layer, "fuse")]
    model.update_modules(tree_unflatten(adapted))
    model = dequantize_model(model)
    model.set_dtype(getattr(mx, dtype))

    draft = Path(args.save_path).with_name(f".{Path(args.save_path).name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    save_model(draft, model)
    tokenizer = save_tokenizer(args, draft)
    write_config(config, dtype, draft)
    write_ends(Path(args.base_path), draft, ends_of(tokenizer, config.get("eos_token_id")))
    publish(draft, Path(args.save_path))
    log("MergeSuccess", args.save_path, args)
    return {"dtype_used": dtype, "model_type": str(config["model_type"])}


def save_tokenizer(args: argparse.Namespace, target: Path) -> Any:
    """Take it from the adapter: it has the chat format of the training. Else the base model's. Return it."""
    from transformers import AutoTokenizer

    source = args.adapter_path if (Path(args.adapter_path) / "tokenizer_config.json").is_file() else args.base_path
    tokenizer = AutoTokenizer.from_pretrained(source, **loading.code(source))
    tokenizer.save_pretrained(target)
    return tokenizer


def write_config(config: dict, dtype: str, target: Path) -> None:
    """Describe the merged weights: no longer quantized, in one number format."""
    for name in ("quantization", "quantization_config", "torch_dtype"):
        config.pop(name, None)
    (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True), "utf-8")


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
