"""Environments and nodes over HTTP, on SQLite and on Postgres."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.domain.enums import JobKind, JobStatus, Platform
from app.domain.environment_locks import EnvironmentLock, PipPackage
from app.executor.environments.environment_archive import EnvironmentArchive, write_durably
from app.executor.runs.job_spec import JobSpec
from app.registry.environments.specs import parse_spec, spec_hash
from app.store import environments, jobs, nodes
from app.store.session import Database
from tests.api.client import MethodsApp, methods_app, tag_of
from tests.api.resources import ROUTERS, codes, insert_job

URL = "/api/v1/environments"
NODES = "/api/v1/nodes"
SPEC = "channels: [conda-forge]\ndependencies:\n  - python>=3.11\n  - pip\n  - pip:\n      - trl==1.16.0\n"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=ROUTERS) as running:
        yield running


async def create(app: MethodsApp, name: str = "trl", **values: Any) -> httpx.Response:
    return await app.client.post(URL, json={"name": name, **values})


async def register_node(app: MethodsApp, name: str = "laptop", *, age: timedelta = timedelta(), **values: Any) -> str:
    said = {
        "platform": Platform.CPU,
        "accelerators": [{"kind": "cpu"}],
        "environments": ["base"],
        "slots": 1,
        "boot_id": "b",
        **values,
    }
    async with app.database.writing() as session:
        row = await nodes.register_node(session, name=name, now=datetime.now(UTC) - age, **said)
    return row.id


async def ship(app: MethodsApp, name: str = "shipped", spec: str = SPEC) -> bool:
    async with app.database.writing() as session:
        return await environments.ensure_shipped(session, name, spec=spec, spec_hash="0" * 64, now=datetime.now(UTC))


class TestKnownEnvironments:
    async def test_base_is_always_known(self, app: MethodsApp) -> None:
        items = (await app.client.get(URL)).json()["items"]

        assert [(item["name"], item["source"], item["spec"]) for item in items] == [("base", "discovered", None)]
        assert (await app.client.get(f"{URL}/base")).status_code == 200

    async def test_lists_registered_shipped_and_discovered_ones_with_their_state(self, app: MethodsApp) -> None:
        node = await register_node(app, environments=["base", "found"])
        await create(app, name="mine", spec=SPEC)
        await ship(app)
        await insert_job(
            app.database, kind=JobKind.ENVIRONMENT, environment="mine", status=JobStatus.RUNNING, node_id=node
        )

        items = (await app.client.get(URL)).json()["items"]

        assert [(item["name"], item["source"], item["nodes"][0]["state"]) for item in items] == [
            ("base", "discovered", "ready"),
            ("found", "discovered", "ready"),
            ("mine", "registered", "building"),
            ("shipped", "shipped", "known"),
        ]

    async def test_pages_and_filters(self, app: MethodsApp) -> None:
        for name in ("x1", "x2", "x3"):
            await create(app, name=name)

        first = (await app.client.get(URL, params={"limit": 2, "q": "X"})).json()
        second = (await app.client.get(URL, params={"limit": 2, "q": "X", "cursor": first["next_cursor"]})).json()
        backwards = (await app.client.get(URL, params={"sort": "-name", "limit": 1})).json()

        assert [item["name"] for item in first["items"] + second["items"]] == ["x1", "x2", "x3"]
        assert second["next_cursor"] is None
        assert backwards["items"][0]["name"] == "x3"


class TestCreate:
    async def test_registers_with_a_spec(self, app: MethodsApp) -> None:
        response = await create(app, spec=SPEC)

        body = response.json()
        assert (response.status_code, response.headers["location"]) == (201, f"{URL}/trl")
        assert (body["spec"], body["source"]) == (SPEC, "registered")
        assert len(body["spec_hash"]) == 64
        assert (await app.client.get(f"{URL}/trl")).json() == body

    @pytest.mark.parametrize("name", ["", "a b", "a/b", "-x", "环境", "base", "a:b", "x" * 101])
    async def test_refuses_names_that_conda_would_not_take(self, app: MethodsApp, name: str) -> None:
        response = await create(app, name=name)

        assert response.status_code == 422
        assert {pointer for pointer, _ in codes(response.json())} == {"/name"}

    @pytest.mark.parametrize("spec", ["dependencies: [", "- a", "name: x", "dependencies: python"])
    async def test_refuses_a_spec_that_cannot_be_built(self, app: MethodsApp, spec: str) -> None:
        response = await create(app, spec=spec)

        assert response.status_code == 422
        assert {pointer for pointer, _ in codes(response.json())} == {"/spec"}

    async def test_says_what_is_wrong_with_name_and_spec_at_once(self, app: MethodsApp) -> None:
        response = await create(app, name="a b", spec="- a")

        assert [pointer for pointer, _ in codes(response.json())] == ["/name", "/spec", "/spec"]

    async def test_answers_with_the_tag_that_reading_gives(self, app: MethodsApp) -> None:
        created = [await create(app, name="found"), await create(app, spec=SPEC)]

        for response in created:
            assert response.headers["etag"] == (await app.client.get(response.headers["location"])).headers["etag"]

    async def test_of_two_creates_of_one_name_one_wins(self, app: MethodsApp) -> None:
        responses = await asyncio.gather(*[create(app) for _ in range(3)])

        assert sorted(response.status_code for response in responses) == [201, 409, 409]


class TestReplace:
    async def test_changes_the_spec_of_the_version_that_was_read(self, app: MethodsApp) -> None:
        await create(app, spec=SPEC)
        read = await app.client.get(f"{URL}/trl")

        changed = await app.client.put(f"{URL}/trl", json={"spec": SPEC + "      - peft\n"}, headers=tag_of(read))
        stale = await app.client.put(f"{URL}/trl", json={"spec": SPEC}, headers=tag_of(read))
        unread = await app.client.put(f"{URL}/trl", json={"spec": SPEC})

        assert (changed.status_code, stale.status_code, unread.status_code) == (200, 412, 428)
        assert changed.json()["spec_hash"] != read.json()["spec_hash"]
        assert changed.headers["etag"] != read.headers["etag"]

    async def test_refuses_what_is_not_the_users(self, app: MethodsApp) -> None:
        await ship(app)
        await register_node(app, environments=["found"])
        answers = {
            name: (await app.client.put(f"{URL}/{name}", json={"spec": SPEC}, headers={"If-Match": "*"})).json()
            for name in ("shipped", "found", "base", "nowhere")
        }

        assert {name: answer["code"] for name, answer in answers.items()} == {
            "shipped": "environment_shipped",
            "found": "environment_not_registered",
            "base": "environment_not_registered",
            "nowhere": "environment_not_found",
        }


class TestDelete:
    async def test_deletes_the_entry(self, app: MethodsApp) -> None:
        await create(app)

        response = await app.client.delete(f"{URL}/trl", headers={"If-Match": "*"})

        assert response.status_code == 204
        assert (await app.client.get(f"{URL}/trl")).json()["code"] == "environment_not_found"

    async def test_refuses_while_a_method_or_job_needs_it(self, app: MethodsApp) -> None:
        await create(app, name="of-method")
        await create(app, name="of-job")
        await app.create(name="user", stages={"training": {"file": "train.py", "conda_env": "of-method"}})
        await insert_job(app.database, environment="of-job", status=JobStatus.QUEUED)

        answers = [
            await app.client.delete(f"{URL}/{name}", headers={"If-Match": "*"}) for name in ("of-method", "of-job")
        ]

        assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(409, "environment_in_use")] * 2
        assert "user" in answers[0].json()["detail"]

    async def test_refuses_what_is_shipped(self, app: MethodsApp) -> None:
        await ship(app)

        response = await app.client.delete(f"{URL}/shipped", headers={"If-Match": "*"})

        assert (response.status_code, response.json()["code"]) == (409, "environment_shipped")


class TestEnsureShipped:
    async def test_is_idempotent_and_brings_upgrades(self, app: MethodsApp) -> None:
        assert await ship(app) is True
        assert await ship(app) is False
        assert await ship(app, spec=SPEC + "# 2\n") is True

        assert (await app.client.get(f"{URL}/shipped")).json()["spec"] == SPEC + "# 2\n"

    async def test_leaves_an_environment_of_the_user_alone(self, app: MethodsApp) -> None:
        await create(app, spec=SPEC)

        assert await ship(app, name="trl", spec="dependencies: [python]\n") is False

        assert (await app.client.get(f"{URL}/trl")).json()["spec"] == SPEC


def lock_of(node: str, **values: Any) -> EnvironmentLock:
    defaults: dict[str, Any] = {
        "environment": "trl",
        "spec_hash": spec_hash(parse_spec(SPEC)),
        "platform": "linux-x86_64",
        "python": "3.11.7",
        "builder": "venv",
        "conda": (),
        "pip": (PipPackage(name="trl", version="1.16.0", sha256="0" * 64),),
        "created_at": datetime.now(UTC),
    }
    return EnvironmentLock(**{**defaults, "node": node, **values})


def keep(app: MethodsApp, lock: EnvironmentLock) -> None:
    """Write a lock down as a build does."""
    archive = EnvironmentArchive(app.home.environments, "trl", parse_spec(SPEC))
    write_durably(archive.lock_file(lock.node), lock.model_dump_json())


class TestLocks:
    async def test_reads_the_newest_or_that_of_a_node(self, app: MethodsApp) -> None:
        await create(app, spec=SPEC)
        for name in ("one", "two"):
            await register_node(app, name)
            keep(app, lock_of(name))

        newest = (await app.client.get(f"{URL}/trl/lock")).json()
        one = (await app.client.get(f"{URL}/trl/lock", params={"node": "one"})).json()

        assert (newest["node"], one["node"]) == ("two", "one")
        assert one["pip"] == [{"name": "trl", "version": "1.16.0", "url": None, "sha256": "0" * 64}]

    async def test_says_what_is_not_there(self, app: MethodsApp) -> None:
        await create(app, spec=SPEC)
        await create(app, name="bare")

        found = [
            (await app.client.get(f"{URL}/{address}")).json()["code"]
            for address in ("trl/lock", "bare/lock", "nowhere/lock", "trl/lock?node=../one")
        ]

        assert found == [
            "environment_lock_not_found",
            "environment_without_spec",
            "environment_not_found",
            "node_not_found",
        ]

    async def test_build_keeps_to_the_lock_of_another_node(self, app: MethodsApp) -> None:
        await create(app, spec=SPEC)
        await register_node(app, "one", age=timedelta(seconds=5))
        await register_node(app, "two")
        refused = await app.client.post(f"{URL}/trl:build", json={"locked": True})
        keep(app, lock_of("one"))
        keep(app, lock_of("two"))

        made = await app.client.post(f"{URL}/trl:build", json={"locked": True}, params={"node": "two"})
        again = await app.client.post(f"{URL}/trl:build", json={"lock_of": "one"}, params={"node": "two"})

        assert (refused.status_code, refused.json()["code"]) == (409, "environment_lock_missing")
        assert (made.status_code, again.status_code, again.json()["id"]) == (201, 200, made.json()["id"])
        async with app.database.reading() as session:
            build = JobSpec.of(await jobs.get(session, made.json()["id"])).build
        assert build is not None
        assert build.lock is not None
        assert (build.action, build.lock.node) == ("build", "one")

    async def test_packs_what_a_living_node_has(self, app: MethodsApp) -> None:
        await create(app, spec=SPEC)
        await register_node(app, "one", age=timedelta(hours=1), environments=["trl"])
        nowhere = await app.client.post(f"{URL}/trl:pack")
        node = await register_node(app, "two", environments=["trl"])

        made = await app.client.post(f"{URL}/trl:pack")
        without = await app.client.post(f"{URL}/base:pack", params={"node": "two"})

        assert (nowhere.status_code, nowhere.json()["code"]) == (409, "environment_ready_nowhere")
        assert (made.status_code, made.json()["stage"]) == (201, "environment")
        assert without.json()["code"] == "environment_ready_nowhere"
        async with app.database.reading() as session:
            row = await jobs.get(session, made.json()["id"])
        order = JobSpec.of(row).build
        assert order is not None
        assert (row.node_id, order.action) == (node, "pack")
        state = (await app.client.get(f"{URL}/trl")).json()["nodes"][1]
        assert (state["node"], state["state"], state["build"]) == ("two", "ready", None)


class TestNodes:
    async def test_shows_nodes_and_whether_they_were_heard_of(self, app: MethodsApp) -> None:
        card = {"id": "GPU-1", "index": 0, "kind": "cuda", "name": "L4"}
        await register_node(app, "new", platform=Platform.CUDA, accelerators=[card], slots=2)
        await register_node(app, "old", age=timedelta(minutes=5))

        items = (await app.client.get(NODES)).json()["items"]

        assert [(item["name"], item["state"]) for item in items] == [("new", "ready"), ("old", "unknown")]
        assert (items[0]["platform"], items[0]["accelerators"][0]["name"]) == ("cuda", "L4")
        assert items[0]["slots"] == 2
        assert 299 < items[1]["heartbeat_age_seconds"] < 360
        assert (await app.client.get(f"{NODES}/old")).json()["id"] == items[1]["id"]
        assert (await app.client.get(f"{NODES}/none")).json()["code"] == "node_not_found"

    async def test_keeps_its_id_when_it_registers_again(self, app: MethodsApp) -> None:
        first = await register_node(app)
        second = await register_node(app, environments=["b", "a"], boot_id="c")

        body = (await app.client.get(f"{NODES}/laptop")).json()
        assert first == second == body["id"]
        assert body["environments"] == ["a", "b"]

    async def test_a_heartbeat_says_what_changed(self, app: MethodsApp) -> None:
        node = await register_node(app, age=timedelta(minutes=5))

        async with app.database.writing() as session:
            known = await nodes.heartbeat(session, node, now=datetime.now(UTC), environments=["base", "trl"])
            unknown = await nodes.heartbeat(session, "nobody", now=datetime.now(UTC))

        body = (await app.client.get(f"{NODES}/laptop")).json()
        assert (known, unknown) == (True, False)
        assert (body["state"], body["environments"]) == ("ready", ["base", "trl"])
