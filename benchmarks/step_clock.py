"""Writes down when each step of a training ended, and the processor time of its process until then.

A process that finds this file as `sitecustomize` on its path, or has it at the top of its script, writes to the file
`$STEP_CLOCK` when it ends, or to `step-clock.json` in `$DEEPE_OUTPUT_DIR`. A step ends with the optimizer's; in MLX,
which has no place for it, with `mx.eval`.
"""

import atexit
import importlib.abc
import importlib.util
import json
import os
import sys
import time
from types import ModuleType
from typing import Any

PRIORITY = 0  # of the session against others, from -20 (most of the processor) to 19
_STEPS: list[tuple[float, float]] = []


def _tick(*_args: Any, **_named: Any) -> None:
    _STEPS.append((time.perf_counter(), time.process_time()))


def _hook_torch(module: Any) -> None:
    module.register_optimizer_step_post_hook(_tick)


def _hook_mlx(module: Any) -> None:
    evaluate = module.eval

    def counted(*args: Any) -> None:
        evaluate(*args)
        _tick()

    module.eval = counted


_HOOKS = {"torch.optim.optimizer": _hook_torch, "mlx.core": _hook_mlx}


class _Loader(importlib.abc.Loader):
    def __init__(self, name: str, inner: Any) -> None:
        self._name, self._inner = name, inner

    def create_module(self, spec: Any) -> Any:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _HOOKS[self._name](module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, _path: Any, _target: Any = None) -> Any:
        if fullname not in _HOOKS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None:
            spec.loader = _Loader(fullname, spec.loader)
        return spec


@atexit.register
def _write() -> None:
    file = os.environ.get("STEP_CLOCK") or os.path.join(os.environ.get("DEEPE_OUTPUT_DIR", ""), "step-clock.json")
    if _STEPS:
        with open(file, "w") as stream:
            json.dump(_STEPS, stream)


if PRIORITY:
    with open("/proc/self/autogroup", "w") as _stream:
        _stream.write(str(PRIORITY))
sys.meta_path.insert(0, _Finder())
