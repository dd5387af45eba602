"""What a record holds of the values that callers bring."""

import pytest

from app.domain.audit import MAX_VALUE, recordable

LONG = 300_000


class TestRecordable:
    @pytest.mark.parametrize(
        "piece",
        [
            "a",
            "token",
            "token ",
            "http://",
            "https://a",
            "://",
            "://a@",
            "hf_",
            "deepe_aaaaaaaa-",
            "password=",
            "?",
            "api_key:",
        ],
    )
    @pytest.mark.parametrize("length", [MAX_VALUE, LONG])
    def test_takes_any_text_in_a_time_that_grows_with_its_length(self, piece: str, length: int) -> None:
        """One that grew with the square of it would not end."""
        text = (piece * length)[:length]

        assert recordable({"texts": [text[:MAX_VALUE]] * (LONG // MAX_VALUE), "text": text})

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("https://ada:pw@example.com/x", "https://(hidden)@example.com/x"),
            ("see https://example.com/jobs:validate?key=1 now", "see https://example.com/jobs:validate?(hidden) now"),
            ("my_token = abc, x", "my_token = (hidden), x"),
            ("hf_abcdefghijklmnop1234", "(hidden)"),
            ("nothing to hide", "nothing to hide"),
        ],
    )
    def test_hides_what_looks_like_a_secret(self, text: str, kept: str) -> None:
        assert recordable(text) == kept
        assert recordable({"text": [text]}) == {"text": [kept]}

    def test_long_text_is_a_digest(self) -> None:
        assert set(recordable("a" * (MAX_VALUE + 1))) == {"sha256", "bytes"}
