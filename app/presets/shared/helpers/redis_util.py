"""Status of a task in Redis, for scripts that set it themselves.

`redis_client` is ready on import. What is set is told to the platform as well (`$DEEPE_EVENTS`), so that nothing is
lost where the `redis` package, the address or the server is missing; a script must not fail for want of them.
"""

import json
import os
import sys
from datetime import UTC, datetime
from typing import Any

import deepe

_TIMEOUT_S = 2


class RedisClient:
    """Reads and writes `{"status", "updateTime", "pid"}` under the task's id in database 0."""

    def __init__(self) -> None:
        self.client: Any = _connect()

    def set_status(self, task_id: str, status: int, pid: int = 0) -> None:
        deepe.status(task_id, status)
        entry = {"status": status, "updateTime": datetime.now(UTC).isoformat(timespec="microseconds"), "pid": pid}
        self._call("set", task_id, json.dumps(entry))

    def get_status(self, task_id: str) -> dict[str, Any] | None:
        stored = self._call("get", task_id)
        return json.loads(stored) if stored else None

    def delete_status(self, task_id: str) -> None:
        self._call("delete", task_id)

    def _call(self, command: str, *arguments: str) -> Any:
        if self.client is None:
            return None
        try:
            return getattr(self.client, command)(*arguments)
        except Exception as error:  # any failure of the server or the network: say it once, then stay silent
            sys.stderr.write(f"redis_util: no status is kept from here on: {error}\n")
            self.client = None
            return None


def _connect() -> Any:
    address = _address()
    if address is None:
        return None
    try:
        import redis
    except ImportError:
        return None
    host, port = address
    return redis.Redis(
        host=host,
        port=port,
        db=0,
        decode_responses=True,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
    )


def _address() -> tuple[str, int] | None:
    """Return host and port: `AI_PY_REDIS_HOST` with `..._START_PORT`; on macOS the local `..._EXPOSED_PORT`."""
    if sys.platform == "darwin" and (port := os.environ.get("AI_PY_REDIS_EXPOSED_PORT", "")).isdigit():
        return "127.0.0.1", int(port)
    host, port = os.environ.get("AI_PY_REDIS_HOST"), os.environ.get("AI_PY_REDIS_START_PORT", "")
    return (host, int(port)) if host and port.isdigit() else None


redis_client = RedisClient()
