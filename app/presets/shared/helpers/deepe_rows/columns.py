"""The parts of a row out of its columns: turns, tools, pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from .forms import Form
from .pictures import check_places, names_in
from .problems import RowProblem, shown
from .telling import Telling
from .turns import Turns, is_conversation, message, read_tools, read_turns, text_of

Raw = Mapping[str, Any]
_CONVERSATIONS = ("messages", "conversations")


def whole_conversation(form: Form, raw: Raw, telling: Telling) -> Turns:
    """Return the turns of a row, its answer last."""
    before = turns_before(form, raw, telling)
    column = form.columns[1] if len(form.columns) > 1 else None
    if column is None or form.columns[0] in _CONVERSATIONS:
        return before
    start = len(before.turns)
    if is_turns(raw[column]):
        more = turns_in(raw[column], column, telling)
    elif raw[column] is None:
        more = Turns([message("assistant", "")], set(), {0}, [])
    else:
        text = text_of(raw[column], f"/{column}", telling.say, said="answer_not_text")
        more = Turns([message("assistant", text)], set(), set(), [])
    return Turns(
        [*before.turns, *more.turns],
        before.silent | {start + place for place in more.silent},
        before.absent | {start + place for place in more.absent},
        [*before.pictures, *more.pictures],
    )


def turns_before(form: Form, raw: Raw, telling: Telling) -> Turns:
    """Return the turns before the answer: a conversation, or system, history and the question with its input."""
    first = form.columns[0]
    if first == "chosen":
        return Turns([], set(), set(), [])
    if first in _CONVERSATIONS:
        return _after_system(form, raw, turns_in(raw[first], first, telling))
    if is_conversation(raw[first]):  # its answers were given: only what follows is learned
        found = _after_system(form, raw, turns_in(raw[first], first, telling))
        spoken = {place for place, turn in enumerate(found.turns) if turn["role"] == "assistant"}
        return found._replace(silent=spoken)
    turns = _history(raw["history"], telling) if "history" in form.optional and raw.get("history") else []
    question = "" if raw[first] is None else text_of(raw[first], f"/{first}", telling.say, said="input_not_text")
    for name in ("input", "context"):
        more = raw.get(name) if name in form.optional else None
        if more not in (None, ""):
            more = text_of(more, f"/{name}", telling.say, said="input_not_text")
            question = f"{question}\n\n{more}" if question else more
    if not question.strip():
        telling.say("input_empty")
    return _after_system(form, raw, Turns([*turns, message("user", question)], set(), set(), []))


def turns_in(value: Any, column: str, telling: Telling) -> Turns:
    """Return the turns of a column that holds a conversation, or a single turn."""
    found = read_turns([value] if isinstance(value, dict) else value, f"/{column}", telling.say)
    if found.silent:
        telling.feature("weights")
    return found


def is_turns(value: Any) -> bool:
    """Say whether a value is a turn or a list of turns: an answer may be written so as well."""
    return is_conversation([value]) or is_conversation(value)


def tools_of(raw: Raw, turns: Sequence[Mapping[str, Any]], telling: Telling) -> list[Any] | None:
    """Return the functions that the model may call; count what the turns hold besides text."""
    tools = read_tools(raw["tools"], "/tools") if raw.get("tools") is not None else None
    calls = False
    for turn in turns:
        if len(turn) > 2:
            calls = calls or "tool_calls" in turn or turn["role"] == "tool"
            if "reasoning_content" in turn:
                telling.feature("reasoning")
    if turns[0]["role"] == "system":
        telling.feature("system")
    if tools or calls:
        telling.feature("tools")
        if not telling.wanted.tools:
            raise RowProblem("tools_not_learned")
    return tools


def pictures_of(raw: Raw, turns: Sequence[Mapping[str, Any]], named: list[str], telling: Telling) -> list[str]:
    """Return the pictures of a row, each of which has its place in the turns."""
    pictures = named_pictures(raw, named, telling)
    if pictures and not telling.wanted.pictures:
        raise RowProblem("pictures_not_learned")
    if pictures or telling.wanted.pictures:
        check_places(turns, pictures)
    return pictures


def named_pictures(raw: Raw, named: list[str], telling: Telling) -> list[str]:
    """Return the pictures that a row names: in its column, or in its turns (`named`)."""
    if not named and raw.keys().isdisjoint(telling.picture_columns):
        return []
    column = next((name for name in telling.picture_columns if raw.get(name) not in (None, "", [])), None)
    found = names_in(raw[column], f"/{column}") if column is not None else named
    if column is not None and named and found != named:
        raise RowProblem("pictures_named_twice", f"/{column}", column=column)
    if found:
        telling.feature("pictures")
    return found


def plain_text(value: Any, pointer: str) -> str:
    if not isinstance(value, str):
        raise RowProblem("text_invalid", pointer, found=shown(value))
    return value


def _after_system(form: Form, raw: Raw, found: Turns) -> Turns:
    """Put the text of a system column before the conversation."""
    system = raw.get("system") if "system" in form.optional else None
    if not system:
        return found
    text = plain_text(system, "/system")
    if found.turns[0]["role"] == "system":
        if found.turns[0]["content"] != text:
            raise RowProblem("system_twice", "/system")
        return found
    silent, absent = ({place + 1 for place in places} for places in (found.silent, found.absent))
    return Turns([message("system", text), *found.turns], silent, absent, found.pictures)


def _history(value: Any, telling: Telling) -> list[dict[str, Any]]:
    if is_conversation(value):
        return turns_in(value, "history", telling).turns
    if not isinstance(value, list):
        raise RowProblem("history_invalid", "/history", found=shown(value))
    turns = []
    for place, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise RowProblem("history_invalid", f"/history/{place}", found=shown(pair))
        turns += [message("user", pair[0]), message("assistant", pair[1])]
    return turns
