"""How a row becomes an example of each kind; None if there is nothing to learn in it, which is counted."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from .columns import (
    Raw,
    is_turns,
    named_pictures,
    pictures_of,
    plain_text,
    tools_of,
    turns_before,
    turns_in,
    whole_conversation,
)
from .forms import CAPTION, CONVERSATION, GRADED, LABELLED, PAIR, PREFERENCE, QUESTION, TEXT, Form
from .pictures import COLUMNS as PICTURE_COLUMNS
from .problems import RowProblem, listed, shown
from .telling import Telling
from .turns import Turns, message, text_of
from .values import Caption, Conversation, Example, Graded, Labelled, Pair, Preference, Question, Text

_REFERENCES = ("reference", "solution", "ground_truth")


def conversation(form: Form, raw: Raw, telling: Telling) -> Conversation | None:
    found = whole_conversation(form, raw, telling)
    turns = found.turns
    learned = _learned(found, telling)
    pictures = pictures_of(raw, turns, found.pictures, telling)
    tools = tools_of(raw, turns, telling)
    more = telling.rest(form, raw)
    if not learned:
        spoken = {place for place, turn in enumerate(turns) if turn["role"] == "assistant"} - found.absent
        telling.leave_out("all_weights_zero" if spoken and spoken <= found.silent else "no_answer")
        return None
    last = max(learned)
    if last < len(turns) - 1:
        telling.say("turns_after_answer")
        turns = turns[: last + 1]
    return Conversation(turns, frozenset(learned), tools, pictures, telling.place, more)


def question(form: Form, raw: Raw, telling: Telling) -> Question | None:
    """Read a prompt; a last answer of the assistant, or a column, is the reference."""
    found = whole_conversation(form, raw, telling)
    turns = found.turns
    reference = None
    if turns[-1]["role"] == "assistant":
        reference = None if len(turns) - 1 in found.absent else turns[-1]["content"]
        turns = turns[:-1]
    for name in _REFERENCES:
        if reference is None and name in form.optional and raw.get(name) is not None:
            reference = text_of(raw[name], f"/{name}", telling.say, said="answer_not_text")
    if not any(turn["role"] == "user" for turn in turns):
        telling.leave_out("no_text")
        return None
    pictures_of(raw, turns, found.pictures, telling)
    tools = tools_of(raw, turns, telling)
    return Question(turns, reference, tools, telling.place, telling.rest(form, raw, tell=False))


def text(form: Form, raw: Raw, telling: Telling) -> Text | None:
    (column,) = form.columns
    if _is_blank(raw[column]):
        telling.leave_out("no_text")
        return None
    telling.rest(form, raw)
    return Text(text_of(raw[column], f"/{column}", telling.say, said="answer_not_text"), telling.place)


def preference(form: Form, raw: Raw, telling: Telling) -> Preference | None:
    if raw["chosen"] is None or raw["rejected"] is None:
        telling.leave_out("no_answer")
        return None
    before = turns_before(form, raw, telling).turns
    sides = []
    for column in ("chosen", "rejected"):
        if is_turns(raw[column]):
            read = turns_in(raw[column], column, telling)
            if read.absent:
                telling.leave_out("no_answer")
                return None
            sides.append(read.turns)
        else:
            answer = text_of(raw[column], f"/{column}", telling.say, said="answer_not_text")
            sides.append([message("assistant", answer)])
    chosen, rejected = (side[len(before) :] if side[: len(before)] == before else side for side in sides)
    while len(chosen) > 1 and len(rejected) > 1 and chosen[0] == rejected[0]:
        before, chosen, rejected = [*before, chosen[0]], chosen[1:], rejected[1:]
    if not before:
        raise RowProblem("pair_prompts_differ")
    for column, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) != 1 or side[0]["role"] != "assistant":
            raise RowProblem("answer_turns_several", f"/{column}", column=column, count=len(side))
        if _is_empty(side[0]):
            telling.say("answer_empty")
    if chosen == rejected:
        telling.say("pair_equal")
    pictures_of(raw, before, [], telling)
    tools = tools_of(raw, [*before, chosen[0], rejected[0]], telling)
    telling.rest(form, raw)
    return Preference(before, chosen[0], rejected[0], tools, telling.place)


def labelled(form: Form, raw: Raw, telling: Telling) -> Labelled | None:
    label = _label(raw["label"])
    found = whole_conversation(form, raw, telling)
    if found.turns[-1]["role"] != "assistant" or len(found.turns) - 1 in found.absent:
        telling.leave_out("no_answer")
        return None
    *prompt, answer = found.turns
    if not prompt:
        telling.leave_out("no_text")
        return None
    if _is_empty(answer):
        telling.say("answer_empty")
    pictures_of(raw, found.turns, found.pictures, telling)
    tools = tools_of(raw, found.turns, telling)
    telling.rest(form, raw)
    return Labelled(prompt, answer, label, tools, telling.place)


def pair(form: Form, raw: Raw, telling: Telling) -> Pair | None:
    if any(_is_blank(raw[column]) for column in form.columns):
        telling.leave_out("no_text")
        return None
    anchor, positive = (plain_text(raw[column], f"/{column}") for column in form.columns)
    numbered = [name for name in raw if name.startswith("negative_") and name[9:].isdigit()]
    negatives: list[str] = []
    for column in ("negative", "negatives", *numbered):
        value = raw.get(column)
        given = [(one, f"/{column}/{place}") for place, one in enumerate(value)] if isinstance(value, list) else []
        for one, pointer in given or [(value, f"/{column}")]:
            if one not in (None, "", []):
                negatives.append(plain_text(one, pointer))
    telling.rest(form, raw, also=("negative", "negatives", *numbered))
    return Pair(anchor, positive, tuple(negatives), telling.place)


def graded(form: Form, raw: Raw, telling: Telling) -> Graded | None:
    if _is_blank(raw["query"]) or _is_blank(raw["document"]):
        telling.leave_out("no_text")
        return None
    grade = _grade(raw["label"])
    telling.rest(form, raw)
    query, document = (plain_text(raw[column], f"/{column}") for column in ("query", "document"))
    return Graded(query, document, grade, telling.place)


def caption(form: Form, raw: Raw, telling: Telling) -> Caption | None:
    (column,) = form.columns
    if _is_blank(raw[column]):
        telling.leave_out("no_text")
        return None
    shows = plain_text(raw[column], f"/{column}").strip()
    pictures = named_pictures(raw, [], telling)
    if not pictures:
        raise RowProblem("picture_missing", columns=listed(PICTURE_COLUMNS))
    if len(pictures) > 1:
        raise RowProblem("caption_pictures_several", count=len(pictures))
    telling.rest(form, raw)
    return Caption(shows, pictures[0], telling.place)


READERS: Mapping[str, Callable[[Form, Raw, Telling], Example | None]] = {
    CONVERSATION: conversation,
    TEXT: text,
    PREFERENCE: preference,
    LABELLED: labelled,
    PAIR: pair,
    GRADED: graded,
    QUESTION: question,
    CAPTION: caption,
}


def _learned(found: Turns, telling: Telling) -> set[int]:
    """Return the places of the answers to learn, and tell about those that are empty or come first."""
    learned = set()
    passed = found.silent | found.absent
    for place, turn in enumerate(found.turns):
        if turn["role"] != "assistant" or place in passed:
            continue
        if place == 0:
            telling.say("answer_without_question")
            continue
        if _is_empty(turn):
            telling.say("answer_empty")
        learned.add(place)
    if learned and found.absent:
        telling.say("answer_absent")
    return learned


def _is_empty(turn: Mapping[str, Any]) -> bool:
    content = turn["content"]
    return (not content or content.isspace()) and "tool_calls" not in turn


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and (not value or value.isspace()))


def _label(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # from a table
        return value.strip().lower() == "true"
    if value is True or value is False or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise RowProblem("label_invalid", "/label", found=shown(value))


def _grade(value: Any) -> float:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # from a table
        return float(value.strip().lower() == "true")
    try:
        found = float(value) if isinstance(value, (str, int, float)) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or found < 0:
        raise RowProblem("grade_invalid", "/label", found=shown(value))
    return found
