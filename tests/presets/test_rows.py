"""What becomes of rows: read as examples, left out and counted, or refused with the place and the reason."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.presets.shared.helpers import deepe_rows as rows
from app.presets.shared.helpers.deepe_rows.files import keys_of, number_held_out

Row = dict[str, Any]
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
TALK = frozenset({rows.CONVERSATION, rows.TEXT})
ALL = frozenset(rows.KINDS)


def turn(role: str, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def reader(kinds: frozenset[str] = TALK, **more: Any) -> rows.Reader:
    return rows.Reader(rows.Wanted(kinds=kinds, **more))


def read(row: Any, kinds: frozenset[str] = TALK, **more: Any) -> rows.Example:
    found = reader(kinds, **more).read(row, 1)
    assert found is not None
    return found


def turns_of(row: Row) -> list[Row]:
    found = read(row)
    assert isinstance(found, rows.Conversation)
    return [dict(one) for one in found.turns]


def learned(row: Row) -> list[Any]:
    """Return the contents that are learned."""
    found = read(row)
    assert isinstance(found, rows.Conversation)
    return [found.turns[place]["content"] for place in sorted(found.learned)]


def said(row: Row, kinds: frozenset[str] = TALK, **more: Any) -> set[str]:
    one = reader(kinds, **more)
    assert one.read(row, 1) is not None
    return {code for code, _ in one.report.said}


class TestForms:
    @pytest.mark.parametrize(
        ("row", "turns"),
        [
            ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
            ({"messages": json.dumps([USER, ASSISTANT])}, [USER, ASSISTANT]),
            ({"messages": [turn("developer", "s"), USER, ASSISTANT]}, [turn("system", "s"), USER, ASSISTANT]),
            ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [USER, ASSISTANT]),
            ({"system": "s", "messages": [USER, ASSISTANT]}, [turn("system", "s"), USER, ASSISTANT]),
            (
                {"system": "s", "messages": [turn("system", "s"), USER, ASSISTANT]},
                [turn("system", "s"), USER, ASSISTANT],
            ),
            ({"system": None, "messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
            ({"prompt": "q", "completion": "a"}, [USER, ASSISTANT]),
            ({"prompt": [USER], "completion": [ASSISTANT]}, [USER, ASSISTANT]),
            ({"prompt": [USER], "completion": ASSISTANT}, [USER, ASSISTANT]),
            ({"prompt": "q", "answer": "a"}, [USER, ASSISTANT]),
            ({"prompt": "q", "response": "a"}, [USER, ASSISTANT]),
            ({"question": "q", "answer": "a"}, [USER, ASSISTANT]),
            ({"question": "q", "context": "c", "answer": "a"}, [turn("user", "q\n\nc"), ASSISTANT]),
            ({"instruction": "q", "input": "", "output": "a"}, [USER, ASSISTANT]),
            ({"instruction": "q", "input": "i", "output": "a"}, [turn("user", "q\n\ni"), ASSISTANT]),
            ({"instruction": "q", "input": None, "output": "a"}, [USER, ASSISTANT]),
            ({"instruction": "q", "context": "c", "response": "a"}, [turn("user", "q\n\nc"), ASSISTANT]),
            (
                {"instruction": "q", "output": "a", "system": "s", "history": [["Hi", "Ho"]]},
                [turn("system", "s"), turn("user", "Hi"), turn("assistant", "Ho"), USER, ASSISTANT],
            ),
            ({"prompt": "q", "completion": "a", "messages": None}, [USER, ASSISTANT]),
            ({"messages": [turn("user", [{"type": "text", "text": "q"}]), ASSISTANT]}, [USER, ASSISTANT]),
            (
                {"messages": [USER, turn("assistant", None, tool_calls=[CALL]), turn("tool", {"sum": 3}), ASSISTANT]},
                [USER, turn("assistant", "", tool_calls=[CALL]), turn("tool", '{"sum": 3}'), ASSISTANT],
            ),
            (
                {"messages": [USER, turn("assistant", None, function_call={"name": "add", "arguments": '{"a": 1}'})]},
                [USER, turn("assistant", "", tool_calls=[CALL])],
            ),
            (
                {
                    "conversations": [
                        {"from": "human", "value": "q"},
                        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                        {"from": "observation", "value": "3"},
                        {"from": "gpt", "value": "a"},
                    ],
                    "tools": "[]",
                },
                [USER, turn("assistant", "", tool_calls=[CALL]), turn("tool", "3"), ASSISTANT],
            ),
            (
                {"messages": [USER, turn("assistant", "a", thinking="hm")]},
                [USER, turn("assistant", "a", reasoning_content="hm")],
            ),
        ],
    )
    def test_conversations(self, row: Row, turns: list[Row]) -> None:
        assert turns_of(row) == turns

    @pytest.mark.parametrize(
        ("row", "contents"),
        [
            ({"messages": [USER, ASSISTANT, USER, turn("assistant", "b")]}, ["a", "b"]),
            ({"messages": [USER, turn("assistant", "a", weight=0), USER, turn("assistant", "b")]}, ["b"]),
            ({"messages": [USER, turn("assistant", "a", train=False), USER, turn("assistant", "b")]}, ["b"]),
            ({"messages": [USER, turn("assistant", "a", weight=1)]}, ["a"]),
            ({"messages": [turn("assistant", "hello"), USER, ASSISTANT]}, ["a"]),
            ({"messages": [USER, turn("assistant", None), USER, turn("assistant", "b")]}, ["b"]),
            ({"prompt": [USER, ASSISTANT, USER], "completion": "b"}, ["b"]),
            ({"instruction": "q", "output": "b", "history": [["Hi", "Ho"]]}, ["Ho", "b"]),
            ({"prompt": "q", "completion": [ASSISTANT, USER, turn("assistant", "b")]}, ["a", "b"]),
            (
                {"prompt": "q", "completion": {"name": "Bob", "ok": True, "n": None}},
                ['{"name": "Bob", "ok": true, "n": null}'],
            ),
        ],
    )
    def test_answers_that_are_learned(self, row: Row, contents: list[str]) -> None:
        assert learned(row) == contents

    def test_tools_are_whole(self) -> None:
        found = read({"messages": [USER, ASSISTANT], "tools": json.dumps([TOOL["function"]])})

        assert isinstance(found, rows.Conversation)
        assert found.tools == [TOOL]

    @pytest.mark.parametrize(
        ("row", "kind", "value"),
        [
            ({"text": "t"}, rows.TEXT, rows.Text("t", "line 1")),
            (
                {"prompt": "q", "chosen": "a", "rejected": "b"},
                rows.PREFERENCE,
                rows.Preference([USER], ASSISTANT, turn("assistant", "b"), place="line 1"),
            ),
            (
                {"chosen": [USER, ASSISTANT], "rejected": [USER, turn("assistant", "b")]},
                rows.PREFERENCE,
                rows.Preference([USER], ASSISTANT, turn("assistant", "b"), place="line 1"),
            ),
            (
                {"messages": [USER], "chosen": ASSISTANT, "rejected": {"from": "gpt", "value": "b"}},
                rows.PREFERENCE,
                rows.Preference([USER], ASSISTANT, turn("assistant", "b"), place="line 1"),
            ),
            (
                {"prompt": "q", "completion": "a", "label": True},
                rows.LABELLED,
                rows.Labelled([USER], ASSISTANT, True, place="line 1"),
            ),
            (
                {"messages": [USER, ASSISTANT], "label": "false"},
                rows.LABELLED,
                rows.Labelled([USER], ASSISTANT, False, place="line 1"),
            ),
            ({"anchor": "x", "positive": "y"}, rows.PAIR, rows.Pair("x", "y", (), "line 1")),
            ({"query": "x", "document": "y", "label": 2}, rows.GRADED, rows.Graded("x", "y", 2.0, "line 1")),
            ({"query": "x", "document": "y", "label": "0.5"}, rows.GRADED, rows.Graded("x", "y", 0.5, "line 1")),
            ({"query": "x", "document": "y", "label": False}, rows.GRADED, rows.Graded("x", "y", 0.0, "line 1")),
            (
                {"query": "x", "positive": "y", "negative": "n", "negatives": ["m"], "negative_1": "o"},
                rows.PAIR,
                rows.Pair("x", "y", ("n", "m", "o"), "line 1"),
            ),
            ({"question": "x", "answer": "y"}, rows.PAIR, rows.Pair("x", "y", (), "line 1")),
            ({"prompt": "q"}, rows.QUESTION, rows.Question([USER], place="line 1")),
            (
                {"prompt": "q", "solution": "4", "tests": ["t"]},
                rows.QUESTION,
                rows.Question([USER], "4", place="line 1", more={"tests": ["t"]}),
            ),
            ({"messages": [USER, ASSISTANT]}, rows.QUESTION, rows.Question([USER], "a", place="line 1")),
        ],
    )
    def test_other_kinds(self, row: Row, kind: str, value: rows.Example) -> None:
        assert read(row, frozenset({kind})) == value

    def test_named_columns_win_and_a_known_form_keeps_its_others(self) -> None:
        named = read({"q": "q", "text": "a"}, columns=("q", "text"))
        alpaca = read(
            {"instruction": "q", "input": "i", "output": "a", "text": "all"}, columns=("instruction", "output")
        )

        assert isinstance(named, rows.Conversation)
        assert isinstance(alpaca, rows.Conversation)
        assert named.turns == [USER, ASSISTANT]
        assert alpaca.turns[0]["content"] == "q\n\ni"

    def test_unknown_columns_are_kept_and_told(self) -> None:
        one = reader()
        found = one.read({"prompt": "q", "completion": "a", "source": "web", "file_name": "a.txt"}, 7)

        assert isinstance(found, rows.Conversation)
        assert found.more == {"source": "web", "file_name": "a.txt"}
        assert one.report.said[("column_unused", "source")].lines == [7]


class TestPictures:
    @pytest.mark.parametrize(
        ("row", "pictures", "first"),
        [
            ({"images": [{"imageId": "a.png"}, {"imageId": "b.png"}], "prompt": "q", "completion": "a"}, 2, "q"),
            (
                {"images": ["a.png", "b.png"], "messages": [turn("user", "<image>q<image>"), ASSISTANT]},
                2,
                "<image>q<image>",
            ),
            ({"image": {"path": "a.png"}, "question": "q", "answer": "a"}, 1, "q"),
            ({"file_name": "a.png", "question": "q", "answer": "a"}, 1, "q"),
            (
                {
                    "messages": [
                        turn("user", [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]),
                        ASSISTANT,
                    ]
                },
                1,
                "<image>q",
            ),
            (
                {"images": ["a.png"], "messages": [turn("user", [{"type": "image"}, "q"]), ASSISTANT]},
                1,
                "<image>q",
            ),
            ({"images": [], "question": "q", "answer": "a"}, 0, "q"),
        ],
    )
    def test_of_every_form(self, row: Row, pictures: int, first: str) -> None:
        found = read(row, pictures=True)

        assert isinstance(found, rows.Conversation)
        assert list(found.pictures) == ["a.png", "b.png"][:pictures]
        assert found.turns[0]["content"] == first


PREFERENCE = frozenset({rows.PREFERENCE})
LABELLED = frozenset({rows.LABELLED})
GRADED = frozenset({rows.GRADED})
PAIR = frozenset({rows.PAIR})
PICTURES: dict[str, Any] = {"pictures": True}
WRONG: list[tuple[str, str, Any, frozenset[str], dict[str, Any]]] = [
    ("row_not_object", "", [1], TALK, {}),
    ("row_columns_missing", "", {"a": 1}, TALK, {}),
    ("row_columns_unknown", "", {"a": 1}, PREFERENCE, {}),
    ("row_forms_several", "", {"messages": [USER, ASSISTANT], "prompt": "q", "completion": "a"}, TALK, {}),
    ("row_forms_several", "", {"instruction": "q", "output": "a", "text": "t"}, TALK, {}),
    ("row_form_not_learned", "", {"text": "t"}, PREFERENCE, {}),
    ("row_form_not_learned", "", {"prompt": "q", "chosen": "a", "rejected": "b"}, TALK, {}),
    ("turns_not_list", "/messages", {"messages": "hello"}, TALK, {}),
    ("turns_empty", "/messages", {"messages": []}, TALK, {}),
    ("turn_not_object", "/messages/1", {"messages": [USER, "a"]}, TALK, {}),
    ("turn_role_missing", "/messages/0", {"messages": [{"content": "q"}, ASSISTANT]}, TALK, {}),
    ("turn_role_unknown", "/messages/0/role", {"messages": [turn("narrator", "q"), ASSISTANT]}, TALK, {}),
    ("turn_content_missing", "/messages/0", {"messages": [turn("user", None), ASSISTANT]}, TALK, {}),
    (
        "turn_part_invalid",
        "/messages/0/content/0",
        {"messages": [turn("user", [{"type": "video"}]), ASSISTANT]},
        TALK,
        {},
    ),
    ("turn_key_twice", "/messages/0", {"messages": [turn("user", "q", value="r"), ASSISTANT]}, TALK, {}),
    (
        "tool_calls_invalid",
        "/messages/1/tool_calls/0",
        {"messages": [USER, turn("assistant", "", tool_calls=[1])]},
        TALK,
        {},
    ),
    (
        "tool_arguments_invalid",
        "/messages/1/tool_calls/0/function/arguments",
        {"messages": [USER, turn("assistant", "", tool_calls=[{"name": "add", "arguments": "1 +"}])]},
        TALK,
        {},
    ),
    ("tools_invalid", "/tools/0", {"messages": [USER, ASSISTANT], "tools": [1]}, TALK, {}),
    ("weight_invalid", "/messages/1/weight", {"messages": [USER, turn("assistant", "a", weight=0.5)]}, TALK, {}),
    ("system_twice", "/system", {"system": "s", "messages": [turn("system", "t"), USER, ASSISTANT]}, TALK, {}),
    ("system_not_first", "/messages/1", {"messages": [USER, turn("system", "s"), ASSISTANT]}, TALK, {}),
    ("history_invalid", "/history", {"instruction": "q", "output": "a", "history": "Hi"}, TALK, {}),
    ("history_invalid", "/history/0", {"instruction": "q", "output": "a", "history": [["Hi"]]}, TALK, {}),
    ("text_invalid", "/system", {"messages": [USER, ASSISTANT], "system": 1}, TALK, {}),
    ("text_invalid", "/positive", {"anchor": "x", "positive": ["y"]}, PAIR, {}),
    ("label_invalid", "/label", {"prompt": "q", "completion": "a", "label": "good"}, LABELLED, {}),
    ("grade_invalid", "/label", {"query": "q", "document": "a", "label": -1}, GRADED, {}),
    ("grade_invalid", "/label", {"query": "q", "document": "a", "label": "good"}, GRADED, {}),
    ("grade_invalid", "/label", {"query": "q", "document": "a", "label": float("nan")}, GRADED, {}),
    ("text_invalid", "/document", {"query": "q", "document": 5, "label": 1}, GRADED, {}),
    ("row_form_not_learned", "", {"query": "q", "document": "a", "label": 1}, frozenset({rows.PAIR}), {}),
    (
        "pair_prompts_differ",
        "",
        {"chosen": [USER, ASSISTANT], "rejected": [turn("user", "r"), ASSISTANT]},
        PREFERENCE,
        {},
    ),
    (
        "answer_turns_several",
        "/chosen",
        {"prompt": "q", "chosen": [ASSISTANT, USER, ASSISTANT], "rejected": "b"},
        PREFERENCE,
        {},
    ),
    ("pictures_invalid", "/images", {"images": [{"id": "a"}], "prompt": "q", "completion": "a"}, TALK, PICTURES),
    ("pictures_invalid", "/image", {"image": "https://x.org/a.png", "prompt": "q", "completion": "a"}, TALK, PICTURES),
    (
        "pictures_named_twice",
        "/image",
        {"image": "b.png", "messages": [turn("user", [{"type": "image", "image": "a.png"}]), ASSISTANT]},
        TALK,
        PICTURES,
    ),
    ("pictures_marks_differ", "", {"image": "a.png", "prompt": "<image><image>", "completion": "a"}, TALK, PICTURES),
    ("pictures_marks_differ", "", {"image": "", "prompt": "<image>", "completion": "a"}, TALK, PICTURES),
    ("picture_in_answer", "/1", {"image": "a.png", "prompt": "q", "completion": "<image>"}, TALK, PICTURES),
    (
        "picture_without_question",
        "",
        {"image": "a.png", "messages": [turn("system", "s"), ASSISTANT]},
        TALK,
        PICTURES,
    ),
    ("pictures_not_learned", "", {"image": "a.png", "prompt": "q", "completion": "a"}, TALK, {}),
    ("tools_not_learned", "", {"messages": [USER, ASSISTANT], "tools": [TOOL]}, TALK, {"tools": False}),
    ("picture_missing", "", {"caption": "c"}, frozenset({rows.CAPTION}), PICTURES),
    ("caption_pictures_several", "", {"caption": "c", "images": ["a", "b"]}, frozenset({rows.CAPTION}), PICTURES),
]
LEFT_OUT: list[tuple[str, Row, frozenset[str]]] = [
    ("no_answer", {"prompt": "q", "completion": None}, TALK),
    ("no_answer", {"instruction": "q", "input": "", "output": None}, TALK),
    ("no_answer", {"messages": [USER]}, TALK),
    ("no_answer", {"messages": [USER, turn("assistant", None)]}, TALK),
    ("no_answer", {"prompt": "q", "chosen": "a", "rejected": None}, PREFERENCE),
    ("no_answer", {"messages": [USER], "label": True}, LABELLED),
    ("no_text", {"text": None}, TALK),
    ("no_text", {"text": " "}, TALK),
    ("no_text", {"anchor": "x", "positive": ""}, PAIR),
    ("no_text", {"caption": None, "image": "a.png"}, frozenset({rows.CAPTION})),
    ("all_weights_zero", {"messages": [USER, turn("assistant", "a", weight=0)]}, TALK),
]
SAID: list[tuple[str, Row, frozenset[str]]] = [
    ("answer_absent", {"messages": [USER, turn("assistant", None), USER, ASSISTANT]}, TALK),
    ("input_empty", {"prompt": "", "completion": "a"}, TALK),
    ("answer_empty", {"prompt": "q", "completion": ""}, TALK),
    ("answer_empty", {"messages": [USER, turn("assistant", "")]}, TALK),
    ("answer_empty", {"prompt": "q", "chosen": "", "rejected": "b"}, PREFERENCE),
    ("answer_not_text", {"prompt": "q", "completion": {"a": None}}, TALK),
    ("answer_not_text", {"text": 5}, TALK),
    ("input_not_text", {"prompt": {"a": 1}, "completion": "a"}, TALK),
    ("turns_after_answer", {"messages": [USER, ASSISTANT, USER]}, TALK),
    ("answer_without_question", {"messages": [turn("assistant", "hi"), USER, ASSISTANT]}, TALK),
    ("pair_equal", {"prompt": "q", "chosen": "a", "rejected": "a"}, PREFERENCE),
    ("column_unused", {"prompt": "q", "completion": "a", "source": "web"}, TALK),
    ("key_unused", {"messages": [turn("user", "q", mood="glad"), ASSISTANT]}, TALK),
]


class TestProblems:
    @pytest.mark.parametrize(("code", "pointer", "row", "kinds", "more"), WRONG)
    def test_row_is_refused_with_its_place(
        self, code: str, pointer: str, row: Any, kinds: frozenset[str], more: dict[str, Any]
    ) -> None:
        with pytest.raises(rows.RowProblem) as caught:
            read(row, kinds, **more)

        assert (caught.value.code, caught.value.pointer) == (code, pointer)
        assert caught.value.sentence().startswith(f"{pointer}: " if pointer else "")

    @pytest.mark.parametrize(("code", "row", "kinds"), LEFT_OUT)
    def test_row_without_anything_to_learn_is_counted(self, code: str, row: Row, kinds: frozenset[str]) -> None:
        one = reader(kinds, pictures=True)

        assert one.read(row, 3) is None
        assert {code: count.lines for code, count in one.report.left_out.items()} == {code: [3]}

    @pytest.mark.parametrize(("code", "row", "kinds"), SAID)
    def test_what_is_unusual_is_said(self, code: str, row: Row, kinds: frozenset[str]) -> None:
        assert code in said(row, kinds)

    def test_named_column_that_no_row_has_is_told_at_the_end(self) -> None:
        one = reader(columns=("a", "b"))
        one.read({"a": "q"}, 1)
        with pytest.raises(rows.RowProblem) as refused:
            one.close()
        assert (refused.value.code, refused.value.params) == ("row_column_missing", {"column": "b", "columns": "a"})

        one.read({"a": "q", "b": "r"}, 2)
        one.close()
        assert one.report.left_out["no_answer"].lines == [1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "observation", "x"]) | JSON,
        "from": st.sampled_from(["human", "gpt", "function_call"]) | JSON,
        "content": JSON | st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": JSON})),
        "value": JSON,
        "tool_calls": JSON | st.lists(st.fixed_dictionaries({"function": JSON}), max_size=2),
        "function_call": JSON,
        "reasoning_content": JSON,
        "weight": JSON,
        "name": JSON,
    },
)
COLUMNS = sorted({name for form in rows.FORMS for name in (*form.columns, *form.optional)} | {"images", "image", "id"})
ROW = st.dictionaries(st.sampled_from(COLUMNS), JSON | TURN | st.lists(TURN, max_size=4), max_size=5)


@given(st.one_of(ROW, JSON), st.sampled_from([frozenset({kind}) for kind in rows.KINDS] + [TALK, ALL]), st.booleans())
def test_any_row_is_read_left_out_or_refused(row: Any, kinds: frozenset[str], pictures: bool) -> None:
    one = reader(kinds, pictures=pictures)
    before, found, refused = json.dumps(row), None, ""

    try:
        found = one.read(row, 1)
    except rows.RowProblem as problem:
        refused = str(problem)

    assert (found is None) == bool(one.report.left_out or refused)
    if isinstance(found, rows.Conversation):
        assert found.learned
        assert all(isinstance(said["content"], str) and said["role"] in rows.ROLES for said in found.turns)
    assert json.dumps(row) == before


class Tokenizer:
    """A character is a token, an angle bracket begins one that is special; the template is a function."""

    eos_token_id, bos_token_id = 1, 2
    all_special_ids = (1, 2)
    added_tokens_decoder: ClassVar = {3: SimpleNamespace(special=True), 4: SimpleNamespace(special=False)}
    special = {"<eos>": 1, "<bos>": 2, "<end>": 3}

    def __init__(self, template: Any, *, begins: bool = False) -> None:
        self._template, self._begins = template, begins

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        parts = re.findall(r"<\w+>|(?s:.)", text)
        tokens = [self.special.get(part, 3 + ord(part[0])) for part in parts]
        return {"input_ids": [2, *tokens] if self._begins and add_special_tokens else tokens}

    def apply_chat_template(
        self, turns: Sequence[Row], *, tools: Any, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return str(self._template(turns, tools, add_generation_prompt))


def plain(turns: Sequence[Row], tools: Any, asking: bool, *, end: str = "<eos>", omit: tuple[str, ...] = ()) -> str:
    """Write everything but what is to be left out: roles, tools, calls, reasoning, the text up to `</think>`."""
    text = f"[{json.dumps(tools)}]" if tools and "tools" not in omit else ""
    for one in turns:
        if one["role"] in omit:
            continue
        content = str(one["content"])
        if "think" in omit:
            content = content.rpartition("</think>")[2]
        calls = json.dumps(one["tool_calls"]) if "tool_calls" in one and "calls" not in omit else ""
        thought = one.get("reasoning_content", "") if "reasoning" not in omit else ""
        name = one.get("name", "") if "names" not in omit else ""
        text += f"{one['role']}:{name}{thought}{content}{calls}{end}"
    return text + ("assistant:" if asking else "")


def template(**more: Any) -> Tokenizer:
    begins = more.pop("begins", False)
    return Tokenizer(lambda *given: plain(*given, **more), begins=begins)


def strict(turns: Sequence[Row], _tools: Any, _asking: bool) -> str:
    raise ValueError(f"roles must alternate: {turns[0]['role']}")


def numbered(turns: Sequence[Row], tools: Any, asking: bool) -> str:
    """Begin with the number of turns: no question is the beginning of what is learned."""
    return f"{len(turns)} {plain(turns, tools, asking)}"


def alternating(turns: Sequence[Row], tools: Any, asking: bool) -> str:
    if [one["role"] for one in turns] != [("user", "assistant")[place % 2] for place in range(len(turns))]:
        raise ValueError("roles must alternate")
    return plain(turns, tools, asking)


def opened(turns: Sequence[Row], tools: Any, asking: bool) -> str:
    """Open a block of reasoning when it is asked, and write an empty one when an answer has none."""
    return plain(turns, tools, asking=False).replace("assistant:", "assistant:<think></think>") + (
        "assistant:<think>hm" if asking else ""
    )


def closed(turns: Sequence[Row], tools: Any, asking: bool) -> str:
    """End a question with an empty block of reasoning: it is asked for an answer at once."""
    return plain(turns, tools, asking) + ("<think></think>" if asking else "")


def counting(turns: Sequence[Row], tools: Any, asking: bool) -> str:
    """Throw reasoning away and begin with the number of turns: nothing can be put behind a question."""
    return f"{len(turns)} {plain(turns, tools, asking, omit=('think',))}"


CALLING = {"messages": [USER, turn("assistant", "", tool_calls=[CALL]), turn("tool", "3"), ASSISTANT], "tools": [TOOL]}
RENDERED: list[tuple[str, Row, Tokenizer]] = [
    ("template_refused", {"messages": [USER, ASSISTANT]}, Tokenizer(strict)),
    ("turns_merged", {"messages": [turn("system", "s"), USER, ASSISTANT]}, template(omit=("system",))),
    (
        "system_turn_lost",
        {"messages": [turn("system", "s"), ASSISTANT, USER, ASSISTANT]},
        template(omit=("system", "user")),
    ),
    ("user_turn_lost", {"messages": [turn("user", "what?"), ASSISTANT]}, template(omit=("user",))),
    (
        "assistant_turn_lost",
        {"messages": [USER, turn("assistant", "b4"), USER, ASSISTANT]},
        template(omit=("assistant",)),
    ),
    ("tool_turn_lost", CALLING, template(omit=("tool",))),
    ("tools_lost", CALLING, template(omit=("tools", "calls"))),
    ("tool_calls_lost", CALLING | {"tools": None}, template(omit=("calls",))),
    (
        "reasoning_lost",
        {"messages": [USER, turn("assistant", "a", thinking="hm", tool_calls=[CALL])]},
        template(omit=("reasoning",)),
    ),
    ("reasoning_lost", {"messages": [USER, turn("assistant", "<think>hm</think>a")]}, Tokenizer(counting)),
    ("reasoning_restored", {"messages": [USER, turn("assistant", "<think>hm</think>a")]}, template(omit=("think",))),
    ("reasoning_restored", {"messages": [USER, turn("assistant", "a", thinking="hm")]}, template(omit=("reasoning",))),
    ("prompt_rewritten", {"messages": [USER, ASSISTANT]}, Tokenizer(numbered)),
    ("prompt_not_prefix", {"messages": [USER, ASSISTANT]}, Tokenizer(opened)),
    ("think_block_added", {"messages": [USER, ASSISTANT]}, Tokenizer(opened)),
    ("reasoning_not_asked", {"messages": [USER, turn("assistant", "<think>hm</think>a")]}, Tokenizer(closed)),
    ("bos_missing", {"messages": [USER, ASSISTANT]}, template(begins=True)),
    ("answer_without_end", {"messages": [USER, ASSISTANT]}, template(end="")),
    ("end_is_not_eos", {"messages": [USER, ASSISTANT]}, template(end="<end>")),
    (
        "earlier_reasoning_left_out",
        {"messages": [USER, turn("assistant", "<think>hm</think>a", weight=0), USER, turn("assistant", "b")]},
        template(omit=("think",)),
    ),
    ("names_left_out", {"messages": [turn("user", "q", name="Ann"), ASSISTANT]}, template(omit=("names",))),
]
BY_THE_SCRIPTS = {"text_cut", "text_split", "row_too_long", "answer_too_long"}


def of_parts(turns: Sequence[Row], _tools: Any, asking: bool) -> str:
    """Write contents that are lists of parts, as a template of a model that sees does."""
    text = "".join(f"{one['role']}:{''.join(part.get('text', '#') for part in one['content'])}<eos>" for one in turns)
    return text + ("assistant:" if asking else "")


class TestRendering:
    @pytest.mark.parametrize(("code", "row", "tokenizer"), RENDERED)
    def test_what_a_template_loses_or_adds_is_a_problem_or_a_note(
        self, code: str, row: Row, tokenizer: Tokenizer
    ) -> None:
        found = read(row)
        assert isinstance(found, rows.Conversation)

        try:
            codes = {note for one in rows.render(found, tokenizer) for note in one.notes}
        except rows.RowProblem as problem:
            codes = {problem.code}

        assert code in codes

    def test_answer_is_learned_with_its_end_and_nothing_else(self) -> None:
        tokenizer = template()
        found = read({"messages": [USER, ASSISTANT]})
        assert isinstance(found, rows.Conversation)

        (one,) = rows.render(found, tokenizer)

        assert one.tokens == tokenizer("user:q<eos>assistant:a<eos>")["input_ids"]
        assert one.labels == [-100] * one.start + tokenizer("a<eos>")["input_ids"]
        assert one.notes == ()

    def test_system_and_neighbouring_questions_are_merged_where_the_template_asks_for_it(self) -> None:
        more = turn("user", "more")
        found = read({"messages": [turn("system", "s"), USER, more, ASSISTANT, USER, turn("assistant", "b")]})
        assert isinstance(found, rows.Conversation)

        first, second = rows.render(found, Tokenizer(alternating))

        assert first.notes == second.notes == ("turns_merged",)
        whole = "user:s\n\nq\n\nmore<eos>assistant:a<eos>user:q<eos>assistant:b<eos>"
        assert second.tokens == template()(whole)["input_ids"]
        assert second.labels[second.start :] == template()("b<eos>")["input_ids"]
        assert rows.asked([turn("system", "s"), USER], Tokenizer(alternating)) == "user:s\n\nq<eos>assistant:"

    @pytest.mark.parametrize(
        ("said", "asked", "learned"),
        [
            (turn("assistant", "<think>\nhm\n</think>\n\na"), "", "<think>\nhm\n</think>\n\na<eos>"),
            (turn("assistant", "a", thinking="hm"), "", "<think>\nhm\n</think>\n\na<eos>"),
            (turn("assistant", "<think>\nhm\n</think>\n\na"), "<think>\n", "hm\n</think>\n\na<eos>"),
            (turn("assistant", "<think>hm</think>a"), "<think>", "hm</think>a<eos>"),
            (turn("assistant", "hm\n</think>\n\na"), "<think>\n", "hm\n</think>\n\na<eos>"),
            (turn("assistant", "a", thinking="hm"), "<think>\n", "hm\n</think>\n\na<eos>"),
        ],
    )
    def test_reasoning_that_a_template_throws_away_is_learned_behind_the_question(
        self, said: Row, asked: str, learned: str
    ) -> None:
        def thrown_away(turns: Sequence[Row], tools: Any, asking: bool) -> str:
            return plain(turns, tools, asking, omit=("think", "reasoning")) + (asked if asking else "")

        tokenizer = Tokenizer(thrown_away)
        found = read({"messages": [USER, said, turn("user", "r"), {**said, "content": f"{said['content']}2"}]})
        assert isinstance(found, rows.Conversation)

        first, second = rows.render(found, tokenizer)

        question = f"user:q<eos>assistant:{asked}"
        assert first.tokens == [*tokenizer(question)["input_ids"], *tokenizer(learned)["input_ids"]]
        assert first.labels[first.start :] == tokenizer(learned)["input_ids"]
        assert (
            second.tokens[: second.start]
            == tokenizer(f"user:q<eos>assistant:{said['content'].rpartition('>')[2]}<eos>user:r<eos>assistant:{asked}")[
                "input_ids"
            ]
            or "\n" in said["content"]
        )
        assert second.labels[second.start :] == tokenizer(learned.replace("a<eos>", "a2<eos>"))["input_ids"]
        assert set(first.notes) == {"reasoning_restored"}
        assert set(second.notes) == {"reasoning_restored", "earlier_reasoning_left_out"}
        assert tokenizer(rows.asked([USER], tokenizer))["input_ids"] == first.tokens[: first.start]

    def test_content_of_parts_is_written_as_parts(self) -> None:
        asked = turn("user", [{"type": "image"}, {"type": "text", "text": "q"}])
        said = turn("assistant", [{"type": "text", "text": "a"}])

        one = rows.render_answer(rows.Answer([asked], said), template(), Tokenizer(of_parts))

        assert one.tokens == template()("user:#q<eos>assistant:a<eos>")["input_ids"]

    def test_reasoning_of_parts_that_a_template_throws_away_is_refused(self) -> None:
        def thrown_away(turns: Sequence[Row], tools: Any, asking: bool) -> str:
            return (
                of_parts(turns, tools, asking).replace("<think>hm</think>", "").replace("<think>\nxq1r\n</think>", "")
            )

        said = turn("assistant", [{"type": "text", "text": "<think>hm</think>a"}])

        with pytest.raises(rows.RowProblem, match="leaves out the reasoning of turn 2"):
            rows.render_answer(
                rows.Answer([turn("user", [{"type": "text", "text": "q"}])], said), Tokenizer(thrown_away)
            )

    def test_text_is_learned_whole_and_ends_once(self) -> None:
        (one,) = rows.render(rows.Text("abcde"), template(begins=True))
        pieces = list(rows.chunks(one, 3))

        assert [token for piece in pieces for token in piece.labels] == [2, *template()("abcde")["input_ids"], 1]
        assert [len(piece.tokens) for piece in pieces] == [3, 3, 1]


def test_every_code_has_a_row_that_causes_it() -> None:
    caused = {code for table in (WRONG, LEFT_OUT, SAID, RENDERED) for code, *_ in table}

    assert caused | BY_THE_SCRIPTS | {"row_column_missing"} == rows.SENTENCES.keys()


def arguments(path: Path, **more: Any) -> argparse.Namespace:
    given = {"max_samples": -1, "eval_fraction": 0.1, "eval_samples": 100, "seed": 42}
    return argparse.Namespace(dataset_path=str(path), **given | more)


def load(path: Path, kinds: frozenset[str] = TALK, **more: Any) -> rows.Parts:
    return rows.load(arguments(path, **more), rows.Wanted(kinds=kinds))


def write(path: Path, *given: Any) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in given))
    return path


def texts(part: Sequence[Any]) -> list[str]:
    return sorted(one.text for one in part)


class TestFiles:
    def test_bom_blank_lines_and_odd_line_ends_are_no_fault(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\r\n \n{"text": "c"}'.encode())

        assert texts(load(path, eval_fraction=0).train) == ["a\u2028b", "c"]

    def test_all_that_became_of_the_rows_is_told(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "rows.jsonl",
            {"prompt": "q", "completion": "a", "id": 1},
            *[{"prompt": "q", "completion": None, "id": 2}] * 7,
            {"prompt": "q", "completion": ""},
        )

        notes = load(path, eval_fraction=0).notes

        assert notes == [
            "rows.jsonl: rows are left out: there is no answer to learn (7 of 9 rows; lines 2, 3, 4, 5, 6, ...)",
            "rows.jsonl: column 'id' is not used (8 of 9 rows; lines 1, 2, 3, 4, 5, ...)",
            "rows.jsonl: the answer is empty: the model learns to say nothing (1 of 9 rows; line 9)",
        ]

    @pytest.mark.parametrize(
        ("given", "more", "sentence"),
        [
            ([{"text": "x"}, {"a": 1}, {"b": 1}], {}, "rows.jsonl, line 2: the columns to learn from are missing"),
            ([{"a": 1}] * 9, {}, "; 6 more rows are wrong"),
            ([{"text": None}], {}, "rows.jsonl has no rows to learn from: there is no text to learn"),
            ([], {}, "rows.jsonl has no rows to learn from"),
            ([{"text": "x"}], {"input_train_name": "text"}, "give both input_train_name and output_train_name"),
            ([{"text": "x"}], {"data_form": "poem"}, "data_form: there is no form poem that can be learned here"),
            ([{"text": "x"}], {"data_form": "anchor-positive"}, "data_form: there is no form anchor-positive"),
            ([{"prompt": "q", "completion": "a"}], {"data_form": "text"}, "no row has the column 'text'"),
        ],
    )
    def test_refusals(self, tmp_path: Path, given: list[Any], more: dict[str, Any], sentence: str) -> None:
        with pytest.raises(rows.Refused, match=re.escape(sentence)):
            load(write(tmp_path / "rows.jsonl", *given), **more)

    def test_form_is_chosen_where_rows_fit_several(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.jsonl", {"text": "t", "prompt": "q", "completion": "a"})

        assert texts(load(path, eval_fraction=0, data_form="text").train) == ["t"]

    def test_first_rows_are_taken_of_a_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.jsonl", *({"text": str(number)} for number in range(9)))

        assert texts(load(path, eval_fraction=0, max_samples=4).train) == ["0", "1", "2", "3"]


class TestHeldOut:
    def test_rows_beside_the_data_and_of_a_file_of_ones_own(self, tmp_path: Path) -> None:
        write(tmp_path / "train.jsonl", {"text": "learn"}, {"text": "both"})
        write(tmp_path / "heldout.jsonl", {"text": "score"}, {"text": "both"})
        own = tmp_path / "own"
        own.mkdir()
        write(own / "rows.jsonl", *({"text": str(number)} for number in range(5)))

        beside = load(tmp_path)
        other = load(tmp_path, validation_path=str(own), eval_samples=3)

        assert (texts(beside.train), texts(beside.held_out)) == (["both", "learn"], ["both", "score"])
        assert beside.notes == ["1 of the 2 rows of heldout.jsonl are in the training data as well"]
        assert texts(other.held_out) == ["0", "1", "2"]
        assert other.notes == ["3 of the 5 rows of rows.jsonl are used (eval_samples)"]

    def test_as_many_as_asked_and_all_others_are_learned(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.jsonl", *({"text": str(number)} for number in range(500)))

        parts = load(path, eval_fraction=0.5, eval_samples=20)

        assert len(parts.held_out) == 20
        assert texts([*parts.train, *parts.held_out]) == sorted(map(str, range(500)))

    def test_whole_conversations(self, tmp_path: Path) -> None:
        long = [
            {"messages": [turn(r, f"{i} {j} {r}") for j in range(5) for r in ("user", "assistant")]} for i in range(40)
        ]

        parts = load(write(tmp_path / "rows.jsonl", *long))

        shown = {one["content"] for row in parts.train for one in row.turns}
        assert len(parts.held_out) == 4
        assert not shown & {one["content"] for row in parts.held_out for one in row.turns}

    @given(
        st.lists(st.integers(0, 30), min_size=1, max_size=80),
        st.sampled_from([rows.CONVERSATION, rows.PAIR, rows.PREFERENCE]),
        st.floats(0, 0.99),
        st.integers(0, 40),
        st.integers(0, 5),
    )
    def test_every_row_is_on_one_side_and_no_prompt_on_both(
        self, prompts: list[int], kind: str, fraction: float, most: int, seed: int
    ) -> None:
        made: dict[str, Any] = {
            rows.CONVERSATION: lambda q, a: rows.Conversation([turn("user", q), turn("assistant", a)], frozenset({1})),
            rows.PAIR: lambda q, a: rows.Pair(q, a),
            rows.PREFERENCE: lambda q, a: rows.Preference(
                [turn("user", q)], turn("assistant", a), turn("assistant", "no")
            ),
        }
        given_rows = [made[kind](f"q{prompt}", f"a{number}") for number, prompt in enumerate(prompts)]

        train, held_out = rows.split(given_rows, fraction, most, seed)

        wanted = number_held_out(len(prompts), fraction, most)
        assert sorted(map(repr, [*train, *held_out])) == sorted(map(repr, given_rows))
        assert not {key for row in train for key in keys_of(row)} & {key for row in held_out for key in keys_of(row)}
        assert len(held_out) <= wanted
        if len(set(prompts)) == len(prompts):
            assert len(held_out) == wanted
        assert train
