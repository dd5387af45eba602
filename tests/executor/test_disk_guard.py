"""A node with a full disk takes no jobs, says why, and comes back by itself."""

from pathlib import Path

import pytest

from app.domain.texts import Language, text
from app.executor.nodes.disk_guard import DiskGuard
from app.store import job_attempts, nodes
from app.store.nodes import NodeStatus
from app.store.session import Database
from tests.job_rows import START, add_node

MIB = 2**20
HOME, NODE = Path("home"), Path("node")


class Disks:
    """Two disks whose free space a test sets."""

    def __init__(self, *, min_free_bytes: int = 100 * MIB) -> None:
        self.free = {HOME: 1000 * MIB, NODE: 1000 * MIB}
        self.guard = DiskGuard(
            {"DEEPE_HOME": HOME, "DEEPE_NODE_HOME": NODE},
            min_free_bytes=min_free_bytes,
            free=lambda folder: self.free[folder],
        )


class TestGuard:
    async def test_refuses_for_the_fullest_disk(self) -> None:
        disks = Disks()
        disks.free = {HOME: 90 * MIB, NODE: 80 * MIB}

        refusal = await disks.guard.refusal()

        assert refusal == {
            "code": "node_disk_low",
            "params": {"place": "DEEPE_NODE_HOME", "free_mib": 80, "needed_mib": 100},
        }
        assert all("80" in text(refusal["code"], language, **refusal["params"]) for language in Language)

    @pytest.mark.parametrize(("free", "refuses"), [(99, True), (101, True), (124, True), (125, False)])
    async def test_takes_jobs_again_only_with_more_room(self, free: int, refuses: bool) -> None:
        disks = Disks()
        disks.free[HOME] = 99 * MIB
        assert await disks.guard.refusal() is not None

        disks.free[HOME] = free * MIB

        assert (await disks.guard.refusal() is not None) is refuses

    async def test_is_off_without_a_limit(self) -> None:
        disks = Disks(min_free_bytes=0)
        disks.free[HOME] = 0

        assert await disks.guard.refusal() is None

    async def test_a_folder_that_is_gone_is_no_full_disk(self, tmp_path: Path) -> None:
        guard = DiskGuard({"DEEPE_HOME": tmp_path / "gone"}, min_free_bytes=MIB)

        assert await guard.refusal() is None

    async def test_is_a_check_of_readiness(self) -> None:
        disks = Disks()
        await disks.guard.require()
        disks.free[HOME] = 0

        with pytest.raises(OSError, match="0 MiB left"):
            await disks.guard.require()


class TestNode:
    async def test_refuses_and_returns_with_its_beats(self, database: Database) -> None:
        node_id = await add_node(database)
        statuses = []

        for refusal in ({"code": "node_disk_low", "params": {}}, None):
            async with database.writing() as session:
                await nodes.heartbeat(session, node_id, now=START, refusal=refusal)
            async with database.reading() as session:
                statuses.append((await job_attempts.node_and_attempts(session, node_id))[0])

        assert statuses == [NodeStatus.REFUSING, NodeStatus.READY]
