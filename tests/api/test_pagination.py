from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from app.api.pagination import InvalidCursor, decode_cursor, encode_cursor
from tests.api.foundation import client_of, make_app

NOON = datetime(2026, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)


class TestCursor:
    @pytest.mark.parametrize(
        ("order", "position"),
        [
            ("-created_at", (NOON, "id")),
            ("name", ("金融-sft", "id")),
            ("rows", (3, "")),
            ("-name", ('"}{\\', "\U0001f600")),
        ],
    )
    def test_comes_back_as_it_was(self, order: str, position: tuple[Any, Any]) -> None:
        assert decode_cursor(order, encode_cursor(order, position)) == position

    def test_time_comes_back_in_utc(self) -> None:
        cursor = encode_cursor("created_at", (NOON.astimezone(timezone(timedelta(hours=8))), "id"))

        assert decode_cursor("created_at", cursor) == (NOON, "id")

    def test_is_safe_in_a_url(self) -> None:
        assert set(encode_cursor("name", ("ÿ?>" * 50, "id"))).isdisjoint("+/=&?")

    def test_of_another_sort_is_refused(self) -> None:
        with pytest.raises(InvalidCursor):
            decode_cursor("name", encode_cursor("-name", ("a", "b")))

    @pytest.mark.parametrize("cursor", ["", "a", "$", "eyJhIjoxfQ", "ü", "A" * 5000, "MTIz" * 9])
    def test_invented_is_refused(self, cursor: str) -> None:
        with pytest.raises(InvalidCursor):
            decode_cursor("name", cursor)

    @pytest.mark.parametrize("order", ["-created_at", "updated_at", "name", "path", "rows", "-size_bytes", "number"])
    @pytest.mark.parametrize(
        "value",
        [
            ["x"], {}, None, True, 1.5, 10**30, -(2**63) - 1, "\x00", "\ud800",
            {"t": "x"}, {"t": "2026-01-01T00:00:00"}, {"t": "0001-01-01T00:00:00+23:59"},
            {"t": "9999-12-31T23:59:59-23:59"}, {"t": 1},
        ],
    )  # fmt: skip
    def test_forged_value_of_any_sort_is_refused(self, order: str, value: Any) -> None:
        sound = {"name": "x", "path": "x", "rows": 1, "-size_bytes": 1, "number": 1}.get(order, NOON)

        for position in ((value, "id"), (sound, value)):
            with pytest.raises(InvalidCursor):
                decode_cursor(order, encode_cursor(order, position))

    @pytest.mark.parametrize(("order", "value"), [("name", 1), ("created_at", "x"), ("rows", "x"), ("name", NOON)])
    def test_value_of_another_type_is_refused(self, order: str, value: Any) -> None:
        with pytest.raises(InvalidCursor):
            decode_cursor(order, encode_cursor(order, (value, "id")))

    def test_one_changed_character_is_refused(self) -> None:
        cursor = encode_cursor("name", ("a", "b"))

        for index, character in enumerate(cursor[:-1]):
            changed = cursor[:index] + ("A" if character != "A" else "B") + cursor[index + 1 :]
            with pytest.raises(InvalidCursor):
                decode_cursor("name", changed)


class TestPages:
    async def test_following_next_cursor_walks_the_list(self) -> None:
        async with client_of(make_app()) as client:
            first = (await client.get("/api/v1/things", params={"limit": 2, "sort": "name"})).json()
            second = (
                await client.get("/api/v1/things", params={"limit": 2, "sort": "name", "cursor": first["next_cursor"]})
            ).json()

        assert first["items"] + second["items"] == [0, 1, 2, 3]

    async def test_default_limit_is_50(self) -> None:
        async with client_of(make_app()) as client:
            assert len((await client.get("/api/v1/things")).json()["items"]) == 50

    @pytest.mark.parametrize(
        ("query", "pointer", "code"),
        [
            ("limit=0", "?limit", "field_too_small"),
            ("limit=201", "?limit", "field_too_large"),
            ("limit=x", "?limit", "field_type"),
            ("cursor=x", "?cursor", "invalid_cursor"),
            ("sort=size", "?sort", "invalid_sort"),
            ("sort=--name", "?sort", "invalid_sort"),
        ],
    )
    async def test_returns_422_for_a_bad_parameter(self, query: str, pointer: str, code: str) -> None:
        async with client_of(make_app()) as client:
            response = await client.get(f"/api/v1/things?{query}")

        assert response.status_code == 422
        assert [(entry["pointer"], entry["code"]) for entry in response.json()["errors"]] == [(pointer, code)]
