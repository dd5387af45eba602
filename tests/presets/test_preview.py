"""Previews of rows without a service: which rows are shown, and the spans of their sequences."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.presets.shared.helpers.deepe_rows import CONVERSATION, Refused, RowProblem, Wanted
from app.presets.shared.helpers.deepe_rows.preview import (
    SHOWN_CHARACTERS,
    SHOWN_TOKENS,
    Fate,
    TokenizedText,
    preview,
    spans,
)

SPEECH = Wanted(kinds=frozenset({CONVERSATION}))
GIVEN, LEARNED, CUT = Fate(0), Fate(1), Fate(1, cut=True)


class Bytes:
    """A tokenizer whose tokens are bytes, as the smallest ones of byte-level BPE."""

    def __call__(self, text: str, **_options: Any) -> dict[str, Any]:
        tokens = list(text.encode())
        offsets = [(place, place + 1) for place, one in enumerate(text) for _ in one.encode()]
        return {"input_ids": tokens, "offset_mapping": offsets}

    def decode(self, tokens: list[int], **_options: Any) -> str:
        return bytes(tokens).decode(errors="replace")


class Slow(Bytes):
    """One that does not say where its tokens stand."""

    def __call__(self, text: str, **_options: Any) -> dict[str, Any]:
        raise NotImplementedError


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def asked(text: str) -> dict[str, str]:
    return {"prompt": text, "completion": "a"}


class TestRows:
    def test_are_numbered_by_lines(self, tmp_path: Path) -> None:
        path = written(tmp_path, asked("1"), "\n", asked("3"), asked("4"), asked("5"))

        assert [row["line"] for row in preview(path, SPEECH)] == [1, 3, 4]
        found = preview(path, SPEECH, [9, 3, 2])
        assert [(row["line"], "problem" in row) for row in found] == [(2, True), (3, False), (9, True)]

    def test_behind_those_that_are_used_are_left_out(self, tmp_path: Path) -> None:
        path = written(tmp_path, "\n", asked("1"), asked("2"), {"prompt": "3", "completion": None})

        found = preview(path, SPEECH, [2, 3, 4], limit=1)

        assert [row["left_out"] for row in found] == [None, "row_beyond_max_samples", "no_answer"]

    def test_are_shown_as_they_stand_where_nothing_is_known(self, tmp_path: Path) -> None:
        long = json.dumps({"x": "y" * SHOWN_CHARACTERS})

        (row,) = preview(written(tmp_path, long + "\n"), None)

        assert (len(row["raw"]), row["raw_characters"]) == (SHOWN_CHARACTERS, len(long))

    def test_later_lines_are_not_parsed(self, tmp_path: Path) -> None:
        path = written(tmp_path, asked("1"), asked("2"), "{broken\n")

        assert len(preview(path, SPEECH, [1, 2])) == 2
        with pytest.raises(Refused, match="line 3"):
            preview(path, SPEECH, [3])

    def test_have_the_problem_of_who_shows_them(self, tmp_path: Path) -> None:
        def refuse(_example: Any) -> dict[str, Any]:
            raise RowProblem("template_refused", error="no")

        (row,) = preview(written(tmp_path, asked("1")), SPEECH, show=refuse)

        assert row["problem"] == {"code": "template_refused", "pointer": "", "params": {"error": "no"}}
        assert (row["kind"], "raw" in row) == (CONVERSATION, True)


class TestSpans:
    @given(st.text(min_size=1), st.data())
    def test_are_the_whole_text_and_all_tokens(self, text: str, data: st.DataObject) -> None:
        tokens = list(text.encode())
        fates = data.draw(st.lists(st.sampled_from([GIVEN, LEARNED, CUT]), min_size=len(tokens), max_size=len(tokens)))

        found = spans(TokenizedText(text, tokens, Bytes()), 0, fates)

        assert "".join(span["text"] for span in found) == text
        assert sum(span["tokens"] for span in found) == len(tokens)
        assert sum(span["tokens"] for span in found if span["learned"]) == sum(fate.weight for fate in fates)

    def test_character_of_two_fates_belongs_to_the_later(self) -> None:
        found = spans(TokenizedText("aé", list("aé".encode()), Bytes()), 0, [GIVEN, GIVEN, LEARNED])

        assert [(span["text"], span["tokens"]) for span in found] == [("a", 2), ("é", 1)]

    def test_of_a_tokenizer_without_places_are_near(self) -> None:
        found = spans(TokenizedText("aé", list("aé".encode()), Slow()), 0, [GIVEN, GIVEN, LEARNED])

        assert "".join(span["text"] for span in found) == "aé"

    def test_of_a_part_begin_there(self) -> None:
        whole = TokenizedText("abcdef", list(b"abcdef"), Bytes())

        assert [span["text"] for span in spans(whole, 2, [LEARNED, LEARNED])] == ["cd"]

    def test_show_the_beginning_and_the_end_of_what_is_long(self) -> None:
        text = "a" * SHOWN_TOKENS + "b" * SHOWN_TOKENS

        first, hidden, last = spans(TokenizedText(text, list(text.encode()), Bytes()), 0, [GIVEN] * len(text))

        assert (set(first["text"]), hidden["text"], set(last["text"])) == ({"a"}, None, {"b"})
        assert (first["tokens"] + hidden["tokens"] + last["tokens"], hidden["characters"]) == (len(text), SHOWN_TOKENS)
