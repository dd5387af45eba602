import json
import os
from typing import Any

import pytest

from app.domain.plain_text import MAX_DEPTH, shown, storable, storable_document

LATIN_1 = os.fsdecode(b"\xfc.txt")


def nested(levels: int) -> Any:
    document: Any = "core"
    for _ in range(levels):
        document = [document]
    return document


class TestShown:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("a\nb\x00", "a\\nb\\x00"),
            (LATIN_1, "\\xfc.txt"),
            (os.fsdecode("中文".encode("gbk")), "\\xd6\\xd0\\xce\\xc4"),
            ("\ud800", "\\ud800"),
            ("\x1b[2J\u202e", "\\x1b[2J\\u202e"),
            ("Größe 中文 😀", "Größe 中文 😀"),
        ],
    )
    def test_is_one_printable_line(self, value: str, text: str) -> None:
        assert shown(value) == text

    @pytest.mark.parametrize("value", ["x" * 1000, "\x00" * 79, LATIN_1 * 100])
    def test_is_never_longer_than_the_limit(self, value: str) -> None:
        assert len(shown(value)) == 80
        assert shown(value).endswith("…")

    def test_text_of_just_the_limit_is_whole(self) -> None:
        assert shown("x" * 80) == "x" * 80


class TestStorable:
    @pytest.mark.parametrize(
        ("value", "text"),
        [("a\x00b", "a\\x00b"), (LATIN_1, "\\xfc.txt"), ("\udfff\ud83d", "\\udfff\\ud83d"), ("two\n\tlines 😀", None)],
    )
    def test_escapes_only_what_is_refused(self, value: str, text: str | None) -> None:
        assert storable(value) == (text or value)
        storable(value).encode()


class TestStorableDocument:
    def test_cleans_keys_and_values_at_every_level(self) -> None:
        document = {LATIN_1: [{"\x00": (LATIN_1, 1, 2.5, True, None)}]}

        assert storable_document(document) == {"\\xfc.txt": [{"\\x00": ["\\xfc.txt", 1, 2.5, True, None]}]}

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
    def test_number_that_json_lacks_is_null(self, number: float) -> None:
        assert storable_document({"loss": number}) == {"loss": None}

    def test_integer_without_a_decimal_form_is_left_out(self) -> None:
        assert storable_document([10**4000, 10**5000]) == [10**4000, "…"]

    def test_what_is_nested_too_deep_is_left_out(self) -> None:
        assert storable_document(nested(MAX_DEPTH)) == nested(MAX_DEPTH)
        assert "core" not in json.dumps(storable_document(nested(100_000)))
