"""Data sets made out of others: which rows, how often, in which order, what is kept of it, what is refused."""

import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.registry import dataset_mixes
from app.store.session import Database
from tests.api.jobs_app import API, JobsApp, codes, jobs_app

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

    @pytest.mark.parametrize("pictures", [True, False])
    async def test_pictures_in_a_folder_of_their_own_would_not_be_found(self, app: JobsApp, *, pictures: bool) -> None:
        folder = app.services.home.datasets / "drawn"
        folder.mkdir()
        (folder / "rows.jsonl").write_text('{"text": "a cat"}\n')
        if pictures:
            (folder / "a.png").write_bytes(b"png")
        await app.post("/datasets", {"name": "drawn", "path": "drawn"}, 201)
        body = {"name": "both", "parts": [{"dataset": "a"}, {"dataset": "drawn"}]}

        answer = await app.post("/datasets:mix", body, 422 if pictures else 201)

        if pictures:
            assert codes(answer) == [("/parts/1/dataset", "mix_part_with_pictures")]

    async def test_too_large(self, app: JobsApp, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(app.services.dataset_mixes, "_max_bytes", 100)

        problem = await app.post("/datasets:mix", {"name": "both", "parts": [{"dataset": "a"}]}, 422)

        assert codes(problem) == [("/parts", "mix_too_large")]
        assert leftovers(app) == []
