"""Nodes over HTTP: what they have and do, drain, labels, declared dead, removed. On SQLite and on Postgres."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.enums import EndReason, JobKind, JobStatus, Platform
from app.executor.nodes.reporter import build_job
from app.store import job_attempts, job_status, jobs, nodes
from app.store.job_attempts import Claim
from app.store.session import Database
from tests.api.client import tag_of
from tests.api.jobs_app import JobsApp, codes, jobs_app
from tests.job_rows import LEASE, add_job

CARDS = [
    Accelerator(id=f"GPU-{n}", index=n, kind=AcceleratorKind.CUDA, name="NVIDIA L4", memory_mib=23_034)
    for n in (0, 1, 2, 3)
]
SILENCE = timedelta(minutes=5)


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as running:
        yield running


async def add_node(app: JobsApp, name: str = "gpu-1", *, age: timedelta = timedelta(), **values: Any) -> str:
    """Register a node with four cards that was heard of `age` ago."""
    now = datetime.now(UTC) - age
    async with app.database.writing() as session:
        row = await nodes.register_node(
            session,
            name=name,
            platform=Platform.CUDA,
            accelerators=[card.document() for card in CARDS],
            environments=["base", "trl"],
            slots=1,
            boot_id="boot",
            labels={"node": name, "zone": "a"},
            now=now,
            **values,
        )
        await nodes.heartbeat(session, row.id, now=now, inventory={"hostname": name, "cpus": 8})
    return row.id


async def run_on(app: JobsApp, node: str, *accelerators: str, cancelled: bool = False, **job: Any) -> Claim:
    """Have the node run a new job with these accelerators."""
    job_id = await add_job(app.database, **job)
    async with app.database.writing() as session:
        now = datetime.now(UTC)
        (claim,) = await job_attempts.take_several(
            session, [(job_id, accelerators)], node_id=node, now=now, lease=LEASE
        )
        assert await job_attempts.mark_running(session, claim, now=now)
        if cancelled:
            await job_status.request_cancel(session, job_id, now=now)
    return claim


async def fall_silent(app: JobsApp, node: str) -> None:
    async with app.database.writing() as session:
        await nodes.heartbeat(session, node, now=datetime.now(UTC) - SILENCE)


class TestView:
    async def test_shows_machine_holders_and_jobs(self, app: JobsApp) -> None:
        node = await add_node(app)
        claim = await run_on(app, node, "GPU-0", name="mine")
        blocked = [
            {"id": "GPU-0", "obstacle": "occupied", "used_mib": 9_984, "pids": [1]},  # by our own job
            {"id": "GPU-1", "obstacle": "occupied", "used_mib": 20_480, "pids": [11, 22]},
            {"id": "GPU-2", "obstacle": "missing"},
        ]
        async with app.database.writing() as session:
            await nodes.heartbeat(session, node, now=datetime.now(UTC), inventory={"cpus": 8, "blocked": blocked})

        body = await app.get("/nodes/gpu-1")

        assert [
            (one["state"], one["job"], one["attempt"], one["used_mib"], one["pids"]) for one in body["accelerators"]
        ] == [
            ("leased", claim.job.id, 1, 9_984, [1]),
            ("occupied", None, None, 20_480, [11, 22]),
            ("missing", None, None, None, []),
            ("free", None, None, None, []),
        ]
        assert [(job["name"], job["status"], job["accelerators"]) for job in body["jobs"]] == [
            ("mine", "running", ["GPU-0"])
        ]
        assert (body["state"], body["state_detail"]) == ("ready", "Accepts jobs; 1 running.")
        assert body["inventory"]["cpus"] == 8
        assert body == (await app.get(f"/nodes/{node}")) | {"heartbeat_age_seconds": body["heartbeat_age_seconds"]}
        listed = (await app.get("/nodes", params={"sort": "name"}))["items"]
        assert listed[0] | {"heartbeat_age_seconds": 0} == body | {"heartbeat_age_seconds": 0}

    async def test_silent_node_is_unknown_and_keeps_its_jobs(self, app: JobsApp) -> None:
        node = await add_node(app)
        claim = await run_on(app, node)
        await fall_silent(app, node)

        body = await app.get("/nodes/gpu-1", headers={"Accept-Language": "de"})

        assert body["state"] == "unknown"
        assert "deepe nodes declare-dead gpu-1" in body["state_detail"]
        assert "Seit 5 min nichts gehört" in body["state_detail"]
        assert body["jobs"][0]["id"] == claim.job.id
        assert (await app.get(f"/jobs/{claim.job.id}"))["status"] == "running"

    async def test_job_of_a_silent_node_says_what_it_waits_for(self, app: JobsApp) -> None:
        node = await add_node(app)
        claim = await run_on(app, node)
        assert (await app.get(f"/jobs/{claim.job.id}"))["node_silent"] is None
        await fall_silent(app, node)

        running = await app.get(f"/jobs/{claim.job.id}")
        cancelled = await app.post(f"/jobs/{claim.job.id}:cancel")

        assert "may well be running there" in running["node_silent"]
        assert cancelled["status"] == "running"
        assert cancelled["node_silent"].startswith('The cancel waits for node "gpu-1"')
        assert "deepe nodes declare-dead gpu-1" in cancelled["node_silent"]

    async def test_refusal_is_told_in_the_callers_language(self, app: JobsApp) -> None:
        await add_node(app)
        async with app.database.writing() as session:
            row = await nodes.get_node(session, "gpu-1")
            row.refusal = {"code": "too_many_labels", "params": {"limit": 3}}
            session.add(row)

        body = await app.get("/nodes/gpu-1", headers={"Accept-Language": "zh"})

        assert (body["state"], body["state_detail"]) == ("refusing", "一个节点最多有 3 个标签。")


class TestDrain:
    async def test_empties_the_node_and_lets_it_work_again(self, app: JobsApp) -> None:
        node = await add_node(app)
        claim = await run_on(app, node)

        draining = await app.post("/nodes/gpu-1:drain")
        again = await app.post("/nodes/gpu-1:drain")
        async with app.database.writing() as session:
            end = job_status.End(status=JobStatus.SUCCEEDED, reason=EndReason.COMPLETED, params={})
            assert await job_attempts.finish(session, claim, end, now=datetime.now(UTC))
        drained = await app.get("/nodes/gpu-1")
        ready = await app.post("/nodes/gpu-1:undrain")

        assert [draining["state"], drained["state"], ready["state"]] == ["draining", "drained", "ready"]
        assert draining["draining_at"] == again["draining_at"] != ready["draining_at"]
        assert app.notifier.notified == [node] * 3
        await app.post("/nodes/nobody:drain", status=404)


class TestLabels:
    async def patch(self, app: JobsApp, body: Any, status: int = 200, tag: str = "*") -> Any:
        response = await app.client.patch("/api/v1/nodes/gpu-1", json=body, headers={"If-Match": tag})
        assert response.status_code == status, response.text
        return response.json()

    async def test_are_merged_with_those_of_the_worker(self, app: JobsApp) -> None:
        await add_node(app)

        body = await self.patch(app, {"extra_labels": {"zone": "b", "pool": "x"}})
        assert (body["labels"], body["worker_labels"], body["extra_labels"]) == (
            {"node": "gpu-1", "zone": "b", "pool": "x"},
            {"node": "gpu-1", "zone": "a"},
            {"zone": "b", "pool": "x"},
        )

        await add_node(app)  # the worker starts again
        assert (await self.patch(app, {"extra_labels": {"zone": None, "never": None}}))["labels"] == {
            "node": "gpu-1",
            "zone": "a",
            "pool": "x",
        }
        assert (await self.patch(app, {}))["extra_labels"] == {"pool": "x"}
        assert (await self.patch(app, {"extra_labels": None}))["extra_labels"] == {}

    async def test_need_the_version_that_was_read(self, app: JobsApp) -> None:
        await add_node(app)
        read = await app.client.get("/api/v1/nodes/gpu-1")

        await self.patch(app, {"extra_labels": {"a": "1"}}, tag=tag_of(read)["If-Match"])
        stale = await self.patch(app, {"extra_labels": {"a": "2"}}, 412, tag=tag_of(read)["If-Match"])
        unread = await app.client.patch("/api/v1/nodes/gpu-1", json={})

        assert (stale["code"], unread.status_code) == ("stale_version", 428)

    @pytest.mark.parametrize(
        ("labels", "pointer"),
        [
            ({"a b": "x"}, "/extra_labels/a b"),
            ({"zone": "x y"}, "/extra_labels/zone"),
            ({"zone": 1}, "/extra_labels/zone"),
            ({f"n{number}": "x" for number in range(65)}, "/extra_labels"),
            ("zone=b", "/extra_labels"),
        ],
    )
    async def test_bad_ones_are_refused_where_they_stand(self, app: JobsApp, labels: Any, pointer: str) -> None:
        await add_node(app)

        problem = await self.patch(app, {"extra_labels": labels}, 422)

        assert {place for place, _ in codes(problem)} == {pointer}


class TestDeclareDead:
    async def declare(self, app: JobsApp, status: int = 200, confirm: str = "gpu-1") -> Any:
        return await app.post("/nodes/gpu-1:declare-dead", {"confirm": confirm}, status)

    async def test_training_runs_elsewhere_and_a_question_ends(self, app: JobsApp) -> None:
        node = await add_node(app)
        training = await run_on(app, node, "GPU-0")
        question = await run_on(app, node, kind=JobKind.INFERENCE_COMPLETE)
        cancelled = await run_on(app, node, cancelled=True)
        await fall_silent(app, node)

        body = await self.declare(app)

        assert (body["state"], body["jobs"]) == ("dead", [])
        assert body["accelerators"][0]["state"] == "quarantined"
        async with app.database.reading() as session:
            rows = {
                name: await jobs.get(session, one.job.id)
                for name, one in (("t", training), ("q", question), ("c", cancelled))
            }
        assert (rows["t"].status, rows["t"].token, rows["t"].recoveries, rows["t"].retries) == (
            JobStatus.QUEUED,
            None,
            1,
            0,
        )
        assert (rows["q"].status, rows["q"].reason) == (JobStatus.FAILED, EndReason.NODE_LOST)
        assert (rows["c"].status, rows["c"].reason) == (JobStatus.CANCELLED, EndReason.NODE_LOST)
        assert (await self.declare(app))["dead_at"] == body["dead_at"]

    async def test_what_the_dead_one_writes_later_changes_nothing(self, app: JobsApp) -> None:
        node = await add_node(app)
        claim = await run_on(app, node, "GPU-0")
        await fall_silent(app, node)
        await self.declare(app)
        other = await add_node(app, "gpu-2")
        async with app.database.writing() as session:
            now = datetime.now(UTC)
            assert await job_attempts.take_several(session, [(claim.job.id, ())], node_id=other, now=now, lease=LEASE)

            end = job_status.End(status=JobStatus.SUCCEEDED, reason=EndReason.COMPLETED, params={})
            assert not await job_attempts.finish(session, claim, end, now=now)
            assert not await job_attempts.mark_stopping(session, claim, now=now)
            assert not await nodes.heartbeat(session, node, now=now)

        assert (await app.get(f"/jobs/{claim.job.id}"))["status"] == "launching"
        assert (await app.get("/nodes/gpu-1"))["state"] == "dead"

    async def test_builds_that_it_was_to_do_are_over(self, app: JobsApp) -> None:
        node = await add_node(app)
        async with app.database.writing() as session:
            build = await build_job(session, "trl", "dependencies: [python]\n", node_id=node)
        assert build is not None
        await fall_silent(app, node)

        await self.declare(app)

        job = await app.get(f"/jobs/{build.id}")
        assert (job["status"], job["reason"]) == ("failed", "node_lost")

    async def test_needs_its_name_and_its_silence(self, app: JobsApp) -> None:
        node = await add_node(app)
        alive = await self.declare(app, 409)
        await fall_silent(app, node)
        wrong = await self.declare(app, 422, confirm="gpu-2")
        await app.post("/nodes/gpu-1:declare-dead", {}, 422)

        assert (alive["code"], wrong["code"]) == ("node_is_alive", "node_not_confirmed")
        assert ":drain" in alive["detail"]
        assert codes(wrong) == [("/confirm", "node_not_confirmed")]
        assert (await app.get("/nodes/gpu-1"))["state"] == "unknown"


class TestRemove:
    async def remove(self, app: JobsApp, name: str = "gpu-1") -> tuple[int, str]:
        response = await app.client.delete(f"/api/v1/nodes/{name}", headers={"If-Match": "*"})
        return response.status_code, response.json()["code"] if response.content else ""

    async def test_only_when_nothing_is_there(self, app: JobsApp) -> None:
        node = await add_node(app)
        claim = await run_on(app, node)

        assert await self.remove(app) == (409, "node_in_use")
        await app.post("/nodes/gpu-1:drain")
        assert await self.remove(app) == (409, "node_in_use")
        await fall_silent(app, node)
        await app.post("/nodes/gpu-1:declare-dead", {"confirm": "gpu-1"})
        assert await self.remove(app) == (204, "")

        assert await self.remove(app) == (404, "node_not_found")
        assert "gpu-1" not in [one["name"] for one in (await app.get("/nodes"))["items"]]
        (attempt,) = (await app.get(f"/jobs/{claim.job.id}"))["history"]
        assert attempt["node"].startswith("gpu-1 (removed ")
        assert await add_node(app) != node

    async def test_needs_the_version_that_was_read(self, app: JobsApp) -> None:
        await add_node(app)

        assert (await app.client.delete("/api/v1/nodes/gpu-1")).status_code == 428
