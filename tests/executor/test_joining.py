"""Who may be which node: identity by the node home, the join token, labels."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.enums import Platform
from app.domain.labels import automatic_labels, parse_labels
from app.executor.nodes.joining import (
    JoinTokenWrong,
    NodeIdUnreadable,
    node_id,
    require_join_token,
    set_join_token,
)
from app.store import job_attempts, nodes
from app.store.home import NodeHome
from app.store.nodes import NodeHomeShared, NodeNameTaken, NodeNotFound, NodeStatus
from app.store.session import Database
from app.store.tables import NodeRow

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TOKEN = "kTz4-1xQ8vB2m7Lw0sRd"


async def register(database: Database, name: str = "gpu-1", *, now: datetime = NOW, **who: Any) -> NodeRow:
    said = {"home_id": "home-a", "boot_id": "boot", "hostname": "rack-1", **who}
    async with database.writing() as session:
        row = await nodes.register_node(
            session, name=name, platform=Platform.CPU, accelerators=(), environments=(), slots=1, now=now, **said
        )
        await nodes.heartbeat(session, row.id, now=now, inventory={"hostname": said["hostname"]})
    return row


async def change(database: Database, node: str, **values: Any) -> None:
    async with database.writing() as session:
        row = await nodes.get_node(session, node)
        for column, value in values.items():
            setattr(row, column, value)
        session.add(row)


class TestNodeId:
    def test_is_made_once_and_stays(self, tmp_path: Path) -> None:
        home = NodeHome(tmp_path / "node")
        home.create()

        made = node_id(home)

        assert node_id(home) == made
        assert [path.name for path in home.root.iterdir() if path.is_file()] == ["node-id"]
        assert stat.S_ISREG(home.node_id.stat().st_mode)

    @pytest.mark.parametrize("content", ["", "no id", "12"])
    def test_damaged_file_is_not_replaced_silently(self, tmp_path: Path, content: str) -> None:
        home = NodeHome(tmp_path)
        home.node_id.write_text(content)

        with pytest.raises(NodeIdUnreadable, match="holds no node id"):
            node_id(home)


class TestRegistration:
    async def test_same_home_is_the_same_node(self, database: Database) -> None:
        first = await register(database)

        again = await register(database, boot_id="after a reboot", now=NOW + timedelta(seconds=30))

        assert (again.id, again.boot_id) == (first.id, "after a reboot")

    async def test_another_machine_cannot_take_the_name(self, database: Database) -> None:
        await register(database)

        with pytest.raises(NodeNameTaken, match=r"DEEPE_NODE_NAME.*deepe nodes declare-dead gpu-1") as error:
            await register(database, home_id="home-b", hostname="rack-2", now=NOW + timedelta(days=3))

        assert "rack-1" in str(error.value)

    async def test_unless_the_old_one_is_dead(self, database: Database) -> None:
        old = await register(database)
        await change(database, "gpu-1", dead_at=NOW)

        new = await register(database, home_id="home-b", hostname="rack-2")

        assert new.id != old.id
        async with database.reading() as session:
            assert (await nodes.get_node(session, "gpu-1")).id == new.id
            assert [row.id for row in await nodes.all_nodes(session)] == [new.id]
            assert (await job_attempts.node_and_attempts(session, old.id))[0] is NodeStatus.REMOVED
            with pytest.raises(NodeNotFound):
                await nodes.get_node(session, old.id)
        async with database.writing() as session:
            assert not await nodes.heartbeat(session, old.id, now=NOW)
            assert not await nodes.revive(session, old.id, now=NOW)

    async def test_dead_node_stays_dead_until_it_proves_that_nothing_is_left(self, database: Database) -> None:
        row = await register(database)
        await change(database, "gpu-1", dead_at=NOW)

        again = await register(database, now=NOW + timedelta(hours=1))

        assert (again.id, again.dead_at is not None, again.heartbeat_at) == (row.id, True, NOW)
        async with database.writing() as session:
            assert await nodes.revive(session, row.id, now=NOW + timedelta(hours=1))
            assert not await nodes.revive(session, row.id, now=NOW + timedelta(hours=1))
            assert (await job_attempts.node_and_attempts(session, row.id))[0] is NodeStatus.READY

    async def test_row_of_an_older_version_is_adopted(self, database: Database) -> None:
        row = await register(database, home_id="")

        assert (await register(database, home_id="home-a")).id == row.id

    async def test_two_machines_must_not_share_a_node_home(self, database: Database) -> None:
        await register(database)

        with pytest.raises(NodeHomeShared, match="rack-1"):
            await register(database, boot_id="other kernel", hostname="rack-2", now=NOW + timedelta(seconds=10))
        # a container that was started again has another host name, a machine after a reboot another boot id
        await register(database, hostname="rack-2")
        await register(database, hostname="rack-2", boot_id="other kernel")
        await register(database, boot_id="third", hostname="rack-3", now=NOW + timedelta(hours=1))


class TestJoinToken:
    async def test_nobody_is_asked_until_the_api_has_one(self, database: Database) -> None:
        async with database.reading() as session:
            await require_join_token(session, None)
            await require_join_token(session, TOKEN)

    async def test_must_be_that_of_the_api(self, database: Database) -> None:
        async with database.writing() as session:
            await set_join_token(session, TOKEN)

        async with database.reading() as session:
            await require_join_token(session, TOKEN)
            with pytest.raises(JoinTokenWrong, match="is not set"):
                await require_join_token(session, None)
            with pytest.raises(JoinTokenWrong, match="differs"):
                await require_join_token(session, TOKEN + "x")

    async def test_can_be_changed_and_taken_away(self, database: Database) -> None:
        for token in (TOKEN, TOKEN, "another" + TOKEN):
            async with database.writing() as session:
                await set_join_token(session, token)
        async with database.reading() as session:
            await require_join_token(session, "another" + TOKEN)
            with pytest.raises(JoinTokenWrong):
                await require_join_token(session, TOKEN)

        async with database.writing() as session:
            await set_join_token(session, None)
            await require_join_token(session, None)


class TestLabels:
    def test_reads_what_an_operator_writes(self) -> None:
        assert parse_labels(" gpu=a100 , zone = b, example.com/rack=7,empty=,") == {
            "gpu": "a100",
            "zone": "b",
            "example.com/rack": "7",
            "empty": "",
        }
        assert parse_labels("") == {}

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("gpu", "'gpu' is no label"),
            ("gpu=a,gpu=b", "given twice"),
            ("-x=a", "-x=a is no label"),
            ("x=a b", "x=a b is no label"),
            ("=a", "=a is no label"),
            ("x=" + "a" * 64, "is no label"),
            (",".join(f"x{n}=a" for n in range(65)), "at most 64"),
        ],
    )
    def test_says_what_is_wrong(self, text: str, problem: str) -> None:
        with pytest.raises(ValueError, match=problem):
            parse_labels(text)

    def test_node_says_some_unasked(self) -> None:
        card = Accelerator(id="1", index=0, kind=AcceleratorKind.CUDA, name="NVIDIA H100 80GB HBM3")
        other = Accelerator(id="2", index=1, kind=AcceleratorKind.CUDA, name="NVIDIA L4")

        assert automatic_labels("gpu_1.", Platform.CUDA, [card, card]) == {
            "node": "gpu_1",
            "platform": "cuda",
            "accelerator": "NVIDIA-H100-80GB-HBM3",
        }
        assert "accelerator" not in automatic_labels("a", Platform.CUDA, [card, other])
        parse_labels(",".join(f"{k}={v}" for k, v in automatic_labels("_", Platform.CPU, [card]).items()))

    async def test_those_of_people_win_and_survive_a_restart(self, database: Database) -> None:
        await register(database, labels={"zone": "a", "node": "gpu-1"})
        async with database.writing() as session:
            await nodes.set_extra_labels(session, await nodes.get_node(session, "gpu-1"), {"zone": "b", "pool": "x"})

        row = await register(database, labels={"zone": "c"})

        assert row.labels == {"zone": "b", "pool": "x"}
        async with database.writing() as session:
            await nodes.set_extra_labels(session, await nodes.get_node(session, "gpu-1"), {})
            assert (await nodes.get_node(session, "gpu-1")).labels == {"zone": "c"}
