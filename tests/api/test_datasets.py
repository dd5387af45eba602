"""Data sets over HTTP, on SQLite and on Postgres."""

import asyncio
import gzip
import hashlib
import io
import json
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from app.domain.enums import JobStatus
from app.store.session import Database
from tests.api.client import MAX_LINE, MAX_UPLOAD_BYTES, MethodsApp, methods_app
from tests.api.resources import ROUTERS, codes, insert_job

URL = "/api/v1/datasets"
LINE = b'{"prompt": "Who are you?", "completion": "A test."}\n'
JSONL = {"Content-Type": "application/jsonl"}


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=ROUTERS) as running:
        yield running


def place(app: MethodsApp, path: str, content: bytes = LINE) -> Path:
    file = app.home.datasets / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


async def create(app: MethodsApp, name: str = "faq", path: str = "faq.jsonl", **values: Any) -> httpx.Response:
    return await app.client.post(URL, json={"name": name, "path": path, **values})


async def count(app: MethodsApp) -> int:
    return len((await app.client.get(URL)).json()["items"])


class TestCreate:
    async def test_registers_a_file(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl", LINE * 3)

        response = await create(app, description="Questions")

        body = response.json()
        assert response.status_code == 201
        assert response.headers["location"] == f"{URL}/{body['id']}"
        assert body["digest"] == hashlib.sha256(LINE * 3).hexdigest()
        assert (body["rows"], body["columns"], body["size_bytes"]) == (3, ["prompt", "completion"], len(LINE) * 3)
        assert (body["path"], body["description"]) == ("datasets/faq.jsonl", "Questions")
        assert (await app.client.get(f"{URL}/FAQ")).json() == body
        assert (await app.client.get(f"{URL}/{body['id']}")).json() == body

    async def test_registers_a_folder_with_images(self, app: MethodsApp) -> None:
        place(app, "cats/data.jsonl", b'{"q": "?", "images": [{"imageId": "a.png"}]}\n')
        place(app, "cats/images/a.png", b"png")

        body = (await create(app, path="cats")).json()

        assert (body["path"], body["columns"]) == ("datasets/cats", ["q", "images"])

    async def test_reports_bad_json_on_line_7_and_registers_nothing(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl", LINE * 6 + b"{oops}\n" + LINE)

        response = await create(app)

        assert response.status_code == 422
        assert response.json()["code"] == "invalid_dataset"
        assert codes(response.json()) == [("/lines/7", "line_not_json")]
        assert await count(app) == 0

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"", ("/lines", "dataset_empty")),
            (b"{}", ("/lines/1", "line_without_fields")),
            (json.dumps({"prompt": "x" * MAX_LINE}).encode(), ("/lines/1", "line_too_long")),
        ],
    )
    async def test_refuses_what_scripts_could_not_read(
        self, app: MethodsApp, content: bytes, problem: tuple[str, str]
    ) -> None:
        place(app, "faq.jsonl", content)

        response = await create(app)

        assert (response.status_code, codes(response.json())) == (422, [problem])

    async def test_says_how_many_rows_have_a_value_in_each_column(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl", LINE + b"\n" + b'{"prompt": "a", "tools": []}\n{"prompt": "b", "completion": null}\n')

        body = (await create(app)).json()

        assert (body["rows"], body["columns"], body["blank_lines"]) == (3, ["prompt", "completion", "tools"], 1)
        assert body["column_counts"] == [
            {"name": "prompt", "rows": 3, "first_missing_line": None},
            {"name": "completion", "rows": 1, "first_missing_line": 3},
            {"name": "tools", "rows": 1, "first_missing_line": 1},
        ]
        assert (await app.client.get(f"{URL}/faq")).json() == body
        rows = (await app.client.get(f"{URL}/faq/preview", params={"offset": 1, "limit": 1})).json()["items"]
        assert rows == [{"prompt": "a", "tools": []}]

    async def test_lists_all_problems_in_the_callers_language(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl", LINE + b"# a\n{}\n" + b'["a"]\n')

        response = await app.client.post(
            URL, json={"name": "faq", "path": "faq.jsonl"}, headers={"Accept-Language": "de"}
        )

        assert [pointer for pointer, _ in codes(response.json())] == ["/lines/2", "/lines/3", "/lines/4"]
        assert response.json()["errors"][0]["detail"].startswith("Zeile 2 ist ein Kommentar")

    @pytest.mark.parametrize(
        ("path", "code"),
        [
            ("../license.json", "path_outside_folder"),
            ("a/../../secret.jsonl", "path_outside_folder"),
            ("/etc/passwd", "path_outside_folder"),
            ("C:\\x.jsonl", "path_outside_folder"),
            ("~/x.jsonl", "path_outside_folder"),
            ("link.jsonl", "path_outside_folder"),
            ("links/secret.jsonl", "path_outside_folder"),
            ("loop.jsonl", "path_outside_folder"),
            ("", "invalid_path"),
            (".", "invalid_path"),
            ("x" * 300, "invalid_path"),
            ("a/" * 600, "invalid_path"),
            (".hidden.jsonl", "invalid_path"),
            ("-x.jsonl", "invalid_path"),
            ("a\u202eb.jsonl", "invalid_path"),
            ("a\nb.jsonl", "invalid_path"),
            ("gone.jsonl", "path_not_found"),
            ("empty", "not_a_dataset"),
            ("two", "several_datasets"),
            ("pipe.jsonl", "not_a_dataset"),
        ],
    )
    async def test_refuses_path_tricks(self, app: MethodsApp, tmp_path: Path, path: str, code: str) -> None:
        (tmp_path / "secret.jsonl").write_bytes(LINE)
        root = app.home.datasets
        (root / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
        (root / "links").symlink_to(tmp_path)
        (root / "loop.jsonl").symlink_to("loop.jsonl")
        (root / "empty").mkdir()
        os.mkfifo(root / "pipe.jsonl")
        for file in ("two/a.jsonl", "two/b.jsonl"):
            place(app, file)

        response = await create(app, path=path)

        assert response.status_code == 422
        assert codes(response.json()) in ([("/path", code)], [("/path", "path_not_found")] if "loop" in path else [])

    async def test_may_use_a_link_that_stays_inside(self, app: MethodsApp) -> None:
        place(app, "real/faq.jsonl")
        (app.home.datasets / "alias.jsonl").symlink_to("real/faq.jsonl")

        assert (await create(app, path="alias.jsonl")).status_code == 201

    async def test_refuses_a_nul_in_the_path(self, app: MethodsApp) -> None:
        response = await create(app, path="a\0b.jsonl")

        assert (response.status_code, response.json()["code"]) == (422, "json_bad_character")

    @pytest.mark.parametrize("name", ["", "   ", "a/b", "x" * 101, "..", "0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c"])
    async def test_refuses_bad_names(self, app: MethodsApp, name: str) -> None:
        place(app, "faq.jsonl")

        response = await create(app, name=name)

        assert response.status_code == 422
        assert {pointer for pointer, _ in codes(response.json())} == {"/name"}

    async def test_of_two_creates_of_one_name_one_wins(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl")

        responses = await asyncio.gather(*[create(app, name=name) for name in ("Faq", "FAQ", "faq", "fAq")])

        assert sorted(response.status_code for response in responses) == [201, 409, 409, 409]
        assert {r.json()["code"] for r in responses if r.status_code == 409} == {"name_taken"}
        assert await count(app) == 1

    async def test_gives_the_first_answer_again_for_the_same_key(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl")
        wanted, headers = {"name": "faq", "path": "faq.jsonl"}, {"Idempotency-Key": "k1"}

        first = await app.client.post(URL, json=wanted, headers=headers)
        second = await app.client.post(URL, json=wanted, headers=headers)

        assert (first.status_code, second.status_code) == (201, 201)
        assert first.json() == second.json()


class TestUpload:
    async def put(self, app: MethodsApp, content: Any, name: str = "faq", **headers: str) -> httpx.Response:
        return await app.client.put(f"{URL}/{name}/file", content=content, headers=headers or JSONL)

    def leftovers(self, app: MethodsApp) -> list[str]:
        return sorted(entry.name for entry in app.home.datasets.iterdir())

    async def test_stores_and_registers(self, app: MethodsApp) -> None:
        response = await self.put(app, LINE * 2)

        assert response.status_code == 201
        assert (response.json()["rows"], response.json()["path"]) == (2, "datasets/faq.jsonl")
        assert (app.home.datasets / "faq.jsonl").read_bytes() == LINE * 2
        assert self.leftovers(app) == ["faq.jsonl"]
        assert (await app.client.get(response.headers["location"])).json() == response.json()

    async def test_leaves_nothing_of_an_invalid_file(self, app: MethodsApp) -> None:
        response = await self.put(app, LINE + b"{oops}\n")

        assert (response.status_code, codes(response.json())) == (422, [("/lines/2", "line_not_json")])
        assert self.leftovers(app) == []
        assert await count(app) == 0

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_refuses_an_oversized_body_and_leaves_nothing(self, app: MethodsApp, *, streamed: bool) -> None:
        content = LINE * (MAX_UPLOAD_BYTES // len(LINE) + 1)

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(content), 10_000):
                yield content[start : start + 10_000]

        response = await self.put(app, chunks() if streamed else content)

        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        assert self.leftovers(app) == []

    @pytest.mark.parametrize(
        "kind", ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/pdf", "image/png"]
    )
    async def test_refuses_other_content_types(self, app: MethodsApp, kind: str) -> None:
        response = await self.put(app, LINE, **{"Content-Type": kind})

        assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
        assert self.leftovers(app) == []

    async def test_takes_a_body_without_content_type(self, app: MethodsApp) -> None:
        assert (await self.put(app, LINE, **{"X-Nothing": "1"})).status_code == 201

    async def test_of_two_uploads_of_one_name_one_wins(self, app: MethodsApp) -> None:
        contents = [LINE * rows for rows in range(1, 5)]

        responses = await asyncio.gather(*[self.put(app, content) for content in contents])

        assert sorted(response.status_code for response in responses) == [201, 409, 409, 409]
        winner = next(response for response in responses if response.status_code == 201).json()
        assert (app.home.datasets / "faq.jsonl").read_bytes() == LINE * winner["rows"]
        assert self.leftovers(app) == ["faq.jsonl"]

    async def test_never_overwrites_a_file_that_was_put_there_by_hand(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl", b"mine")

        response = await self.put(app, LINE)

        assert (response.status_code, response.json()["code"]) == (409, "dataset_file_exists")
        assert (app.home.datasets / "faq.jsonl").read_bytes() == b"mine"
        assert await count(app) == 0

    async def test_keeps_a_long_name_in_a_file_that_every_disk_takes(self, app: MethodsApp) -> None:
        name = "数" * 100

        response = await self.put(app, LINE, name=name)

        assert (response.status_code, response.json()["name"]) == (201, name)
        assert app.home.absolute(response.json()["path"]).read_bytes() == LINE

    async def test_refuses_a_bad_name_before_reading(self, app: MethodsApp) -> None:
        response = await self.put(app, LINE, name="a%3Ab")

        assert (response.status_code, codes(response.json())) == (422, [("{dataset}", "invalid_name")])

    async def test_refuses_an_empty_body(self, app: MethodsApp) -> None:
        response = await self.put(app, b"")

        assert codes(response.json()) == [("/lines", "dataset_empty")]


ROWS: list[dict[str, str | None]] = [
    {"question": "Wie heißt du?; so", "answer": "Zeile 1\nZeile 2"},
    {"question": "你好", "answer": None},
]


def german_csv() -> bytes:
    """Return what Excel saves as "CSV UTF-8" in Germany."""
    return 'question;answer\r\n"Wie heißt du?; so";"Zeile 1\nZeile 2"\r\n你好;\r\n'.encode("utf-8-sig")


def gbk_csv() -> bytes:
    return german_csv().decode("utf-8-sig").replace("ß", "ss").encode("gb18030")


def xlsx(*more: str) -> bytes:
    book = openpyxl.Workbook()
    for title in more:
        book.create_sheet(title).append(["x"])
    book.worksheets[0].append(["question", "answer"])
    for row in ROWS:
        book.worksheets[0].append([row["question"], row["answer"]])
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


def parquet() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


def pictures(*, missing: bool = False) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("cats/data.csv", "text,image\ncat,a.png\n")
        archive.writestr("cats/images/b.png" if missing else "cats/images/a.png", b"picture")
    return stream.getvalue()


class TestFormats:
    """Files as people's tools write them, by one PUT as curl sends it."""

    async def put(self, app: MethodsApp, content: bytes, name: str = "faq", **options: str) -> httpx.Response:
        return await app.client.put(f"{URL}/{name}/file", content=content, params=options)

    @pytest.mark.parametrize(
        ("content", "options", "read", "file"),
        [
            (german_csv(), {}, {"format": "csv", "encoding": "utf-8", "delimiter": ";"}, "faq.csv"),
            (gbk_csv(), {"encoding": "gbk"}, {"format": "csv", "encoding": "gb18030", "delimiter": ";"}, "faq.csv"),
            (xlsx(), {}, {"format": "xlsx", "sheet": "Sheet"}, "faq.xlsx"),
            (xlsx("notes"), {"sheet": "Sheet"}, {"sheet": "Sheet", "left_out": ["notes"]}, "faq.xlsx"),
            (json.dumps(ROWS, indent=2).encode(), {}, {"format": "json", "encoding": "utf-8"}, "faq.json"),
            (parquet(), {}, {"format": "parquet", "encoding": None}, "faq.parquet"),
            (gzip.compress(german_csv()), {}, {"format": "csv", "compression": "gzip"}, "faq.csv.gz"),
        ],
        ids=["german csv", "gbk csv", "xlsx", "sheet", "pretty json", "parquet", "csv.gz"],
    )
    async def test_becomes_the_rows_and_keeps_the_original(
        self, app: MethodsApp, content: bytes, options: dict[str, str], read: dict[str, Any], file: str
    ) -> None:
        response = await self.put(app, content, **options)

        body = response.json()
        rows = [json.loads(json.dumps(row).replace("\\u00df", "ss")) if "encoding" in options else row for row in ROWS]
        assert (response.status_code, body["rows"], body["columns"]) == (201, 2, ["question", "answer"])
        assert {name: body["source"][name] for name in read} == read
        assert body["column_counts"][1]["rows"] == 1
        assert (await app.client.get(f"{URL}/faq/preview")).json()["items"] == rows
        downloaded = await app.client.get(f"{URL}/faq/file")
        assert [json.loads(line) for line in downloaded.text.splitlines()] == rows
        assert hashlib.sha256(downloaded.content).hexdigest() == body["digest"]
        original = await app.client.get(f"{URL}/faq/original")
        assert original.content == content
        assert f'filename="{file}"' in original.headers["content-disposition"]
        assert body["source"]["digest"] == hashlib.sha256(content).hexdigest()
        part = await app.client.get(f"{URL}/faq/original", headers={"Range": "bytes=2-5"})
        assert (part.status_code, part.content) == (206, content[2:6])
        hidden = f".{file}.{body['digest'][:16]}.jsonl"
        assert sorted(entry.name for entry in app.home.datasets.iterdir()) == sorted([file, hidden])
        await app.client.delete(f"{URL}/faq", params={"with_file": "true"})
        assert list(app.home.datasets.iterdir()) == []

    @pytest.mark.parametrize(
        ("content", "options", "problem", "says"),
        [
            (b"%PDF-1.7 ...", {}, ("/file", "file_is_other"), "PDF"),
            (b'[\n{"a": 1},\n{"a": }\n]', {}, ("/file", "json_broken"), "line 3"),
            (b"a,b\n1,2\n1,2,3\n", {}, ("/file", "table_field_count"), "line 3 has 3 field(s) and the header has 2"),
            (xlsx("notes"), {}, ("/sheet", "sheet_needed"), "Sheet, notes"),
            (german_csv(), {"encoding": "gbk"}, ("/encoding", "encoding_contradicts"), "utf-8"),
            (gbk_csv(), {}, ("/file", "text_encoding_unclear"), "?encoding=gb18030"),
            (b"{}", {}, ("/lines/1", "line_without_fields"), "Line 1"),
            (pictures(missing=True), {}, ("/lines/2", "line_image_missing"), "a.png"),
        ],
        ids=["pdf", "json", "csv", "sheets", "contradiction", "gbk", "empty object", "picture"],
    )
    async def test_says_in_one_sentence_what_is_wrong_and_leaves_nothing(
        self, app: MethodsApp, content: bytes, options: dict[str, str], problem: tuple[str, str], says: str
    ) -> None:
        response = await self.put(app, content, **options)

        assert (response.status_code, codes(response.json())) == (422, [problem])
        assert says in response.json()["errors"][0]["detail"]
        assert list(app.home.datasets.iterdir()) == []

    async def test_an_archive_with_pictures_becomes_a_folder(self, app: MethodsApp) -> None:
        content = pictures()

        response = await self.put(app, content, "cats")

        body = response.json()
        assert (response.status_code, body["path"], body["rows"]) == (201, "datasets/cats", 1)
        assert body["source"]["archive"]["digest"] == hashlib.sha256(content).hexdigest()
        folder = app.home.datasets / "cats"
        assert (folder / "images" / "a.png").read_bytes() == b"picture"
        again = await self.put(app, content, "Cats2")
        assert again.status_code == 201
        assert (await app.client.get(f"{URL}/cats/original")).text == "text,image\ncat,a.png\n"
        for name in ("cats", "Cats2"):
            await app.client.delete(f"{URL}/{name}", params={"with_file": "true"})
        assert list(app.home.datasets.iterdir()) == []

    async def test_a_table_that_was_put_there_by_hand_is_registered_by_its_path(self, app: MethodsApp) -> None:
        file = place(app, "tables/faq.csv", german_csv())

        checked = (await app.client.post(f"{URL}:validate", json={"path": "tables/faq.csv"})).json()
        assert (checked["valid"], checked["source"]["delimiter"]) == (True, ";")
        assert [entry.name for entry in file.parent.iterdir()] == ["faq.csv"]
        body = (await create(app, path="tables/faq.csv")).json()

        assert (body["path"], body["rows"]) == ("datasets/tables/faq.csv", 2)
        await app.client.delete(f"{URL}/faq")
        assert [entry.name for entry in file.parent.iterdir()] == ["faq.csv"]

    async def test_an_edited_table_is_read_again_with_the_same_options(self, app: MethodsApp) -> None:
        file = place(app, "faq.csv", gbk_csv())
        before = (await create(app, path="faq.csv", encoding="gbk")).json()

        file.write_bytes("question;answer\n你好;世界\n".encode("gbk"))
        rows = (await app.client.get(f"{URL}/faq/preview")).json()["items"]
        file.write_bytes(b"a;b\n1\n")
        broken = await app.client.get(f"{URL}/faq/preview")

        assert (before["rows"], rows) == (2, [{"question": "你好", "answer": "世界"}])
        assert codes(broken.json()) == [("/file", "table_field_count")]

    async def test_one_column_needs_the_content_type_of_a_table(self, app: MethodsApp) -> None:
        content = b"text\nHello\n"

        plain = await self.put(app, content)
        table = await app.client.put(f"{URL}/faq/file", content=content, headers={"Content-Type": "text/csv"})

        assert codes(plain.json()) == [("/file", "text_without_rows")]
        assert (table.status_code, table.json()["columns"]) == (201, ["text"])


class TestValidate:
    async def test_says_that_all_is_well_and_registers_nothing(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl")

        body = (await app.client.post(f"{URL}:validate", json={"path": "faq.jsonl", "name": "faq"})).json()

        assert (body["valid"], body["violations"], body["rows"]) == (True, [], 1)
        assert await count(app) == 0

    async def test_says_everything_a_create_would(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl")
        await create(app)
        place(app, "bad.jsonl", LINE + b"x\n" * 300)

        response = await app.client.post(f"{URL}:validate", json={"path": "bad.jsonl", "name": "FAQ"})

        body = response.json()
        assert response.status_code == 200
        assert (body["valid"], body["violation_count"], len(body["violations"])) == (False, 301, 100)
        assert ("/name", "name_taken") in codes(body)

    async def test_reports_a_bad_path_as_violation(self, app: MethodsApp) -> None:
        body = (await app.client.post(f"{URL}:validate", json={"path": "../x.jsonl"})).json()

        assert (body["valid"], codes(body)) == (False, [("/path", "path_outside_folder")])


class TestPreview:
    async def test_returns_rows_from_an_offset(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl", b"".join(b'{"n": %d}\n' % n for n in range(50)))
        await create(app)

        body = (await app.client.get(f"{URL}/faq/preview", params={"offset": 48, "limit": 5})).json()

        assert body == {"items": [{"n": 48}, {"n": 49}], "offset": 48, "total": 50}

    async def test_shows_the_file_as_it_is_now(self, app: MethodsApp) -> None:
        file = place(app, "faq.jsonl")
        await create(app)

        file.write_bytes(LINE + b"broken\n")
        broken = await app.client.get(f"{URL}/faq/preview")
        file.unlink()
        gone = await app.client.get(f"{URL}/faq/preview")

        assert (broken.status_code, codes(broken.json())) == (422, [("/lines/2", "line_not_json")])
        assert (gone.status_code, gone.json()["code"]) == (409, "dataset_missing")

    @pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 201}, {"offset": -1}, {"offset": 10**30}])
    async def test_refuses_odd_ranges(self, app: MethodsApp, params: dict[str, int]) -> None:
        assert (await app.client.get(f"{URL}/x/preview", params=params)).status_code == 422


class TestProfile:
    async def test_says_how_rows_are_written_and_what_would_be_left_out(self, app: MethodsApp) -> None:
        turns = [{"role": "user", "content": "你好 there"}, {"role": "assistant", "content": "Hello."}]
        rows: list[Any] = [
            *[{"messages": turns}] * 3,
            {"messages": [{"role": "system", "content": "Be kind."}, *turns]},
            {"instruction": "a", "output": None},
            {"messages": [{"role": "narrator", "content": "x"}]},
        ]
        place(app, "faq.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        await create(app)

        found = (await app.client.get(f"{URL}/faq/profile")).json()

        assert found["rows"] == 6
        assert found["forms"] == {"messages": 5, "instruction-output": 1}
        assert found["kinds"] == {"conversation": 4}
        assert found["features"] == {"system": 1}
        assert found["duplicates"] == 2
        assert found["turns"] == {"p50": 2, "p90": 3, "p99": 3, "p100": 3}
        assert set(found["scripts"]) == {"latin", "cjk"}
        assert codes({"errors": found["problems"]}) == [("/lines/6/messages/0/role", "turn_role_unknown")]
        assert codes({"errors": found["remarks"]}) == [("/dataset", "no_answer")]

    async def test_reads_a_file_again_that_has_changed(self, app: MethodsApp) -> None:
        file = place(app, "faq.jsonl")
        await create(app)
        assert (await app.client.get(f"{URL}/faq/profile")).json()["rows"] == 1

        file.write_bytes(LINE * 2)

        assert (await app.client.get(f"{URL}/faq/profile")).json()["rows"] == 2


class TestList:
    async def test_pages_sorts_and_filters(self, app: MethodsApp) -> None:
        for number, name in enumerate(["Beta", "alpha", "Ämter", "gamma"]):
            place(app, f"{number}.jsonl", LINE * (number + 1))
            assert (await create(app, name=name, path=f"{number}.jsonl")).status_code == 201

        names: list[str] = []
        cursor: str | None = None
        while cursor is not None or not names:
            params = {"sort": "-rows", "limit": "3", **({"cursor": cursor} if cursor else {})}
            body = (await app.client.get(URL, params=params)).json()
            names += [item["name"] for item in body["items"]]
            cursor = body["next_cursor"]
        found = (await app.client.get(URL, params={"q": "äM"})).json()["items"]

        assert names == ["gamma", "Ämter", "alpha", "Beta"]
        assert [item["name"] for item in found] == ["Ämter"]


class TestDelete:
    async def test_keeps_the_file(self, app: MethodsApp) -> None:
        file = place(app, "faq.jsonl")
        await create(app)

        response = await app.client.delete(f"{URL}/faq")

        assert (response.status_code, file.exists()) == (204, True)
        assert (await app.client.get(f"{URL}/faq")).status_code == 404
        assert (await app.client.delete(f"{URL}/faq")).json()["code"] == "dataset_not_found"

    async def test_removes_the_file_if_told_so(self, app: MethodsApp) -> None:
        file = place(app, "faq.jsonl")
        await create(app)

        response = await app.client.delete(f"{URL}/faq", params={"with_file": "true"})

        assert (response.status_code, file.exists()) == (204, False)

    async def test_refuses_to_remove_folders_and_shared_files(self, app: MethodsApp) -> None:
        place(app, "cats/data.jsonl")
        await create(app, name="cats", path="cats")
        file = place(app, "faq.jsonl")
        await create(app, name="one")
        await create(app, name="two")

        folder = await app.client.delete(f"{URL}/cats", params={"with_file": "true"})
        shared = await app.client.delete(f"{URL}/one", params={"with_file": "true"})

        assert (folder.status_code, folder.json()["code"]) == (409, "dataset_is_folder")
        assert (shared.status_code, shared.json()["code"]) == (409, "dataset_file_shared")
        assert file.exists()

    async def test_refuses_while_a_job_needs_it(self, app: MethodsApp) -> None:
        place(app, "faq.jsonl")
        dataset = (await create(app)).json()["id"]
        job = await insert_job(app.database, dataset_id=dataset, status=JobStatus.QUEUED)
        await insert_job(app.database, dataset_id=dataset, status=JobStatus.FAILED)

        response = await app.client.delete(f"{URL}/faq")

        assert (response.status_code, response.json()["code"]) == (409, "dataset_in_use")
        assert job.id in response.json()["detail"]
        assert await count(app) == 1
