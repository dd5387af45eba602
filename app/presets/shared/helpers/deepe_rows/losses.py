"""What a chat template leaves out of a conversation. Whatever it loses, the model would never see."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from .problems import RowProblem
from .values import Turn

THINK, THINK_END = "<think>", "</think>"
Shape = tuple[str, int, str, bool, tuple[str, ...]]
"""Of a turn: its role, the number of tool calls, where its reasoning is, if it has a name, the kinds of its parts."""
FIELD, CONTENT = "field", "content"
"""Where reasoning is: in `reasoning_content`, or in the content before `</think>`."""
PLAIN = "plain"
"""The kind of a content that is a text, not a list of parts: templates treat them differently."""


def check_kept(turns: Sequence[Turn], tools: Sequence[Any] | None, whole: str, writer: Any) -> Iterator[str]:
    """Yield the codes of what is left out by intent; raise `RowProblem` for anything else that is lost.

    `whole` is what the template of `writer` has made of the turns. Two things are looked at: what the template does
    to conversations of this shape, and whether the words of this one stand in `whole`.
    """
    last = len(turns) - 1
    for code, place in lost_of_shape(writer, tuple(map(_shape, turns)), bool(tools)):
        if code == "names_left_out" or (code == "reasoning_lost" and place < last):
            yield code if code == "names_left_out" else "earlier_reasoning_left_out"
        else:
            raise RowProblem(code, "/tools" if code == "tools_lost" else "", turn=place + 1)
    for tool in tools or ():
        if tool["function"]["name"] not in whole:
            raise RowProblem("tools_lost", "/tools")
    for place, turn in enumerate(turns):
        thought, *said = _parted(turn["content"])
        if not all(text.strip() in whole for text in said):
            raise RowProblem(f"{turn['role']}_turn_lost", turn=place + 1)
        for name, arguments in _calls(turn):
            if name not in whole or not all(value in whole for value in _scalars(arguments)):
                raise RowProblem("tool_calls_lost", turn=place + 1)
        for thinking in (turn.get("reasoning_content", ""), thought):
            if thinking.strip() not in whole:
                if place == last:
                    raise RowProblem("reasoning_lost", turn=place + 1)
                yield "earlier_reasoning_left_out"


@lru_cache(maxsize=1000)
def lost_of_shape(writer: Any, shapes: tuple[Shape, ...], tools: bool) -> tuple[tuple[str, int], ...]:
    """Return what the template leaves out of every conversation of this shape, as codes and places of turns.

    Words that stand nowhere else take the place of the contents: a short text that is lost could stand in the
    conversation by chance.
    """
    turns = [_probe(place, shape) for place, shape in enumerate(shapes)]
    tool = {"type": "function", "function": {"name": "xqt", "description": "xqd", "parameters": {"type": "object"}}}
    try:
        whole = str(
            writer.apply_chat_template(
                turns,
                tools=[tool] if tools else None,
                tokenize=False,
                add_generation_prompt=shapes[-1][0] != "assistant",
            )
        )
    except Exception:  # it asks for what these words are not; what it does to the real ones is seen there
        return ()
    found = [("tools_lost", 0)] if tools and "xqt" not in whole else []
    for place, (role, calls, reasons, named, contents) in enumerate(shapes):
        if any(f"xq{place}c{number}" not in whole for number, kind in enumerate(contents) if kind != "image"):
            found.append((f"{role}_turn_lost", place))
        if any(f"xq{place}{part}{call}" not in whole for call in range(calls) for part in "fkv"):
            found.append(("tool_calls_lost", place))
        if reasons and f"xq{place}r" not in whole:
            found.append(("reasoning_lost", place))
        if named and f"xq{place}n" not in whole:
            found.append(("names_left_out", place))
    return tuple(found)


def thoughts_in(text: str) -> int:
    return text.count(THINK_END)


def thoughts_of(turn: Turn) -> int:
    """Return how many blocks of reasoning a turn was given with."""
    return 1 if turn.get("reasoning_content") else sum(map(thoughts_in, _texts(turn["content"])))


def _shape(turn: Turn) -> Shape:
    content = turn["content"]
    kinds = (PLAIN,) if isinstance(content, str) else tuple(part["type"] for part in content)
    thinks = turn["role"] == "assistant" and len(_texts(content)) == 1 and THINK_END in _texts(content)[0]
    return (
        turn["role"],
        len(turn.get("tool_calls", ())),
        FIELD if turn.get("reasoning_content") else CONTENT if thinks else "",
        isinstance(turn.get("name"), str),
        kinds if content else (),
    )


def _probe(place: int, shape: Shape) -> dict[str, Any]:
    role, calls, reasons, named, contents = shape
    parts = [
        {"type": kind} | ({"text": f"xq{place}c{number}"} if kind != "image" else {})
        for number, kind in enumerate(contents)
    ]
    if reasons == CONTENT:
        parts[0]["text"] = f"{THINK}\nxq{place}r\n{THINK_END}\n\n{parts[0]['text']}"
    plain = contents in ((), (PLAIN,))
    turn: dict[str, Any] = {"role": role, "content": "".join(part["text"] for part in parts) if plain else parts}
    if calls:
        turn["tool_calls"] = [
            {
                "type": "function",
                "id": f"xq{place:03}{call:04}",  # nine characters: some templates ask for that
                "function": {"name": f"xq{place}f{call}", "arguments": {f"xq{place}k{call}": f"xq{place}v{call}"}},
            }
            for call in range(calls)
        ]
    if role == "tool":
        turn["tool_call_id"] = f"xq{place:03}0000"
    if reasons == FIELD:
        turn["reasoning_content"] = f"xq{place}r"
    if named:
        turn["name"] = f"xq{place}n"
    return turn


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content]


def _parted(content: Any) -> tuple[str, ...]:
    """Return the reasoning inside a content, and what is said after it; of several texts each by itself."""
    texts = _texts(content)
    if len(texts) != 1:
        return ("", *texts)
    thought, end, said = texts[0].partition(THINK_END)
    return (thought.replace(THINK, "", 1), said) if end else ("", texts[0])


def _calls(turn: Turn) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for call in turn.get("tool_calls", ()):
        yield call["function"]["name"], call["function"]["arguments"]


def _scalars(value: Any) -> Iterator[str]:
    """Yield every name and value of the arguments as a template may write it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield json.dumps(name, ensure_ascii=False)[1:-1]
            yield from _scalars(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _scalars(inner)
    elif isinstance(value, str):
        yield json.dumps(value, ensure_ascii=False)[1:-1]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)
