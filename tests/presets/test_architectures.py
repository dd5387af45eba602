"""Bases in the shapes of known families: each is trained, saved as a complete model, and both answer alike."""

import shutil
from typing import Any

import pytest

from app.presets import catalogue
from tests.presets import architectures, families
from tests.presets.conftest import NewHome
from tests.presets.stage import dataset

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("architectures")]

PROBE = """
import contextlib, io, json, os, runpy, sys
from pathlib import Path
import architectures

presets, rows, out = map(Path, sys.argv[1:])
sys.path += [str(presets / "shared/helpers"), str(presets / "shared")]

def run(script, *arguments):
    sys.argv = [script, *map(str, arguments)]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            code = exit.code or 0
    return code, said.getvalue()

def ask(base, model):
    settings = ("--prompt=Which is larger, 3 or 8?", "--max_length=8", "--temperature=0")
    code, said = run("ask_model.py", f"--base_model_path={base}", f"--model_path={model}", *settings)
    return "".join(json.loads(line)["text"] for line in said.splitlines() if '"resp"' in line) if code == 0 else code

for name in architectures.ARCHITECTURES:
    base, adapter, complete = out / name, out / f"{name}-adapter", out / f"{name}-complete"
    os.environ["DEEPE_EVENTS"] = str(out / f"{name}.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):
        architectures.build(name, presets, base)
    paths = (f"--model_path={base}", f"--dataset_path={rows}", f"--output_dir={adapter}")
    few = ("--max_steps=8", "--batch_size=16", "--eval_samples=16", "--eval_max_new_tokens=4", "--learning_rate=0.01")
    trained, _ = run("sft-demo.py", *paths, *few)
    merge = (f"--base_path={base}", f"--adapter_path={adapter}", f"--save_path={complete}", "--dtype_str=float32")
    saved, _ = run("save_model.py", *merge)
    found = {"codes": [trained, saved], "customized": ask(base, adapter), "complete": ask(complete, complete)}
    events = [json.loads(line) for line in Path(os.environ["DEEPE_EVENTS"]).read_text().splitlines()]
    with open(adapter / "adapter_model.safetensors", "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found["adapted"] = sorted({part for key in head for part in key.split(".") if key.startswith("base_model")})
    scores = {one["phase"]: one["value"] for one in events if one.get("name") == "eval_loss"}
    print(json.dumps({"name": name, **found, **scores}), flush=True)

paths = (f"--model_path={out / 'mixtral'}", f"--dataset_path={rows}", f"--output_dir={out / 'dora'}")
print(json.dumps({"name": "dora", "said": run("peft-demo.py", *paths, "--adapter=dora")[0]}), flush=True)
"""


@pytest.fixture(scope="module")
def found(new_home: NewHome) -> dict[str, dict[str, Any]]:
    """Return what became of each base; one process does them all."""
    home = new_home("architectures")
    for module in (architectures, families):
        shutil.copy(str(module.__file__), home.scripts)
    (home.scripts / "probe.py").write_text(PROBE)
    run = home.run("probe.py", str(catalogue.ROOM), str(dataset("sft-demo")), str(home.path / "bases"))
    assert run.code == 0, run.stderr
    return {line["name"]: line for line in run.json_lines if "name" in line}


@pytest.mark.parametrize("name", list(architectures.ARCHITECTURES))
def test_learns_is_saved_and_answers(found: dict[str, dict[str, Any]], name: str) -> None:
    one = found[name]

    assert one["codes"] == [0, 0]
    assert one["after"] < one["before"] - 0.5
    assert one["customized"] == one["complete"]
    assert ("experts" in one["adapted"]) is (name in ("mixtral", "qwen3-moe"))
    assert "gate" not in one["adapted"], "the router of a mixture is left alone"


def test_adapter_that_cannot_adapt_experts_is_refused(found: dict[str, dict[str, Any]]) -> None:
    assert "adapter=dora with use_dora=True cannot adapt the experts of a mixture" in found["dora"]["said"]
    assert found["dora"]["said"].endswith("target_modules=k_proj,o_proj,q_proj,v_proj")
