"""The audit trail over HTTP, on SQLite and on Postgres: each change is recorded, with who, what and from where."""

import asyncio
import hashlib
import io
import json
import re
import zipfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel, select

from app.access.audit import AuditTrail, Refusals, verify
from app.access.guard import LicenceGuard, LicenceRecord
from app.access.licence import issue
from app.api.application import HttpOptions, new_application
from app.api.guards import AccessPolicy
from app.api.routes import queues
from app.api.routing import permission_of
from app.domain.access import Permission
from app.domain.audit import HIDDEN, Action, AuditKind, acting, canonical, recordable
from app.domain.code_review import CodeApproval
from app.domain.enums import ModelState
from app.domain.projects import EVERY_PROJECT
from app.main import ROUTERS
from app.store import job_attempts, nodes
from app.store.audit_records import kept, old_records
from app.store.audit_trail import TABLES, Audited
from app.store.code_reviews import set_policy
from app.store.session import Database
from app.store.tables import AuditRecordRow, NodeRow, QueueRow
from tests.api.jobs_app import API, SUBMIT, JobsApp, jobs_app
from tests.api.resources import safetensors
from tests.job_rows import FAILURE, START, add_node, cards
from tests.waiting import until

ANY = {"If-Match": "*"}
PYTHON = {"Content-Type": "text/x-python", **ANY}
PATCH = {"Content-Type": "application/merge-patch+json", **ANY}
BYTES = {"Content-Type": "application/octet-stream"}
CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode()
SECRETS = ("correct horse battery", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "hub-password-of-ada")
SPEC = "channels: [conda-forge]\ndependencies:\n  - python>=3.11\n"
SCRIPT = b"import argparse\n\nargparse.ArgumentParser().parse_known_args()\n"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        async with app.database.writing() as session:
            assert await nodes.heartbeat(session, app.runner.node_id, now=datetime.now(UTC))
        yield app


async def records(database: Database, after: int = 0) -> list[AuditRecordRow]:
    async with database.reading() as session:
        statement = select(AuditRecordRow).where(AuditRecordRow.number > after).order_by(sa.text("number"))
        return list((await session.exec(statement)).all())


async def newest(database: Database) -> AuditRecordRow:
    return (await records(database))[-1]


def details_of(row: AuditRecordRow) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row.details)
    return found


def things_of(row: AuditRecordRow) -> list[tuple[str, str, str | None]]:
    return [(one["kind"], one["name"] or one["id"], one.get("done")) for one in details_of(row)["things"]]


class Drive:
    """Calls one changing route after the other and looks whether each left a record of its own."""

    def __init__(self, app: JobsApp) -> None:
        self.app = app
        self.done: set[str] = set()

    async def __call__(self, operation: str, method: str, path: str, **options: Any) -> Any:
        before = len(await records(self.app.database))
        response = await self.app.client.request(method, API + path, **options)
        assert response.status_code < 400, (operation, response.text)
        self.done.add(operation)
        new = (await records(self.app.database))[before:]
        assert new, f"{operation} left no record"
        for row in new:
            if row.kind is not AuditKind.LAUNCH:
                assert (row.operation, row.caller, row.principal) == (operation, "local", "local"), operation
                assert row.request_id == response.headers["x-request-id"]
        return response.json() if response.content and "json" in response.headers["content-type"] else None

    async def unanswered(self, operation: str, path: str, body: Any) -> None:
        """Ask what is answered only when a node has run something; leave when the job is there."""
        before = len(await records(self.app.database))
        asking = asyncio.create_task(self.app.client.post(API + path, json=body))

        async def recorded() -> bool:
            assert not asking.done(), asking.result().text
            return any(row.operation == operation for row in (await records(self.app.database))[before:])

        await until(recorded, operation)
        self.done.add(operation)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def drive_methods(drive: Drive) -> None:
    stages = {"training": {"file": "train.py", "conda_env": "base"}}
    body = {"name": "finance", "training_type": "chat", "technique": "sft", "lifecycle": ["customized"]}
    await drive("write_script", "PUT", "/scripts/train.py", content=SCRIPT, headers={"Content-Type": "text/x-python"})
    await drive("create_method", "POST", "/methods", json={**body, "stages": stages})
    await drive("update_method", "PATCH", "/methods/finance", content=b'{"description": "a"}', headers=PATCH)
    await drive(
        "replace_method", "PUT", "/methods/finance", json={**body, "stages": stages, "description": "b"}, headers=ANY
    )
    await drive(
        "replace_method_file", "PUT", "/methods/finance/files/training", content=SCRIPT + b"#\n", headers=PYTHON
    )
    await drive("restore_method", "POST", "/methods/finance:restore", json={"version": 1}, headers=ANY)
    await drive("copy_method", "POST", "/methods/finance:copy", json={"name": "copy"})
    await drive("delete_method", "DELETE", "/methods/copy", headers=ANY)
    await drive("update_method", "PATCH", "/methods/Custom01", content=b'{"description": "mine"}', headers=PATCH)
    await drive("reset_method", "POST", "/methods/Custom01:reset", headers=ANY)
    await drive("install_preset", "POST", "/presets/Custom02:install")
    await drive("write_script", "PUT", "/scripts/gone.py", content=SCRIPT, headers={"Content-Type": "text/x-python"})
    await drive("delete_script", "DELETE", "/scripts/gone.py", headers=ANY)


async def drive_data(drive: Drive) -> None:
    rows = b'{"question": "a?", "answer": "b"}\n' * 3
    upload = {"Content-Type": "application/jsonl"}
    await drive("upload_dataset", "PUT", "/datasets/rows/file", content=rows, headers=upload)
    (drive.app.services.home.datasets / "more.jsonl").write_bytes(rows)
    await drive("create_dataset", "POST", "/datasets", json={"name": "more", "path": "more.jsonl"})
    parts = [{"dataset": "rows"}, {"dataset": "more"}]
    await drive("mix_datasets", "POST", "/datasets:mix", json={"name": "mix", "parts": parts})
    await drive("delete_dataset", "DELETE", "/datasets/mix", headers=ANY)
    await drive("upload_base_model_file", "PUT", "/base-models/tiny/files/config.json", content=CONFIG, headers=BYTES)
    weights = safetensors(embedding=[10, 4], head=[4, 10])
    path = "/base-models/tiny/files/model.safetensors"
    await drive("upload_base_model_file", "PUT", path, content=weights, headers=BYTES)
    await drive("create_base_model", "POST", "/base-models", json={"name": "tiny"})
    allowed = {"pickled_weights": True}
    await drive("allow_base_model_loading", "POST", "/base-models/tiny:allow-loading", json=allowed)
    await drive("delete_base_model", "DELETE", "/base-models/tiny", headers=ANY)
    archive = packed({"config.json": CONFIG, "model.safetensors": weights})
    await drive("upload_base_model_archive", "PUT", "/base-models/other/archive", content=archive, headers=BYTES)
    await drive("discard_base_model_upload", "DELETE", "/base-models/other/files", headers=ANY)
    wanted = {"name": "Qwen", "repository": "Qwen/Qwen2.5-1.5B"}
    await drive("download_base_model", "POST", "/base-models:download", json=wanted)


def packed(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


async def drive_jobs(drive: Drive) -> None:
    await drive.app.add_model("bicycles", ModelState.CUSTOMIZED, kind="adapter", files={"weights.bin": "1"})
    body = {**SUBMIT, "through": "customized"}
    one = await drive("submit_job", "POST", "/jobs", json=body)
    await drive("cancel_job", "POST", f"/jobs/{one['id']}:cancel")
    await drive("retry_job", "POST", f"/jobs/{one['id']}:retry")
    await drive("copy_job", "POST", f"/jobs/{one['id']}:copy", json={})
    await drive.unanswered(
        "chat_with_model", "/models/bicycles/chat", {"messages": [{"role": "user", "content": "Hello?"}]}
    )
    preview = {"base_model": "custom01-base", "dataset": "custom01"}
    await drive.unanswered("preview_rows", "/methods/Custom01:preview", preview)
    await drive("delete_model", "DELETE", "/models/bicycles", headers=ANY)
    served = {"name": "online", "state": "online", "url": "http://127.0.0.1:9"}
    new = {**served, "method": "Custom01", "base_model": "custom01-base"}
    await drive("register_model", "POST", "/models", json=new)


async def drive_operations(drive: Drive) -> None:
    await drive("create_environment", "POST", "/environments", json={"name": "lab", "spec": SPEC})
    await drive("replace_environment", "PUT", "/environments/lab", json={"spec": SPEC + "  - pip\n"}, headers=ANY)
    await drive("build_environment", "POST", "/environments/lab:build", json={})
    async with drive.app.database.writing() as session:
        await session.exec(sa.update(NodeRow).values(environments=["base", "lab"]))
    await drive("pack_environment", "POST", "/environments/lab:pack")
    await drive("create_environment", "POST", "/environments", json={"name": "old"})
    await drive("delete_environment", "DELETE", "/environments/old", headers=ANY)
    await drive("set_queue_limits", "PUT", "/queues/night", json={"max_live": 2}, headers=ANY)
    await drive("delete_queue_limits", "DELETE", "/queues/night", headers=ANY)
    target = {"name": "box", "kind": "ollama", "url": "http://127.0.0.1:9"}
    await drive("create_deploy_target", "POST", "/deploy-targets", json=target)
    await drive(
        "update_deploy_target", "PATCH", "/deploy-targets/box", content=b'{"url": "http://127.0.0.1:8"}', headers=PATCH
    )
    await drive("test_deploy_target", "POST", "/deploy-targets/box:test")
    await drive("delete_deploy_target", "DELETE", "/deploy-targets/box", headers=ANY)
    hook = {"url": f"http://receiver.example/hooks?key={SECRETS[2]}", "secret": SECRETS[1]}
    made = await drive("create_webhook", "POST", "/webhooks", json=hook)
    address = f"/webhooks/{made['id']}"
    await drive("update_webhook", "PATCH", address, content=b'{"events": ["job.failed"]}', headers=PATCH)
    message = await drive("test_webhook", "POST", f"{address}:test")
    await drive("redeliver_delivery", "POST", f"{address}/deliveries/{message['id']}:redeliver")
    await drive("delete_webhook", "DELETE", address, headers=ANY)
    await drive("run_housekeeping", "POST", "/housekeeping:run", json={})
    key = await drive("create_key", "POST", "/keys", json={"name": "ada", "role": "operator"})
    await drive("update_key", "PATCH", "/keys/ada", content=b'{"role": "viewer"}', headers=PATCH)
    rotated = await drive("rotate_key", "POST", "/keys/ada:rotate", headers=ANY)
    await drive("revoke_key", "DELETE", "/keys/ada", headers=ANY)
    for shown in (key["secret"], rotated["secret"]):
        assert not any(shown in row.details for row in await records(drive.app.database))
    await drive("set_secret", "PUT", "/secrets/hub", json={"value": SECRETS[0]}, headers=ANY)
    await drive("delete_secret", "DELETE", "/secrets/hub", headers=ANY)


async def drive_reviews(drive: Drive) -> None:
    app, file = drive.app, "/methods/Custom01/files/training"
    async with app.database.writing() as session:
        await set_policy(session, CodeApproval.REQUIRED, now=START)
    author = await app.post("/keys", {"name": "author", "role": "developer"}, 201)
    for number, steps in enumerate((("approve", "withdraw"), ("reject",))):
        headers = {**PYTHON, "Authorization": f"Bearer {author['secret']}"}
        changed = await app.client.put(API + file, content=SCRIPT + b"#" * (number + 2), headers=headers)
        assert changed.status_code == 200, changed.text
        (review,) = (await app.get("/code-reviews", params={"state": "waiting"}))["items"]
        for step in steps:
            name = "withdraw_approval" if step == "withdraw" else f"{step}_code"
            address = f"/code-reviews/{review['digest']}:{step}"
            await drive(name, "POST", address, json={"note": "read"})
            assert ("code-review", "Custom01", "changed") in things_of(await newest(app.database))


async def drive_projects(drive: Drive) -> None:
    await drive(
        "set_allowed_in_environment", "PUT", "/environments/base/allowed", json={"methods": ["Custom01"]}, headers=ANY
    )
    assert things_of(await newest(drive.app.database)) == [("environment-allow-list", "base", "created")]
    await drive("create_project", "POST", "/projects", json={"id": "bikes"})
    await drive("update_project", "PATCH", "/project", content=b'{"title": "Bikes"}', headers=PATCH)
    await drive("set_project_limits", "PUT", "/project/limits", json={"jobs": 500}, headers=ANY)
    member = {"principal": "key:1", "name": "ada", "role": "viewer"}
    await drive("set_member", "PUT", "/members", json=member)
    assert details_of(await newest(drive.app.database))["things"][0]["fields"]["role"] == [None, "viewer"]
    await drive("remove_member", "DELETE", "/members", params={"principal": "key:1"})
    row = await newest(drive.app.database)
    assert (things_of(row), row.project_id) == ([("member", "ada", "deleted")], "default")


async def drive_licence(drive: Drive) -> None:
    home, key, now = drive.app.services.home, Ed25519PrivateKey.generate(), datetime.now(UTC)
    guard = LicenceGuard(home.licence, key.public_key(), lambda: datetime.now(UTC))
    drive.app.application.state.licence = guard
    drive.app.application.state.licence_record = LicenceRecord(drive.app.database, guard)
    licence = issue(
        key,
        licence_id="L-1",
        licensee="ACME",
        issued_at=now,
        expires_at=now + timedelta(days=30),
        features=("methods:write",),
    )
    await drive("install_license", "PUT", "/license", json=json.loads(licence))
    (changed,) = details_of(await newest(drive.app.database))["files"]
    digest = hashlib.sha256(home.licence.read_bytes()).hexdigest()
    assert changed == {"path": "license.json", "before": None, "after": digest}


async def drive_nodes(drive: Drive) -> None:
    database = drive.app.database
    node = await add_node(database, "gpu-box", accelerators=cards(1), environments=("base", "pack"))
    await drive("update_node", "PATCH", "/nodes/gpu-box", content=b'{"extra_labels": {"a": "b"}}', headers=PATCH)
    job = await drive("submit_job", "POST", "/jobs", json={**SUBMIT, "through": "customized"})
    won = await replace(drive.app.runner, node_id=node).start(job["id"])
    async with database.writing() as session:
        await job_attempts.finish(session, won, replace(FAILURE, exit={"unkillable": 2}), now=START)
    await drive("set_allowed_on_node", "PUT", "/nodes/gpu-box/allowed", json={"projects": ["default"]}, headers=ANY)
    await drive("release_accelerator", "POST", "/nodes/gpu-box/accelerators/card-0:release")
    await drive("drain_node", "POST", "/nodes/gpu-box:drain")
    await drive("undrain_node", "POST", "/nodes/gpu-box:undrain")
    async with database.writing() as session:
        await session.exec(sa.update(NodeRow).where(NodeRow.id == node).values(heartbeat_at=START))  # type: ignore[arg-type]
    await drive("declare_node_dead", "POST", "/nodes/gpu-box:declare-dead", json={"confirm": "gpu-box"})
    await drive("delete_node", "DELETE", "/nodes/gpu-box", headers=ANY)


class TestEveryChange:
    async def test_leaves_a_record_of_its_own_and_the_trail_is_whole(self, app: JobsApp) -> None:
        drive = Drive(app)

        for part in (
            *(drive_nodes, drive_jobs, drive_methods, drive_data, drive_operations),
            *(drive_reviews, drive_projects, drive_licence),
        ):
            await part(drive)

        changing = {
            route.name
            for router in ROUTERS
            for route in router.routes
            if route.methods != {"GET"} and permission_of(route) is not Permission.READ
        }
        assert changing == drive.done, "drive the new route above"
        found = await verify(app.database)
        assert found.sound
        assert found.records == len(await records(app.database))
        everything = "".join(row.details + row.things for row in await records(app.database))
        assert not [secret for secret in SECRETS if secret in everything]

    async def test_says_who_what_and_from_where(self, app: JobsApp) -> None:
        key = await app.post("/keys", {"name": "ada", "role": "admin"}, 201)
        headers = {"Authorization": f"Bearer {key['secret']}", "X-Request-Id": "request-1", **ANY}

        for most in (2, 3):
            await app.client.put(f"{API}/queues/night", json={"max_live": most}, headers=headers)

        row = await newest(app.database)
        assert (row.caller_kind, row.caller, row.principal) == ("key", "ada", f"key:{key['id']}")
        assert (row.address, row.request_id, row.operation) == ("127.0.0.1", "request-1", "set_queue_limits")
        (thing,) = details_of(row)["things"]
        assert thing == {
            "kind": "queue", "id": "night", "name": "night", "done": "changed", "fields": {"max_live": [2, 3]},
        }  # fmt: skip

    async def test_is_not_recorded_where_it_was_rolled_back(self, app: JobsApp) -> None:
        with acting(ACTION):
            with pytest.raises(IntegrityError):
                await write_twice(app.database)
            await write_queue(app.database, "night", 1)

        assert [(row.number, things_of(row)) for row in await records(app.database)] == [
            (1, [("queue", "night", "created")])
        ]

    async def test_of_the_service_itself_is_not_recorded(self, app: JobsApp) -> None:
        await write_queue(app.database, "night", 1)

        assert await records(app.database) == []

    async def test_refused_or_wrong_ones_leave_none(self, app: JobsApp) -> None:
        await app.post("/methods", {"name": "x"}, 422)
        await app.post("/jobs/nobody:cancel", status=404)

        assert await records(app.database) == []

    async def test_that_cannot_be_recorded_is_refused(self, app: JobsApp) -> None:
        """The program is wrong then; a change without a record would be worse."""
        copied = sa.insert(QueueRow).from_select(["name"], sa.select(sa.literal("night")))
        with acting(ACTION):
            for statement in (copied, sa.delete(QueueRow)):
                with pytest.raises(NotImplementedError, match="not recorded"):
                    await execute(app.database, statement)

    def test_of_each_table_is_recorded_or_it_says_why_not(self) -> None:
        assert set(TABLES) == set(SQLModel.metadata.tables)
        for name, rule in TABLES.items():
            if isinstance(rule, Audited):
                columns = set(SQLModel.metadata.tables[name].columns.keys())
                assert rule.hidden | rule.digests <= columns
                assert rule.name is None or rule.name in columns

    def test_is_made_by_no_statement_written_as_text(self) -> None:
        """The trail sees statements that are built, not those that are written."""
        writing = re.compile(r"text\(\s*[frb]*[\"']+\s*(insert|update|delete|with)\b", re.IGNORECASE)
        found = [path.name for path in Path("app").rglob("*.py") if writing.search(path.read_text("utf-8"))]

        assert found == []


ACTION = Action("key", "ada", "key:1", "set_queue_limits", address="127.0.0.1")


async def write_queue(database: Database, name: str, most: int) -> None:
    async with database.writing() as session:
        await session.merge(QueueRow(name=name, max_live=most, created_at=START, updated_at=START))


async def execute(database: Database, statement: Any) -> None:
    async with database.writing() as session:
        await session.exec(statement)


async def write_twice(database: Database) -> None:
    async with database.writing() as session:
        for _ in range(2):
            await session.exec(sa.insert(QueueRow).values(name="never", created_at=START, updated_at=START))


async def write_some(database: Database, count: int = 6) -> None:
    with acting(ACTION):
        for number in range(1, count + 1):
            await write_queue(database, "night", number)


async def change(database: Database, *statements: str) -> None:
    """Change rows as somebody does who has the database."""
    async with database.writing() as session:
        connection = await session.connection()
        for statement in statements:
            await connection.execute(sa.text(statement))


class TestLaunch:
    async def test_is_recorded_with_node_attempt_and_script(self, app: JobsApp) -> None:
        made = await app.submit(through="customized")
        await app.runner.start(made["id"])

        submitted, launched = await records(app.database)
        launch = details_of(launched)["launch"]
        method = await app.get("/methods/Custom01")
        files = await app.get(f"/methods/{method['id']}/files")
        training = next(file for file in files["items"] if file["stage"] == "training")
        assert (launched.kind, launched.caller_kind, launched.caller) == (AuditKind.LAUNCH, "node", "node-1")
        assert [thing[:2] for thing in things_of(launched)] == [
            ("job", "Custom01"), ("node", "node-1"), ("method", "Custom01"),
        ]  # fmt: skip
        assert (launch["attempt"], launch["method_version"], launch["user"]) == (1, 1, "")
        assert launch["script"]["sha256"] == training["sha256"]
        (job,) = details_of(submitted)["things"]
        assert launch["launch"] == job["fields"]["launch"][1]
        assert (await verify(app.database)).sound


class TestVerify:
    async def test_finds_nothing_where_nothing_is_wrong(self, app: JobsApp) -> None:
        empty = await verify(app.database)
        await write_some(app.database)
        kept = (await records(app.database))[3].hash

        body = await app.get("/audit:verify", params={"expect": kept})

        assert (empty.sound, empty.records) == (True, 0)
        assert (body["sound"], body["first"], body["last"], body["records"]) == (True, 1, 6, 6)
        assert body["hash"] == (await newest(app.database)).hash

    @pytest.mark.parametrize(
        ("statements", "found"),
        [
            (["UPDATE audit_record SET caller = 'bob' WHERE number = 3"], [(3, "audit_record_changed")]),
            (["UPDATE audit_record SET details = '{}' WHERE number = 3"], [(3, "audit_record_changed")]),
            (["UPDATE audit_record SET details = 'x' WHERE number = 3"], [(3, "audit_record_changed")]),
            (["UPDATE audit_record SET details = '[1]' WHERE number = 3"], [(3, "audit_record_changed")]),
            (["UPDATE audit_record SET kind = 'removal' WHERE number = 3"], [(3, "audit_record_changed")]),
            (["UPDATE audit_record SET things = '' WHERE number = 3"], [(3, "audit_record_changed")]),
            (["DELETE FROM audit_record WHERE number = 3"], [(3, "audit_record_missing")]),
            (["DELETE FROM audit_record WHERE number > 4"], [(5, "audit_end_removed")]),
            (["DELETE FROM audit_record WHERE number < 3"], [(3, "audit_beginning_removed")]),
            (["DELETE FROM audit_record"], [(1, "audit_end_removed")]),
            (["DELETE FROM installation WHERE key = 'audit-head'"], [(6, "audit_head_differs")]),
            (
                [
                    "UPDATE audit_record SET number = 100 WHERE number = 3",
                    "UPDATE audit_record SET number = 3 WHERE number = 4",
                    "UPDATE audit_record SET number = 4 WHERE number = 100",
                ],
                [
                    (3, "audit_chain_broken"), (3, "audit_record_changed"), (4, "audit_chain_broken"),
                    (4, "audit_record_changed"), (5, "audit_chain_broken"),
                ],
            ),
        ],
    )  # fmt: skip
    async def test_finds_what_was_done_to_the_rows(
        self, app: JobsApp, statements: list[str], found: list[tuple[int, str]]
    ) -> None:
        await write_some(app.database)
        await change(app.database, *statements)

        body = await app.get("/audit:verify")

        assert [(one["number"], one["code"]) for one in body["problems"]] == found
        assert (body["sound"], body["problem_count"]) == (False, len(found))
        assert all(str(one["number"]) in one["detail"] for one in body["problems"])

    async def test_finds_a_record_with_another_content_and_its_right_hash(self, app: JobsApp) -> None:
        await write_some(app.database)
        row = (await records(app.database))[2]
        forged = replace(kept(row).record, caller="bob")
        await change(app.database, f"UPDATE audit_record SET caller = 'bob', hash = '{forged.hash()}' WHERE number = 3")

        assert [(one.number, one.code) for one in (await verify(app.database)).problems] == [(4, "audit_chain_broken")]

    async def test_finds_a_cut_end_by_the_hash_that_somebody_kept(self, app: JobsApp) -> None:
        """Who has the database can write another head, too."""
        await write_some(app.database)
        last, before = (await records(app.database))[-1].hash, (await records(app.database))[-2].hash
        head = json.dumps({"number": 5, "hash": before})
        await change(
            app.database,
            "DELETE FROM audit_record WHERE number = 6",
            f"UPDATE installation SET value = '{head}' WHERE key = 'audit-head'".replace(":", "\\:"),
        )

        assert (await verify(app.database)).sound
        assert [one.code for one in (await verify(app.database, expected=last)).problems] == ["audit_expected_missing"]


class TestWriters:
    async def test_of_two_processes_make_one_chain(self, database: Database) -> None:
        others = [Database(database.url, scope=EVERY_PROJECT), Database(database.url, scope=EVERY_PROJECT)]
        try:
            with acting(ACTION):
                await asyncio.gather(
                    *(write_queue(others[number % 2], f"queue-{number}", number) for number in range(24))
                )
        finally:
            for other in others:
                await other.close()

        found = await verify(database)
        assert (found.sound, found.first, found.records) == (True, 1, 24)


class TestRefusals:
    async def test_repeats_are_one_record_and_reads_are_none(self, database: Database) -> None:
        clock = [0.0]
        trail = AuditTrail(database=database, clock=lambda: START)
        trail.refusals = Refusals(now=lambda: START, clock=lambda: clock[0])
        client = guarded(trail, "the-token-of-the-installation")

        for _ in range(3):
            await client.put("/things/a", headers={"Authorization": "Bearer wrong"})
        await trail.keep_up()
        await client.put("/things/a", headers={"Authorization": "Bearer wrong"})
        await client.put("/things/a")  # no token at all is no attempt
        await trail.keep_up()
        (first,) = await records(database)
        clock[0] = Refusals.COLLAPSED_SECONDS
        await trail.keep_up()

        second = await newest(database)
        assert (first.kind, first.operation, first.address) == (AuditKind.REFUSAL, "authenticate", "127.0.0.1")
        told = [details_of(row)["refusal"] for row in (first, second)]
        assert [(one["code"], one["count"]) for one in told] == [("token_wrong", 3), ("token_wrong", 1)]
        assert "wrong" not in first.details.replace("token_wrong", "")
        assert (await verify(database)).sound

    async def test_say_who_was_not_permitted_what(self, app: JobsApp) -> None:
        key = await app.post("/keys", {"name": "ada", "role": "viewer"}, 201)
        headers = {"Authorization": f"Bearer {key['secret']}", **ANY}
        policy = AccessPolicy(keys=app.services.access_keys.caller, refused=app.services.audit.refusals.note)
        application = new_application(HttpOptions(version="1", access=policy))
        application.state.services = app.services
        application.include_router(queues.router)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://127.0.0.1:8000")

        refused = await client.put(f"{API}/queues/night", json={"max_live": 1}, headers=headers)
        await app.services.audit.finish()

        row = await newest(app.database)
        assert refused.status_code == 403
        assert (row.kind, row.caller, row.operation) == (AuditKind.REFUSAL, "ada", "set_queue_limits")
        assert things_of(row) == [("queue", "night", None)]

    def test_of_many_kinds_do_not_fill_the_database(self) -> None:
        refusals = Refusals(now=lambda: START, clock=lambda: 0.0)

        for number in range(10 * Refusals.KINDS):
            refusals.note(replace(ACTION, caller=f"caller-{number}"), "token_wrong")

        due = refusals.take_due()
        assert len(due) == Refusals.KINDS + 1
        assert sum(one.count for one in due) == 10 * Refusals.KINDS


def guarded(trail: AuditTrail, token: str) -> httpx.AsyncClient:
    application = new_application(
        HttpOptions(version="1", access=AccessPolicy(token=token, refused=trail.refusals.note))
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://127.0.0.1:8000")


class TestRead:
    async def test_pages_and_filters(self, app: JobsApp) -> None:
        await write_some(app.database, 3)
        made = await app.submit(through="customized")
        page = await app.get("/audit", params={"limit": 2})
        rest = await app.get("/audit", params={"limit": 2, "cursor": page["next_cursor"]})

        async def numbers(**wanted: Any) -> list[int]:
            return [one["number"] for one in (await app.get("/audit", params=wanted))["items"]]

        assert [one["number"] for one in page["items"] + rest["items"]] == [4, 3, 2, 1]
        assert await numbers(caller="ada") == await numbers(caller="key:1") == [3, 2, 1]
        assert await numbers(thing="night") == await numbers(thing_kind="queue") == [3, 2, 1]
        assert await numbers(thing=made["id"]) == await numbers(operation="submit_job") == [4]
        assert await numbers(thing="nigh") == await numbers(kind="launch") == []
        times = [one["at"] for one in rest["items"]]
        assert await numbers(until=times[0]) == [1]
        assert await numbers(since=times[0]) == [4, 3, 2]
        one = await app.get("/audit/2")
        assert one["details"]["things"][0]["fields"] == {"max_live": [1, 2]}
        assert (await app.get("/audit/99", 404))["code"] == "audit_record_not_found"
        assert (await app.get("/audit", 422, params={"since": "yesterday"}))["code"] == "invalid_request"

    async def test_exports_lines(self, app: JobsApp) -> None:
        await write_some(app.database, 3)

        response = await app.client.get(f"{API}/audit:export")

        lines = [json.loads(line) for line in response.text.splitlines()]
        assert response.headers["content-type"].startswith("application/octet-stream")
        assert [line["number"] for line in lines] == [1, 2, 3]
        assert lines[1]["previous"] == lines[0]["hash"]

    async def test_is_for_administrators(self, app: JobsApp) -> None:
        key = await app.post("/keys", {"name": "dev", "role": "developer"}, 201)
        headers = {"Authorization": f"Bearer {key['secret']}"}

        for path in ("/audit", "/audit/1", "/audit:export", "/audit:verify"):
            assert (await app.client.get(API + path, headers=headers)).status_code == 403


class TestRetention:
    async def test_removes_the_oldest_and_says_so_in_the_trail(self, app: JobsApp) -> None:
        await write_some(app.database)
        third = (await records(app.database))[2]
        limit = (await records(app.database))[3].at

        async with app.database.writing() as session:
            removed = await old_records(session, limit, remove=True)

        left = await records(app.database)
        assert (removed, [row.number for row in left]) == (3, [4, 5, 6, 7])
        assert left[-1].kind is AuditKind.REMOVAL
        assert details_of(left[-1])["removed"] == {
            "first": 1, "last": 3, "hash": third.hash, "before": limit.isoformat(),
        }  # fmt: skip
        found = await verify(app.database, expected=third.hash)
        assert (found.sound, found.first, found.records) == (True, 4, 4)
        await change(app.database, "DELETE FROM audit_record WHERE number = 4")
        assert [one.code for one in (await verify(app.database)).problems] == ["audit_beginning_removed"]

    async def test_keeps_the_newest_however_old(self, app: JobsApp) -> None:
        await write_some(app.database, 2)
        later = datetime.now(UTC) + timedelta(days=1)

        async with app.database.reading() as session:
            assert await old_records(session, later, remove=False) == 1


class TestValues:
    @pytest.mark.parametrize(
        "value",
        [
            {"hub_token": "hf_abcdefghijklmnopqrstuvwx"},
            {"nested": [{"password": "correct horse"}]},
            "postgresql://ada:correct@host/db",
            "https://host/path?signature=correct",
            "export HF_TOKEN=correct",
            "deepe_abcdefghijklmnopqrstuvwxyz",
        ],
    )
    def test_hold_no_secrets(self, value: Any) -> None:
        shown = canonical(recordable(value))

        assert HIDDEN in shown
        assert not any(secret in shown for secret in ("correct", "abcdefghijklmnop"))

    def test_long_ones_are_digests(self) -> None:
        assert recordable("x" * 2000)["bytes"] == 2002
