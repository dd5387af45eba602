"""What the reader says that is learned is what the trainers hold, token by token; nothing of a row is lost unsaid."""

import json
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from app.presets import catalogue
from tests.presets import families
from tests.presets.conftest import NewHome

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("labels")]

Row = dict[str, Any]
SAID_LOSSES = {
    "answer_without_question",
    "column_unused",
    "earlier_reasoning_left_out",
    "key_unused",
    "names_left_out",
    "turns_after_answer",
}
"""What is told when something of a row is neither given nor learned."""


class Words:
    """Words of which each stands in one place only, so that it shows when it is lost."""

    def __init__(self) -> None:
        self._count = 0

    def new(self) -> str:
        self._count += 1
        return f"w{self._count:04}q"


def turn(role: str, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def conversations(words: Words) -> Iterator[Row]:
    """Yield a row of every form and with every part, and some by chance."""
    w = words.new
    yield {"messages": [turn("user", w()), turn("assistant", w())]}
    yield {"messages": [turn("system", w()), turn("user", w()), turn("assistant", w())]}
    yield {"messages": [turn("user", w()), turn("assistant", w()), turn("user", w()), turn("assistant", w())]}
    yield {"messages": [turn("user", w()), turn("user", w()), turn("assistant", w())]}
    yield {"messages": [turn("user", w()), turn("assistant", w(), weight=0), turn("user", w()), turn("assistant", w())]}
    yield {"messages": [turn("user", [{"type": "text", "text": w()}]), turn("assistant", f" {w()}\n")]}
    yield {"messages": [turn("user", w(), name=w()), turn("assistant", w())]}
    yield {"messages": [turn("user", w()), turn("assistant", w()), turn("user", w())]}
    yield {"messages": [turn("assistant", w()), turn("user", w()), turn("assistant", w())]}
    yield {"messages": [turn("user", w()), turn("assistant", w(), reasoning_content=w())]}
    yield {"messages": [turn("user", w()), turn("assistant", f"<think>\n{w()}\n</think>\n\n{w()}")]}
    yield {
        "messages": [
            turn("user", w()),
            turn("assistant", f"<think>{w()}</think>{w()}"),
            turn("user", w()),
            turn("assistant", w()),
        ]
    }
    call = {"id": "call00001", "type": "function", "function": {"name": w(), "arguments": {w(): w(), "n": 17}}}
    yield {
        "tools": [
            {"type": "function", "function": {"name": w(), "description": w(), "parameters": {"type": "object"}}}
        ],
        "messages": [
            turn("user", w()),
            turn("assistant", None, tool_calls=[call]),
            turn("tool", w(), tool_call_id="call00001"),
            turn("assistant", w()),
        ],
    }
    yield {"conversations": [{"from": "human", "value": w()}, {"from": "gpt", "value": w()}], "system": w()}
    yield {
        "conversations": [
            {"from": "human", "value": w()},
            {"from": "function_call", "value": json.dumps({"name": w(), "arguments": {w(): w()}})},
            {"from": "observation", "value": w()},
            {"from": "gpt", "value": w()},
        ]
    }
    yield {"instruction": w(), "input": w(), "output": w(), "system": w(), "history": [[w(), w()]]}
    yield {"prompt": w(), "completion": w()}
    yield {"prompt": [turn("user", w())], "completion": [turn("assistant", w())]}
    yield {"prompt": w(), "completion": {w(): w(), "n": None, "ok": True}}
    yield {"prompt": w(), "completion": ""}
    yield {"question": w(), "answer": w(), "source": w()}
    yield {"text": f"{w()} {w()}"}
    draw = random.Random(7)
    for _ in range(12):
        turns = [turn("system", w())] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 4)):
            asked = turn("user", " ".join(w() for _ in range(draw.randint(1, 3))))
            said = turn("assistant", w() + draw.choice(["", "\n", " é 中 🙂", "</s>", "\n\n- a\n- b"]))
            if draw.random() < 0.2:
                said["train"] = draw.random() < 0.5
            turns += [asked, said]
        yield {"messages": turns}


def preferences(words: Words) -> Iterator[Row]:
    w = words.new
    yield {"prompt": w(), "chosen": w(), "rejected": w()}
    yield {"prompt": [turn("system", w()), turn("user", w())], "chosen": w(), "rejected": w()}
    before = [turn("user", w()), turn("assistant", w()), turn("user", w())]
    yield {"chosen": [*before, turn("assistant", w())], "rejected": [*before, turn("assistant", w())]}
    yield {
        "conversations": [{"from": "human", "value": w()}],
        "chosen": {"from": "gpt", "value": w()},
        "rejected": {"from": "gpt", "value": w()},
    }
    yield {"instruction": w(), "input": w(), "chosen": w(), "rejected": w()}
    yield {"prompt": w(), "completion": w(), "label": False}
    yield {"messages": [turn("user", w()), turn("assistant", w())], "label": True}


def words_in(value: Any) -> Iterator[str]:
    text = json.dumps(value, ensure_ascii=False)
    yield from {
        text[place : place + 6]
        for place in range(len(text))
        if text[place] == "w" and text[place + 5 : place + 6] == "q"
    }


ADD = {"name": "add", "arguments": {"a": 1}}
THINK = "<think>\n\n</think>\n\n"
LEFT_OUT = "rows.jsonl: rows are left out: there is no answer to learn (1 of 2 rows; line 2)"
LONG = "w " * 200
CASES: dict[str, tuple[Row, list[str] | None, list[str]]] = {
    "tool calls, content null": (
        {"messages": [turn("user", "q"), turn("assistant", None, tool_calls=[{"function": ADD}]), turn("tool", "3")]},
        ['<think>\n\n</think>\n\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'],
        ["turns after the last answer"],
    ),
    "ShareGPT with system": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        [f"{THINK}a<|im_end|>\n"],
        [],
    ),
    "Alpaca with history and system": (
        {"instruction": "q", "input": "", "output": "a", "history": [["Hi", "Ho"]], "system": "s"},
        [f"{THINK}Ho<|im_end|>\n", f"{THINK}a<|im_end|>\n"],
        [],
    ),
    "null as answer": ({"instruction": "q", "input": "", "output": None}, [], [LEFT_OUT]),
    "empty answer": ({"prompt": "q", "completion": ""}, [f"{THINK}<|im_end|>\n"], ["the answer is empty"]),
    "object as answer": (
        {"prompt": "q", "completion": {"ok": True, "n": None}},
        [f'{THINK}{{"ok": true, "n": null}}<|im_end|>\n'],
        ["the answer is no text: its JSON is learned"],
    ),
    "answer beyond the limit": ({"prompt": "q", "completion": LONG}, [], ["the row is longer than allowed"]),
    "text beyond the limit": (
        {"text": LONG.strip()},
        None,
        ["the text is longer than allowed and is learned in several"],
    ),
    "several turns": (
        {"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]},
        [f"{THINK}a<|im_end|>\n", f"{THINK}b<|im_end|>\n"],
        [],
    ),
    "reasoning in the answer": (
        {"messages": [turn("user", "q"), turn("assistant", "<think>\nhm\n</think>\n\na")]},
        ["<think>\nhm\n</think>\n\na<|im_end|>\n"],
        [],
    ),
    "template that adds a block of reasoning": (
        {"prompt": "q", "completion": "a"},
        [f"{THINK}a<|im_end|>\n"],
        ["the chat template adds an empty block of reasoning"],
    ),
    "earlier reasoning": (
        {
            "messages": [
                turn("user", "q"),
                turn("assistant", "a", reasoning_content="hm", weight=0),
                turn("user", "r"),
                turn("assistant", "b"),
            ]
        },
        [f"{THINK}b<|im_end|>\n"],
        ["the chat template leaves out the reasoning of earlier answers"],
    ),
    "weight 0": (
        {"messages": [turn("user", "q"), turn("assistant", "a", weight=0), turn("user", "r"), turn("assistant", "b")]},
        [f"{THINK}b<|im_end|>\n"],
        [],
    ),
    "roles that nobody knows": ({"messages": [turn("narrator", "q"), turn("assistant", "a")]}, None, []),
}
"""Rows that go wrong elsewhere: what is learned of each, and what the user is told besides."""


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    words = Words()
    return {
        "conversations": list(conversations(words)),
        "preferences": list(preferences(words)),
        "cases": {name: row for name, (row, _, _) in CASES.items()},
    }


@pytest.fixture(scope="module")
def found(new_home: NewHome, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Return what becomes of the rows in every family; one process asks them all."""
    home = new_home("labels")
    shutil.copy(families.__file__, home.scripts / "families.py")
    (home.path / "given.json").write_text(json.dumps(rows))

    run = home.run("families.py", str(catalogue.ROOM), str(home.path / "given.json"), str(home.path / "bases"))

    assert run.code == 0, run.stderr
    answers: dict[str, Any] = run.json_lines[-1]
    return answers


FAMILIES = pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIANTS])


@FAMILIES
@pytest.mark.parametrize("method", ["sft", "peft", "custom02"])
def test_answers_are_learned_as_the_reader_says(
    found: dict[str, Any], rows: dict[str, Any], family: str, method: str
) -> None:
    told = [
        one
        for row, made in zip(rows["conversations"], found[family]["conversations"], strict=True)
        if method != "custom02" or "text" not in row
        for one in made.get("sequences", ())
    ]

    assert len(told) > 20
    assert by_tokens(found[family][method]) == by_tokens(told)


@FAMILIES
def test_sft_works_out_the_probabilities_of_what_is_learned_only(found: dict[str, Any], family: str) -> None:
    for one in found[family]["sft"]:
        ours, of_the_model = one["losses"]
        assert ours == pytest.approx(of_the_model, rel=1e-4)
        assert one["scored"] == sum(label != -100 for label in one["labels"][1:])
    assert found[family]["sft"][0]["gradients apart"] < 1e-3


@FAMILIES
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_are_held_as_the_reader_says(
    found: dict[str, Any], rows: dict[str, Any], family: str, objective: str
) -> None:
    told = []
    for row, one in zip(rows["preferences"], found[family]["preferences"], strict=True):
        sides = [(given_of(side), learned_of(side)) for side in one.get("sequences", ())]
        if objective == "kto":
            labels = [row["label"]] if "label" in row else [True, False]
            told += [(prompt, answer, label) for (prompt, answer), label in zip(sides, labels, strict=False)]
        elif len(sides) == 2:
            told.append((sides[0][0], sides[0][1], sides[1][1]))

    held = [
        (one["prompt_ids"], one["completion_ids"], one["label"])
        if objective == "kto"
        else (one["prompt_ids"], one["chosen_ids"], one["rejected_ids"])
        for one in found[family][objective]
    ]

    assert len(held) >= 3
    assert sorted(held) == sorted(told)


@FAMILIES
def test_orpo_learns_one_end(found: dict[str, Any], family: str) -> None:
    told = [row["sequences"] for row in found[family]["preferences"] if len(row.get("sequences", ())) == 2]
    held = found[family]["orpo"]

    assert by_tokens([row["chosen"] for row in held]) == by_tokens([better for better, _ in told])
    assert by_tokens([row["rejected"] for row in held]) == by_tokens([worse for _, worse in told])
    ends = {learned_of(row[side]).count(found[family]["end"]) for row in held for side in ("chosen", "rejected")}
    assert ends == {1}


@FAMILIES
def test_rewards_compare_what_the_reader_says(found: dict[str, Any], family: str) -> None:
    told = [row["sequences"] for row in found[family]["preferences"] if len(row.get("sequences", ())) == 2]

    assert len(told) >= 3
    assert sorted(found[family]["reward"]) == sorted([side["tokens"] for side in both] for both in told)


@FAMILIES
def test_questions_are_asked_as_they_were_given(found: dict[str, Any], family: str) -> None:
    asked = [
        (one["asked"], given_of(one))
        for row in found[family]["conversations"]
        if "prompt_not_prefix" not in row.get("told", ())
        for one in row.get("sequences", ())
        if one["asked"] is not None
    ]

    assert len(asked) > 20 or family == "r1"  # its questions open a block of reasoning, which is told
    assert all(question == given for question, given in asked)
    assert found[family]["saved"]["same"]
    assert found[family]["saved"]["end"] == found[family]["end"]


@FAMILIES
def test_rewarded_answers_are_asked_with_the_instruction_and_end(found: dict[str, Any], family: str) -> None:
    held = found[family]["grpo"]

    assert held["asked"] == held["shown"]
    assert found[family]["end"] in as_list(held["ends"])
    assert found[family]["ppo"]["answer_length"] > 0
    assert sorted(found[family]["ppo"]["asked"]) == sorted(found[family]["ppo"]["shown"])


def test_turns_end_otherwise_than_documents(found: dict[str, Any]) -> None:
    (text,) = [
        row["sequences"][0]["learned"]
        for row in found["chatml with another eos"]["conversations"]
        if row.get("sequences") and row["sequences"][0]["asked"] is None and row["sequences"][0]["given"] == ""
    ]
    assert text.endswith("<|endoftext|>")
    for name, ends in {
        "chatml with another eos": ("<|im_end|>", "<|endoftext|>"),
        "gemma": ("<end_of_turn>", "<eos>"),
        "llama 3": ("<|eot_id|>", "<|eot_id|>"),
        "another template": ("<|eot_id|>", "<|end_of_text|>"),
    }.items():
        known = families.FAMILIES[families.VARIANTS.get(name, (name,))[0]][0]
        assert found[name]["end"] == known.index(ends[0])
        assert as_list(found[name]["grpo"]["ends"])[0] == known.index(ends[0])
        assert found[name]["document end"] == known.index(ends[1])


def test_contents_only_are_a_prompt_and_its_completion(found: dict[str, Any], rows: dict[str, Any]) -> None:
    shown = {
        (one["given"], one["learned"])
        for row in found["contents only"]["conversations"]
        for one in row.get("sequences", ())
    }

    (row,) = [row for row in rows["conversations"] if row.keys() == {"prompt", "completion"} and row_is_text(row)]
    assert (f"<|begin_of_text|>{row['prompt']}", f"{row['completion']}<|end_of_text|>") in shown


def test_block_of_reasoning_is_given_where_thinking_is_off(found: dict[str, Any]) -> None:
    off = [row for row in found["qwen 3 without thinking"]["conversations"] if "sequences" in row]
    last = [row["sequences"][-1] for row in off if row["sequences"][-1]["asked"] is not None]

    assert len(last) > 20
    assert all(one["given"].endswith("<think>\n\n</think>\n\n") for one in last)
    assert not any("think>" in one["learned"] for one in last)
    assert found["qwen 3 without thinking"]["saved"]["asked"].endswith("<think>\n\n</think>\n\n")


@FAMILIES
@pytest.mark.parametrize("kind", ["conversations", "preferences"])
def test_nothing_given_is_lost_unsaid(found: dict[str, Any], rows: dict[str, Any], family: str, kind: str) -> None:
    for row, one in zip(rows[kind], found[family][kind], strict=True):
        if "problem" in one or "left_out" in one:
            continue
        shown = "".join(side["given"] + side["learned"] for side in one["sequences"])
        lost = [word for word in words_in(row) if word not in shown]
        assert not lost or SAID_LOSSES & set(one["told"]), (row, one["told"], lost)


@FAMILIES
def test_answers_are_learned_and_questions_are_not(found: dict[str, Any], rows: dict[str, Any], family: str) -> None:
    for row, one in zip(rows["conversations"], found[family]["conversations"], strict=True):
        if "messages" not in row or "sequences" not in one:
            continue
        learned = "".join(side["learned"] for side in one["sequences"])
        silent = [
            word
            for place, said in enumerate(row["messages"])
            if said["role"] != "assistant" or said.get("weight", said.get("train", 1)) in (0, False) or place == 0
            for word in words_in(said)
        ]
        assert not [word for word in silent if word in learned]
        spoken = [
            word
            for place, said in enumerate(row["messages"])
            if said["role"] == "assistant" and said.get("weight", said.get("train", 1)) not in (0, False) and place > 0
            for word in words_in([said.get("content"), said.get("reasoning_content")])
        ]
        assert all(word in learned for word in spoken), (row, learned)


def test_what_families_cannot_be_told_is_refused(found: dict[str, Any]) -> None:
    problems = {
        name: {row["problem"] for row in found[name]["conversations"] if "problem" in row}
        for name in [*families.FAMILIES, *families.VARIANTS]
    }

    without_tools = {"tool_calls_lost", "tools_lost"}
    assert problems == {
        "chatml with another eos": without_tools,
        "llama 3": without_tools,
        "gemma": without_tools | {"template_refused"},  # begins with an answer
        "mistral": without_tools | {"template_refused"},
        "qwen 3": set(),
        "r1": without_tools,
        "none": without_tools,
        "qwen 3 without thinking": {"reasoning_not_asked"},
        "contents only": without_tools,
        "another template": without_tools,
    }


@pytest.mark.parametrize("case", list(CASES))
def test_rows_that_go_wrong_elsewhere(found: dict[str, Any], case: str) -> None:
    _, learned, sentences = CASES[case]
    job = found["cases"][case]

    if case == "roles that nobody knows":
        assert job["refused"].startswith("rows.jsonl, line 2: /messages/0/role: 'narrator' is no known role")
    elif case == "text beyond the limit":
        assert "".join(job["learned"]) == f"{LONG.strip()}<|im_end|>"
        assert len(job["learned"]) > 1
    else:
        assert sorted(job["learned"]) == sorted(learned or [])
    for sentence in sentences:
        assert any(sentence in told for told in job["told"]), job["told"]


def as_list(ends: int | list[int]) -> list[int]:
    return ends if isinstance(ends, list) else [ends]


def row_is_text(row: Row) -> bool:
    return isinstance(row["prompt"], str) and isinstance(row["completion"], str) and bool(row["completion"])


def by_tokens(sequences: list[Any]) -> list[tuple[list[int], list[int]]]:
    return sorted((one["tokens"], one["labels"]) for one in sequences)


def given_of(one: Any) -> list[int]:
    return [token for token, label in zip(one["tokens"], one["labels"], strict=True) if label == -100]


def learned_of(one: Any) -> list[int]:
    return [label for label in one["labels"] if label != -100]
