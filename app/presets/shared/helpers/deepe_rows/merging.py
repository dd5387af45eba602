"""Conversations for templates that know no system turn, or ask for roles that alternate."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .problems import RowProblem
from .values import Turn

Made = TypeVar("Made")
_MENDED = ("template_refused", "system_turn_lost")


def with_merged_turns(turns: Sequence[Turn], make: Callable[[Sequence[Turn]], Made]) -> tuple[Made, bool]:
    """Return what `make` makes of the turns, if it refuses them of the merged ones, and whether they were merged."""
    try:
        return make(turns), False
    except RowProblem as problem:
        merged = merge(turns)
        if problem.code not in _MENDED or merged == list(turns):
            raise
        try:
            return make(merged), True
        except RowProblem:
            raise problem from None  # merging was no help: what the turns as they are lack is said


def merge(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with the system's text at the beginning of the first question, and questions in a row as one."""
    found: list[Turn] = []
    before: Any = None
    for turn in turns:
        if turn["role"] == "system":
            before = turn["content"] if before is None else _joined(before, turn["content"])
        elif turn["role"] == "user" and before is not None:
            found.append({**turn, "content": _joined(before, turn["content"])})
            before = None
        elif turn["role"] == "user" and found and found[-1]["role"] == "user" and len(turn) == 2:
            found[-1] = {**found[-1], "content": _joined(found[-1]["content"], turn["content"])}
        else:
            found.append(turn)
    return found if before is None else list(turns)


def _joined(first: Any, second: Any) -> Any:
    """Join two contents, texts or lists of parts."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    parts = [[{"type": "text", "text": one}] if isinstance(one, str) else one for one in (first, second)]
    return [*parts[0], {"type": "text", "text": "\n\n"}, *parts[1]]
