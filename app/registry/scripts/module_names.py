"""Names in the script root that would hide a module from the scripts beside them.

Python looks for a module first in the folder of the script that runs. A file `json.py` there is found instead of the
standard library's, by the script and by every library that it imports. Folders are separate: a method whose
file lies in another folder, and the shipped methods, never look into it.
"""

import re
import sys
from collections.abc import Collection, Iterable
from functools import cache, lru_cache
from pathlib import PurePosixPath

from app.domain.errors import AppError, Violation
from app.presets.catalogue import helpers_dir
from app.registry.environments.specs import parse_spec
from app.registry.scripts.names import SUFFIX, stem

CONTRACT_HELPERS = frozenset({"enums", "redis_util", "train_callback"})
"""Helper modules of which users bring their own copies; those come before the product's."""

_HOOKS = frozenset({"sitecustomize", "usercustomize"})
_INIT = "__init__"
PACKAGE = f"{_INIT}.py"
_COMPILED = frozenset({".pyc", ".so", ".pyd"})
_MODULES_OF = {
    "beautifulsoup4": "bs4",
    "opencv-python": "cv2",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "protobuf": "google",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
"""Modules that are called differently from the packages that bring them; all others differ by hyphens at most."""


def provided(path: str) -> tuple[str, str]:
    """Return the folder whose scripts find a module in the file `path`, and the name of the module."""
    parts = PurePosixPath(path)
    # compiled ones are called after the interpreter too: `json.cpython-311-x86_64-linux-gnu.so`
    module = parts.name.split(".")[0] if parts.suffix in _COMPILED else stem(path)
    if module == _INIT and len(parts.parts) > 1:
        return _folder(parts.parent), parts.parent.name
    return _folder(parts), module


def folder_of(path: str) -> str:
    """Return the folder of a file, empty for the script root itself."""
    return _folder(PurePosixPath(path))


def top_package(module: str) -> str:
    """Return the package that a module is in, or its own name."""
    return module.partition(".")[0]


def hidden(path: str, module: str, *, packages: Collection[str] = (), pointer: str = "") -> Violation | None:
    """Return what is wrong with a file that brings `module`; `packages` are the modules of the environments."""
    if module in _HOOKS or module.endswith(".pth"):
        return Violation(pointer, "script_is_interpreter_hook", {"file": path})
    if module in sys.stdlib_module_names:
        return Violation(pointer, "script_hides_standard_module", {"file": path, "module": module})
    if module in _own_helpers():
        return Violation(pointer, "script_hides_helper", {"file": path, "module": module})
    if module in packages:
        return Violation(pointer, "script_hides_package", {"file": path, "module": module})
    return None


def modules_of(specs: Iterable[str]) -> frozenset[str]:
    """Return the modules that environments of these specifications have, as far as the specifications say."""
    return frozenset[str]().union(*(_modules_of_spec(spec) for spec in specs))


@cache
def _own_helpers() -> frozenset[str]:
    found = helpers_dir().glob("deepe*")
    return frozenset(entry.stem for entry in found if entry.suffix == SUFFIX or (entry / PACKAGE).is_file())


@lru_cache(maxsize=256)
def _modules_of_spec(text: str) -> frozenset[str]:
    try:
        spec = parse_spec(text)
    except AppError:
        return frozenset()
    packages = [dependency.name for dependency in spec.dependencies]
    packages += [name[0].lower() for line in spec.pip if (name := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line))]
    return frozenset(_MODULES_OF.get(name, re.sub(r"[-.]", "_", name)) for name in packages)


def _folder(path: PurePosixPath) -> str:
    parent = str(path.parent)
    return "" if parent == "." else parent
