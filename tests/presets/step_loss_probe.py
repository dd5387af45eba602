"""Take one step of each method in several ways, and print its loss and gradient: `step_loss_probe.py RUNS`.

RUNS is a JSON object: the name of a run to its script and arguments. It runs in the environment of the stages, alone
or as one of several processes; the first one prints a JSON line for each run. Sampling depends on the row alone.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

RANK = int(os.environ.get("RANK", "0"))
LIKELY = 3  # tokens that an answer may take at each place


def main() -> None:
    gradients: list[torch.Tensor] = []
    clip = torch.nn.utils.clip_grad_norm_

    def seen(parameters: Any, *more: Any, **named: Any) -> Any:
        weights = list(parameters)
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]).clone())
        return clip(weights, *more, **named)

    def drawn(odds: Any, *_: Any, **__: Any) -> Any:
        """Return the first, second or third likeliest token, by the place of the row among those of all processes."""
        rows = torch.arange(len(odds)) + RANK * len(odds)
        return odds.topk(LIKELY).indices.gather(1, (rows % LIKELY)[:, None])

    torch.nn.utils.clip_grad_norm_ = seen
    torch.multinomial = drawn
    events = Path(os.environ["DEEPE_EVENTS"])
    for name, (script, arguments) in json.loads(sys.argv[1]).items():
        module = runpy.run_path(script, run_name="script_of_run")
        args, rest = module["make_parser"]().parse_known_args(arguments)
        if "LIBRARY_OPTIONS" in module:
            args.options = module["Options"](rest, module["LIBRARY_OPTIONS"], args)
        if torch.distributed.is_initialized():  # by the run before
            group = module["run"].__globals__
            group |= {"join_group": lambda: "cpu", "leave_group": lambda *_: None}
        gradients.clear()
        module["run"](args)
        if RANK == 0:
            lines = [json.loads(line) for line in events.read_text().splitlines()]
            losses = [line["values"]["loss"] for line in lines if "loss" in line.get("values", {})]
            (gradient,) = gradients
            print(json.dumps({"run": name, "loss": losses[-1], "gradient": gradient.tolist()}), flush=True)
        gc.collect()


main()
os._exit(0)  # threads that gloo left may abort the interpreter's own end
