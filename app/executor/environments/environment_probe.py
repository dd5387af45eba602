"""Look into the environments of a node: are the modules there that methods import, do they see the accelerators.

One short process at a time, of the environment's own Python and of the lowest priority, started by a thread that is not
awaited; never before an environment stood ready for a while, so that a first job goes before. Modules are looked for
without importing them; torch and mlx are imported, as nothing else says what they see. What was found is kept beside
the environments until the environment or the methods change.
"""

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from app.domain.environment_reports import Probe
from app.domain.plain_text import shown
from app.executor.environments.activation import ActivationFailed, interpreter, stage_environment
from app.executor.environments.environment_archive import write_durably

logger = logging.getLogger(__name__)

PROBES = ".probes"
TURN_SECONDS = 15.0
PROBE_SECONDS = 120.0
LOWEST_PRIORITY = 19

PROGRAM = """
import importlib.util, json, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
found = {"missing": sorted(name for name in sys.argv[1:] if not there(name))}
try:
    if there("torch"):
        import torch
        found["cuda"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
        mps = getattr(torch.backends, "mps", None)
        found["mps"] = bool(mps and mps.is_available())
    if there("mlx"):
        import mlx.core
        found["mlx"] = str(mlx.core.default_device())
except Exception as error:
    found["trouble"] = f"{type(error).__name__}: {error}"[:300]
print(json.dumps(found))
"""


class EnvironmentProbes:
    """What was found in the environments of one node."""

    def __init__(self, envs_dir: Path, environ: Mapping[str, str]) -> None:
        self._folder = envs_dir / PROBES
        self._environ = environ
        self._known: dict[Path, Probe] = {}
        self._due = time.monotonic() + TURN_SECONDS
        self._probing: threading.Thread | None = None

    def of(self, prefix: Path) -> Probe | None:
        """Return what was found in the prefix, if it was looked into."""
        return self._known.get(prefix)

    def due(self) -> bool:
        """Say whether it is time for another turn."""
        at_it = self._probing is not None and self._probing.is_alive()
        return not at_it and time.monotonic() >= self._due

    def begin(self, wanted: Mapping[Path, Collection[str]]) -> None:
        """Look into these prefixes for these modules, in the background; what was looked at already costs little."""
        self._due = time.monotonic() + TURN_SECONDS
        self._probing = threading.Thread(target=self.probe_all, args=(dict(wanted),), daemon=True)
        self._probing.start()

    def probe_all(self, wanted: Mapping[Path, Collection[str]]) -> None:
        """Do it; blocks."""
        for prefix, modules in wanted.items():
            try:
                self._known[prefix] = self._probed(prefix, sorted(modules))
            except OSError as error:
                logger.warning("environment_not_probed", extra={"prefix": str(prefix), "error": str(error)})

    def _probed(self, prefix: Path, modules: list[str]) -> Probe:
        key = _key(prefix, modules)
        known = self._known.get(prefix)
        if known is not None and known.key == key:
            return known
        file = self._folder / f"{sha256(os.fsencode(prefix)).hexdigest()[:32]}.json"
        try:
            kept = Probe.model_validate_json(file.read_text("utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):
            kept = None
        if kept is not None and kept.key == key:
            return kept
        found = probe(prefix, modules, self._environ, key=key)
        write_durably(file, found.model_dump_json())
        return found


def probe(prefix: Path, modules: list[str], environ: Mapping[str, str], *, key: str = "") -> Probe:
    """Ask the environment's Python; what it does not answer is what it lacks."""
    try:
        environment = stage_environment(environ, prefix, {})
        command = [str(interpreter(prefix)), "-c", PROGRAM, *modules]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            _step_back(process.pid)
            try:
                said, complaint = process.communicate(timeout=PROBE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return Probe(key=key, modules=tuple(modules), trouble=f"no answer within {PROBE_SECONDS:.0f} s")
        found = json.loads(said.decode().strip().splitlines()[-1])
        return Probe.model_validate({"key": key, "modules": modules, **found})
    except (ActivationFailed, OSError) as error:
        return Probe(key=key, modules=tuple(modules), trouble=shown(str(error), limit=300))
    except (ValueError, IndexError, ValidationError):
        last = complaint.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return Probe(key=key, modules=tuple(modules), trouble=shown(last[0], limit=300))


def _step_back(pid: int) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, pid, LOWEST_PRIORITY)
    except OSError:
        return  # it ended already


def _key(prefix: Path, modules: list[str]) -> str:
    """Return what changes when something is installed, or other modules are wanted."""
    folders = [prefix / "pyvenv.cfg", prefix / "conda-meta", prefix / "deepe-ready.json"]
    folders += sorted(prefix.glob("lib/python3*/site-packages"))
    stamps = [(path.name, path.stat().st_mtime_ns) for path in folders if path.exists()]
    return sha256(json.dumps([str(prefix), stamps, modules]).encode()).hexdigest()
