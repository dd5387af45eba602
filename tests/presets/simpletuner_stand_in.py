"""Stands in for SimpleTuner's `train.py`: reads its configuration, posts its events, writes its files. No training.

What it does beside a good run is said by `stand_in` in the configuration: `fail`, `crash`, `silent`, `hang` (before the
first step). Like the real one it ends with exit code 0 when it has failed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


def main() -> None:
    config = json.loads(Path("config/config.json").read_text())
    behaviour = config.get("stand_in", "")
    output = Path(config["output_dir"])
    resumed = config.get("resume_from_checkpoint")
    begin = int(resumed.removeprefix("checkpoint-")) if resumed else 0
    (backend, _) = json.loads(Path(config["data_backend_config"]).read_text())
    pictures = sorted(path.name for path in Path(backend["instance_data_dir"]).iterdir())
    print(f"\x1b[32m{len(pictures)} files\x1b[0m", flush=True)
    post(
        config, {"type": "lifecycle.stage", "stage": {"key": "init_vae_cache", "label": "Caching", "status": "running"}}
    )
    if behaviour == "hang":
        time.sleep(60)
    for step in range(begin + 1, config["max_train_steps"] + 1):
        tell_step(config, step)
        if step == 3 and behaviour == "fail":
            error = "CUDA out of memory. Tried to allocate 2.00 GiB"
            post(config, {"type": "training.status", "data": {"status": "failed", "error": error}})
            sys.exit(0)
        if step == 3 and behaviour == "crash":
            raise RuntimeError("the disk is on fire")
        if step % config["checkpoint_step_interval"] == 0:
            write_checkpoint(config, output / f"checkpoint-{step}")
        print(f"\rSteps: {step}%|###", end="", flush=True)
        time.sleep(0.02)
    if behaviour != "silent":
        (output / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    post(config, {"type": "lifecycle.stage", "stage": {"key": "training_complete", "status": "completed"}})


def tell_step(config: dict[str, Any], step: int) -> None:
    metrics = {"loss": 1 / step, "learning_rate": 0.1, "epoch": 1, "parent_loss": None}
    progress = {"current": step, "total": config["max_train_steps"], "metrics": metrics}
    post(config, {"type": "training.status", "data": {"status": "running"}, "progress": progress})


def write_checkpoint(config: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    post(config, {"type": "training.checkpoint", "checkpoint": {"path": str(folder)}})


def post(config: dict[str, Any], event: dict[str, Any]) -> None:
    (hook,) = config["webhook_config"]
    headers = {"Content-Type": "application/json"}
    urlopen(Request(hook["callback_url"], json.dumps(event).encode(), headers)).close()


if __name__ == "__main__":
    main()
