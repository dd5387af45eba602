"""Secrets among the settings: read from variables or files, and not left where other processes can read them.

`DEEPE_API_TOKEN_FILE` names a file that holds what `DEEPE_API_TOKEN` would. A process of the service hides its secrets
once it has read them; until then, and on systems that cannot hide them, other processes of its account can read them.
A stage runs as the same account, so this keeps a secret from a script that looks around, not from one that attacks
the service (docs/security.md).
"""

import ctypes
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

PREFIX: Final = "DEEPE_"
FILE_SUFFIX: Final = "_FILE"
SECRET_FIELDS: Final = ("api_token", "metrics_token", "join_token", "database_url", "redis_url", "secrets_key")
CALLER_FIELDS: Final = frozenset({"api_token", "metrics_token"})
"""What callers of the API authenticate with; a worker serves no callers and needs none."""

_MAX_BYTES: Final = 64 * 1024
_PR_SET_DUMPABLE: Final = 4


class SecretFileError(Exception):
    """A secret's file that cannot be used; the text names the variable."""


def variable(field: str) -> str:
    """Return the variable of a setting."""
    return PREFIX + field.upper()


def file_variable(field: str) -> str:
    """Return the variable that names the file of a secret."""
    return variable(field) + FILE_SUFFIX


def secret_from_file(field: str, environ: Mapping[str, str]) -> str | None:
    """Return the secret in the file that `environ` names, None if it names none; raise `SecretFileError`."""
    path = environ.get(file_variable(field), "").strip()
    if not path:
        return None
    if environ.get(variable(field)):
        raise SecretFileError(f"{variable(field)} and {file_variable(field)} are both set; keep one of them.")
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode().strip()
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else "is not UTF-8 text"
        raise SecretFileError(f"{file_variable(field)}: {path}: {problem}.") from error
    if not text or len(content) > _MAX_BYTES:
        problem = "is empty" if not text else "is no secret: it is too large"
        raise SecretFileError(f"{file_variable(field)}: {path} {problem}.")
    return text


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without the secrets and the names of their files."""
    secret = {name for field in SECRET_FIELDS for name in (variable(field), file_variable(field))}
    return {name: value for name, value in environ.items() if name not in secret}


def hide_secrets(environ: MutableMapping[str, str] = os.environ) -> None:
    """Take the secrets out of this process's environment, also out of what the system shows of it to others.

    Called once the settings are read. Child processes inherit none; code that starts one that needs a secret hands it
    over. On Linux the process's memory is closed as well, to debuggers too: `py-spy` then needs root.
    """
    for field in SECRET_FIELDS:
        if variable(field) in environ:
            _overwrite(variable(field))
            del environ[variable(field)]
        environ.pop(file_variable(field), None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _overwrite(name: str) -> None:
    """Clear the value where it lies: /proc/PID/environ and `ps` show the memory that the process was started with."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype, libc.getenv.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    address = libc.getenv(name.encode())
    if address:
        ctypes.memset(address, 0, len(ctypes.string_at(address)))
