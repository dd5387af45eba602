"""Custom01, saving: make a complete model of the base model and what the training has written.

    python app/presets/custom01/save_custom01.py --base_path app/presets/custom01/custom01-base \
        --adapter_path custom01-out --save_path custom01-complete

Afterwards `save_path` needs neither the base model nor the training's output any more. The last line on stdout is the
result, `{"status": "success", ...}`; exit code 0 without it is not a success.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
from train_callback import LevelEnum, LogEnum, write_log


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Save a complete Custom01 model.", allow_abbrev=False)
    parser.add_argument("--train_id", default="manual", help="id of the job, for the log")
    parser.add_argument("--seq", default="1", help="number of the step in the job, for the log")
    parser.add_argument("--save_path", required=True, help="folder for the complete model")
    parser.add_argument("--base_path", required=True, help="folder of the base model")
    parser.add_argument("--adapter_path", required=True, help="folder that the training wrote")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    try:
        files = save(Path(args.base_path), Path(args.adapter_path), Path(args.save_path))
    except (ValueError, OSError) as error:
        write_log(LevelEnum.ERROR, LogEnum.SaveModelTaskFailed, str(error), args.train_id, args.seq, None)
        deepe.result("failed", message=str(error))
        sys.exit(1)
    write_log(LevelEnum.INFO, LogEnum.MergeSuccess, args.save_path, args.train_id, args.seq, None)
    deepe.result(message=f"saved {files} files", dtype_used="float32", model_type="bag-of-words")


def save(base: Path, adapter: Path, target: Path) -> int:
    """Write config, answers and weights; the number of files. A real method merges its adapter into the base here."""
    trained = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    base_config = base / "config.json"
    config = json.loads(base_config.read_text("utf-8")) if base_config.is_file() else {}
    if config.get("features", trained["features"]) != trained["features"]:
        raise ValueError(f"{adapter} was trained on another base model than {base}")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(adapter / "adapter_model.safetensors", target / "model.safetensors")
    write_json(target / "config.json", config | {key: trained[key] for key in ("model_type", "features")})
    write_json(target / "answers.json", trained["answers"])
    return 3


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
