"""Lists say what their caller can do, and that is what a call then says."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from app.main import ROUTERS
from app.store.session import Database
from tests.api.client import SwitchableLicence
from tests.api.jobs_app import API, jobs_app
from tests.api.test_projects import HERE, THERE, Callers, two_projects

LISTS = (
    "methods", "jobs", "models", "datasets", "base-models", "deploy-targets", "environments", "nodes", "queues",
    "scripts", "presets", "projects", "secrets", "keys", "webhooks", "code-reviews",
)  # fmt: skip
ROUTES = {
    route.name: (next(iter(route.methods or ())), re.sub(r"\{[^}]*\}", "nothing", route.path))
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
}


@pytest.fixture
async def callers(database: Database, tmp_path: Path) -> AsyncIterator[Callers]:
    async with two_projects(database, tmp_path / "home") as found:
        yield found


async def can(callers: Callers, url: str, secret: str, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = (await callers.call("GET", url, secret=secret, status=200, **options)).json()["can"]
    return found


class TestRole:
    @pytest.mark.parametrize("role", ["viewer", "developer", "admin"])
    async def test_says_what_a_call_says(self, callers: Callers, role: str) -> None:
        """For members of a project, who may nothing that concerns all of them."""
        secret = (await callers.key("ada", role, THERE))["secret"]
        told = 0

        for name in LISTS:
            response = await callers.call("GET", f"{HERE}/{name}", secret=secret)
            for operation, ability in response.json().get("can", {}).items():
                method, path = ROUTES[operation]
                called = await callers.call(method, path, secret=secret, headers={"If-Match": "*"})
                where = f"{role}: {operation} {ability} {called.status_code} {called.text[:200]}"
                assert (called.status_code == 403) is not ability["allowed"], where
                assert ability["allowed"] or ability["reason"]["code"] == called.json()["code"], where
                told += 1

        assert told > 40

    async def test_reason_is_in_the_callers_language(self, callers: Callers) -> None:
        secret = (await callers.key("ada", "viewer", THERE))["secret"]

        german = await can(callers, f"{HERE}/datasets", secret, headers={"Accept-Language": "de"})

        assert "dafür ist die Rolle operator nötig" in german["upload_dataset"]["reason"]["detail"]


async def test_licence_is_a_reason_too(database: Database, tmp_path: Path) -> None:
    async with jobs_app(database, tmp_path / "home", licence=SwitchableLicence(installed=False)) as app:
        found = (await app.client.get(f"{API}/methods")).json()["can"]

    refused = {name for name, ability in found.items() if not ability["allowed"]}
    assert refused == {"create_method", "copy_method", "delete_method"}
    assert found["create_method"]["reason"]["code"] == "commercial_license_required"
