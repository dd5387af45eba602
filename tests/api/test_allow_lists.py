"""Allow-lists of environments and nodes over HTTP, on SQLite and on Postgres."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.domain.kinds import STAGES
from app.domain.projects import EVERY_PROJECT
from app.store import claims
from app.store.claims import Offer
from app.store.clock import database_now
from app.store.session import Database
from tests.api.jobs_app import API, SUBMIT, JobsApp, codes, jobs_app
from tests.job_rows import ENVIRONMENT

ANY = {"If-Match": "*"}


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as running:
        yield running


async def put(app: JobsApp, path: str, status: int = 200, headers: Any = ANY, **lists: list[str]) -> Any:
    answer = await app.client.put(f"{API}{path}/allowed", json=lists, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


async def copy(app: JobsApp, name: str) -> str:
    made = await app.client.post(f"{API}/methods/Custom01:copy", json={"name": name})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def claimed(app: JobsApp) -> list[str]:
    """Return the methods of the jobs that the node takes."""
    async with app.database.of(EVERY_PROJECT).writing() as session:
        now = await database_now(session)
        offer = Offer(app.runner.node_id, environments=("base", ENVIRONMENT), slots=9)
        won = await claims.claim_several(session, offer, kinds=STAGES, now=now, lease=timedelta(seconds=60), most=9)
    return [claim.job.method_name or "" for claim in won]


class TestNode:
    async def test_runs_what_it_may(self, app: JobsApp) -> None:
        other = await copy(app, "other")
        for method in ("Custom01", "other"):
            await app.submit(method=method, through="customized")

        shown = await put(app, "/nodes/node-1", methods=["other"])
        waiting = [job for job in (await app.get("/jobs"))["items"] if job["method"]["name"] == "Custom01"]

        assert shown["methods"] == [{"id": other, "name": "other", "project": "default"}]
        assert (await app.get("/nodes/node-1"))["restricted"]
        assert waiting[0]["waiting"]["code"] == "waiting_not_allowed"
        assert await claimed(app) == ["other"]
        await put(app, "/nodes/node-1")
        assert await claimed(app) == ["Custom01"]

    @pytest.mark.parametrize("wait", [False, True])
    async def test_refuses_a_job_that_no_node_may_run(self, app: JobsApp, wait: bool) -> None:
        await put(app, "/nodes/node-1", environments=[ENVIRONMENT])

        problem = await app.post("/jobs", {**SUBMIT, "wait": wait}, 422)

        assert ("/method", "no_node_allows") in codes(problem)

    async def test_says_what_is_unknown(self, app: JobsApp) -> None:
        problem = await put(
            app, "/nodes/node-1", 422, methods=["Custom01", "none"], projects=["nobodys"], environments=["nowhere"]
        )

        assert codes(problem) == [
            ("/methods/1", "unknown_method"),
            ("/projects/0", "allowed_project_unknown"),
            ("/environments/0", "allowed_environment_unknown"),
        ]
        assert not (await app.get("/nodes/node-1"))["restricted"]

    async def test_names_the_version_that_it_replaces(self, app: JobsApp) -> None:
        read = await app.client.get(f"{API}/nodes/node-1/allowed")
        tag = {"If-Match": read.headers["etag"]}
        await put(app, "/nodes/node-1", headers=tag, methods=["Custom01"])

        assert (await put(app, "/nodes/node-1", 412, headers=tag))["code"] == "stale_version"
        assert (await put(app, "/nodes/node-1", 428, headers={}))["code"] == "precondition_required"


class TestEnvironment:
    async def test_is_for_some_methods(self, app: JobsApp) -> None:
        await copy(app, "other")
        await put(app, "/environments/base", methods=["other"])

        problem = await app.post("/jobs", {**SUBMIT, "through": "customized"}, 422)
        await app.submit(method="other", through="customized")
        await put(app, "/environments/base")
        await app.submit(through="customized")

        assert codes(problem) == [("/method", "environment_not_allowed")]

    async def test_is_for_some_projects(self, app: JobsApp) -> None:
        await put(app, "/environments/base", projects=["default"])
        await app.submit(through="customized")

        assert (await app.get("/environments/base/allowed"))["projects"] == ["default"]

    async def test_a_method_that_was_deleted_and_made_anew_is_another_one(self, app: JobsApp) -> None:
        await copy(app, "other")
        await put(app, "/environments/base", methods=["other"])
        await app.client.delete(f"{API}/methods/other", headers=ANY)
        await copy(app, "other")

        problem = await app.post("/jobs", {**SUBMIT, "method": "other", "through": "customized"}, 422)

        assert codes(problem) == [("/method", "environment_not_allowed")]

    async def test_is_not_there(self, app: JobsApp) -> None:
        assert (await put(app, "/environments/nowhere", 404))["code"] == "environment_not_found"

    async def test_needs_an_administrator(self, app: JobsApp) -> None:
        made = await app.post("/keys", {"name": "ada", "role": "developer"}, 201)
        headers = {**ANY, "Authorization": f"Bearer {made['secret']}"}

        for path in ("/environments/base", "/nodes/node-1"):
            assert (await put(app, path, 403, headers=headers))["code"] == "permission_missing"
