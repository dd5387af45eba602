"""The stage script of the runs, and the journal it appends to.

A script knows nothing of the harness: it appends to `chaos.journal` beside the script root, in one write per line,
which attempt began, ticked and ended; so do the processes it starts, some of which do all they can to escape. Its
outputs come last.
"""

import json
from pathlib import Path
from typing import Any

from tests.chaos.verdict import Line

BASE_MODEL, DATASET = "chaos-base", "chaos"
JOURNAL = "chaos.journal"

SCRIPT = '''
"""Tick for a while, leave checkpoints, then leave an adapter."""

import argparse
import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

OUTPUT = Path(os.environ["DEEPE_OUTPUT_DIR"])
JOURNAL = os.open(Path.cwd().parent / "chaos.journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
PAUSE = 0.05


def journal(word):
    held = os.environ.get("DEEPE_ACCELERATORS", "")
    line = {
        "word": word,
        "job": os.environ["DEEPE_JOB_ID"],
        "attempt": os.environ["DEEPE_ATTEMPT"],
        "at": time.time(),
        "accelerators": [name for name in held.split(",") if name],
    }
    os.write(JOURNAL, json.dumps(line).encode() + b"\\n")


def weights(path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    draft = path.with_suffix(".draft")
    draft.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.0))
    draft.replace(path)


def start_child(family):
    """Fork a process that outlives us, in the way `family` says, unless it is stopped."""
    if os.fork():
        return
    if family != "plain":
        os.setsid()
    if family == "orphan" and os.fork():
        os._exit(0)
    if family == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(600):
        journal("child")
        time.sleep(0.1)
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--dataset_path", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--ticks", type=int, default=10)
    parser.add_argument("--gate", default="", help="file beside the script root until which it goes on")
    parser.add_argument("--family", default="none", choices=["none", "plain", "session", "orphan", "stubborn"])
    arguments, _ = parser.parse_known_args()
    journal("start")
    if arguments.family != "none":
        start_child(arguments.family)
    gate, tick = arguments.gate and Path.cwd().parent / arguments.gate, 0
    while tick < arguments.ticks or (gate and not gate.exists()):
        tick += 1
        time.sleep(PAUSE)
        journal("tick")
        checkpoint = OUTPUT / "checkpoint.json"
        checkpoint.with_suffix(".draft").write_text(json.dumps({"tick": tick}))
        checkpoint.with_suffix(".draft").replace(checkpoint)
        print(f"tick {tick}", flush=True)
    (OUTPUT / "adapter_config.json").write_text("{}")
    weights(OUTPUT / "adapter_model.safetensors")
    journal("end")


main()
'''


def submission(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the body that submits one job."""
    inputs = {"method": "Custom01", "base_model": BASE_MODEL, "dataset": DATASET, "through": "customized"}
    return {**inputs, "parameters": parameters}


def read_journal(path: Path) -> list[Line]:
    """Return the lines; each is there in one piece, because it was appended by one write."""
    if not path.exists():
        return []
    documents = (json.loads(line) for line in path.read_text().splitlines())
    return [Line(**{**document, "accelerators": tuple(document["accelerators"])}) for document in documents]
