"""Which builds a node orders, and for whom it gives up."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event
from sqlmodel import col, select

from app.domain.enums import EndReason, JobKind, JobStatus, Platform
from app.executor.environments.builders import BuildRules
from app.executor.environments.conda import CondaSearch
from app.executor.nodes.reporter import EnvironmentManager, NodeFacts, build_job
from app.executor.runs.job_spec import JobSpec
from app.registry.environments.specs import parse_spec, spec_hash
from app.store import job_attempts, job_status, nodes
from app.store import jobs as store
from app.store.home import NodeHome
from app.store.session import Database
from app.store.tables import EnvironmentRow, JobRow, NodeRow
from tests import job_rows
from tests.executor.machines import machine_with

SPEC = "dependencies: [python]\n"


class Node:
    """A node without any environment, and the database it looks into."""

    def __init__(self, root: Path, database: Database) -> None:
        self.database = database
        self.home = NodeHome(root / "node")
        self.home.create()
        self.environments = EnvironmentManager(
            database=database,
            facts=NodeFacts(name="here", platform=Platform.CPU, slots=1, boot_id="boot"),
            hardware=machine_with(root),
            node_home=self.home,
            search=CondaSearch(environ={"PATH": ""}, home=root, root=root / "no-conda"),
            rules=BuildRules(builder="venv"),
        )
        self.id = ""

    async def know(self, name: str, spec: str | None) -> None:
        """Register an environment."""
        now = datetime.now(UTC)
        row = EnvironmentRow(
            id=str(uuid4()),
            name=name,
            name_key=name,
            spec=spec,
            spec_hash=spec_hash(parse_spec(spec)) if spec else None,
            created_at=now,
            updated_at=now,
        )
        async with self.database.writing() as session:
            session.add(row)

    async def other(self, *environments: str, silent: timedelta = timedelta()) -> str:
        """Make another node known that has these environments; return its id."""
        other = await job_rows.add_node(self.database, "other", environments=environments)
        async with self.database.writing() as session:
            await nodes.heartbeat(session, other, now=datetime.now(UTC) - silent)
        return other

    async def builds(self) -> list[JobRow]:
        async with self.database.reading() as session:
            statement = select(JobRow).where(JobRow.kind == JobKind.ENVIRONMENT).order_by(col(JobRow.created_at))
            return list((await session.exec(statement)).all())

    async def fail_build(self) -> None:
        """End the build that is queued."""
        claim = await job_rows.claim(self.database, self.id, kinds=[JobKind.ENVIRONMENT])
        assert claim is not None
        async with self.database.writing() as session:
            assert await job_attempts.finish(session, claim, job_rows.FAILURE, now=datetime.now(UTC))

    async def job(self, job_id: str) -> JobRow:
        async with self.database.reading() as session:
            return await store.get(session, job_id)


@pytest.fixture
async def node(tmp_path: Path, database: Database) -> Node:
    node = Node(tmp_path, database)
    node.id = await node.environments.register()
    return node


class TestOrders:
    async def test_one_build_however_many_wait_and_look(self, node: Node) -> None:
        await node.know("tiny", SPEC)
        for _ in range(3):
            await job_rows.add_job(node.database, environment="tiny")

        for _ in range(2):
            await node.environments.request_builds()

        (build,) = await node.builds()
        order = JobSpec.of(build).build
        assert order is not None
        assert (build.environment, build.node_id, build.status) == ("tiny", node.id, JobStatus.QUEUED)
        assert (order.name, order.spec) == ("tiny", SPEC)

    async def test_second_order_at_the_same_moment_is_dropped(self, node: Node) -> None:
        async with node.database.writing() as session:
            first = await build_job(session, "tiny", SPEC, node_id=node.id)
        async with node.database.writing() as session:
            second = await build_job(session, "tiny", SPEC, node_id=node.id)

        assert (first is not None, second) == (True, None)

    async def test_base_needs_no_specification(self, node: Node) -> None:
        await job_rows.add_job(node.database, environment="base")

        await node.environments.request_builds()

        assert [build.environment for build in await node.builds()] == ["base"]

    async def test_nothing_for_jobs_that_wait_for_another_job(self, node: Node) -> None:
        await node.know("later", SPEC)
        first = await job_rows.add_job(node.database, environment="base")
        await job_rows.add_job(node.database, environment="later", blocked_by=first)

        await node.environments.request_builds()

        assert [build.environment for build in await node.builds()] == ["base"]

    async def test_again_after_a_failure_for_a_job_that_came_later(self, node: Node) -> None:
        await node.know("tiny", SPEC)
        waited = await job_rows.add_job(node.database, environment="tiny")
        await node.environments.request_builds()
        await node.fail_build()
        later = await job_rows.add_job(node.database, environment="tiny", updated_at=datetime.now(UTC))

        await node.environments.request_builds()
        await node.environments.request_builds()

        assert (await node.job(waited)).reason is EndReason.ENV_BUILD_FAILED
        assert (await node.job(later)).status is JobStatus.QUEUED
        assert [build.status for build in await node.builds()] == [JobStatus.FAILED, JobStatus.QUEUED]

    async def test_not_again_for_who_waits_when_the_build_is_cancelled(self, node: Node) -> None:
        await node.know("tiny", SPEC)
        job_id = await job_rows.add_job(node.database, environment="tiny")
        await node.environments.request_builds()
        (build,) = await node.builds()
        async with node.database.writing() as session:
            await job_status.request_cancel(session, build.id, now=datetime.now(UTC))

        await node.environments.request_builds()

        row = await node.job(job_id)
        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.ENV_BUILD_FAILED)
        assert row.reason_params["build"] == build.id
        assert len(await node.builds()) == 1

    @pytest.mark.parametrize(("silent", "status"), [(0, JobStatus.QUEUED), (3600, JobStatus.FAILED)])
    async def test_not_again_while_a_living_node_has_it(self, node: Node, silent: int, status: JobStatus) -> None:
        await node.know("tiny", SPEC)
        await node.other("tiny", silent=timedelta(seconds=silent))
        job_id = await job_rows.add_job(node.database, environment="tiny")
        await node.environments.request_builds()
        await node.fail_build()

        await node.environments.request_builds()

        assert (await node.job(job_id)).status is status
        assert len(await node.builds()) == 1

    @pytest.mark.parametrize(("silent", "nodes_that_build"), [(0, 1), (3600, 2)])
    async def test_waits_for_the_build_of_a_living_node_only(
        self, node: Node, silent: int, nodes_that_build: int
    ) -> None:
        await node.know("tiny", SPEC)
        other = await node.other(silent=timedelta(seconds=silent))
        async with node.database.writing() as session:
            await build_job(session, "tiny", SPEC, node_id=other)
        await job_rows.add_job(node.database, environment="tiny")

        await node.environments.request_builds()

        assert len({build.node_id for build in await node.builds()}) == nodes_that_build

    async def test_again_if_the_specification_was_mended(self, node: Node) -> None:
        await node.know("tiny", SPEC)
        await node.other("tiny")
        await job_rows.add_job(node.database, environment="tiny")
        await node.environments.request_builds()
        await node.fail_build()
        async with node.database.writing() as session:
            row = (await session.exec(select(EnvironmentRow))).one()
            row.spec = "dependencies: [python, pip]\n"
            session.add(row)

        await node.environments.request_builds()

        assert len(await node.builds()) == 2


class TestGivesUp:
    async def test_job_whose_environment_nobody_knows_fails(self, node: Node) -> None:
        job_id = await job_rows.add_job(node.database, environment="unheard-of")

        await node.environments.request_builds()

        row = await node.job(job_id)
        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.ENV_MISSING)
        assert await node.builds() == []

    async def test_job_waits_for_the_node_that_has_it(self, node: Node) -> None:
        await node.other("theirs")
        job_id = await job_rows.add_job(node.database, environment="theirs")

        await node.environments.request_builds()

        assert (await node.job(job_id)).status is JobStatus.QUEUED


class TestNode:
    async def test_keeps_its_id_and_tells_what_is_placed(self, node: Node) -> None:
        prefix = node.home.environments / "placed"
        (prefix / "bin").mkdir(parents=True)
        (prefix / "bin" / "python").touch()
        (prefix / "pyvenv.cfg").touch()

        again = await node.environments.register()
        await node.environments.beat()

        assert again == node.id
        async with node.database.reading() as session:
            row = (await session.exec(select(NodeRow))).one()
        assert row.environments == ["placed"]
        assert await node.environments.prefix("placed") == prefix
        assert await node.environments.prefix("unheard-of") is None


class TestPatience:
    async def test_waits_for_an_environment_that_nobody_has(self, node: Node) -> None:
        patient = await job_rows.add_job(node.database, environment="gone", launch=JobSpec(wait=True).document())
        other = await job_rows.add_job(node.database, environment="gone")

        await node.environments.request_builds()

        assert (await node.job(patient)).status is JobStatus.QUEUED
        assert (await node.job(other)).reason is EndReason.ENV_MISSING


class TestOthers:
    @pytest.mark.parametrize(("state", "builds"), [("known", 0), ("missing", 1)])
    async def test_what_only_another_node_can_build_is_left_to_it(self, node: Node, state: str, builds: int) -> None:
        await node.know("foreign", "dependencies: [ffmpeg]\n")
        other = await node.other()
        async with node.database.writing() as session:
            states = [{"name": "foreign", "state": state}]
            await nodes.heartbeat(session, other, now=datetime.now(UTC), environment_states=states)
        await job_rows.add_job(node.database, environment="foreign")

        await node.environments.request_builds()

        assert len(await node.builds()) == builds


class TestBeat:
    async def test_tells_states_and_writes_them_only_when_they_changed(self, node: Node) -> None:
        await node.know("tiny", SPEC)
        await node.know("foreign", "dependencies: [ffmpeg]\n")

        async def states() -> dict[str, str]:
            async with node.database.reading() as session:
                row = await nodes.get_node(session, node.id)
                return {state["name"]: state["state"] for state in row.environment_states}

        async def forget() -> None:
            async with node.database.writing() as session:
                await nodes.heartbeat(session, node.id, now=datetime.now(UTC), environment_states=[])

        await node.environments.prefix("nothing")  # a look
        await node.environments.beat()
        told = await states()
        await forget()
        await node.environments.beat()
        untouched = await states()
        await node.know("later", SPEC)
        await node.environments.prefix("nothing")
        await node.environments.beat()

        assert told == {"base": "known", "tiny": "known", "foreign": "missing"}
        assert untouched == {}
        assert await states() == {**told, "later": "known"}

    async def test_beat_writes_a_time_only_unless_something_changed(self, node: Node) -> None:
        written: list[str] = []

        def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("UPDATE node"):
                written.append(statement)

        event.listen(node.database.engine.sync_engine, "before_cursor_execute", note)
        for _ in range(2):
            await node.environments.beat()
        async with node.database.writing() as session:  # dead: what is said now is not heard
            row = await nodes.get_node(session, node.id)
            row.dead_at = datetime.now(UTC)
            session.add(row)
        written.pop()
        await node.environments.beat()
        async with node.database.writing() as session:
            await nodes.revive(session, node.id, now=datetime.now(UTC))
        written.pop()
        await node.environments.beat()

        told = ["inventory=" in statement for statement in written]
        assert told == [True, False, False, True]
