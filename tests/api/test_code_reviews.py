"""Approval of code by a second person over HTTP, on SQLite and on Postgres."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.domain.code_review import CodeApproval
from app.domain.enums import JobStatus
from app.executor.runs.job_code import unpinned_files
from app.executor.runs.job_spec import JobSpec
from app.presets.catalogue import load_manifests
from app.store.code_reviews import set_policy
from app.store.session import Database
from app.store.tables import JobRow
from tests.api.jobs_app import API, SUBMIT, JobsApp, codes, jobs_app

TRAINING = f"{API}/methods/Custom01/files/training"
CHANGED = b"\n# changed\n"


class Reviewed:
    """A service that runs approved code only, called with keys of several people."""

    def __init__(self, app: JobsApp) -> None:
        self.app = app
        self.keys: dict[str, str] = {}

    async def add(self, name: str, role: str = "developer") -> None:
        made = await self.app.post("/keys", {"name": name, "role": role}, 201)
        self.keys[name] = made["secret"]

    async def call(self, who: str, verb: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.keys[who]}", **options.pop("headers", {})}
        return await self.app.client.request(verb, path, headers=headers, **options)

    async def change(self, who: str, more: bytes = CHANGED) -> None:
        """Let somebody upload another training script of Custom01."""
        present = await self.app.client.get(TRAINING)
        headers = {"If-Match": "*", "Content-Type": "text/x-python"}
        answer = await self.call(who, "PUT", TRAINING, content=present.content + more, headers=headers)
        assert answer.status_code == 200, answer.text

    async def submit(self, who: str = "ada", status: int = 201) -> Any:
        answer = await self.call(who, "POST", f"{API}/jobs", json=SUBMIT)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def decide(self, who: str, digest: str, what: str, status: int = 200, note: str = "") -> Any:
        answer = await self.call(who, "POST", f"{API}/code-reviews/{digest}:{what}", json={"note": note})
        assert answer.status_code == status, answer.text
        return answer.json()

    async def waiting(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.app.get("/code-reviews?state=waiting"))["items"]
        return found

    async def changed_and_waiting(self, who: str = "ada") -> str:
        """Let somebody change the training script; return the digest that waits."""
        await self.change(who)
        (item,) = await self.waiting()
        digest: str = item["digest"]
        return digest


@pytest.fixture
async def reviewed(database: Database, tmp_path: Path) -> AsyncIterator[Reviewed]:
    async with jobs_app(database, tmp_path / "home") as app:
        async with database.writing() as session:
            await set_policy(session, CodeApproval.REQUIRED, now=datetime.now(UTC))
        service = Reviewed(app)
        for name in ("ada", "grace"):
            await service.add(name)
        yield service


class TestSubmit:
    async def test_takes_what_the_product_ships(self, reviewed: Reviewed) -> None:
        await reviewed.submit()

        assert await reviewed.waiting() == []

    async def test_takes_every_shipped_method_and_copies_of_them(self, reviewed: Reviewed) -> None:
        methods = reviewed.app.services.methods
        async with reviewed.app.database.writing() as session:
            for manifest in load_manifests():
                await methods.presets.install(session, manifest.name)
        copied = await reviewed.call("ada", "POST", f"{API}/methods/SFT-Demo:copy", json={"name": "mine"})
        async with reviewed.app.database.writing() as session:
            await methods.code_reviews.look_at_all(session)

        assert copied.status_code == 201, copied.text
        assert len((await reviewed.app.get("/methods"))["items"]) == len(load_manifests()) + 1
        assert await reviewed.waiting() == []

    async def test_refuses_changed_code_and_says_who_may_approve_it(self, reviewed: Reviewed) -> None:
        digest = await reviewed.changed_and_waiting()

        problem = await reviewed.submit(status=422)

        (error,) = problem["errors"]
        assert (error["pointer"], error["code"]) == ("/method", "code_not_approved")
        for said in ('"training" (custom01.py)', "waiting", "Changed by ada", "developer, admin", digest):
            assert said in error["detail"]
        assert (await reviewed.app.get("/jobs"))["items"] == []

    async def test_takes_it_once_somebody_else_has_approved_it(self, reviewed: Reviewed) -> None:
        digest = await reviewed.changed_and_waiting()

        refused = await reviewed.decide("ada", digest, "approve", 403)
        approved = await reviewed.decide("grace", digest, "approve", note="read it")

        assert refused["code"] == "own_code"
        assert (approved["state"], approved["decided_by"], approved["note"]) == ("approved", "grace", "read it")
        assert [one["name"] for one in approved["changed_by"]] == ["ada"]
        assert not approved["unknown_author"]
        await reviewed.submit()

    async def test_does_not_take_what_came_after_the_approval(self, reviewed: Reviewed) -> None:
        digest = await reviewed.changed_and_waiting()
        await reviewed.decide("grace", digest, "approve")
        await reviewed.change("grace", b"# once more\n")

        problem = await reviewed.submit(status=422)

        assert codes(problem) == [("/method", "code_not_approved")]
        assert "Changed by grace." in problem["errors"][0]["detail"]

    async def test_of_code_changed_by_two_needs_a_third(self, reviewed: Reviewed) -> None:
        await reviewed.add("joan")
        await reviewed.change("ada")
        await reviewed.change("grace", b"# and this\n")
        digest = (await reviewed.waiting())[0]["digest"]

        refused = [await reviewed.decide(who, digest, "approve", 403) for who in ("ada", "grace")]
        approved = await reviewed.decide("joan", digest, "approve")

        assert [one["code"] for one in refused] == ["own_code", "own_code"]
        assert {one["name"] for one in approved["changed_by"]} == {"ada", "grace"}

    async def test_notices_a_module_that_a_script_imports(self, reviewed: Reviewed) -> None:
        digest = await _with_module(reviewed, "ada")
        await reviewed.decide("grace", digest, "approve")
        await reviewed.submit()
        await _put(reviewed, "grace", "helping.py", b"x = 2\n")

        problem = await reviewed.submit(status=422)
        again = (await reviewed.waiting())[0]["digest"]
        refused = await reviewed.decide("grace", again, "approve", 403)

        assert again in problem["errors"][0]["detail"]
        assert refused["code"] == "own_code"
        await reviewed.decide("ada", again, "approve")

    async def test_notices_a_module_that_was_deleted(self, reviewed: Reviewed) -> None:
        digest = await _with_module(reviewed, "ada")
        await reviewed.decide("grace", digest, "approve")
        await reviewed.change("ada", b"")
        script = (await reviewed.app.client.get(TRAINING)).content.replace(b"import helping\n", b"")
        headers = {"If-Match": "*", "Content-Type": "text/x-python"}
        await reviewed.call("grace", "PUT", TRAINING, content=script, headers=headers)

        waiting = (await reviewed.waiting())[0]

        assert codes(await reviewed.submit(status=422)) == [("/method", "code_not_approved")]
        assert (await reviewed.decide("grace", waiting["digest"], "approve", 403))["code"] == "own_code"

    async def test_notices_approved_bytes_at_another_place(self, reviewed: Reviewed) -> None:
        """What ada wrote and grace approved takes the place of another module: that is grace's change."""
        digest = await _with_module(reviewed, "ada")
        await reviewed.decide("grace", digest, "approve")
        present = (await reviewed.app.client.get(TRAINING)).content
        await _put(reviewed, "grace", "helping_too.py", b"x = 1\n")
        with (reviewed.app.services.home.scripts / "custom01.py").open("wb") as file:
            file.write(present + b"import helping_too\n")
        await reviewed.submit(status=422)
        waiting = (await reviewed.waiting())[0]["digest"]

        read = await reviewed.app.get(f"/code-reviews/{waiting}")

        assert "grace" in {one["name"] for one in read["changed_by"]}
        assert read["unknown_author"]
        assert (await reviewed.decide("grace", waiting, "approve", 403))["code"] == "own_code"

    async def test_lets_anyone_approve_what_was_changed_by_hand(self, reviewed: Reviewed) -> None:
        with (reviewed.app.services.home.scripts / "custom01.py").open("ab") as file:
            file.write(CHANGED)

        problem = await reviewed.submit(status=422)
        (item,) = await reviewed.waiting()
        read = await reviewed.app.get(f"/code-reviews/{item['digest']}")

        assert codes(problem) == [("/method", "code_not_approved_author_unknown")]
        assert (item["method"]["name"], item["method"]["version"], item["stage"]) == ("Custom01", 2, "training")
        assert (read["changed_by"], read["unknown_author"], read["approved_version"]) == ([], True, 1)
        await reviewed.decide("ada", item["digest"], "approve")
        await reviewed.submit()

    async def test_refuses_another_call_of_the_same_file(self, reviewed: Reviewed) -> None:
        change = {"stages": {"training": {"env": {"TRACKER": "on"}}}}
        answer = await reviewed.call("ada", "PATCH", f"{API}/methods/Custom01", json=change, headers={"If-Match": "*"})
        assert answer.status_code == 200, answer.text

        assert codes(await reviewed.submit(status=422)) == [("/method", "code_not_approved")]

    async def test_validation_says_the_same_and_writes_nothing(self, reviewed: Reviewed) -> None:
        with (reviewed.app.services.home.scripts / "custom01.py").open("ab") as file:
            file.write(CHANGED)

        answer = await reviewed.call("ada", "POST", f"{API}/jobs:validate", json=SUBMIT)

        assert [one["code"] for one in answer.json()["violations"]] == ["code_not_approved_author_unknown"]
        assert await reviewed.waiting() == []

    async def test_takes_everything_where_no_approval_is_required(self, reviewed: Reviewed, database: Database) -> None:
        await reviewed.change("ada")
        async with database.writing() as session:
            await set_policy(session, CodeApproval.OFF, now=datetime.now(UTC))

        await reviewed.submit()


class TestNamedFiles:
    @pytest.mark.parametrize(
        ("effective", "declared", "unpinned"),
        [
            ({"reward_file": "/elsewhere.py"}, ("reward_file",), ["reward_file"]),
            ({"reward_file": None}, ("reward_file",), []),
            ({"reward_fi": "/elsewhere.py"}, ("reward_file",), ["reward_file"]),
            ({"tools": "a,b"}, ("tools", "tools_file"), []),
            ({"tools": "a,b"}, ("tools",), []),
            ({"tools": "a,b"}, None, []),
            ({"tools_file": "x"}, None, ["tools_file"]),
        ],
    )
    def test_what_is_not_pinned_is_found(
        self, effective: dict[str, Any], declared: tuple[str, ...] | None, unpinned: list[str]
    ) -> None:
        assert unpinned_files(JobSpec(effective=effective, declared=declared)) == unpinned


class TestDecisions:
    async def test_reject_withdraw_and_approve_again_are_kept(self, reviewed: Reviewed) -> None:
        digest = await reviewed.changed_and_waiting()

        await reviewed.decide("ada", digest, "reject", note="not yet")
        await reviewed.decide("grace", digest, "approve")
        await reviewed.decide("grace", digest, "withdraw")
        conflict = await reviewed.decide("grace", digest, "withdraw", 409)
        read = await reviewed.app.get(f"/code-reviews/{digest}")

        assert conflict["code"] == "review_state_conflict"
        assert [(one["state"], one["name"]) for one in read["decisions"]] == [
            ("rejected", "ada"),
            ("approved", "grace"),
            ("withdrawn", "grace"),
        ]
        assert codes(await reviewed.submit(status=422)) == [("/method", "code_not_approved")]

    async def test_need_a_role_that_may(self, reviewed: Reviewed) -> None:
        await reviewed.add("otto", "operator")
        digest = await reviewed.changed_and_waiting()

        assert (await reviewed.decide("otto", digest, "approve", 403))["code"] == "permission_missing"

    async def test_a_key_that_was_renamed_and_rotated_is_still_the_author(self, reviewed: Reviewed) -> None:
        digest = await reviewed.changed_and_waiting()
        headers = {"If-Match": "*"}
        await reviewed.app.client.patch(f"{API}/keys/ada", json={"name": "someone"}, headers=headers)
        rotated = await reviewed.app.post("/keys/someone:rotate")
        reviewed.keys["someone"] = rotated["secret"]

        assert (await reviewed.decide("someone", digest, "approve", 403))["code"] == "own_code"

    async def test_unknown_digest(self, reviewed: Reviewed) -> None:
        assert (await reviewed.decide("grace", "0" * 64, "approve", 404))["code"] == "code_review_not_found"

    async def test_withdrawal_names_the_jobs_that_have_started(self, reviewed: Reviewed, database: Database) -> None:
        digest = await reviewed.changed_and_waiting()
        await reviewed.decide("grace", digest, "approve")
        started, waits = (await reviewed.submit())["id"], (await reviewed.submit())["id"]
        async with database.writing() as session:
            row = await session.get_one(JobRow, started)
            row.status = JobStatus.RUNNING
            session.add(row)

        answer = await reviewed.decide("grace", digest, "withdraw")

        assert (answer["running_jobs"], answer["state"]) == ([started], "withdrawn")
        assert waits not in answer["running_jobs"]

    async def test_pages(self, reviewed: Reviewed) -> None:
        for number in range(3):
            await reviewed.change("ada", f"# {number}\n".encode())

        first = await reviewed.app.get("/code-reviews?limit=2")
        second = await reviewed.app.get(f"/code-reviews?limit=2&cursor={first['next_cursor']}")

        assert (len(first["items"]), len(second["items"]), second["next_cursor"]) == (2, 1, None)


class TestExamination:
    async def test_shows_the_difference_to_what_was_approved_and_what_to_look_at(self, reviewed: Reviewed) -> None:
        first = await reviewed.changed_and_waiting()
        await reviewed.decide("grace", first, "approve")
        await reviewed.change("ada", b"import socket; exec(input())\n")
        digest = (await reviewed.waiting())[0]["digest"]

        found = await reviewed.app.get(f"/code-reviews/{digest}", headers={"Accept-Language": "de"})

        (difference,) = found["differences"]
        assert (difference["path"], difference["change"], difference["complete"]) == ("custom01.py", "changed", True)
        assert [line for line in difference["diff"].split("\n") if line[0] in "+-"] == ["+import socket; exec(input())"]
        notes = [(note["code"], note["quoted"]) for note in found["notes"]]
        assert ("code_network", "import socket; exec(input())") in notes
        assert ("code_evaluates", "exec(input())") in notes
        assert found["notes"][0]["detail"].startswith("Es ")
        assert (found["approved_version"], found["not_compared"], found["not_read"]) == (2, 0, 0)

    async def test_shows_how_the_call_changed(self, reviewed: Reviewed) -> None:
        change = {"stages": {"training": {"env": {"TRACKER": "on"}}}}
        await reviewed.call("ada", "PATCH", f"{API}/methods/Custom01", json=change, headers={"If-Match": "*"})
        (item,) = await reviewed.waiting()

        found = await reviewed.app.get(f"/code-reviews/{item['digest']}")

        (difference,) = found["differences"]
        assert difference["path"] == ""
        assert '+      "TRACKER": "on"' in difference["diff"]

    @pytest.mark.parametrize(
        ("content", "noted"),
        [
            (b"x = 1\0\n", "code_unreadable"),
            (b"\xff\xfe\n", "code_unreadable"),
            (b"(" * 20_000 + b")" * 20_000, "code_unreadable"),
            (b"eval(1)\n" * 30_000, "code_more"),
        ],
        ids=["nul", "not utf-8", "nested", "many"],
    )
    async def test_of_hostile_modules_ends(self, reviewed: Reviewed, content: bytes, noted: str) -> None:
        scripts = reviewed.app.services.home.scripts
        (scripts / "helping.py").write_bytes(content)
        with (scripts / "custom01.py").open("ab") as file:
            file.write(b"\nimport helping\n")
        await reviewed.submit(status=422)
        (item,) = await reviewed.waiting()

        found = await reviewed.app.get(f"/code-reviews/{item['digest']}")

        assert noted in {note["code"] for note in found["notes"] if note["path"] == "helping.py"}
        assert {one["path"] for one in found["differences"]} == {"custom01.py", "helping.py"}


class TestQuestions:
    async def test_retry_of_a_job_needs_an_approval_again(self, reviewed: Reviewed) -> None:
        digest = await reviewed.changed_and_waiting()
        await reviewed.decide("grace", digest, "approve")
        job = (await reviewed.submit())["id"]
        await reviewed.app.post(f"/jobs/{job}:cancel")
        await reviewed.decide("grace", digest, "withdraw")

        answer = await reviewed.call("ada", "POST", f"{API}/jobs/{job}:retry", json={})

        assert answer.status_code == 422, answer.text
        assert [one["code"] for one in answer.json()["errors"]] == ["code_not_approved"]


async def _put(reviewed: Reviewed, who: str, path: str, content: bytes) -> None:
    headers = {"If-Match": "*", "Content-Type": "text/x-python"}
    answer = await reviewed.call(who, "PUT", f"{API}/scripts/{path}", content=content, headers=headers)
    assert answer.status_code in (200, 201), answer.text


async def _with_module(reviewed: Reviewed, who: str) -> str:
    """Let somebody add a module that the training imports; return the digest that waits."""
    await _put(reviewed, who, "helping.py", b"x = 1\n")
    present = (await reviewed.app.client.get(TRAINING)).content
    headers = {"If-Match": "*", "Content-Type": "text/x-python"}
    content = present + b"\nimport helping\n"
    answer = await reviewed.call(who, "PUT", TRAINING, content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    digest: str = (await reviewed.waiting())[0]["digest"]
    return digest
