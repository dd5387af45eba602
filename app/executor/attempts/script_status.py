"""The status keys that DeepExtension's scripts and backend share: Redis database 0, one key per job.

Scripts may set Failed there and still exit with 0. Without Redis there is no key, and the exit decides alone.
"""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import redis.asyncio
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

SUCCESS: Final = 1
RUNNING: Final = 2
FAILED: Final = 3
_DATABASE = 0
_TIMEOUT_SECONDS = 1.0
# only a key that still says Running without a pid: the script may have spoken meanwhile
_ADD_PID = """
local value = redis.call('get', KEYS[1])
if not value then return nil end
local known, record = pcall(cjson.decode, value)
if known and type(record) == 'table' and record.status == tonumber(ARGV[1]) and record.pid == 0 then
  return redis.call('set', KEYS[1], ARGV[2])
end
return nil
"""


class ScriptStatus(Protocol):
    """Reads and writes the keys; never raises."""

    async def launching(self, job_id: str) -> None: ...

    async def running(self, job_id: str, pid: int) -> None: ...

    async def read(self, job_id: str) -> int | None: ...

    async def record(self, job_id: str) -> Mapping[str, Any] | None: ...

    async def ended(self, job_id: str, *, succeeded: bool) -> None: ...

    async def close(self) -> None: ...


class NoScriptStatus:
    """Without Redis."""

    async def launching(self, job_id: str) -> None:
        """Do nothing."""

    async def running(self, job_id: str, pid: int) -> None:
        """Do nothing."""

    async def read(self, job_id: str) -> int | None:
        """Return None: the script cannot have said anything."""
        return None

    async def record(self, job_id: str) -> Mapping[str, Any] | None:
        """Return None, likewise."""
        return None

    async def ended(self, job_id: str, *, succeeded: bool) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


class RedisScriptStatus:
    """With Redis; while it is away the keys are simply not written."""

    def __init__(self, redis_url: str) -> None:
        pool = redis.asyncio.ConnectionPool.from_url(
            redis_url, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS
        )
        pool.connection_kwargs["db"] = _DATABASE  # whatever the URL names
        self._client = redis.asyncio.Redis.from_pool(pool)
        self._add_pid = self._client.register_script(_ADD_PID)

    async def launching(self, job_id: str) -> None:
        """Say Running before the script starts, so that whatever it says comes later."""
        try:
            await self._client.set(job_id, _record(RUNNING, pid=0))
        except (RedisError, OSError) as error:
            _lost(job_id, error)

    async def running(self, job_id: str, pid: int) -> None:
        """Add the pid, whose end ends the whole tree, unless the script has spoken already."""
        try:
            await self._add_pid(keys=[job_id], args=[RUNNING, _record(RUNNING, pid=pid)])
        except (RedisError, OSError) as error:
            _lost(job_id, error)

    async def read(self, job_id: str) -> int | None:
        """Return the status that stands there, None when there is none or it cannot be read."""
        status = (await self.record(job_id) or {}).get("status")
        return status if isinstance(status, int) else None

    async def record(self, job_id: str) -> Mapping[str, Any] | None:
        """Return all that stands there, None when there is nothing or it cannot be read."""
        try:
            value = await self._client.get(job_id)
            record = json.loads(value) if value else None
        except (RedisError, OSError) as error:
            _lost(job_id, error)
            return None
        except ValueError:
            return None
        return record if isinstance(record, dict) else None

    async def ended(self, job_id: str, *, succeeded: bool) -> None:
        """Write the final status."""
        try:
            await self._client.set(job_id, _record(SUCCESS if succeeded else FAILED, pid=0))
        except (RedisError, OSError) as error:
            _lost(job_id, error)

    async def close(self) -> None:
        """Give the connections back."""
        await self._client.aclose()


def _record(status: int, *, pid: int) -> str:
    return json.dumps(
        {"status": status, "updateTime": datetime.now(UTC).isoformat(timespec="microseconds"), "pid": pid}
    )


def _lost(job_id: str, error: Exception) -> None:
    logger.warning("script_status_lost", extra={"job_id": job_id, "error": str(error)})
