"""Data sets made out of others: which rows, how often, in which order, what is kept of it, what is refused."""

import errno
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app.domain.errors import InvalidRequest
from app.executor.jobs.requests import JobSubmit
from app.executor.runs.job_spec import JobSpec
from app.registry.datasets import mixes as dataset_mixes
from app.store import jobs
from app.store.session import Database
from app.store.tables import DatasetRow
from tests.api.jobs_app import API, SUBMIT, JobsApp, codes, jobs_app

KEY = {"Idempotency-Key": "one-and-only"}
A = [{"question": f"a{number}?", "answer": "yes"} for number in range(10)]
B = [{"prompt": f"b{number}?", "completion": "nein ö"} for number in range(4)]


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        await app.register_data("a", A)
        await app.register_data("b", B)
        yield app


async def mixed(app: JobsApp, *parts: dict[str, Any], name: str = "both", **members: Any) -> Any:
    return await app.post("/datasets:mix", {"name": name, "parts": parts, **members}, 201)


async def rows_of(app: JobsApp, dataset: str) -> list[Any]:
    answer = await app.client.get(f"{API}/datasets/{dataset}/file")
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def counted(rows: list[Any]) -> Counter[str]:
    return Counter(json.dumps(row, ensure_ascii=False) for row in rows)


def leftovers(app: JobsApp) -> list[str]:
    return [path.name for path in app.services.home.datasets.glob(".upload-*")]


class TestRows:
    @pytest.mark.parametrize("child", [False, True], ids=["at once", "in a process"])
    async def test_has_every_row_of_the_parts_as_it_is_in_another_order(
        self, app: JobsApp, monkeypatch: pytest.MonkeyPatch, *, child: bool
    ) -> None:
        if child:
            monkeypatch.setattr(dataset_mixes, "_SMALL", 0)

        made = await mixed(app, {"dataset": "a"}, {"dataset": "b"}, description="for the desk")

        rows = await rows_of(app, "both")
        assert counted(rows) == counted(A + B)
        assert rows != A + B
        assert (made["rows"], made["description"]) == (14, "for the desk")
        assert {column["name"]: column["rows"] for column in made["column_counts"]} == {
            "question": 10, "answer": 10, "prompt": 4, "completion": 4,
        }  # fmt: skip
        assert leftovers(app) == []

    @pytest.mark.parametrize(
        ("part", "counts", "taken"),
        [
            ({"weight": 2}, [2] * 10, 20),
            ({"weight": 0.5}, [1] * 5, 5),
            ({"weight": 1.5}, [1] * 5 + [2] * 5, 15),
            ({"max_rows": 3}, [1] * 3, 3),
            ({"max_rows": 4, "weight": 2.5}, [2, 2, 3, 3], 10),
            ({"max_rows": 1000}, [1] * 10, 10),
        ],
    )
    async def test_takes_rows_as_often_as_wanted(
        self, app: JobsApp, part: dict[str, Any], counts: list[int], taken: int
    ) -> None:
        made = await mixed(app, {"dataset": "a", **part})

        found = counted(await rows_of(app, "both"))
        assert sorted(found.values()) == counts
        assert set(found) <= set(counted(A))
        (kept,) = made["source"]["mix"]["parts"]
        assert (kept["rows"], kept["taken"]) == (10, taken)

    async def test_the_seed_decides_sample_and_order(self, app: JobsApp) -> None:
        part = {"dataset": "a", "max_rows": 5}
        for name, seed in (("one", 1), ("same", 1), ("other", 2)):
            await mixed(app, part, name=name, seed=seed)

        one, same, other = [await rows_of(app, name) for name in ("one", "same", "other")]
        assert one == same
        assert one != other
        assert one != A[:5]

    async def test_reads_parts_of_other_formats_and_endings(self, app: JobsApp) -> None:
        folder = app.services.home.datasets
        (folder / "table.csv").write_text("question,answer\nx?,y\n", "utf-8")
        (folder / "windows.jsonl").write_bytes(
            b'{"question": "w?", "answer": "v"}\r\n{"question": "u?", "answer": "t"}'
        )
        for file in ("table.csv", "windows.jsonl"):
            await app.post("/datasets", {"name": file.partition(".")[0], "path": file}, 201)

        await mixed(app, {"dataset": "table"}, {"dataset": "windows"})

        wanted = [
            {"question": "x?", "answer": "y"},
            {"question": "w?", "answer": "v"},
            {"question": "u?", "answer": "t"},
        ]
        assert counted(await rows_of(app, "both")) == counted(wanted)


class TestRecipe:
    async def test_is_kept_and_shown(self, app: JobsApp) -> None:
        a, b = [await app.get(f"/datasets/{name}") for name in "ab"]

        await mixed(app, {"dataset": "a", "weight": 2}, {"dataset": b["id"], "max_rows": 3}, seed=7)

        mix = (await app.get("/datasets/both"))["source"]["mix"]
        assert mix["seed"] == 7
        kept = {"weight": 1, "max_rows": None}
        assert mix["parts"] == [
            {**kept, "dataset": a["id"], "name": "a", "digest": a["digest"], "weight": 2, "rows": 10, "taken": 20},
            {**kept, "dataset": b["id"], "name": "b", "digest": b["digest"], "max_rows": 3, "rows": 4, "taken": 3},
        ]

    async def test_takes_a_part_as_it_is_on_disk_now(self, app: JobsApp) -> None:
        (app.services.home.datasets / "b.jsonl").write_text(json.dumps(B[0]) + "\n")

        made = await mixed(app, {"dataset": "a"}, {"dataset": "b"})

        assert made["rows"] == 11
        assert made["source"]["mix"]["parts"][1]["digest"] != (await app.get("/datasets/b"))["digest"]

    async def test_repeated_request_is_answered_as_the_first_time(self, app: JobsApp) -> None:
        body = {"name": "both", "parts": [{"dataset": "a"}]}

        first = await app.post("/datasets:mix", body, 201, headers=KEY)
        await app.client.delete(f"{API}/datasets/a")
        again = await app.post("/datasets:mix", body, 201, headers=KEY)

        assert first == again

    async def test_a_deleted_mix_can_be_made_again_of_other_rows(self, app: JobsApp) -> None:
        await mixed(app, {"dataset": "a"})
        await app.client.delete(f"{API}/datasets/both")

        assert (await mixed(app, {"dataset": "b"}))["rows"] == 4


class TestJobs:
    """Jobs that name several data sets."""

    PARTS = ({"dataset": "a", "weight": 2}, {"dataset": "custom01", "max_rows": 40})

    async def submit(self, app: JobsApp, *parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
        made = await app.submit(dataset=None, datasets=parts or self.PARTS, **changes)
        job: dict[str, Any] = await app.get(f"/jobs/{made['id']}")
        return job

    async def test_trains_on_one_data_set_made_of_them(self, app: JobsApp) -> None:
        job = await self.submit(app)

        data = await app.get(f"/datasets/{job['dataset']['id']}")
        assert data["name"] == job["dataset"]["name"] == "mix of a x2 and custom01 40 rows"
        assert [part["taken"] for part in data["source"]["mix"]["parts"]] == [20, 40]
        assert len(await rows_of(app, data["id"])) == data["rows"] == 60
        async with app.database.reading() as session:
            spec = JobSpec.of(await jobs.get(session, job["id"]))
        assert spec.dataset is not None
        assert (app.services.home.absolute(spec.dataset.path).exists(), spec.dataset.digest) == (True, data["digest"])
        assert leftovers(app) == []

    async def test_same_recipe_is_the_same_data_set_until_a_part_or_the_mix_changes(self, app: JobsApp) -> None:
        first, again = [(await self.submit(app))["dataset"] for _ in range(2)]
        (app.services.home.datasets / "a.jsonl").write_text(json.dumps(A[0]) + "\n")
        other = (await self.submit(app))["dataset"]
        mixed = app.services.home.absolute((await app.get(f"/datasets/{other['id']}"))["path"])
        mixed.write_text(json.dumps(A[0]) + "\n")
        anew = (await self.submit(app))["dataset"]

        assert first == again
        assert len({data["id"] for data in (first, other, anew)}) == 3
        assert (await app.get(f"/datasets/{anew['id']}"))["rows"] == 42

    async def test_one_that_is_taken_whole_is_itself(self, app: JobsApp) -> None:
        assert (await self.submit(app, {"dataset": "a"}))["dataset"]["name"] == "a"

    async def test_validate_says_the_same_and_changes_nothing(self, app: JobsApp) -> None:
        before = sorted(path.name for path in app.services.home.datasets.iterdir())
        body = {**SUBMIT, "dataset": None, "datasets": self.PARTS}

        found = await app.post("/jobs:validate", body)

        assert (found["valid"], found["plan"]["rows"]["read"]) == (True, 60)
        assert sorted(path.name for path in app.services.home.datasets.iterdir()) == before
        assert len((await app.get("/datasets"))["items"]) == 3

    async def test_refused_submit_leaves_nothing(self, app: JobsApp) -> None:
        before = sorted(path.name for path in app.services.home.datasets.iterdir())
        body = {**SUBMIT, "dataset": None, "datasets": self.PARTS, "parameters": {"epochs": "many"}}

        problem = await app.post("/jobs", body, 422)

        assert codes(problem) == [("/parameters/epochs", "parameter_wrong_type")]
        assert sorted(path.name for path in app.services.home.datasets.iterdir()) == before
        assert len((await app.get("/datasets"))["items"]) == 3

    async def test_repeated_request_is_answered_as_the_first_time(self, app: JobsApp) -> None:
        body = {**SUBMIT, "dataset": None, "datasets": self.PARTS}

        first, again = [await app.post("/jobs", body, 201, headers=KEY) for _ in range(2)]

        assert first == again
        assert len((await app.get("/datasets"))["items"]) == 4

    async def test_of_two_at_once_both_train_on_one(self, app: JobsApp) -> None:
        body = JobSubmit.model_validate({**SUBMIT, "dataset": None, "datasets": self.PARTS})
        submissions = app.services.submissions

        made = []
        async with submissions.planned(body) as one, submissions.planned(body) as other:
            for plan in (one, other):
                async with app.database.writing() as session:
                    made.append((await submissions.write(session, plan)).jobs[0].dataset_id)

        assert made[0] == made[1]
        assert leftovers(app) == []

    async def test_mix_that_was_deleted_meanwhile_is_refused(self, app: JobsApp) -> None:
        await self.submit(app)
        body = JobSubmit.model_validate({**SUBMIT, "dataset": None, "datasets": self.PARTS})

        async with app.services.submissions.planned(body) as plan:
            async with app.database.writing() as session:
                await session.exec(sa.delete(DatasetRow))
            with pytest.raises(InvalidRequest) as refused:
                async with app.database.writing() as session:
                    await app.services.submissions.write(session, plan)

        assert [(one.pointer, one.code) for one in refused.value.violations()] == [("/datasets", "unknown_dataset")]

    async def test_rows_that_cannot_be_learned_are_named_by_part_and_line(self, app: JobsApp) -> None:
        await app.register_data("wrong", [A[0], {**A[1], "images": ["a.png"]}])
        body = {**SUBMIT, "dataset": None, "datasets": [{"dataset": "a"}, {"dataset": "wrong", "weight": 3}]}

        problem = await app.post("/jobs", body, 422)

        assert codes(problem) == [("/datasets/1/dataset", "pictures_not_learned")]
        assert "Line 2" in problem["errors"][0]["detail"]

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"dataset": "a"}, ("/datasets", "dataset_or_datasets")),
            ({"datasets": []}, ("/datasets", "field_too_short")),
            ({"datasets": [{"dataset": "gone"}]}, ("/datasets/0/dataset", "unknown_dataset")),
            ({"datasets": [{"dataset": "a", "weight": 0.01}]}, ("/datasets/0/weight", "mix_part_empty")),
            (
                {"through": None, "stage": "saving", "model": "none", "base_model": None},
                ("/model", "unknown_model"),
            ),
        ],
    )
    async def test_refuses(self, app: JobsApp, changes: dict[str, Any], expected: tuple[str, str]) -> None:
        body = {**SUBMIT, "dataset": None, "datasets": self.PARTS, **changes}

        problem = await app.post("/jobs", body, 422)

        assert expected in codes(problem)
        assert leftovers(app) == []


class TestPictures:
    """Parts whose rows name pictures in a folder of their own."""

    async def folder(self, app: JobsApp, name: str, rows: list[Any], files: dict[str, bytes]) -> Path:
        folder = app.services.home.datasets / name
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        await app.post("/datasets", {"name": name, "path": name}, 201)
        return folder

    def shown(self, app: JobsApp, made: Any, name: str) -> bytes:
        """Return the picture that a row of a mix names."""
        found: bytes = (app.services.home.absolute(made["path"]) / "images" / name).read_bytes()
        return found

    @pytest.mark.parametrize("child", [False, True], ids=["at once", "in a process"])
    async def test_are_found_from_the_mix_whatever_they_are_called(
        self, app: JobsApp, monkeypatch: pytest.MonkeyPatch, *, child: bool
    ) -> None:
        if child:
            monkeypatch.setattr(dataset_mixes, "_SMALL", 0)
        parts = [{"type": "text", "text": "?"}, {"type": "image", "image": "b.png"}]
        rows = [
            {"question": "c1", "answer": "x", "images": [{"imageId": "a.png"}, "deep/b.png"]},
            {"question": "c2", "answer": "y", "image": "a.png", "images": None},
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "z"}]},
        ]
        files = {"images/a.png": b"cat", "images/deep/b.png": b"cat 2", "b.png": b"cat beside"}
        cats = await self.folder(app, "cats", rows, files)
        dogs = {"file_name": "a.png", "text": "a dog"}
        await self.folder(app, "dogs", [dogs], {"a.png": b"a dog", "a.txt": b"its caption"})

        made = await mixed(app, {"dataset": "cats"}, {"dataset": "dogs", "weight": 2}, {"dataset": "a"})

        found = {json.dumps(row)[:17]: row for row in await rows_of(app, "both")}
        first, second, third = (found[json.dumps(row)[:17]] for row in rows)
        assert self.shown(app, made, first["images"][0]["imageId"]) == b"cat"
        assert self.shown(app, made, first["images"][1]) == b"cat 2"
        assert self.shown(app, made, second["image"]) == b"cat"
        assert self.shown(app, made, third["messages"][0]["content"][1]["image"]) == b"cat beside"
        (dog,) = [row for row in found.values() if "file_name" in row]
        assert self.shown(app, made, dog["file_name"]) == b"a dog"
        assert self.shown(app, made, dog["file_name"].replace(".png", ".txt")) == b"its caption"
        assert (made["rows"], made["source"]["mix"]["pictures"]) == (15, 4)
        assert (cats / "images/a.png").stat().st_nlink == 2  # no second copy
        assert leftovers(app) == []

    async def test_equal_ones_have_one_name_so_that_no_row_is_scored_and_learned(self, app: JobsApp) -> None:
        row = {"question": "what?", "answer": "cat"}
        await self.folder(app, "one", [row | {"image": "1.png"}], {"images/1.png": b"same"})
        files = {"images/2.png": b"same", "images/3.png": b"else"}
        await self.folder(app, "two", [row | {"image": "2.png"}, row | {"image": "3.png"}], files)

        await mixed(app, {"dataset": "one"}, {"dataset": "two"})

        names = Counter(row["image"] for row in await rows_of(app, "both"))
        assert sorted(names.values()) == [1, 2]

    async def test_with_other_captions_beside_them_stay_two(self, app: JobsApp) -> None:
        for name in ("one", "two"):
            files = {"1.png": b"same", "1.txt": name.encode()}
            await self.folder(app, name, [{"file_name": "1.png"}], files)

        made = await mixed(app, {"dataset": "one"}, {"dataset": "two"})

        names = [row["file_name"] for row in await rows_of(app, "both")]
        captions = {self.shown(app, made, name.replace(".png", ".txt")) for name in names}
        assert captions == {b"one", b"two"}

    async def test_are_copied_where_no_links_can_be_made(self, app: JobsApp, monkeypatch: pytest.MonkeyPatch) -> None:
        await self.folder(app, "one", [{"image": "1.png", "text": "x"}], {"1.png": b"a picture"})
        monkeypatch.setattr(os, "link", refuse_link)

        made = await mixed(app, {"dataset": "one"}, {"dataset": "a"})

        (name,) = [row["image"] for row in await rows_of(app, "both") if "image" in row]
        assert self.shown(app, made, name) == b"a picture"

    async def test_that_changed_make_another_mix(self, app: JobsApp) -> None:
        folder = await self.folder(app, "one", [{"question": "1", "answer": "2"}], {"images/1.png": b"old"})
        parts = [{"dataset": "one"}, {"dataset": "a"}]

        first, again = [await app.submit(dataset=None, datasets=parts) for _ in range(2)]
        (folder / "images/1.png").unlink()
        (folder / "images/1.png").write_bytes(b"something new")
        other = await app.submit(dataset=None, datasets=parts)

        used = [(await app.get(f"/jobs/{job['id']}"))["dataset"]["id"] for job in (first, again, other)]
        assert used[0] == used[1] != used[2]

    async def test_other_files_that_rows_name_are_refused(self, app: JobsApp) -> None:
        row = {"image": "a.png", "mask": ["masks/a.png"], "text": "x"}
        await self.folder(app, "one", [row], {"images/a.png": b"a", "images/masks/a.png": b"m"})
        body = {"name": "both", "parts": [{"dataset": "a"}, {"dataset": "one"}]}

        problem = await app.post("/datasets:mix", body, 422)

        assert codes(problem) == [("/parts/1/dataset", "mix_row_names_file")]
        assert '"masks/a.png" in "mask"' in problem["errors"][0]["detail"]
        assert leftovers(app) == []

    async def test_go_with_the_mix_and_stay_with_the_parts(self, app: JobsApp) -> None:
        folder = await self.folder(app, "one", [{"image": "1.png", "text": "x"}], {"images/1.png": b"a"})
        made = await mixed(app, {"dataset": "one"}, {"dataset": "a"})

        answer = await app.client.delete(f"{API}/datasets/both?with_file=true")

        assert answer.status_code == 204, answer.text
        assert not app.services.home.absolute(made["path"]).exists()
        assert (folder / "images/1.png").read_bytes() == b"a"
        assert (await mixed(app, {"dataset": "one"}, {"dataset": "a"}))["rows"] == 11


def refuse_link(*_arguments: Any, **_options: Any) -> None:
    raise OSError(errno.EXDEV, "another file system")


class TestRefusals:
    async def test_names_everything_at_once(self, app: JobsApp) -> None:
        parts = [{"dataset": "a"}, {"dataset": "gone"}, {"dataset": "a"}]

        problem = await app.post("/datasets:mix", {"name": "no/slash", "parts": parts}, 422)

        assert set(codes(problem)) == {
            ("/name", "invalid_name"),
            ("/parts/1/dataset", "unknown_dataset"),
            ("/parts/2/dataset", "mix_part_twice"),
        }
        assert leftovers(app) == []

    @pytest.mark.parametrize(
        ("part", "pointer"),
        [
            ({"weight": 0}, "/parts/0/weight"),
            ({"weight": 1001}, "/parts/0/weight"),
            ({"max_rows": 0}, "/parts/0/max_rows"),
            ({"share": 1}, "/parts/0/share"),
            ({"weight": 0.04}, "/parts/0/weight"),
        ],
    )
    async def test_bounds(self, app: JobsApp, part: dict[str, Any], pointer: str) -> None:
        problem = await app.post("/datasets:mix", {"name": "x", "parts": [{"dataset": "a", **part}]}, 422)

        assert [at for at, _ in codes(problem)] == [pointer]
        assert leftovers(app) == []

    async def test_name_of_another_data_set_is_409(self, app: JobsApp) -> None:
        problem = await app.post("/datasets:mix", {"name": "B", "parts": [{"dataset": "a"}]}, 409)

        assert problem["code"] == "name_taken"

    @pytest.mark.parametrize("weight", [1, 1000])
    async def test_too_large(self, app: JobsApp, monkeypatch: pytest.MonkeyPatch, weight: int) -> None:
        monkeypatch.setattr(app.services.dataset_mixes, "_max_bytes", 100)
        parts = [{"dataset": "a", "weight": weight}]

        problem = await app.post("/datasets:mix", {"name": "both", "parts": parts}, 422)

        assert codes(problem) == [("/parts", "mix_too_large")]
        assert leftovers(app) == []
