"""Projects over HTTP: who enters which, what is found there, and that nothing of another one is reached."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlmodel import SQLModel, select

from app.api.routes import metrics, system
from app.domain.enums import JobStatus, ModelState
from app.domain.projects import EVERY_PROJECT, Scope
from app.main import ROUTERS
from app.store.jobs import get as get_job
from app.store.session import Database
from app.store.tables import OfProject
from tests.api.client import SwitchableLicence, tag_of
from tests.api.jobs_app import API, SUBMIT, JobsApp, jobs_app
from tests.job_rows import ENVIRONMENT, FAILURE, Runner, add_job, add_node

HOOK = {"url": "https://example.com/hook", "events": ["job.failed"]}
HERE, THERE = API, f"/projects/bikes{API}"


@dataclass
class Callers:
    """The service with two projects, called by the owner of this machine or with a key."""

    app: JobsApp

    async def call(
        self, method: str, url: str, *, secret: str | None = None, status: int | None = None, **options: Any
    ) -> httpx.Response:
        headers = {**options.pop("headers", {}), **({"Authorization": f"Bearer {secret}"} if secret else {})}
        response = await self.app.client.request(method, url, headers=headers, **options)
        assert status in (None, response.status_code), response.text
        return response

    async def key(self, name: str, role: str, at: str = HERE) -> dict[str, Any]:
        made = await self.call("POST", f"{at}/keys", json={"name": name, "role": role}, status=201)
        body: dict[str, Any] = made.json()
        return body


@asynccontextmanager
async def two_projects(database: Database, root: Path) -> AsyncIterator[Callers]:
    async with jobs_app(database, root) as app:
        callers = Callers(app)
        await callers.call("POST", f"{HERE}/projects", json={"id": "bikes", "title": "Bike hire"}, status=201)
        yield callers


@pytest.fixture
async def callers(database: Database, tmp_path: Path) -> AsyncIterator[Callers]:
    async with two_projects(database, tmp_path / "home") as found:
        yield found


class TestProject:
    async def test_has_the_shipped_methods_and_folders_of_its_own(self, callers: Callers) -> None:
        methods = (await callers.call("GET", f"{THERE}/methods?limit=100", status=200)).json()["items"]
        home = callers.app.services.home.root / "projects" / "bikes"

        assert {"Custom01", "SFT-Demo"} <= {method["name"] for method in methods}
        assert (home / "scripts" / "custom01.py").is_file()
        assert {"datasets", "models", "images"} <= {folder.name for folder in home.iterdir()}

    async def test_names_and_files_are_its_own(self, callers: Callers) -> None:
        rows = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        headers = {"Content-Type": "application/jsonl", "If-None-Match": "*"}
        made = [
            (await callers.call("PUT", f"{at}/datasets/faq/file", content=rows, headers=headers, status=201)).json()
            for at in (HERE, THERE)
        ]

        assert [one["path"] for one in made] == ["datasets/faq.jsonl", "projects/bikes/datasets/faq.jsonl"]
        assert len({one["id"] for one in made}) == 2

    async def test_address_of_what_was_made_leads_into_it(self, callers: Callers) -> None:
        made = await callers.call(
            "POST", f"{THERE}/webhooks", json={"url": "https://example.com/hook", "events": ["job.succeeded"]}
        )

        location = made.headers["Location"]
        assert location == f"{THERE}/webhooks/{made.json()['id']}"
        await callers.call("GET", location, status=200)
        await callers.call("GET", f"{HERE}/webhooks/{made.json()['id']}", status=404)

    async def test_idempotency_key_of_one_is_not_that_of_another(self, callers: Callers) -> None:
        headers, body = {"Idempotency-Key": "one"}, {"url": "https://example.com/hook", "events": ["job.succeeded"]}

        made = [await callers.call("POST", f"{at}/webhooks", json=body, headers=headers) for at in (HERE, THERE, THERE)]

        assert made[0].json()["id"] != made[1].json()["id"] == made[2].json()["id"]

    @pytest.mark.parametrize("wrong", ["Bikes", "-a", "a-", "a b", "a/b", "..", "自行车", "", "a" * 41])
    async def test_id_must_fit_an_address_and_a_folder(self, callers: Callers, wrong: str) -> None:
        refused = await callers.call("POST", f"{HERE}/projects", json={"id": wrong})

        assert refused.status_code == 422
        assert not {"Bikes", "-a"} & {folder.name for folder in (callers.app.services.home.root / "projects").iterdir()}

    async def test_second_one_of_an_id_is_refused_and_makes_nothing(self, callers: Callers) -> None:
        for taken in ("bikes", "default"):
            refused = await callers.call("POST", f"{HERE}/projects", json={"id": taken}, status=409)
            assert refused.json()["code"] == "name_taken"

    async def test_licence_says_how_many(self, database: Database, tmp_path: Path) -> None:
        async with jobs_app(database, tmp_path / "home", licence=SwitchableLicence(installed=False)) as app:
            refused = await app.client.post(f"{HERE}/projects", json={"id": "bikes"})

        assert (refused.status_code, refused.json()["code"]) == (403, "license_project_limit")

    async def test_title_may_change(self, callers: Callers) -> None:
        tag = tag_of(await callers.call("GET", f"{THERE}/project", status=200))
        changed = await callers.call("PATCH", f"{THERE}/project", json={"title": "共享单车"}, headers=tag, status=200)
        stale = await callers.call("PATCH", f"{THERE}/project", json={"title": "x"}, headers=tag)

        assert changed.json()["title"] == "共享单车"
        assert stale.status_code == 412


class TestMaker:
    async def test_is_named_by_everything_that_was_made(self, callers: Callers) -> None:
        secret = (await callers.key("ada", "admin"))["secret"]
        hook = {"url": "https://example.com/hook", "events": ["job.failed"]}
        target = {"name": "edge", "kind": "ollama", "url": "http://127.0.0.1:9"}
        method = (await callers.call("GET", f"{HERE}/methods/Custom01")).json()

        made = [
            await callers.call("POST", f"{HERE}{path}", secret=secret, json=body, status=201)
            for path, body in (
                ("/webhooks", hook),
                ("/deploy-targets", target),
                ("/environments", {"name": "mine"}),
                ("/methods", {**method, "name": "mine"}),
                ("/jobs", SUBMIT),
            )
        ]
        read = [(await callers.call("GET", one.headers["Location"], status=200)).json() for one in made]

        assert [one["created_by"] for one in read] == ["ada"] * len(made)
        assert method["created_by"] == ""  # the service itself brought it


class TestEntering:
    async def test_key_of_a_project_opens_it_without_naming_it_and_no_other(self, callers: Callers) -> None:
        secret = (await callers.key("bike-bot", "operator", THERE))["secret"]

        me = (await callers.call("GET", f"{HERE}/me", secret=secret, status=200)).json()
        named = (await callers.call("GET", f"{THERE}/me", secret=secret, status=200)).json()
        foreign = await callers.call("GET", f"/projects/default{API}/methods", secret=secret)

        assert (me["role"], me["project"], me["role_in_project"]) == (None, "bikes", "operator")
        assert me["permissions"] == named["permissions"] == ["read", "run"]
        assert (foreign.status_code, foreign.json()["code"]) == (404, "project_not_found")

    async def test_key_of_the_installation_is_let_in_as_a_member_only(self, callers: Callers) -> None:
        key = await callers.key("ada", "developer")
        member = {"principal": f"key:{key['id']}", "role": "viewer", "name": "ada"}

        before = await callers.call("GET", f"{THERE}/methods", secret=key["secret"])
        await callers.call("PUT", f"{THERE}/members", json=member, status=200)
        inside = (await callers.call("GET", f"{THERE}/me", secret=key["secret"], status=200)).json()
        refused = await callers.call("POST", f"{THERE}/jobs", secret=key["secret"], json={})
        await callers.call("DELETE", f"{THERE}/members", params={"principal": member["principal"]}, status=204)
        after = await callers.call("GET", f"{THERE}/methods", secret=key["secret"])

        assert before.json()["code"] == after.json()["code"] == "project_not_found"
        assert inside["role_in_project"] == "viewer"
        assert inside["permissions"] == [
            "read",
            "observe",
            "build",
        ]  # what concerns all projects needs the role everywhere
        assert refused.json()["code"] == "permission_missing"

    async def test_administrator_of_a_project_is_none_of_the_installation(self, callers: Callers) -> None:
        secret = (await callers.key("bike-admin", "admin", THERE))["secret"]

        made = await callers.call(
            "POST", f"{HERE}/keys", secret=secret, json={"name": "x", "role": "admin"}, status=201
        )
        refused = [
            await callers.call("PUT", f"{HERE}/queues/default", secret=secret, json={"max_live": 1}),
            await callers.call("POST", f"{HERE}/projects", secret=secret, json={"id": "more"}),
            await callers.call("GET", "/metrics", secret=secret),
        ]

        assert made.json()["project_id"] == "bikes"
        assert {one.json()["code"] for one in refused} == {"installation_permission_missing"}

    async def test_keys_of_another_project_are_not_seen(self, callers: Callers) -> None:
        root = await callers.key("root-key", "admin")
        secret = (await callers.key("bike-admin", "admin", THERE))["secret"]

        listed = (await callers.call("GET", f"{HERE}/keys", secret=secret, status=200)).json()["items"]
        for method, path in (("GET", ""), ("POST", ":rotate"), ("DELETE", "")):
            url = f"{HERE}/keys/{root['id']}{path}"
            await callers.call(method, url, secret=secret, headers={"If-Match": "*"}, status=404)

        assert [key["name"] for key in listed] == ["bike-admin"]

    async def test_list_shows_what_one_may_enter(self, callers: Callers) -> None:
        key = await callers.key("ada", "viewer")

        async def listed(secret: str | None) -> list[str]:
            found = await callers.call("GET", f"{HERE}/projects", secret=secret, status=200)
            return [project["id"] for project in found.json()["items"]]

        assert await listed(None) == ["bikes", "default"]
        assert await listed(key["secret"]) == ["default"]
        member = {"principal": f"key:{key['id']}", "role": "viewer"}
        await callers.call("PUT", f"{THERE}/members", json=member, status=200)
        assert await listed(key["secret"]) == ["bikes", "default"]
        assert await listed((await callers.key("bike-bot", "viewer", THERE))["secret"]) == ["bikes"]

    @pytest.mark.parametrize("named", ["cars", "%2e%2e", "default%00", "BIKES", "x" * 5000])
    async def test_what_is_no_project_is_not_found(self, callers: Callers, named: str) -> None:
        found = await callers.call("GET", f"/projects/{named}{API}/methods")

        assert (found.status_code, found.json()["code"]) == (404, "project_not_found")

    async def test_member_must_be_somebody(self, callers: Callers) -> None:
        wrong = await callers.call("PUT", f"{THERE}/members", json={"principal": "ada", "role": "admin"})
        missing = await callers.call("DELETE", f"{THERE}/members", params={"principal": "key:1"})

        assert [entry["code"] for entry in wrong.json()["errors"]] == ["principal_wrong"]
        assert missing.json()["code"] == "project_member_not_found"


class TestShared:
    """Nodes, queues and the writer of a job's status work for all projects."""

    async def test_webhook_hears_of_jobs_of_its_own_project_only(self, callers: Callers) -> None:
        hooks = [
            (await callers.call("POST", f"{at}/webhooks", json=HOOK, status=201)).json()["id"] for at in (HERE, THERE)
        ]

        for project, heard in (("default", [1, 0]), ("bikes", [1, 1])):
            job_id = await add_job(callers.app.database.of(Scope(project)))
            await whole(callers).run(job_id, FAILURE)
            deliveries = [
                (await callers.call("GET", f"{at}/webhooks/{hook}/deliveries", status=200)).json()["items"]
                for at, hook in zip((HERE, THERE), hooks, strict=True)
            ]
            assert [len(each) for each in deliveries] == heard

    async def test_node_that_is_declared_dead_gives_back_the_jobs_of_all(self, callers: Callers) -> None:
        database = callers.app.database
        node = await add_node(database, "gpu-1", environments=("base", ENVIRONMENT), slots=2)
        claims = [
            await whole(callers, node).start(await add_job(database.of(Scope(project))))
            for project in ("default", "bikes")
        ]
        busy = await callers.call("DELETE", f"{HERE}/nodes/gpu-1", headers={"If-Match": "*"})
        await callers.call("POST", f"{HERE}/nodes/gpu-1:declare-dead", json={"confirm": "gpu-1"}, status=200)

        async with database.of(EVERY_PROJECT).reading() as session:
            statuses = [(await get_job(session, claim.job.id)).status for claim in claims]
        assert busy.status_code == 409
        assert JobStatus.RUNNING not in statuses
        assert len(set(statuses)) == 1

    async def test_node_shows_that_it_is_busy_and_not_with_what(self, callers: Callers) -> None:
        database = callers.app.database
        node = await add_node(database, "gpu-1", environments=("base", ENVIRONMENT), heartbeat_at=datetime.now(UTC))
        await whole(callers, node).start(await add_job(database.of(Scope("bikes")), name="their secret plan"))

        drained = await callers.call("POST", f"{HERE}/nodes/gpu-1:drain", json={}, status=200)

        assert drained.json()["state"] == "draining"
        assert [job["name"] for job in drained.json()["jobs"]] == [""]

    async def test_job_waits_for_a_queue_that_another_project_fills(self, callers: Callers) -> None:
        limit = {"max_live": 1, "max_live_per_user": None}
        await callers.call("PUT", f"{HERE}/queues/default", json=limit, headers={"If-Match": "*"}, status=200)
        database = callers.app.database
        node = await add_node(database, "gpu-1", environments=("base", ENVIRONMENT), heartbeat_at=datetime.now(UTC))
        await whole(callers, node).start(await add_job(database.of(Scope("bikes"))))

        waiting = await callers.app.submit()

        shown = await callers.app.get(f"/jobs/{waiting['id']}")
        assert shown["waiting"]["code"] == "waiting_queue_limit"


def whole(callers: Callers, node: str | None = None) -> Runner:
    """Return what plays a node, which sees the jobs of all projects."""
    runner = callers.app.runner
    return replace(runner, database=callers.app.database.of(EVERY_PROJECT), node_id=node or runner.node_id)


class TestLimits:
    @staticmethod
    async def limit(callers: Callers, **limits: Any) -> dict[str, Any]:
        tag = tag_of(await callers.call("GET", f"{HERE}/project", status=200))
        changed = await callers.call("PUT", f"{HERE}/project/limits", json=limits, headers=tag, status=200)
        body: dict[str, Any] = changed.json()
        return body

    async def test_jobs_beyond_are_refused_by_the_check_too_until_some_have_ended(self, callers: Callers) -> None:
        await self.limit(callers, jobs=3)
        chain = await callers.app.submit()

        checked = (await callers.call("POST", f"{HERE}/jobs:validate", json=SUBMIT, status=409)).json()
        refused = await callers.call("POST", f"{HERE}/jobs", json=SUBMIT, status=409)
        shown = (await callers.call("GET", f"{HERE}/project", status=200)).json()
        await callers.call("POST", f"{HERE}/jobs/{chain['id']}:cancel", status=200)
        await callers.app.submit()

        assert checked["code"] == refused.json()["code"] == "project_jobs_limit"
        assert (shown["limits"]["jobs"], shown["use"]["jobs"], shown["use"]["jobs_of_yours"]) == (3, 2, 2)

    async def test_two_submits_at_once_do_not_both_take_the_last_place(self, callers: Callers) -> None:
        await self.limit(callers, jobs=2)

        made = await asyncio.gather(*(callers.call("POST", f"{HERE}/jobs", json=SUBMIT) for _ in range(3)))

        assert sorted(one.status_code for one in made) == [201, 409, 409]

    async def test_each_person_has_a_share(self, callers: Callers) -> None:
        await self.limit(callers, jobs_per_person=2)
        secret = (await callers.key("ada", "operator"))["secret"]
        await callers.app.submit()

        await callers.call("POST", f"{HERE}/jobs", json=SUBMIT, status=409)
        await callers.call("POST", f"{HERE}/jobs", secret=secret, json=SUBMIT, status=201)

    async def test_retry_counts_too(self, callers: Callers) -> None:
        chain = await callers.app.submit()
        await callers.app.runner.run(chain["id"], FAILURE)
        await self.limit(callers, jobs=1)

        refused = await callers.call("POST", f"{HERE}/jobs/{chain['id']}:retry", json={})

        assert refused.json()["code"] == "project_jobs_limit"

    async def test_accelerators_and_queue(self, callers: Callers) -> None:
        await self.limit(callers, accelerators_per_job=2, queue="bikes")

        wrong = {**SUBMIT, "resources": {"accelerators": 3}, "queue": "fast"}
        refused = await callers.call("POST", f"{HERE}/jobs", json={**SUBMIT, "queue": "fast"}, status=422)
        too_many = await callers.call(
            "POST", f"{HERE}/jobs", json={**wrong, "queue": "bikes", "wait": True}, status=422
        )
        taken = await callers.app.submit()

        assert [entry["code"] for entry in refused.json()["errors"]] == ["project_queue"]
        assert [entry["code"] for entry in too_many.json()["errors"]] == ["project_accelerators_limit"]
        assert (await callers.app.get(f"/jobs/{taken['id']}"))["queue"] == "bikes"

    async def test_disk(self, callers: Callers) -> None:
        used = (await callers.call("GET", f"{HERE}/project", status=200)).json()["use"]["disk_bytes"]
        await self.limit(callers, disk_bytes=used + 10)

        headers = {"Content-Type": "application/jsonl", "If-None-Match": "*"}
        rows = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        refused = await callers.call("PUT", f"{HERE}/datasets/faq/file", content=rows, headers=headers, status=409)

        assert refused.json()["code"] == "project_disk_limit"
        assert [file.name for file in callers.app.services.home.datasets.iterdir()] == ["custom01.jsonl"]

    async def test_only_an_administrator_of_the_installation_sets_them(self, callers: Callers) -> None:
        secret = (await callers.key("bike-admin", "admin", THERE))["secret"]
        headers = {"If-Match": "*"}

        refused = await callers.call("PUT", f"{HERE}/project/limits", secret=secret, json={}, headers=headers)

        assert refused.json()["code"] == "installation_permission_missing"


# what belongs to no project, and files of one's own: their addresses are paths
_SHARED = re.compile(rf"{API}/(nodes|queues|environments|presets|scripts|base-models/[^/]+/files)\b")


_WITH_ROWS = [router for router in ROUTERS if router not in (system.router, metrics.router)]


class TestIsolation:
    async def test_no_route_reaches_anything_of_another_project(self, callers: Callers) -> None:
        """Every route, with the ids of another project, called by an administrator of this one."""
        ids = await _furnish(callers)
        secret = (await callers.key("bike-admin", "admin", THERE))["secret"]
        before = await _rows_of_default(callers.app.database)

        for route in (route for router in _WITH_ROWS for route in router.routes if isinstance(route, APIRoute)):
            for method in sorted(route.methods or ()):
                path = re.sub(r"\{(\w+)(:path)?\}", lambda match: ids[match[1]], route.path)
                found = await callers.call(method, path, secret=secret, json={} if method != "GET" else None)
                where = f"{method} {path}: {found.status_code} {found.text[:300]}"
                if "{" in route.path and not _SHARED.match(path):
                    assert found.status_code >= 400, where
                assert found.status_code < 500, where
                told = found.text.replace(ids["secret"], "") if "{secret}" in route.path else found.text
                assert not _FOREIGN.search(told), where

        assert await _rows_of_default(callers.app.database) == before

    async def test_body_cannot_name_anything_of_another_project(self, callers: Callers) -> None:
        ids = await _furnish(callers)
        secret = (await callers.key("bike-bot", "admin", THERE))["secret"]
        submit = {"method": "Custom01", "base_model": ids["base_model"], "dataset": ids["dataset"]}

        refused = await callers.call("POST", f"{HERE}/jobs", secret=secret, json={**submit, "through": "customized"})

        assert refused.status_code == 422
        assert {entry["pointer"] for entry in refused.json()["errors"]} >= {"/base_model", "/dataset"}


_FOREIGN = re.compile("foreign-[a-z]+")


async def _furnish(callers: Callers) -> dict[str, str]:
    """Make one of everything in the project `default`; return what stands for each parameter of an address."""
    app = callers.app
    await app.add_model("foreign-model", ModelState.CUSTOMIZED, kind="adapter", files={"a.txt": "a"})
    models = (await callers.call("GET", f"{HERE}/models")).json()["items"]
    jobs = (await callers.call("GET", f"{HERE}/jobs")).json()["items"]
    data = await app.register_data(
        "foreign-data",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "foreign-text"}]}],
    )
    base = (await callers.call("GET", f"{HERE}/base-models/custom01-base")).json()
    method = (await callers.call("GET", f"{HERE}/methods/Custom01")).json()
    webhook = await app.post("/webhooks", {"url": "https://example.com/foreign-hook", "events": ["job.failed"]}, 201)
    target = await app.post(
        "/deploy-targets", {"name": "foreign-target", "kind": "ollama", "url": "http://127.0.0.1:9"}, 201
    )
    value = {"value": "foreign-secret-value"}
    await callers.call("PUT", f"{HERE}/secrets/foreign-secret", json=value, headers={"If-Match": "*"}, status=200)
    key = await callers.key("foreign-key", "viewer")
    headers = {"Content-Type": "text/x-python", "If-None-Match": "*"}
    await callers.call("PUT", f"{HERE}/scripts/theirs.py", content=b"print('foreign-code')", headers=headers)
    (app.services.home.images / "theirs.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return {
        "job": jobs[0]["id"], "model": models[0]["id"], "dataset": data["id"], "base_model": base["id"],
        "method": method["id"], "webhook": webhook["id"], "deploy_target": target["id"], "secret": "foreign-secret",
        "key": key["id"], "name": "theirs.py", "stage": "training", "number": "1", "version": "1", "attempt": "1",
        "node": "n", "environment": "base", "queue": "default", "preset": "Custom01", "delivery": "1", "path": "a.txt",
        "accelerator": "0", "digest": "1",
    }  # fmt: skip


async def _rows_of_default(database: Database) -> list[str]:
    tables = [mapper.class_ for mapper in SQLModel._sa_registry.mappers if issubclass(mapper.class_, OfProject)]
    found = []
    async with database.of(EVERY_PROJECT).reading() as session:
        for table in tables:
            rows = (await session.exec(select(table).where(table.project_id == "default"))).all()
            found += [repr(row) for row in rows]
    return sorted(found)
