"""A node's worker: the agent as the main loop, arq's notifications beside it (`python -m app.worker`, `deepe worker`).

Ends on SIGTERM or SIGINT within moments and leaves the stages running: their supervisors own them, and the next worker
of this node goes on where this one stopped.
"""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

from sqlalchemy.engine import make_url

from app.domain.accelerators import AcceleratorKind
from app.domain.containment import Containment
from app.domain.kinds import SlotPool, kinds_of
from app.domain.projects import EVERY_PROJECT
from app.executor.attempts.finalize import StageFinalizer
from app.executor.attempts.forecast import Forecasts
from app.executor.attempts.launch import StageLauncher
from app.executor.attempts.limits import LimitWatch
from app.executor.attempts.projections import Projections
from app.executor.attempts.script_status import NoScriptStatus, RedisScriptStatus
from app.executor.attempts.stage_sandbox import ContainedNode
from app.executor.containment.probe import (
    AccountUnusable,
    Bubblewrap,
    ContainmentUnavailable,
    find_account,
    find_containment,
)
from app.executor.engines.local import LocalEngine, boot_id
from app.executor.environments.builders import BuildRules
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environment_cleaning import DAY, CleaningRules, EnvironmentCleaning
from app.executor.environments.environment_probe import EnvironmentProbes
from app.executor.environments.method_probing import MethodProbing
from app.executor.environments.shipped import TorchSource
from app.executor.nodes.agent import NodeAgent, Pool, Timing
from app.executor.nodes.backoff import TRANSIENT, backoff_seconds, log_failure
from app.executor.nodes.disk_guard import DiskGuard
from app.executor.nodes.inventory import Hardware, this_hardware
from app.executor.nodes.joining import node_id
from app.executor.nodes.node_lock import NodeIsTaken, exclusive
from app.executor.nodes.notifier import listen_to_file
from app.executor.nodes.redis_notifier import listen
from app.executor.nodes.reporter import EnvironmentManager, NodeFacts
from app.observability import configure_logging
from app.presets.environments import Device
from app.registry.methods.files import MethodFiles
from app.registry.methods.script_modules import ScriptModules
from app.registry.methods.script_reading import ScriptReader
from app.registry.nodes.platforms import this_machine
from app.registry.scripts.root import ScriptRoot
from app.registry.scripts.versions import VersionStore
from app.secret_values import hide_secrets
from app.settings import Settings, SettingsError, load_settings
from app.store.home import Home, NodeHome, files_of_sqlite
from app.store.migrate import DatabaseUnusable, schema_state
from app.store.nodes import RegistrationRefused
from app.store.session import Database

logger = logging.getLogger(__name__)


class NodeRemoved(RegistrationRefused):
    """A person took the node out of the installation while its worker was running."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The node {name!r} was removed, and everything of it has ended. Start the worker again to add it anew."
        )


class HomeUnusable(Exception):
    """The disk of a home is full, read-only, or not ours."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"A worker must be able to write in DEEPE_HOME and DEEPE_NODE_HOME: {error}. Give it the rights or another "
            "folder, and start it again; scripts that run are found then."
        )


def main() -> int:
    """Run until told to stop; return the exit status."""
    try:
        settings = load_settings(serves=False)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    hide_secrets()
    return run(settings)


def run(settings: Settings) -> int:
    """Be the worker of this node until told to stop; return the exit status."""
    configure_logging(level=settings.log_level, form=settings.log_format)
    try:
        asyncio.run(work(settings))
    except NodeIsTaken:
        sys.stderr.write(f"Another worker is running as node {settings.node_name!r}; set DEEPE_NODE_NAME to add one.\n")
        return 2
    except DatabaseUnusable as error:
        sys.stderr.write(f"{error} {error.advice}\n")
        return 2
    except (RegistrationRefused, HomeUnusable, AccountUnusable, ContainmentUnavailable) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


async def work(settings: Settings) -> None:
    """Be the worker of this node until SIGTERM or SIGINT; raise `NodeIsTaken` if there is one already."""
    home, node_home = Home(settings.home), NodeHome(settings.node_home)
    with contextlib.ExitStack() as held:
        try:
            home.create()
            node_home.create()
            held.enter_context(exclusive(node_home.root / "agent.lock"))
        except OSError as error:
            raise HomeUnusable(error) from error
        await _work(settings, home, node_home)


def _devices(hardware: Hardware) -> frozenset[Device]:
    """Return what environments of this node can run on."""
    kinds = {accelerator.kind for accelerator in hardware.accelerators}
    found: dict[AcceleratorKind, Device] = {AcceleratorKind.CUDA: "cuda", AcceleratorKind.APPLE: "apple"}
    return frozenset({"cpu", *(found[kind] for kind in kinds if kind in found)})


async def _work(settings: Settings, home: Home, node_home: NodeHome) -> None:
    redis_url = settings.redis_url.get_secret_value() if settings.redis_url else None
    database = Database(settings.database_url, scope=EVERY_PROJECT)
    status = RedisScriptStatus(redis_url) if redis_url else NoScriptStatus()
    containment, bubblewrap = await asyncio.to_thread(
        find_containment, settings.containment, settings.stage_network, find_account(settings.stage_user)
    )
    contained = None if bubblewrap is None else _contained_node(settings, node_home, bubblewrap)
    hardware = await asyncio.to_thread(_hardware, settings, node_home, containment)
    reporter = EnvironmentManager(
        database=database,
        facts=_facts(settings, node_home),
        hardware=hardware,
        node_home=node_home,
        search=CondaSearch.of(os.environ, root=settings.conda_root),
        rules=BuildRules(
            builder=settings.env_builder,
            channels=settings.conda_channels,
            offline=settings.offline,
            archive=home.environments,
            torch=TorchSource(settings.torch_index, settings.torch_find_links),
            devices=_devices(hardware),
        ),
        disks=DiskGuard(
            {"DEEPE_HOME": home.runs, "DEEPE_NODE_HOME": node_home.root}, min_free_bytes=settings.min_free_bytes
        ),
        cleaning=environment_cleaning(settings, database),
        probing=_probing(database, home, node_home),
    )
    stopping = asyncio.Event()
    _on_stop(stopping.set)
    try:
        registered = await _register(database, reporter, stopping)
        if registered is None:
            return
        agent = _agent(settings, database, home, node_home, reporter, status, redis_url, contained, node_id=registered)
        _on_stop(functools.partial(_stop, stopping, agent))
        await _tell_start(settings, hardware, containment, redis=redis_url is not None)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(agent.run(stopping))
            if redis_url is None:
                fifo = home.wakeup_fifos / settings.node_name
                tasks.create_task(listen_to_file(home.notify_file, fifo=fifo, wake=agent.wake, stopping=stopping))
            else:
                tasks.create_task(listen(redis_url, node=settings.node_name, wake=agent.wake, stopping=stopping))
        if agent.removed:
            raise NodeRemoved(settings.node_name)
    finally:
        await status.close()
        await database.close()
        logger.info("worker_stopped", extra={"node": settings.node_name})


async def _register(database: Database, reporter: EnvironmentManager, stopping: asyncio.Event) -> str | None:
    """Make the node known as soon as the database answers; None if told to stop before.

    Raises `DatabaseUnusable` when no waiting helps.
    """
    failures = 0
    while not stopping.is_set():
        try:
            await schema_state(database)
            return await reporter.register()
        except TRANSIENT as error:
            failures += 1
            pause = backoff_seconds(failures)
            log_failure(logger, "node_not_registered", error, {"next_try_in": pause})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), timeout=pause)
    return None


def _agent(
    settings: Settings,
    database: Database,
    home: Home,
    node_home: NodeHome,
    reporter: EnvironmentManager,
    status: RedisScriptStatus | NoScriptStatus,
    redis_url: str | None,
    contained: ContainedNode | None,
    *,
    node_id: str,
) -> NodeAgent:
    launcher = StageLauncher(
        database=database,
        home=home,
        prefixes=reporter,
        status=status,
        environ=os.environ,
        variables=tuple(filter(None, settings.stage_variables.split(","))),
        redis_url=redis_url,
        runner_port=settings.runner_port,
        grace_seconds=settings.stop_grace_seconds,
        secrets_key=settings.given_secrets_key,
        target_addresses=settings.target_addresses,
        containment=contained,
    )
    engine = LocalEngine(node_home)
    return NodeAgent(
        database=database,
        node_id=node_id,
        engine=engine,
        pools=tuple(Pool(kinds_of(pool), _slots(pool, settings)) for pool in SlotPool),
        launcher=launcher,
        finalizer=StageFinalizer(database=database, home=home, status=status, compare_answers=settings.compare_answers),
        reporter=reporter,
        projections=Projections(home),
        forecasts=Forecasts(home),
        limits=LimitWatch(home, engine),
        # neither a FIFO nor a touched file is sure to reach another machine
        timing=Timing(poll_seconds=settings.poll_seconds if redis_url else min(settings.poll_seconds, 2.0)),
    )


def _facts(settings: Settings, node_home: NodeHome) -> NodeFacts:
    return NodeFacts(
        name=settings.node_name,
        platform=this_machine(),
        slots=settings.slots,
        boot_id=boot_id(),
        home_id=node_id(node_home),
        labels=settings.node_labels,
        join_token=settings.join_token.get_secret_value() if settings.join_token else None,
    )


def _contained_node(settings: Settings, node_home: NodeHome, bubblewrap: Bubblewrap) -> ContainedNode:
    url = make_url(settings.database_url)
    database = Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None
    named = (settings.stage_readable, settings.stage_writable, settings.stage_hidden)
    readable, writable, hidden = (tuple(map(Path, filter(None, paths.split(",")))) for paths in named)
    return ContainedNode(
        bubblewrap=bubblewrap,
        node_home=node_home,
        service_files=files_of_sqlite(database) if database is not None else (),
        readable=readable,
        writable=writable,
        hidden=hidden,
    )


def _hardware(settings: Settings, node_home: NodeHome, containment: Containment) -> Hardware:
    return this_hardware(
        os.environ,
        home=settings.home,
        node_home=node_home,
        simulated=settings.simulated_accelerators,
        foreign_memory_mib=settings.foreign_memory_mib,
        containment=containment,
    )


def _slots(pool: SlotPool, settings: Settings) -> int:
    match pool:
        case SlotPool.STAGES:
            return settings.slots
        case SlotPool.INFERENCE:
            return settings.inference_slots
        case SlotPool.BUILDS:
            return 1
        case _:
            assert_never(pool)


async def _tell_start(settings: Settings, hardware: Hardware, containment: Containment, *, redis: bool) -> None:
    """Say once in the log what this worker works with."""
    machine = await hardware.inventory()
    fields = {
        "node": settings.node_name,
        "redis": redis,
        "system": machine.system,
        "cpus": machine.cpus,
        "memory_gib": round(machine.memory_bytes / 1024**3, 1),
        "containment": containment.mode.value,
        "accelerators": [
            f"{one.name} {one.memory_mib} MiB" if one.memory_mib is not None else one.name
            for one in hardware.accelerators
        ],
    }
    logger.info("worker_started", extra=fields)


def _probing(database: Database, home: Home, node_home: NodeHome) -> MethodProbing:
    files = MethodFiles(ScriptRoot(home.scripts), VersionStore(home.versions))
    probes = EnvironmentProbes(node_home.environments, os.environ)
    return MethodProbing(database=database, modules=ScriptModules(files), reader=ScriptReader(files), probes=probes)


def environment_cleaning(settings: Settings, database: Database) -> EnvironmentCleaning:
    """Return the clean-up of this node's environments."""
    rules = CleaningRules(
        keep_seconds=settings.keep_environment_days * DAY,
        # before jobs are refused
        min_free_bytes=2 * settings.min_free_bytes,
    )
    search = CondaSearch.of(os.environ, root=settings.conda_root)
    envs_dir = NodeHome(settings.node_home).environments
    return EnvironmentCleaning(database=database, envs_dir=envs_dir, search=search, rules=rules)


def _stop(stopping: asyncio.Event, agent: NodeAgent) -> None:
    stopping.set()
    agent.wake()


def _on_stop(act: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, act)


if __name__ == "__main__":
    sys.exit(main())
