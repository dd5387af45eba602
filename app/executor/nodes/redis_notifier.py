"""Notifications over Redis, carried by arq (see `app.executor.nodes.notifier`).

One queue per node keeps notifications for a node that is away; a message on a channel of the same name arrives at once.
arq's function only wakes the agent: were it to run the training itself, a crash would be noticed after the job's
timeout, a restart would start the training again, and a job queued for a day would be forgotten
(docs/decisions/0002-queue.md has the measurements). A module of its own: where there is no Redis, arq is not imported.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import unquote

from arq import Worker
from arq.connections import ArqRedis, RedisSettings, create_pool
from arq.worker import func
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.executor.nodes.backoff import TRANSIENT

logger = logging.getLogger(__name__)

NOTIFICATION_DATABASE = 1  # database 0 belongs to the status keys of scripts
SILENCE_SECONDS = 5.0
# how often the queue is read by a node that missed the message on the channel
QUEUE_SECONDS = 0.5
FUNCTION = "hint"  # in the queues of nodes and APIs of earlier releases
_EXPIRES_SECONDS = 300
_CHANNEL_PAUSE_SECONDS = 2.0


class RedisNotifier:
    """Enqueues a notification for each of `nodes`. They should be alive: the queue of a dead node would grow for ever.

    After a failure it keeps silent for a while instead of trying for each job.
    """

    def __init__(self, redis_url: str, *, nodes: Callable[[], Awaitable[Sequence[str]]]) -> None:
        self._settings = redis_settings(redis_url)
        self._nodes = nodes
        self._pool: ArqRedis | None = None
        self._connecting = asyncio.Lock()
        self._numbers = itertools.count(time.time_ns())
        self._silent_until = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def notify(self, job_id: str) -> None:
        """Send the notification in the background."""
        if time.monotonic() < self._silent_until:
            return
        task = asyncio.create_task(self._send(job_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait shortly for notifications on their way, then close the connections."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=1)
        if self._pool is not None:
            await self._pool.aclose()

    async def _send(self, job_id: str) -> None:
        try:
            pool = await self._connected()
            nodes = await self._nodes()
            for node in nodes:  # before the queue, which takes four round trips and serves nodes that are away
                await pool.publish(queue_name(node), job_id)
            for node in nodes:
                await pool.enqueue_job(
                    FUNCTION,
                    job_id,
                    _job_id=f"{FUNCTION}:{job_id}:{next(self._numbers)}",
                    _queue_name=queue_name(node),
                    _expires=_EXPIRES_SECONDS,
                )
        except (RedisError, *TRANSIENT) as error:
            self._silent_until = time.monotonic() + SILENCE_SECONDS
            logger.warning("notification_lost", extra={"job_id": job_id, "error": str(error)})

    async def _connected(self) -> ArqRedis:
        async with self._connecting:  # many may notify before the first connection is made
            if self._pool is None:
                self._pool = await create_pool(self._settings, job_serializer=_pack, job_deserializer=_unpack)
            return self._pool


async def wake_agent(ctx: dict[Any, Any], job_id: str) -> None:
    """Wake the agent of this node (the arq function)."""
    logger.debug("notification_received", extra={"job_id": job_id})
    ctx["wake"]()


async def listen(redis_url: str, *, node: str, wake: Callable[[], None], stopping: asyncio.Event) -> None:
    """Wake the agent at every notification for this node, from its queue and its channel, until `stopping`."""
    channel = asyncio.create_task(_follow_channel(redis_url, node=node, wake=wake), name="channel")
    try:
        await _work_off_queue(redis_url, node=node, wake=wake, stopping=stopping)
    finally:
        channel.cancel()
        await asyncio.gather(channel, return_exceptions=True)


async def _work_off_queue(redis_url: str, *, node: str, wake: Callable[[], None], stopping: asyncio.Event) -> None:
    """Run arq's worker for this node until `stopping`; restart it with back-off when Redis goes away."""
    pause = 0.5
    while not stopping.is_set():
        started = time.monotonic()
        worker = _worker(redis_url, node=node, wake=wake)
        task = asyncio.create_task(worker.async_run(), name="arq")
        stop = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("notifications_interrupted", extra={"error": str(error), "retry_in": pause})
        finally:
            stop.cancel()
            task.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)
            await _close(worker)
        if not stopping.is_set():
            wake()
            pause = 0.5 if time.monotonic() - started > 60 else min(pause * 2, 30.0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), timeout=pause)


async def _follow_channel(redis_url: str, *, node: str, wake: Callable[[], None]) -> None:
    """Wake the agent at every message on the node's channel, for ever; while Redis is away the queue's side says so."""
    while True:
        with contextlib.suppress(RedisError, OSError):
            async with Redis.from_url(redis_url, socket_connect_timeout=1) as client, client.pubsub() as channel:
                await channel.subscribe(queue_name(node))
                async for _ in channel.listen():
                    wake()
        await asyncio.sleep(_CHANNEL_PAUSE_SECONDS)


def queue_name(node: str) -> str:
    """Return the arq queue of a node."""
    return f"deepe:node:{node}"


def redis_settings(redis_url: str) -> RedisSettings:
    """Return connection settings that survive a short absence of Redis but do not wait long for a long one."""
    settings = RedisSettings.from_dsn(redis_url)
    settings.database = NOTIFICATION_DATABASE
    if settings.unix_socket_path is not None:
        settings.unix_socket_path = unquote(settings.unix_socket_path)  # as redis-py does
    settings.conn_timeout = 1
    settings.conn_retries = 0
    settings.retry = Retry(ExponentialBackoff(cap=1, base=0.1), 3)
    settings.retry_on_error = [RedisConnectionError, RedisTimeoutError, OSError]
    return settings


def _worker(redis_url: str, *, node: str, wake: Callable[[], None]) -> Worker:
    return Worker(
        functions=[func(wake_agent, name=FUNCTION, timeout=30, max_tries=1, keep_result=0)],
        redis_settings=redis_settings(redis_url),
        queue_name=queue_name(node),
        ctx={"wake": wake},
        handle_signals=False,
        poll_delay=QUEUE_SECONDS,
        job_timeout=30,
        max_tries=1,
        keep_result=0,
        job_completion_wait=0,
        allow_abort_jobs=False,
        job_serializer=_pack,
        job_deserializer=_unpack,
        log_results=False,
    )


async def _close(worker: Worker) -> None:
    try:
        await worker.close()
    except (RedisError, OSError, AttributeError) as error:  # it never connected, or the connection is gone
        logger.debug("notifications_closed", extra={"error": str(error)})


def _pack(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


def _unpack(data: bytes) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(data)
    return loaded
