"""Saving for models that draw: merge LoRA weights into their pipeline and write a complete one that needs neither.

    python app/presets/sd-demo/save_image_model.py --base_path tiny-diffusion --adapter_path sd-out \
        --save_path sd-complete --dtype_str float32

It works for every pipeline of diffusers whose LoRA diffusers can load and fuse. Merging happens in float32, the result
is rounded once. The last line on stdout is the result, `{"status": "success", "message", "dtype_used", "model_type"}`.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
from deepe_diffusion import WEIGHTS, Machine, kind_of, load_pipeline
from deepe_log import log
from deepe_rows import Refused

DTYPES = ("float16", "float32", "bfloat16")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Merge LoRA weights into their pipeline.", allow_abbrev=False)
    parser.add_argument("--train_id", default="manual", help="id of the job, for the log")
    parser.add_argument("--seq", default="1", help="number of the step in the job, for the log")
    parser.add_argument("--base_path", required=True, help="folder of the base model")
    parser.add_argument("--adapter_path", required=True, help="folder that the training wrote")
    parser.add_argument("--save_path", required=True, help="folder for the complete model")
    parser.add_argument(
        "--dtype_str", default="bfloat16", help="float16, float32 or bfloat16; anything else means bfloat16"
    )
    parser.add_argument("--lora_scale", type=float, default=1.0, help="how much of what was learned is merged")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    log("SaveModelTaskStarts", args.save_path, args)
    try:
        check(args)
        dtype = merge(args)
    except Exception as error:
        reason = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        log("SaveModelTaskFailed", reason, args, level="ERROR")
        deepe.result("failed", message=reason)
        if isinstance(error, Refused):
            sys.exit(1)
        raise
    log("SaveModelTaskSuccess", args.save_path, args)
    deepe.artifact(args.save_path, "model")
    kind = kind_of(Path(args.save_path))
    deepe.result(message=f"the model is complete in {args.save_path}", dtype_used=dtype, model_type=kind)


def check(args: argparse.Namespace) -> None:
    kind_of(Path(args.base_path))
    if not (Path(args.adapter_path) / WEIGHTS).is_file():
        raise Refused(f"there is no {WEIGHTS} in {args.adapter_path}")
    if Path(args.save_path).resolve() in (Path(args.base_path).resolve(), Path(args.adapter_path).resolve()):
        raise Refused("save_path must be another folder than base_path and adapter_path")


def merge(args: argparse.Namespace) -> str:
    """Merge, write, and put in place when all is written; return the number format."""
    import torch

    dtype = args.dtype_str if args.dtype_str in DTYPES else "bfloat16"
    log("MergeLoadingBaseModel", args.base_path, args)
    pipeline = load_pipeline(Path(args.base_path), Machine("cpu", "float32"), Path(args.adapter_path))
    log("MergeAdapters", f"{args.base_path}, {args.adapter_path}", args)
    pipeline.fuse_lora(lora_scale=args.lora_scale)
    pipeline.unload_lora_weights()
    pipeline.to(getattr(torch, dtype))

    target = Path(args.save_path)
    draft = target.with_name(f".{target.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline.save_pretrained(draft, max_shard_size="10GB")
    for weights in draft.rglob("*.safetensors"):
        weights.chmod(0o644)  # written as 0600, whatever the umask says
    publish(draft, target)
    log("MergeSuccess", args.save_path, args)
    return dtype


def publish(draft: Path, target: Path) -> None:
    """Move what is new into place; the folder may exist already. The index comes last: it makes a model of it."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "model_index.json").unlink(missing_ok=True)
    for entry in sorted(draft.iterdir(), key=lambda entry: entry.name == "model_index.json"):
        if (target / entry.name).is_dir():
            shutil.rmtree(target / entry.name)
        os.replace(entry, target / entry.name)
    draft.rmdir()


if __name__ == "__main__":
    main()
