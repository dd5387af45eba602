"""The faults: what each does to the installation, and how one sees that it has got over it.

Every fault is a coroutine on a `FaultInjector`: it hits, waits as long as the outage lasts, undoes it, and returns the
seconds from there until the sign that is named in its docstring, or None when there is nothing to wait for. It gets a
random generator of its own, so that one fault's choices do not shift those of the next. `NothingToHit` means that the
target is not there now; the injector takes another fault then.
"""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import httpx
import psutil
import redis.asyncio as redis_client

from app.executor.nodes.redis_notifier import RedisNotifier
from app.executor.supervisor import program
from tests.chaos.cluster import Folder, Node
from tests.chaos.proxy import Line as Network
from tests.executor.attempts import supervises
from tests.waiting import until

if TYPE_CHECKING:
    from tests.chaos.fault_injector import FaultInjector


class NothingToHit(Exception):
    """The target is not there, or somebody else is at it."""


Fault = Callable[["FaultInjector", Random], Awaitable[float | None]]

# ---- the service's own processes ------------------------------------------------------------------------------------


async def kill_worker(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL, restart. Sign: the node's next heartbeat."""
    with injector.holding_node(rng) as node:
        node.worker.kill()
        await asyncio.sleep(rng.choice((0.0, 0.5, 1.0)))
        return await _restarted(injector, node)


async def stop_worker(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGTERM as at an upgrade, restart. Sign: the node's next heartbeat."""
    with injector.holding_node(rng) as node:
        await node.worker.end()
        return await _restarted(injector, node)


async def freeze_worker(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGSTOP for some seconds. Sign: the node's next heartbeat."""
    with injector.holding_node(rng) as node:
        node.worker.send(signal.SIGSTOP)
        await asyncio.sleep(rng.uniform(0.5, 4.0))
        before = injector.signs
        node.worker.send(signal.SIGCONT)
        return await injector.until_changed(node.name, before)


async def kill_api(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL, restart. Sign: `/readyz`."""
    with injector.holding("api"):
        injector.cluster.api.kill()
        return await _api_restarted(injector, rng)


async def stop_api(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGTERM, restart. Sign: `/readyz`."""
    with injector.holding("api"):
        await injector.cluster.api.end()
        return await _api_restarted(injector, rng)


async def kill_submitter(injector: "FaultInjector", _: Random) -> float | None:
    """SIGKILL of the client in the middle of its request, restart."""
    with injector.holding("submitter"):
        injector.cluster.submitter.kill()
        injector.cluster.submitter.start()
    return None


# ---- attempts -------------------------------------------------------------------------------------------------------


async def kill_supervisor(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL. Sign: another supervisor holds the attempt, or its end is on disk."""
    with injector.holding_attempt(rng) as (_, folder):
        pid = _supervisor_pid(folder)
        _send(pid, signal.SIGKILL)
        return await _until(lambda: _is_over(folder) or _supervisor_now(folder) not in (None, pid))


async def freeze_supervisor(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGSTOP for some seconds."""
    with injector.holding_attempt(rng) as (_, folder):
        pid = _supervisor_pid(folder)
        _send(pid, signal.SIGSTOP)
        await asyncio.sleep(rng.uniform(0.5, 3.0))
        _send(pid, signal.SIGCONT)
    return None


async def kill_supervisor_and_worker(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL of both, restart of the worker. Sign: another supervisor holds the attempt, or its end is on disk."""
    with injector.holding_attempt(rng) as (node, folder), injector.holding(node.name):
        pid = _supervisor_pid(folder)
        node.worker.kill()
        _send(pid, signal.SIGKILL)
        await asyncio.sleep(rng.choice((0.0, 1.0)))
        node.worker.start()
        return await _until(lambda: _is_over(folder) or _supervisor_now(folder) not in (None, pid))


async def kill_fork_server(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL of what a worker starts supervisors with, and of what it forks at this moment."""
    with injector.holding_node(rng) as node:
        for process in node.fork_servers():
            _kill(process)
    return None


async def kill_reaper(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL of the second supervisor of the exit status; without the first one too, the end may stay unknown."""
    with injector.holding_attempt(rng) as (_, folder):
        injector.cluster.hurt.add(folder.attempt)
        _kill(folder.reaper)
    return None


async def kill_stage(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL of the script itself. Sign: the end of the attempt is on disk."""
    with injector.holding_attempt(rng) as (_, folder):
        injector.cluster.hurt.add(folder.attempt)
        _kill(folder.stage)
        return await _until(lambda: _is_over(folder))


async def kill_tree(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL of supervisor, reaper, script and all its children. Sign: the end of the attempt is on disk."""
    with injector.holding_attempt(rng) as (_, folder):
        injector.cluster.hurt.add(folder.attempt)
        _kill_all([folder.path])
        return await _until(lambda: _is_over(folder))


async def kill_child(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL of a process that the script started; the script goes on."""
    with injector.holding_attempt(rng) as (_, folder):
        stage = folder.stage
        children = stage.children(recursive=True) if stage is not None else []
        if not children:
            raise NothingToHit
        _kill(rng.choice(children))
    return None


async def cancel(injector: "FaultInjector", rng: Random) -> float | None:
    """Cancel over HTTP. Sign: the end of the attempt is on disk."""
    with injector.holding_attempt(rng) as (_, folder):
        job = await injector.job_of(folder.attempt)
        if job is None:
            raise NothingToHit
        injector.cluster.cancelled.add(job)
        async with injector.cluster.client() as client:
            with contextlib.suppress(httpx.HTTPError):
                answer = await client.post(f"/jobs/{job}:cancel")
                if answer.is_success:
                    return await _until(lambda: _is_over(folder))
    return None


async def four_supervisors(injector: "FaultInjector", rng: Random) -> float | None:
    """Four more supervisors on a folder at once, half of them to adopt it."""
    with injector.holding_attempt(rng) as (_, folder):
        twins = (asyncio.to_thread(_supervise, folder, *options) for options in ((), ("--adopt",), (), ("--adopt",)))
        await asyncio.gather(*twins)
    return None


# ---- the machine ----------------------------------------------------------------------------------------------------


async def reboot(injector: "FaultInjector", rng: Random) -> float | None:
    """Everything of a node dies at once and finds another boot id. Sign: the node's next heartbeat."""
    with injector.holding_node(rng) as node:
        folders = [path for path in node.home.attempts.glob("[!.]*") if path.is_dir()]
        injector.cluster.hurt |= {path.name for path in folders}
        forks = node.fork_servers()
        node.worker.kill()
        for fork in forks:
            _kill(fork)
        folders = [path for path in node.home.attempts.glob("[!.]*") if path.is_dir()]
        injector.cluster.hurt |= {path.name for path in folders}
        _kill_all(folders)
        for path in folders:
            with contextlib.suppress(OSError):
                state = json.loads((path / "state.json").read_bytes())
                (path / "state.json").write_text(json.dumps(state | {"boot_id": "the boot before"}))
        return await _restarted(injector, node)


# ---- Redis ----------------------------------------------------------------------------------------------------------


async def kill_redis(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL, restart after a while. Sign: the next transition of a job."""
    with injector.holding("redis"):
        injector.cluster.redis.stop()
        await asyncio.sleep(rng.choice((0.1, 1.0, 5.0)))
        await asyncio.to_thread(injector.cluster.redis.start)
        return await injector.until_changed("event", injector.signs)


async def flush_redis(injector: "FaultInjector", _: Random) -> float | None:
    """FLUSHALL. Sign: the next transition of a job."""
    with injector.holding("redis"):
        async with _redis(injector) as client:
            await client.flushall()
        return await injector.until_changed("event", injector.signs)


async def restore_redis(injector: "FaultInjector", rng: Random) -> float | None:
    """Start from what Redis held some time ago. Sign: the next transition of a job."""
    with injector.holding("redis"):
        old = injector.cluster.redis.folder / "old.rdb"
        dump = injector.cluster.redis.folder / "dump.rdb"
        if not old.exists():
            async with _redis(injector) as client:
                await client.save()
            dump.replace(old)
            raise NothingToHit
        injector.cluster.redis.stop()
        dump.write_bytes(old.read_bytes())
        old.unlink()
        await asyncio.to_thread(injector.cluster.redis.start)
        return await injector.until_changed("event", injector.signs)


async def freeze_redis(injector: "FaultInjector", rng: Random) -> float | None:
    """DEBUG SLEEP. Sign: the next transition of a job."""
    with injector.holding("redis"):
        async with _redis(injector) as client:
            await client.execute_command("DEBUG", "SLEEP", rng.choice((0.5, 3.0)))  # type: ignore[no-untyped-call]
        return await injector.until_changed("event", injector.signs)


async def repeat_notifications(injector: "FaultInjector", rng: Random) -> float | None:
    """Notify every node three times more of a job that runs."""
    with injector.holding_attempt(rng) as (_, folder):
        job = await injector.job_of(folder.attempt)

        async def names() -> Sequence[str]:
            return [node.name for node in injector.cluster.nodes]

        notifier = RedisNotifier(f"redis://127.0.0.1:{injector.cluster.redis.port}", nodes=names)
        for _ in range(3):
            notifier.notify(job or "unknown")
        await notifier.close()
    return None


# ---- the database ---------------------------------------------------------------------------------------------------


async def kill_postgres(injector: "FaultInjector", rng: Random) -> float | None:
    """SIGKILL of the postmaster, restart. Sign: the next transition of a job."""
    postgres = injector.cluster.postgres
    assert postgres is not None
    with injector.holding("postgres"):
        await asyncio.to_thread(postgres.kill)
        await asyncio.sleep(rng.choice((0.0, 0.5, 2.0)))
        await asyncio.to_thread(postgres.start)
        return await injector.until_changed("event", injector.signs)


async def stop_postgres(injector: "FaultInjector", rng: Random) -> float | None:
    """Fast stop, start. Sign: the next transition of a job."""
    postgres = injector.cluster.postgres
    assert postgres is not None
    with injector.holding("postgres"):
        await asyncio.to_thread(postgres.stop)
        await asyncio.sleep(rng.choice((0.0, 1.0)))
        await asyncio.to_thread(postgres.start)
        return await injector.until_changed("event", injector.signs)


async def cut_network(injector: "FaultInjector", rng: Random) -> float | None:
    """Break a node's connections to the database and refuse new ones. Sign: the node's next heartbeat."""
    return await _bad_network(injector, rng, Network.CUT)


async def swallow_network(injector: "FaultInjector", rng: Random) -> float | None:
    """Let nothing through between a node and the database, and tell nobody. Sign: the node's next heartbeat."""
    return await _bad_network(injector, rng, Network.SILENT)


async def slow_network(injector: "FaultInjector", rng: Random) -> float | None:
    """Delay every packet between a node and the database. Sign: the node's next heartbeat."""
    return await _bad_network(injector, rng, Network.SLOW)


async def lock_sqlite(injector: "FaultInjector", rng: Random) -> float | None:
    """Somebody holds the write lock of the file for a while. Sign: the next transition of a job."""
    with injector.holding("sqlite"):
        file = injector.cluster.database.url.partition("///")[2]
        await asyncio.to_thread(_hold_lock, file, rng.uniform(0.3, 2.0))
        return await injector.until_changed("event", injector.signs)


EVERYWHERE: dict[str, tuple[Fault, int]] = {
    "worker SIGKILL": (kill_worker, 10),
    "worker SIGTERM": (stop_worker, 4),
    "worker SIGSTOP": (freeze_worker, 4),
    "API SIGKILL": (kill_api, 3),
    "API SIGTERM": (stop_api, 1),
    "submitter SIGKILL": (kill_submitter, 2),
    "supervisor SIGKILL": (kill_supervisor, 12),
    "supervisor SIGSTOP": (freeze_supervisor, 4),
    "supervisor and worker SIGKILL": (kill_supervisor_and_worker, 5),
    "fork server SIGKILL": (kill_fork_server, 3),
    "reaper SIGKILL": (kill_reaper, 3),
    "stage SIGKILL": (kill_stage, 5),
    "whole tree SIGKILL": (kill_tree, 3),
    "child SIGKILL": (kill_child, 4),
    "cancel": (cancel, 5),
    "four more supervisors": (four_supervisors, 4),
    "reboot": (reboot, 3),
    "Redis SIGKILL": (kill_redis, 3),
    "Redis FLUSHALL": (flush_redis, 4),
    "Redis restored from old": (restore_redis, 3),
    "Redis DEBUG SLEEP": (freeze_redis, 2),
    "notifications repeated": (repeat_notifications, 4),
}
BACKENDS: dict[str, dict[str, tuple[Fault, int]]] = {
    "postgres": {
        **EVERYWHERE,
        "Postgres SIGKILL": (kill_postgres, 5),
        "Postgres fast stop": (stop_postgres, 2),
        "network cut": (cut_network, 3),
        "network silent": (swallow_network, 3),
        "network slow": (slow_network, 2),
    },
    "sqlite": {**EVERYWHERE, "SQLite locked": (lock_sqlite, 6)},
}

# ---- helpers --------------------------------------------------------------------------------------------------------


async def _restarted(injector: "FaultInjector", node: Node) -> float | None:
    before = injector.signs
    node.worker.start()
    return await injector.until_changed(node.name, before)


async def _api_restarted(injector: "FaultInjector", rng: Random) -> float | None:
    await asyncio.sleep(rng.choice((0.0, 1.0)))
    begun = time.monotonic()

    async def answers() -> bool:
        injector.cluster.api.start()  # again and again, as a service manager: it ends when it finds no database
        return await injector.cluster.api_answers()

    await until(answers, "the API", injector.cluster.report)
    return time.monotonic() - begun


async def _bad_network(injector: "FaultInjector", rng: Random, line: Network) -> float | None:
    with injector.holding_node(rng) as node:
        assert node.proxy is not None
        node.proxy.become(line)
        await asyncio.sleep(rng.uniform(0.5, 5.0))
        before = injector.signs
        node.proxy.become(Network.GOOD)
        return await injector.until_changed(node.name, before)


async def _until(look: Callable[[], bool], seconds: float = 60.0) -> float:
    begun = time.monotonic()
    while not look() and time.monotonic() - begun < seconds:  # noqa: ASYNC110 - other processes set no event
        await asyncio.sleep(0.02)
    return time.monotonic() - begun


def _supervise(folder: Folder, *options: str) -> None:
    command = [sys.executable, "-I", "-S", program.__file__, str(folder.path), *options]
    subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _is_over(folder: Folder) -> bool:
    return (folder.path / "exit.json").exists() or not folder.path.exists()


def _supervisor_pid(folder: Folder) -> int:
    pid = folder.supervisor_pid()
    if pid is None:
        raise NothingToHit
    return pid


def _supervisor_now(folder: Folder) -> int | None:
    now = Folder.of(folder.path)
    return now.supervisor_pid() if now is not None else None


def _kill(process: psutil.Process | None) -> None:
    if process is None:
        raise NothingToHit
    _send(process.pid, signal.SIGKILL)


def _processes_of(folders: Sequence[Path]) -> set[int]:
    """Return what keeps, or belongs to, these attempts."""
    names = {path.name for path in folders}
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            kept = any(supervises(process, folder) for folder in folders)
            if kept or process.environ().get("DEEPE_ATTEMPT") in names:
                found.add(pid)
    return found


def _kill_all(folders: Sequence[Path]) -> None:
    """Kill them as a power cut would: nobody gets a turn in between, and what was forked meanwhile dies, too."""
    frozen: set[int] = set()
    while more := _processes_of(folders) - frozen:
        for pid in more:
            _send(pid, signal.SIGSTOP)
        frozen |= more
    for pid in frozen:
        _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _redis(injector: "FaultInjector") -> "redis_client.Redis":
    if injector.cluster.redis.process is None:
        raise NothingToHit
    return redis_client.Redis(port=injector.cluster.redis.port)


def _hold_lock(file: str, seconds: float) -> None:
    with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        other.execute("ROLLBACK")
