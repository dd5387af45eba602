"""The environment variables of a stage: an allow-list of the worker's, and what activating its prefix sets.

Activation is computed here once instead of going through `conda run`, which holds output back, swallows signals and
costs a second per launch. The result is what conda sets, without the variables that only serve conda itself.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

# HF_* includes a hub token, and trackers have keys: the operator gives them to the worker for the scripts. Nothing of
# the service itself passes.
STAGE_VARIABLES = (
    *("PATH", "HOME", "USER", "LANG", "LC_*", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
    *("CUDA_*", "NVIDIA_*", "NCCL_*", "OMP_*", "HF_*", "AI_PY_REDIS_*", "TRAINING_START_PORT"),
    *("MLFLOW_*", "WANDB_*", "TRACKIO_*", "SWANLAB_*"),
)
NETWORK_VARIABLES = (
    *("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
INSTALLER_VARIABLES = (
    *("PIP_*", "CONDA_*", "CONDARC", "MAMBA_*", "MAMBARC", "RATTLER_*", "NETRC", "XDG_*_HOME"),
    *NETWORK_VARIABLES,
)
# Left by an activated environment of the person who started the worker, or sending packages elsewhere.
_NEVER = (
    *("CONDA_PREFIX", "CONDA_PREFIX_*", "CONDA_SHLVL", "CONDA_DEFAULT_ENV", "CONDA_PROMPT_MODIFIER"),
    "DEEPE_*",  # addresses and keys of the service, and what it sets itself
    *("CONDA_STACKED_*", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT", "PIP_PYTHON"),
)
_SHELL_OWN = ("_", "SHLVL", "PWD", "OLDPWD")
_UNSET = "***unset***"
_SCRIPT_SECONDS = 60
_PYTHON = {"PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"}


class ActivationFailed(Exception):
    """A script in the prefix's `activate.d` failed; the message holds what it printed last."""


def interpreter(prefix: Path) -> Path:
    """Return the Python of an environment."""
    return prefix / "bin" / "python"


def stage_environment(
    base: Mapping[str, str], prefix: Path, extra: Mapping[str, str], *, also: Sequence[str] = ()
) -> dict[str, str]:
    """Return the whole environment of a stage: allowed variables of `base`, activation of `prefix`, then `extra`.

    `also`: further names and patterns that the operator allows.
    """
    return {**activated(inherited_variables(base, also=also), prefix), **_PYTHON, **extra}


def inherited_variables(base: Mapping[str, str], *, also: Sequence[str] = ()) -> dict[str, str]:
    """Return the variables of `base` that a stage may have."""
    return _allowed(base, (*STAGE_VARIABLES, *also))


def builder_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for building environments: a stage's, and the settings of installers."""
    return {**_allowed(base, STAGE_VARIABLES + INSTALLER_VARIABLES), **_PYTHON}


def network_variables(base: Mapping[str, str]) -> dict[str, str]:
    """Return what installers know of proxies and certificates, for programs that download."""
    return {name: value for name, value in _allowed(base, NETWORK_VARIABLES).items() if name != "PATH"}


def activated(base: Mapping[str, str], prefix: Path) -> dict[str, str]:
    """Return `base` as it is after activating `prefix`, a conda environment or a venv."""
    is_conda = (prefix / "conda-meta").is_dir()
    variables = {**base, "PATH": os.pathsep.join((str(prefix / "bin"), base.get("PATH") or os.defpath))}
    variables |= _conda_variables(prefix) if is_conda else {"VIRTUAL_ENV": str(prefix)}
    variables |= _declared(prefix)
    scripts = sorted((prefix / "etc" / "conda" / "activate.d").glob("*.sh"))
    if not scripts:
        return variables
    stamps = tuple((str(script), script.stat().st_mtime_ns) for script in scripts)
    return dict(_sourced(stamps, frozenset(variables.items())))


def _allowed(base: Mapping[str, str], patterns: tuple[str, ...]) -> dict[str, str]:
    allowed = {
        name: value
        for name, value in base.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in _NEVER)
    }
    active = {str(Path(base[name]) / "bin") for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if base.get(name)}
    parts = allowed.get("PATH", os.defpath).split(os.pathsep)
    return {**allowed, "PATH": os.pathsep.join(part for part in parts if part not in active)}


def _conda_variables(prefix: Path) -> dict[str, str]:
    name = "base" if (prefix / "condabin").is_dir() else prefix.name if prefix.parent.name == "envs" else str(prefix)
    return {
        "CONDA_PREFIX": str(prefix),
        "CONDA_SHLVL": "1",
        "CONDA_DEFAULT_ENV": name,
        "CONDA_PROMPT_MODIFIER": f"({name}) ",
    }


def _declared(prefix: Path) -> dict[str, str]:
    """Return the variables that packages and the environment's own specification set; the latter win."""
    files = sorted((prefix / "etc" / "conda" / "env_vars.d").glob("*.json"))
    own = _json_object(prefix / "conda-meta" / "state").get("env_vars")
    declared: dict[str, object] = {}
    for entries in (*map(_json_object, files), own if isinstance(own, dict) else {}):
        declared |= entries
    return {name: str(value) for name, value in declared.items() if value != _UNSET and name != "PATH"}


def _json_object(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@lru_cache(maxsize=64)
def _sourced(stamps: tuple[tuple[str, int], ...], variables: frozenset[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Source the scripts in one shell; remembered until a script or what it starts from changes."""
    environment = dict(variables)
    program = 'for script in "$@"; do . "$script" >&2 || exit 91; done; exec /usr/bin/env -0'
    command = [shutil.which("bash") or "/bin/sh", "-c", program, "activate", *(path for path, _ in stamps)]
    if command[0] != "/bin/sh":
        command[1:1] = ["--noprofile", "--norc"]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SCRIPT_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        raise ActivationFailed(error.stderr.decode(errors="replace")[-1000:] or f"exit {error.returncode}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ActivationFailed(str(error)) from error
    entries = (entry.decode(errors="surrogateescape").partition("=") for entry in done.stdout.split(b"\0") if entry)
    return tuple((name, value) for name, _, value in entries if name not in _SHELL_OWN or name in environment)
