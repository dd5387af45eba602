"""Conversations, however they are written: OpenAI's messages, ShareGPT's from and value, instructions, plain pairs."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from .pictures import MARK, name_of_part
from .problems import RowProblem, listed, shown

Say = Callable[..., None]
"""Counts something worth telling about the row."""


class Turns(NamedTuple):
    """A conversation, and what is known of it besides."""

    turns: list[dict[str, Any]]
    silent: set[int]
    """Places of turns with the weight 0."""
    absent: set[int]
    """Places of answers that are not there: null, or no content at all."""
    pictures: list[str]
    """Files that parts of the turns name, in their order."""


_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_SAME = {"from": "role", "value": "content", "reasoning": "reasoning_content", "thinking": "reasoning_content"}
_WEIGHTS = ("weight", "train", "loss")
_KEPT = ("name", "tool_call_id")
_PLAIN = ({"role", "content"}, {"from", "value"})


def read_turns(value: Any, pointer: str, say: Say) -> Turns:
    """Return the turns of a conversation. A picture among the parts of a turn becomes `MARK` in its text."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a table's cell holds the JSON of a list
        value = _parsed(value)
    if not isinstance(value, list):
        raise RowProblem("turns_not_list", pointer, found=shown(value))
    if not value:
        raise RowProblem("turns_empty", pointer)
    found: list[dict[str, Any]] = []
    silent: set[int] = set()
    absent: set[int] = set()
    pictures: list[str] = []
    for place, raw in enumerate(value):
        if type(raw) is dict and len(raw) == 2 and "role" in raw:  # most turns of most files
            content, role = raw.get("content"), raw["role"]
            if type(content) is str and role in ("user", "assistant"):
                found.append(raw)
                continue
        one = _read_turn(raw, f"{pointer}/{place}", say)
        if one.turn["role"] == "system" and place > 0:
            raise RowProblem("system_not_first", f"{pointer}/{place}", turn=place + 1)
        if one.silent:
            silent.add(place)
        if one.absent:
            absent.add(place)
        pictures += one.pictures
        found.append(one.turn)
    return Turns(found, silent, absent, pictures)


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def text_of(value: Any, pointer: str, say: Say, *, said: str) -> str:
    """Return a value as text: a text as it is, anything else as its JSON, which is told."""
    if isinstance(value, str):
        return value
    say(said)
    return json.dumps(value, ensure_ascii=False)


def read_tools(value: Any, pointer: str) -> list[Any] | None:
    """Return the functions that the model may call, as OpenAI writes them."""
    if isinstance(value, str):
        if not value.strip():
            return None
        value = _parsed(value)
    if value in (None, []):
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowProblem("tools_invalid", pointer, found=shown(value))
    return [_tool(one, f"{pointer}/{place}") for place, one in enumerate(value)]


def is_conversation(value: Any) -> bool:
    """Say whether a value is a list of turns, not a list that is an answer by itself."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    )


class _One(NamedTuple):
    turn: dict[str, Any]
    silent: bool
    absent: bool
    pictures: list[str]


def _read_turn(raw: Any, pointer: str, say: Say) -> _One:
    if not isinstance(raw, dict):
        raise RowProblem("turn_not_object", pointer, found=shown(raw))
    given: dict[str, Any] = {}
    for key, value in raw.items():
        if value is None:
            continue
        name = str(_SAME.get(key, key))
        if given.get(name, value) != value:
            raise RowProblem("turn_key_twice", pointer, first=name, second=key)
        given[name] = value
    spoken = given.pop("role", None)
    if not isinstance(spoken, str) or not spoken.strip():
        raise RowProblem("turn_role_missing", pointer)
    role = _ROLES.get(spoken.strip().lower())
    if role is None:
        raise RowProblem("turn_role_unknown", f"{pointer}/role", role=spoken, known=listed(sorted(_ROLES)))
    content = given.pop("content", None)
    calls = _calls(given, spoken, content, pointer)
    if calls and spoken.strip().lower() == "function_call":
        content = None
    silent = _weight(given, pointer) == 0
    text, pictures = _content(content, f"{pointer}/content", say)
    absent = text is None and not calls
    if absent and role != "assistant":
        raise RowProblem("turn_content_missing", pointer)
    turn: dict[str, Any] = {"role": role, "content": text or ""}
    if calls:
        turn["tool_calls"] = calls
    reasoning = given.pop("reasoning_content", None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise RowProblem("text_invalid", f"{pointer}/reasoning_content", found=shown(reasoning))
        if reasoning:
            turn["reasoning_content"] = reasoning
    turn |= {key: given.pop(key) for key in _KEPT if key in given}
    for key in given:
        say("key_unused", key=key)
    return _One(turn, silent, absent, pictures)


def _weight(given: dict[str, Any], pointer: str) -> int:
    found = {key: given.pop(key) for key in _WEIGHTS if key in given}
    for key, value in found.items():
        if value not in (0, 1):
            raise RowProblem("weight_invalid", f"{pointer}/{key}", found=shown(value))
    if len({int(value) for value in found.values()}) > 1:
        first, second, *_ = found
        raise RowProblem("turn_key_twice", pointer, first=first, second=second)
    return int(next(iter(found.values()), 1))


def _content(value: Any, pointer: str, say: Say) -> tuple[str | None, list[str]]:
    if value is None or isinstance(value, str):
        return value, []
    if isinstance(value, dict) and "type" not in value:  # the result of a tool, or an object as an answer
        return text_of(value, pointer, say, said="answer_not_text"), []
    if isinstance(value, (int, float)):
        return text_of(value, pointer, say, said="answer_not_text"), []
    parts = value if isinstance(value, list) else [value]
    texts, pictures = [], []
    for place, part in enumerate(parts):
        where = f"{pointer}/{place}"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url", "input_image"):
            texts.append(MARK)
            pictures += name_of_part(part, where)
        elif kind is None and isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise RowProblem("turn_part_invalid", where, found=shown(part))
    return "".join(texts), pictures


def _calls(given: dict[str, Any], spoken: str, content: Any, pointer: str) -> list[dict[str, Any]]:
    calls = given.pop("tool_calls", None)
    where = f"{pointer}/tool_calls"
    legacy = given.pop("function_call", None)  # OpenAI's older form
    if calls is None and legacy is not None:
        calls, where = [legacy], f"{pointer}/function_call"
    if calls is None and spoken.strip().lower() == "function_call":  # ShareGPT: the content is the call
        calls, where = _parsed(content) if isinstance(content, str) else content, f"{pointer}/value"
    if isinstance(calls, str):
        calls = _parsed(calls)
    if calls in (None, []):
        return []
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise RowProblem("tool_calls_invalid", where, found=shown(calls))
    return [_call(call, f"{where}/{place}") for place, call in enumerate(calls)]


def _call(call: Any, pointer: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("tool_calls_invalid", pointer, found=shown(call))
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):  # OpenAI writes their JSON; templates would write it as a text in a text
        arguments = _parsed(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowProblem("tool_arguments_invalid", f"{pointer}/function/arguments", found=shown(arguments))
    found: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        found["id"] = call["id"]
    return found


def _tool(one: Any, pointer: str) -> Any:
    function = one.get("function", one) if isinstance(one, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("tools_invalid", pointer, found=shown(one))
    return {"type": "function", "function": function}


def _parsed(text: str) -> Any:
    """Return what a text is the JSON of, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
