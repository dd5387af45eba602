"""Methods under concurrency and failure, and beside the jobs that name them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import JobKind, JobStatus, VersionSource
from app.domain.pointers import merge_patch
from app.store import jobs
from app.store.methods import MethodNotFound
from app.store.session import Database
from tests.api.client import MethodsApp, methods_app, tag_of
from tests.job_rows import add_job

EDITED = b"print('edited')\n"
URL = "/api/v1/methods/finance"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home") as running:
        yield running


async def status_of(app: MethodsApp, job_id: str) -> JobStatus:
    async with app.database.reading() as session:
        return (await jobs.get(session, job_id)).status


class TestDeleteWithJobs:
    async def test_live_jobs_make_it_a_conflict(self, app: MethodsApp) -> None:
        method = await app.create()
        job_id = await add_job(app.database, method_id=method["id"], method_version=1)

        response = await app.client.delete(URL, headers=tag_of(await app.client.get(URL)))

        assert (response.status_code, response.json()["code"]) == (409, "method_has_live_jobs")
        assert (await app.client.get(URL)).status_code == 200
        assert await status_of(app, job_id) is JobStatus.QUEUED

    @pytest.mark.parametrize(("choice", "status"), [("cancel", JobStatus.CANCELLED), ("keep", JobStatus.QUEUED)])
    async def test_the_caller_says_what_becomes_of_them(self, app: MethodsApp, choice: str, status: JobStatus) -> None:
        method = await app.create()
        job_id = await add_job(app.database, method_id=method["id"], method_version=1)

        response = await app.client.delete(f"{URL}?jobs={choice}", headers=tag_of(await app.client.get(URL)))

        assert response.status_code == 204, response.text
        assert (await app.client.get(URL)).status_code == 404
        assert await status_of(app, job_id) is status

    async def test_finished_jobs_do_not_matter_and_stay(self, app: MethodsApp) -> None:
        method = await app.create()
        job_id = await add_job(app.database, method_id=method["id"], method_version=1, status=JobStatus.SUCCEEDED)

        response = await app.client.delete(URL, headers=tag_of(await app.client.get(URL)))

        assert response.status_code == 204
        assert await status_of(app, job_id) is JobStatus.SUCCEEDED

    async def test_an_unknown_choice_is_422(self, app: MethodsApp) -> None:
        await app.create()

        assert (await app.client.delete(f"{URL}?jobs=kill", headers={"If-Match": "*"})).status_code == 422


class TestConcurrency:
    async def test_two_submits_take_an_edit_up_as_one_version(self, app: MethodsApp) -> None:
        await app.create()
        app.script("train.py", EDITED)

        async def pin() -> int:
            async with app.database.writing() as session:
                return (await app.services.runs.pin_for_run(session, "finance")).version

        assert await asyncio.gather(*(pin() for _ in range(4))) == [2, 2, 2, 2]

    async def test_nobody_submits_what_is_being_deleted(self, app: MethodsApp) -> None:
        await app.create()
        tag = tag_of(await app.client.get(URL))
        pinned, submitted = asyncio.Event(), asyncio.Event()

        async def submit() -> None:
            async with app.database.writing() as session:
                await app.services.runs.pin_for_run(session, "finance")
                pinned.set()
                await submitted.wait()

        submitting = asyncio.create_task(submit())
        await pinned.wait()
        deleting = asyncio.create_task(app.client.delete(URL, headers=tag))
        done, _ = await asyncio.wait([deleting], timeout=0.2)
        assert not done  # it waits for the submit, whose jobs it has to count

        submitted.set()
        await submitting
        assert (await deleting).status_code == 204
        with pytest.raises(MethodNotFound):
            await submit()

    async def test_copies_to_one_name_at_once(self, app: MethodsApp) -> None:
        await app.create()

        responses = await asyncio.gather(*(app.client.post(f"{URL}:copy", json={"name": "new"}) for _ in range(3)))

        assert sorted(response.status_code for response in responses) == [201, 409, 409]
        assert sorted(file.name for file in app.home.scripts.iterdir()) == ["new_train.py", "train.py"]


class TestCrash:
    async def test_an_upload_whose_commit_fails_is_taken_up_and_not_lost(self, app: MethodsApp) -> None:
        await app.create()

        class PowerCutError(Exception):
            pass

        async def upload() -> None:
            async with app.database.writing() as session:
                await app.services.stage_files.write(
                    session, "finance", JobKind.TRAINING, EDITED, precondition=lambda _: None
                )
                raise PowerCutError

        with pytest.raises(PowerCutError):
            await upload()

        async with app.database.writing() as session:
            method = await app.services.runs.pin_for_run(session, "finance")
        assert (method.version, method.source) == (2, VersionSource.DISK)
        assert app.services.files.versions.get(method.files[JobKind.TRAINING].sha256) == EDITED


class TestMergePatch:
    """The examples of RFC 7396, appendix A."""

    @pytest.mark.parametrize(
        ("target", "patch", "result"),
        [
            ({"a": "b"}, {"a": "c"}, {"a": "c"}),
            ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
            ({"a": "b"}, {"a": None}, {}),
            ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
            ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
            ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
            ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
            ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
            (["a", "b"], ["c", "d"], ["c", "d"]),
            ({"a": "b"}, ["c"], ["c"]),
            ({"a": "foo"}, "bar", "bar"),
            ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
            ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
            ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ],
    )
    def test_merges(self, target: Any, patch: Any, result: Any) -> None:
        assert merge_patch(target, patch) == result
