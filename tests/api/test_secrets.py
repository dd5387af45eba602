"""Secrets over HTTP: set, referred to, never shown."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.access.keys import NewKey
from app.domain.access import LOCAL, Role
from app.presets.catalogue import script_path
from app.store.session import Database
from tests.api.jobs_app import API, JobsApp, codes, jobs_app

VALUE = "correct horse battery"
PYTHON = {"Content-Type": "text/x-python"}
ANY = {"If-Match": "*"}


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path) as app:
        yield app


class TestSecrets:
    async def test_are_set_changed_and_deleted_and_never_shown(self, app: JobsApp) -> None:
        body, path = {"value": VALUE}, f"{API}/secrets/hub-token"

        made = await app.client.put(path, json=body, headers=ANY)
        stale = await app.client.put(path, json=body, headers={"If-Match": '"none"'})
        changed = await app.client.put(path, json=body, headers={"If-Match": made.headers["etag"]})
        listed = await app.get("/secrets")

        assert (made.status_code, stale.status_code, changed.status_code) == (200, 412, 200)
        assert [(one["name"], one["reference"]) for one in listed["items"]] == [("hub-token", "secret://hub-token")]
        assert (await app.client.put(path, json=body)).status_code == 428
        everything = [made.text, stale.text, changed.text, str(listed), (await app.client.get(path)).text]
        assert not any(VALUE in text for text in everything)
        assert (await app.client.delete(path, headers=ANY)).status_code == 204
        await app.get("/secrets/hub-token", 404)

    @pytest.mark.parametrize(
        ("name", "value", "wrong"),
        [
            ("a", "tiny!", ("/value", "secret_length")),
            ("a", "0.123456789", ("/value", "secret_is_number")),
            ("a", "nul\0nul\0nul", ("/value", "json_bad_character")),
            ("a b", VALUE, ("", "secret_name_invalid")),
        ],
    )
    async def test_refused_ones_say_why_and_not_what(
        self, app: JobsApp, name: str, value: str, wrong: tuple[str, str]
    ) -> None:
        response = await app.client.put(f"{API}/secrets/{name}", json={"value": value}, headers=ANY)

        assert response.status_code == 422
        assert codes(response.json()) == [wrong]
        assert value not in response.text

    async def test_developers_set_them_and_operators_use_them(self, app: JobsApp) -> None:
        await app.client.put(f"{API}/secrets/hub", json={"value": VALUE}, headers=ANY)
        statuses = {}
        for role in (Role.OPERATOR, Role.DEVELOPER):
            async with app.database.writing() as session:
                _, secret = await app.services.access_keys.create(session, NewKey(role.value, role), by=LOCAL)
            sent = {**ANY, "Authorization": f"Bearer {secret}"}
            put = await app.client.put(f"{API}/secrets/{role}", json={"value": VALUE}, headers=sent)
            statuses[role] = put.status_code

        assert statuses == {Role.OPERATOR: 403, Role.DEVELOPER: 200}
        job = await app.submit(parameters={"seed": 1})
        assert job["warnings"] == []


class TestReferences:
    async def test_unknown_and_broken_ones_are_refused_where_they_stand(self, app: JobsApp) -> None:
        await app.client.put(f"{API}/secrets/hub", json={"value": VALUE}, headers=ANY)
        script = script_path("custom01.py").read_text()
        script = script.replace(
            'parser.add_argument("--seed"', 'parser.add_argument("--hub_token"); parser.add_argument("--seed"'
        )
        await app.client.put(f"{API}/methods/Custom01/files/training", content=script, headers={**ANY, **PYTHON})
        method = await app.get("/methods/Custom01")
        stages = {"training": {**method["stages"]["training"], "env": {"KEY": "secret://gone", "FINE": "secret://hub"}}}
        headers = {**ANY, "Content-Type": "application/merge-patch+json"}
        patched = await app.client.patch(f"{API}/methods/Custom01", json={"stages": stages}, headers=headers)
        assert patched.status_code == 200, patched.text

        body = {"method": "Custom01", "base_model": "custom01-base", "dataset": "custom01", "through": "customized"}
        refused = await app.post("/jobs", {**body, "parameters": {"hub_token": "Bearer secret://hub"}}, 422)

        assert sorted(codes(refused)) == [
            ("/method", "unknown_secret"),
            ("/parameters/hub_token", "secret_reference_broken"),
        ]
        await app.client.put(f"{API}/secrets/gone", json={"value": VALUE}, headers=ANY)
        job = await app.post("/jobs", {**body, "parameters": {"hub_token": "secret://hub"}}, 201)
        read = await app.client.get(f"{API}/jobs/{job['id']}")
        assert read.json()["parameters"]["hub_token"] == "secret://hub"
        assert VALUE not in read.text
        command = await app.client.get(f"{API}/methods/Custom01/command", params={"stage": "training"})
        assert VALUE not in command.text
