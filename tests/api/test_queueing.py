"""Queues, resources and waiting over HTTP, on SQLite and on Postgres."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.domain.demand import Demand
from app.store import jobs
from app.store.session import Database
from tests.api.jobs_app import API, JobsApp, codes, jobs_app
from tests.job_rows import FAILURE, START, add_job, add_node, cards, claim

ANY = {"If-Match": "*"}
ASKED = {
    "resources": {"accelerators": 2, "accelerator_memory_mib": 40_000, "labels": {"gpu": "a100"}},
    "priority": -7,
    "queue": "research",
    "user": "ann@example.com",
}


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        yield app


async def node(app: JobsApp, name: str = "node-1", **options: Any) -> str:
    return await add_node(app.database, name, environments=("base", "trl"), heartbeat_at=datetime.now(UTC), **options)


class TestSubmit:
    async def test_says_what_the_job_asks_for(self, app: JobsApp) -> None:
        job = await app.submit(**ASKED)

        training = await app.get(f"/jobs/{job['id']}")
        saving = await app.get(f"/jobs/{job['chain'][1]['id']}")
        assert {name: training[name] for name in ASKED} == ASKED
        nothing = {"accelerators": None, "accelerator_memory_mib": None}
        assert {name: saving[name] for name in ASKED} == {**ASKED, "resources": {**nothing, "labels": {"gpu": "a100"}}}
        async with app.database.reading() as session:
            demand = Demand.parse((await jobs.get(session, job["id"])).demand)
        assert (demand.resources.accelerators, demand.queue, demand.submitted_by) == (2, "research", "ann@example.com")

    async def test_defaults(self, app: JobsApp) -> None:
        job = await app.get(f"/jobs/{(await app.submit())['id']}")

        assert (job["queue"], job["priority"], job["user"]) == ("default", 0, "")
        assert job["resources"] == {"accelerators": None, "accelerator_memory_mib": None, "labels": {}}
        assert (job["node"], job["accelerators"]) == (None, [])

    @pytest.mark.parametrize(
        ("wrong", "pointer"),
        [
            ({"resources": {"accelerators": -1}}, "/resources/accelerators"),
            ({"resources": {"accelerators": 0, "accelerator_memory_mib": 5}}, "/resources/accelerator_memory_mib"),
            ({"resources": {"cards": 1}}, "/resources/cards"),
            ({"resources": {"labels": {"a b": "c"}}}, "/resources/labels/a b"),
            ({"priority": 101}, "/priority"),
            ({"queue": "a/b"}, "/queue"),
            ({"user": "a\nb"}, "/user"),
        ],
    )
    async def test_refuses_what_makes_no_sense(self, app: JobsApp, wrong: dict[str, Any], pointer: str) -> None:
        body = {"method": "Custom01", "base_model": "custom01-base", "dataset": "custom01", "through": "complete"}

        problem = await app.post("/jobs", {**body, **wrong}, 422)

        assert [where for where, _ in codes(problem)] == [pointer]

    async def test_retry_and_copy_carry_it_on_and_a_copy_may_change_it(self, app: JobsApp) -> None:
        await node(app, accelerators=cards(2), labels={"gpu": "a100"})
        job = await app.submit(**ASKED)
        await app.runner.run(job["id"], FAILURE)

        async def made(action: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
            answer = await app.post(f"/jobs/{job['id']}:{action}", changes or {}, 201)
            found: dict[str, Any] = await app.get(f"/jobs/{answer['id']}")
            return found

        retried, copy = await made("retry"), await made("copy")
        changed = await made("copy", {"priority": 0, "user": "", "resources": {"accelerators": 1}})

        assert {name: retried[name] for name in ASKED} == ASKED
        assert {name: copy[name] for name in ASKED} == ASKED
        assert (changed["priority"], changed["user"], changed["queue"]) == (0, "", "research")
        assert changed["resources"] == {"accelerators": 1, "accelerator_memory_mib": None, "labels": {}}

    async def test_running_job_names_its_node_and_accelerators(self, app: JobsApp) -> None:
        await node(app, accelerators=cards(4))
        job = await app.submit(resources={"accelerators": 2})
        await app.runner.start(job["id"])

        shown = await app.get(f"/jobs/{job['id']}")
        (listed,) = (await app.get("/jobs", params={"stage": "training"}))["items"]

        assert (shown["node"], shown["accelerators"], shown["waiting"]) == ("node-1", ["card-0", "card-1"], None)
        assert (listed["node"], listed["accelerators"]) == ("node-1", ["card-0", "card-1"])


class TestWaiting:
    async def waiting(self, app: JobsApp, job: str, language: str = "en") -> dict[str, Any]:
        found: dict[str, Any] = (await app.get(f"/jobs/{job}", headers={"Accept-Language": language}))["waiting"]
        return found

    async def test_reason_place_and_estimate(self, app: JobsApp) -> None:
        """Half of the sentences of `app.domain.waiting`; its tests have them all."""
        await node(app, accelerators=cards(2))
        first = await add_job(app.database, limits={"seconds": 3600})
        won = await claim(app.database, app.runner.node_id, now=datetime.now(UTC))
        assert won is not None
        assert won.job.id == first
        large = (await app.submit(resources={"accelerators": 2}))["id"]
        huge = await app.submit(resources={"accelerators": 8}, user="x")
        saving = huge["chain"][1]["id"]
        await claim(app.database, app.runner.node_id, environments=("base",), now=datetime.now(UTC))

        kept = await self.waiting(app, large)
        nowhere = await self.waiting(app, huge["id"])

        assert (kept["position"], kept["code"]) == (1, "waiting_reserved")
        assert kept["detail"] == 'The node "node-1" keeps accelerators for it until 2 are free.'
        start = datetime.fromisoformat(kept["estimated_start"])
        assert timedelta(minutes=59) < start - datetime.now(UTC) <= timedelta(hours=1)
        assert (nowhere["position"], nowhere["code"], nowhere["estimated_start"]) == (2, "waiting_accelerators", None)
        assert "8 Beschleuniger" in (await self.waiting(app, huge["id"], "de"))["detail"]
        behind = await self.waiting(app, saving)
        assert (behind["code"], behind["position"]) == ("waiting_predecessor", None)
        assert huge["id"] in behind["detail"]

    async def test_limit_of_a_user_and_silent_nodes(self, app: JobsApp) -> None:
        limits = {"max_live_per_user": 1}
        await app.client.put(f"{API}/queues/research", json=limits, headers=ANY)
        mine = [(await app.submit(queue="research", user="x"))["id"] for _ in range(2)]

        assert (await self.waiting(app, mine[0]))["code"] == "waiting_silent"
        await node(app)
        await claim(app.database, app.runner.node_id, environments=("base",), now=datetime.now(UTC))
        waiting = [await app.get(f"/jobs/{job}") for job in mine]

        (left,) = [job["waiting"] for job in waiting if job["status"] == "queued"]
        assert left["code"] == "waiting_user_limit"
        assert left["detail"] == '1 jobs of user "x" run in the queue "research"; the limit is 1.'

    async def test_pause_before_a_retry(self, app: JobsApp) -> None:
        await node(app)
        moment = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
        job = await add_job(app.database, not_before=moment)

        waiting = await self.waiting(app, job)

        assert (waiting["code"], waiting["position"]) == ("waiting_not_before", None)
        assert f"{moment:%H:%M:%S} UTC" in waiting["detail"]

    async def test_list_has_it_too(self, app: JobsApp) -> None:
        await node(app)
        jobs_ = [await add_job(app.database, created_at=START + timedelta(seconds=n)) for n in range(3)]

        items = (await app.get("/jobs"))["items"]

        places = {item["id"]: item["waiting"]["position"] for item in items}
        assert places == {job: place for place, job in enumerate(jobs_, start=1)}


class TestQueues:
    async def test_limits_come_and_go(self, app: JobsApp) -> None:
        empty = await app.client.get(f"{API}/queues/research")
        without = await app.client.put(f"{API}/queues/research", json={"max_live": 1})
        made = await app.client.put(
            f"{API}/queues/research", json={"max_live": 2}, headers={"If-Match": empty.headers["etag"]}
        )
        stale = await app.client.put(
            f"{API}/queues/research", json={"max_live": 3}, headers={"If-Match": empty.headers["etag"]}
        )
        changed = await app.client.put(
            f"{API}/queues/research", json={"max_live_per_user": 3}, headers={"If-Match": made.headers["etag"]}
        )
        await app.submit(queue="research")
        listed = await app.get("/queues")
        unread = await app.client.delete(f"{API}/queues/research")
        gone = [await app.client.delete(f"{API}/queues/research", headers=ANY) for _ in range(2)]

        assert empty.json() == {
            "name": "research", "max_live": None, "max_live_per_user": None, "running": 0, "waiting": 0,
            "updated_at": None,
        }  # fmt: skip
        assert (without.status_code, stale.status_code, unread.status_code) == (428, 412, 428)
        assert (made.status_code, made.json()["max_live"]) == (200, 2)
        assert (changed.json()["max_live"], changed.json()["max_live_per_user"]) == (None, 3)
        assert [(entry["name"], entry["waiting"]) for entry in listed["items"]] == [("research", 1)]
        assert [answer.status_code for answer in gone] == [204, 204]
        assert (await app.get("/queues/research"))["max_live_per_user"] is None

    @pytest.mark.parametrize("wrong", [{"max_live": -1}, {"max_live": "many"}, {"most": 1}])
    async def test_refuses_nonsense(self, app: JobsApp, wrong: dict[str, Any]) -> None:
        answer = await app.client.put(f"{API}/queues/q", json=wrong, headers=ANY)

        assert answer.status_code == 422
        assert codes(answer.json())[0][0] == f"/{next(iter(wrong))}"

    async def test_name_that_none_can_have_is_unknown(self, app: JobsApp) -> None:
        assert (await app.get("/queues/a b", 404))["code"] == "queue_not_found"
