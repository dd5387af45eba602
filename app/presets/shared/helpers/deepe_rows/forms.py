"""The forms in which people write rows: which columns make one, and which kinds of example it can be read as."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .problems import RowProblem, listed

CONVERSATION, TEXT, PREFERENCE, LABELLED, PAIR, GRADED, QUESTION, CAPTION = (
    "conversation",
    "text",
    "preference",
    "labelled",
    "pair",
    "graded",
    "question",
    "caption",
)
KINDS = (CONVERSATION, TEXT, PREFERENCE, LABELLED, PAIR, GRADED, QUESTION, CAPTION)
"""What a row can become, and what a method says that it learns from."""


@dataclass(frozen=True, slots=True)
class Form:
    """A way to write a row. A row has the form if it has all `columns`; the `optional` ones belong to it as well."""

    name: str
    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    optional: tuple[str, ...] = ()


_SPOKEN = (CONVERSATION, QUESTION)
_ABOUT = ("system", "tools")
FORMS = (
    Form("messages", ("messages",), _SPOKEN, _ABOUT),
    Form("conversations", ("conversations",), _SPOKEN, _ABOUT),
    Form("prompt-completion", ("prompt", "completion"), _SPOKEN, _ABOUT),
    Form("prompt-answer", ("prompt", "answer"), _SPOKEN, _ABOUT),
    Form("prompt-response", ("prompt", "response"), _SPOKEN, _ABOUT),
    Form("instruction-output", ("instruction", "output"), _SPOKEN, ("input", "history", *_ABOUT)),
    Form("instruction-response", ("instruction", "response"), _SPOKEN, ("input", "context", "history", *_ABOUT)),
    Form("question-answer", ("question", "answer"), (*_SPOKEN, PAIR), ("history", "context", *_ABOUT)),
    Form("prompt", ("prompt",), (QUESTION, CAPTION), ("reference", "solution", "ground_truth", *_ABOUT)),
    Form("question", ("question",), (QUESTION,), ("reference", "solution", "ground_truth", *_ABOUT)),
    Form("text", ("text",), (TEXT, CAPTION)),
    Form("caption", ("caption",), (CAPTION,)),
    Form("prompt-chosen-rejected", ("prompt", "chosen", "rejected"), (PREFERENCE,), _ABOUT),
    Form("question-chosen-rejected", ("question", "chosen", "rejected"), (PREFERENCE,), _ABOUT),
    Form("instruction-chosen-rejected", ("instruction", "chosen", "rejected"), (PREFERENCE,), ("input", *_ABOUT)),
    Form("conversations-chosen-rejected", ("conversations", "chosen", "rejected"), (PREFERENCE,), _ABOUT),
    Form("messages-chosen-rejected", ("messages", "chosen", "rejected"), (PREFERENCE,), _ABOUT),
    Form("chosen-rejected", ("chosen", "rejected"), (PREFERENCE,), _ABOUT),
    Form("prompt-completion-label", ("prompt", "completion", "label"), (LABELLED,), _ABOUT),
    Form("messages-label", ("messages", "label"), (LABELLED,), _ABOUT),
    Form("anchor-positive", ("anchor", "positive"), (PAIR,), ("negative", "negatives")),
    Form("query-document", ("query", "document"), (PAIR,), ("negative", "negatives")),
    Form("query-positive", ("query", "positive"), (PAIR,), ("negative", "negatives")),
    Form("query-document-label", ("query", "document", "label"), (GRADED,)),
)
NAMES = tuple(form.name for form in FORMS)
NAMED = "named columns"
NAMEABLE = (CONVERSATION, QUESTION, PAIR)
"""Kinds that have an input and an output, so that their columns can be named."""


def named_form(columns: tuple[str, ...], kinds: Collection[str]) -> Form:
    """Return the form of rows whose columns the user has named; a known one with these columns knows more of them."""
    for form in FORMS:
        if form.columns == columns and any(kind in kinds for kind in form.kinds):
            return form
    if len(columns) == 1:
        return Form(NAMED, columns, (CAPTION,))
    more = ("negative", "negatives") if PAIR in kinds else ("history", *_ABOUT)
    return Form(NAMED, columns, NAMEABLE, more)


def form_called(name: str) -> Form | None:
    return next((form for form in FORMS if form.name == name), None)


def find_form(raw: Mapping[str, Any], kinds: Collection[str]) -> Form:
    """Return the form that a row has. A null counts as an absent column, unless only with it the row has a form.

    Raises `RowProblem` when the row has none, one that is not learned, or several.
    """
    given = {name for name, value in raw.items() if value is not None}
    fitting: list[Form] = []
    learned: list[Form] = []
    for names in (given, raw.keys()):
        fitting = _most_specific(names) or fitting
        learned = [form for form in fitting if any(kind in kinds for kind in form.kinds)]
        if learned:
            break
    if len(learned) == 1:
        return learned[0]
    if learned:
        raise RowProblem("row_forms_several", forms=listed(form.name for form in learned))
    if fitting:
        raise RowProblem("row_form_not_learned", form=listed(form.name for form in fitting), wanted=wanted(kinds))
    code = "row_columns_missing" if any(kind in kinds for kind in NAMEABLE) else "row_columns_unknown"
    raise RowProblem(code, columns=listed(raw), wanted=wanted(kinds))


def wanted(kinds: Collection[str]) -> str:
    """Return the columns of every form that can be read as one of the kinds."""
    forms = [form for form in FORMS if any(kind in kinds for kind in form.kinds)]
    return "; ".join(" and ".join(form.columns) for form in forms)


def _most_specific(names: Iterable[str]) -> list[Form]:
    """Return the forms whose columns are all there, without those that another one has all columns of."""
    there = set(names)
    fitting = [form for form in FORMS if there.issuperset(form.columns)]
    return [form for form in fitting if not any(set(form.columns) < set(other.columns) for other in fitting)]
