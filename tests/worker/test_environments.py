"""Environments that jobs wait for: built once, by a job with a log, and then the stage runs in them."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlmodel import select

from app.domain.enums import EndReason, JobKind, JobStatus
from app.executor.nodes.reporter import build_job
from app.registry.environments.specs import parse_spec, spec_hash
from app.store.nodes import all_nodes, heartbeat
from app.store.tables import EnvironmentRow, JobRow
from tests.executor.channel import make_channel
from tests.waiting import until
from tests.worker.harness import Site

# without conda this one is refused, at once
IMPOSSIBLE = "dependencies: [python, ffmpeg]\n"

OFFLINE = {"PIP_NO_INDEX": "1", "DEEPE_ENV_BUILDER": "venv"}
SHOW = """
import json, os, play
play.adapter()
print(json.dumps([os.environ.get("CONDA_PREFIX"), os.environ.get("GREETING")]))
"""


async def register(site: Site, name: str, spec: str) -> None:
    now = datetime.now(UTC)
    row = EnvironmentRow(
        id=str(uuid4()),
        name=name,
        name_key=name,
        spec=spec,
        spec_hash=spec_hash(parse_spec(spec)),
        created_at=now,
        updated_at=now,
    )
    async with site.database.writing() as session:
        session.add(row)


@pytest.fixture(scope="session")
def channel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a conda channel: a prefix of its packages is made ten times as quickly as a venv with pip."""
    return make_channel(tmp_path_factory.mktemp("conda") / "channel")


@pytest.fixture
def conda(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a worker that builds from conda channels."""
    return {"DEEPE_ENV_BUILDER": "rattler", "RATTLER_CACHE_DIR": str(tmp_path / "cache")}


async def builds(site: Site) -> list[JobRow]:
    async with site.database.reading() as session:
        return list((await session.exec(select(JobRow).where(JobRow.kind == JobKind.ENVIRONMENT))).all())


class TestBuild:
    async def test_is_made_once_for_all_who_wait(self, any_site: Site, channel: str, conda: dict[str, str]) -> None:
        """A conda prefix, whose activation script gives the stage a variable."""
        await register(any_site, "greeting", f"channels: ['{channel}']\ndependencies: [python, greeter=1.0]\n")
        ids = [await any_site.submit(SHOW, environment="greeting") for _ in range(2)]

        any_site.start_worker(DEEPE_SLOTS="2", **conda)
        rows = await any_site.wait_for_end(*ids)

        assert [row.status for row in rows] == [JobStatus.SUCCEEDED] * 2, any_site.story(rows[0])
        (build,) = await builds(any_site)
        assert (build.status, build.environment) == (JobStatus.SUCCEEDED, "greeting")
        assert "built by rattler" in any_site.output(build.id)
        (prefix,) = (path for path in any_site.node_home().environments.glob("greeting-*") if path.is_dir())
        assert all(f"hello from {prefix}" in any_site.output(job_id) for job_id in ids)

    async def test_failure_fails_who_waits_with_the_end_of_its_log(self, any_site: Site) -> None:
        await register(any_site, "broken", IMPOSSIBLE)
        waiting = await any_site.submit_chain((JobKind.TRAINING, SHOW), (JobKind.SAVING, SHOW), environment="broken")
        other = await any_site.submit()

        any_site.start_worker(**OFFLINE)
        rows = await any_site.wait_for_end(*waiting, other)

        assert [(row.status, row.reason) for row in rows] == [
            (JobStatus.FAILED, EndReason.ENV_BUILD_FAILED),
            (JobStatus.CANCELLED, EndReason.PREDECESSOR_FAILED),
            (JobStatus.SUCCEEDED, EndReason.COMPLETED),
        ]
        (build,) = await builds(any_site)
        assert (build.status, build.reason) == (JobStatus.FAILED, EndReason.ENV_BUILD_FAILED)
        params = rows[0].reason_params
        assert (params["build"], params["environment"]) == (build.id, "broken")
        assert any("ffmpeg" in line for line in params["log_tail"])

    async def test_failure_spares_jobs_that_another_node_can_run(
        self, site: Site, channel: str, conda: dict[str, str]
    ) -> None:
        await register(
            site, "shared", f"channels: ['{channel}']\ndependencies: [python, greeter=2.0]\n"
        )  # there is 1.0
        busy = await site.submit("import play\nplay.wait_for('go')\nplay.adapter()\n")
        site.start_worker("two")
        await site.wait(busy, JobStatus.RUNNING)
        other = site.node_home("two").environments
        (other / "shared").symlink_to(other / "base")

        async def known() -> bool:
            async with site.database.reading() as session:
                return any("shared" in node.environments for node in await all_nodes(session))

        await until(known, "the environment of node two", report=site.report)
        job_id = await site.submit(environment="shared")

        site.start_worker("one", **conda)

        async def build_failed() -> bool:
            return [build.status for build in await builds(site)] == [JobStatus.FAILED]

        await until(build_failed, "the failed build", report=site.report)
        site.open("go")
        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED, site.story(row)
        assert len(await builds(site)) == 1

    async def test_base_is_built_where_there_is_none(self, site: Site) -> None:
        job_id = await site.submit(SHOW)

        site.start_bare_worker(**OFFLINE)
        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED, site.story(row)
        assert [build.environment for build in await builds(site)] == ["base"]


class TestSpecification:
    async def test_change_leaves_running_jobs_alone_and_gives_the_next_a_new_build(
        self, site: Site, channel: str, conda: dict[str, str]
    ) -> None:
        spec = f"channels: ['{channel}']\ndependencies: [python]\nvariables: {{GREETING: %s}}\n"
        await register(site, "mine", spec % "old")
        running = await site.submit("import play\nplay.wait_for('go')\n" + SHOW, environment="mine")
        site.start_worker(DEEPE_SLOTS="2", **conda)
        await site.wait(running, JobStatus.RUNNING)
        async with site.database.writing() as session:
            row = (await session.exec(select(EnvironmentRow))).one()
            row.spec = spec % "new"
            row.spec_hash = spec_hash(parse_spec(row.spec))

        later = await site.submit(SHOW, environment="mine")
        new = await site.wait(later)
        old_status = (await site.row(running)).status
        site.open("go")
        old = await site.wait(running)

        assert (new.status, old_status, old.status) == (JobStatus.SUCCEEDED, JobStatus.RUNNING, JobStatus.SUCCEEDED)
        (old_prefix, old_word), (new_prefix, new_word) = [
            json.loads(site.output(job_id).splitlines()[-1]) for job_id in (running, later)
        ]
        assert (old_word, new_word) == ("old", "new")
        assert old_prefix != new_prefix


class TestPack:
    async def test_carries_an_environment_to_a_node_without_network(
        self, site: Site, channel: str, conda: dict[str, str]
    ) -> None:
        spec = f"channels: ['{channel}']\ndependencies: [python, greeter=1.0]\n"
        await register(site, "tiny", spec)
        one = site.start_worker(**conda)
        await site.wait(await site.submit(SHOW, environment="tiny"))
        async with site.database.writing() as session:
            node = (await all_nodes(session))[0]
            job = await build_job(session, "tiny", spec, node_id=node.id, action="pack")
            assert job is not None
        packing = await site.wait(job.id)
        one.stop()

        job_id = await site.submit(SHOW, environment="tiny")
        async with site.database.writing() as session:
            await heartbeat(session, node.id, now=datetime.now(UTC) - timedelta(hours=1), environments=[])
        site.start_worker("two", DEEPE_OFFLINE="true", **conda)
        row = await site.wait(job_id)

        assert packing.status is JobStatus.SUCCEEDED, site.story(packing)
        assert row.status is JobStatus.SUCCEEDED, site.story(row)
        prefix, greeting = json.loads(site.output(job_id))
        assert prefix.startswith(str(site.node_home("two").environments))
        assert greeting == f"hello from {prefix}"
        order = [build for build in await builds(site) if build.node_id == row.node_id]
        assert [build.environment for build in order] == ["tiny"]
        assert "Unpacking what one packed" in site.output(order[0].id)


@pytest.mark.parametrize("script", ["exit 7", "echo broken >&2; return 1"])
async def test_activation_that_fails_ends_the_job(site: Site, script: str) -> None:
    site.place_base()
    environments = site.node_home().environments
    folder = environments / "odd"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to((environments / "base" / "bin" / "python").resolve())
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "etc" / "conda" / "activate.d").mkdir(parents=True)
    (folder / "etc" / "conda" / "activate.d" / "odd.sh").write_text(script + "\n")
    job_id = await site.submit(environment="odd")

    site.start_worker()
    row = await site.wait(job_id)

    assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.SPAWN_FAILED)
