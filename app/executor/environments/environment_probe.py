"""Look into the environments of a node: are the modules there that methods import, do they see the accelerators.

One short process at a time, of the environment's own Python and of the lowest priority, started by a thread that is not
awaited; never before an environment stood ready for a while, so that a first job goes before. Modules are looked for
without importing them; torch and mlx are imported, as nothing else says what they see. Configuration classes of
libraries whose fields methods take as options are described by a second process, as importing them takes seconds. What
was found is kept beside the environments until the environment or the methods change.
"""

import contextlib
import json
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.domain.environment_reports import Probe
from app.domain.library_options import OptionClass
from app.domain.plain_text import shown
from app.executor.environments.activation import ActivationFailed, interpreter, stage_environment
from app.executor.environments.environment_archive import write_durably
from app.presets.catalogue import fields_program

logger = logging.getLogger(__name__)

PROBES = ".probes"
TURN_SECONDS = 15.0
PROBE_SECONDS = 120.0
DESCRIBE_SECONDS = 300.0
MAX_DESCRIPTION_BYTES = 4 * 2**20
OFFLINE = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
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


NAMES_PROGRAM = """
import importlib, json, sys
missing = []
for name in sys.argv[1:]:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except BaseException:
        continue
    try:
        getattr(found, attribute)
    except AttributeError:
        try:
            importlib.import_module(module + "." + attribute)
        except ModuleNotFoundError:
            missing.append(name)
        except BaseException:
            pass
    except BaseException:
        pass
print()
print(json.dumps(missing))
"""


@dataclass(frozen=True)
class Needs:
    """What methods need of an environment.

    `modules`: those that their scripts import, and `module:name` for what they take from them. `classes`: those whose
    fields they take.
    """

    modules: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(self.modules | other.modules, self.classes | other.classes)


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

    def descriptions(self, digests: Collection[str]) -> dict[str, Mapping[str, Any]]:
        """Return the descriptions of configuration classes with these digests; blocks."""
        found: dict[str, Mapping[str, Any]] = {}
        for digest in digests:
            with contextlib.suppress(OSError, ValidationError, UnicodeDecodeError):
                found[digest] = OptionClass.model_validate_json(self._description(digest).read_text("utf-8")).document()
        return found

    def due(self) -> bool:
        """Say whether it is time for another turn."""
        at_it = self._probing is not None and self._probing.is_alive()
        return not at_it and time.monotonic() >= self._due

    def begin(self, wanted: Mapping[Path, Needs]) -> None:
        """Look into these prefixes for what is needed, in the background; what was looked at already costs little."""
        self._due = time.monotonic() + TURN_SECONDS
        self._probing = threading.Thread(target=self.probe_all, args=(dict(wanted),), daemon=True)
        self._probing.start()

    def probe_all(self, wanted: Mapping[Path, Needs]) -> None:
        """Do it; blocks."""
        for prefix, needs in wanted.items():
            try:
                self._known[prefix] = self._probed(prefix, needs)
            except OSError as error:
                logger.warning("environment_not_probed", extra={"prefix": str(prefix), "error": str(error)})

    def _probed(self, prefix: Path, needs: Needs) -> Probe:
        modules, classes = sorted(needs.modules), sorted(needs.classes)
        key = _key(prefix, modules, classes)
        known = self._known.get(prefix)
        if known is not None and known.key == key:
            return known
        file = self._folder / f"{sha256(os.fsencode(prefix)).hexdigest()[:32]}.json"
        try:
            kept = Probe.model_validate_json(file.read_text("utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):
            kept = None
        if kept is not None and kept.key == key and self._has_all(kept.options.values()):
            return kept
        found = probe(prefix, modules, self._environ, key=key)
        if not classes:
            write_durably(file, found.model_dump_json())
            return found
        described, trouble, ended = describe(prefix, classes, self._environ)
        for one in described:
            write_durably(self._description(one.digest), json.dumps(one.document()))
        options = {one.path: one.digest for one in described}
        found = found.model_copy(update={"options": options, "options_trouble": trouble})
        if ended:  # else it is asked again after a restart: the machine was busy
            write_durably(file, found.model_dump_json())
        return found

    def _has_all(self, digests: Collection[str]) -> bool:
        return all(self._description(digest).is_file() for digest in digests)

    def _description(self, digest: str) -> Path:
        return self._folder / f"options-{digest[:32]}.json"


def probe(prefix: Path, needed: list[str], environ: Mapping[str, str], *, key: str = "") -> Probe:
    """Ask the environment's Python; what it does not answer is what it lacks."""
    modules = [name for name in needed if ":" not in name]
    found = _probe(prefix, modules, environ, key=key)
    there = set(modules) - set(found.missing)
    names = [name for name in needed if ":" in name and name.partition(":")[0].partition(".")[0] in there]
    if found.trouble is not None or not names:
        return found.model_copy(update={"modules": tuple(needed)})
    missing = _missing_names(prefix, names, environ)
    return found.model_copy(update={"modules": tuple(needed), "missing": (*found.missing, *missing)})


def _ask(prefix: Path, program: Sequence[str], environment: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Run a program in the environment's Python; return what it printed, and its complaints.

    Raises `OSError`, and `subprocess.TimeoutExpired` after `PROBE_SECONDS`.
    """
    with subprocess.Popen(
        [str(interpreter(prefix)), "-c", *program],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        _step_back(process.pid)
        try:
            return process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _missing_names(prefix: Path, names: list[str], environ: Mapping[str, str]) -> Sequence[str]:
    """Return those of the names, `module:name`, that their modules do not have; a module that fails says nothing."""
    try:
        said, _ = _ask(prefix, [NAMES_PROGRAM, *names], stage_environment(environ, prefix, {}) | OFFLINE)
        missing = json.loads(said.decode().strip().splitlines()[-1])
        return [name for name in names if name in missing]
    except (ActivationFailed, OSError, subprocess.TimeoutExpired, ValueError, IndexError, TypeError):
        return ()


def _probe(prefix: Path, modules: list[str], environ: Mapping[str, str], *, key: str) -> Probe:
    try:
        environment = stage_environment(environ, prefix, {}) | {"PYTHONDONTWRITEBYTECODE": "1"}
        said, complaint = _ask(prefix, [PROGRAM, *modules], environment)
        found = json.loads(said.decode().strip().splitlines()[-1])
        return Probe.model_validate({"key": key, "modules": modules, **found})
    except subprocess.TimeoutExpired:
        return Probe(key=key, modules=tuple(modules), trouble=f"no answer within {PROBE_SECONDS:.0f} s")
    except (ActivationFailed, OSError) as error:
        return Probe(key=key, modules=tuple(modules), trouble=shown(str(error), limit=300))
    except (ValueError, IndexError, ValidationError):
        last = complaint.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return Probe(key=key, modules=tuple(modules), trouble=shown(last[0], limit=300))


def describe(
    prefix: Path, classes: Sequence[str], environ: Mapping[str, str]
) -> tuple[Sequence[OptionClass], dict[str, str], bool]:
    """Return the configuration classes, why others could not be described, and whether the program came to an end.

    A library that ends the program, or keeps it from ending, takes no other with it: then each is asked by itself.
    """
    described, trouble, ended = _describe(prefix, classes, environ)
    by_library: dict[str, list[str]] = {}
    for path in classes:
        by_library.setdefault(path.partition(".")[0], []).append(path)
    if ended or len(by_library) == 1:
        return described, trouble, ended
    found = [_describe(prefix, paths, environ) for paths in by_library.values()]
    return (
        [one for classes_of, _, _ in found for one in classes_of],
        {path: why for _, trouble_of, _ in found for path, why in trouble_of.items()},
        all(ended for _, _, ended in found),
    )


def _describe(
    prefix: Path, classes: Sequence[str], environ: Mapping[str, str]
) -> tuple[Sequence[OptionClass], dict[str, str], bool]:
    try:
        environment = stage_environment(environ, prefix, {}) | OFFLINE
        command = [str(interpreter(prefix)), str(fields_program()), *classes]
        with (
            tempfile.TemporaryFile() as answer,
            subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=answer, stderr=subprocess.DEVNULL
            ) as process,
        ):
            _step_back(process.pid)
            try:
                process.wait(timeout=DESCRIBE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return (), dict.fromkeys(classes, f"no answer within {DESCRIBE_SECONDS:.0f} s"), False
            answer.seek(0)
            said = answer.read(MAX_DESCRIPTION_BYTES)
        documents = json.loads(said.decode().strip().splitlines()[-1])
    except (ActivationFailed, OSError, ValueError, IndexError) as error:
        return (), dict.fromkeys(classes, shown(f"{type(error).__name__}: {error}", limit=300)), False
    described, trouble = [], {}
    for path in classes:
        document = documents.get(path, {})
        try:
            if "trouble" in document:
                trouble[path] = shown(str(document["trouble"]), limit=300)
            else:
                described.append(OptionClass.model_validate(document))
        except ValidationError as error:
            trouble[path] = shown(str(error), limit=300)
    return described, trouble, True


def _step_back(pid: int) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, pid, LOWEST_PRIORITY)
    except OSError:
        return  # it ended already


def _key(prefix: Path, modules: Sequence[str], classes: Sequence[str]) -> str:
    """Return what changes when something is installed, other modules or classes are wanted, or described otherwise."""
    folders = [prefix / "pyvenv.cfg", prefix / "conda-meta", prefix / "deepe-ready.json"]
    folders += sorted(prefix.glob("lib/python3*/site-packages"))
    program = sha256(fields_program().read_bytes()).hexdigest() if classes else ""
    stamps = [(path.name, path.stat().st_mtime_ns) for path in folders if path.exists()]
    return sha256(json.dumps([str(prefix), stamps, modules, classes, program]).encode()).hexdigest()
