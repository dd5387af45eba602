"""Read training rows, whatever form people write them in. Standard library only.

The upload, the submit, the preview and every script read rows with this package, so that a row means the same to all.
`load` gives a script its examples and the held-out ones; `Reader` reads single rows and counts what becomes of them.
What is wrong with a row is a `RowProblem` with its place; what a script cannot go on with is a `Refused`.
"""

from .files import (
    HELD_OUT,
    Parts,
    Stored,
    data_file,
    enumerated_rows,
    keys_of,
    load,
    notes_of,
    read_file,
    split,
    with_choices,
)
from .forms import (
    CAPTION,
    CONVERSATION,
    FORMS,
    GRADED,
    KINDS,
    LABELLED,
    PAIR,
    PREFERENCE,
    QUESTION,
    TEXT,
    Form,
)
from .pictures import COLUMNS as PICTURE_COLUMNS
from .pictures import MARK, column_of, names_in
from .problems import SENTENCES, Refused, RowProblem
from .reading import Reader
from .rendering import (
    Rendered,
    asked,
    chunks,
    render,
    render_answer,
    render_answers,
    render_question,
    render_text,
    written,
)
from .telling import Count, Report, Wanted
from .turns import message
from .values import (
    ROLES,
    Answer,
    Caption,
    Conversation,
    Example,
    Graded,
    Labelled,
    Pair,
    Preference,
    Question,
    Text,
    Turn,
)

__all__ = [
    "CAPTION",
    "Caption",
    "column_of",
    "names_in",
    "CONVERSATION",
    "FORMS",
    "GRADED",
    "Graded",
    "HELD_OUT",
    "KINDS",
    "LABELLED",
    "MARK",
    "PAIR",
    "PICTURE_COLUMNS",
    "PREFERENCE",
    "QUESTION",
    "ROLES",
    "SENTENCES",
    "TEXT",
    "Answer",
    "asked",
    "Conversation",
    "Count",
    "Example",
    "Form",
    "Labelled",
    "Pair",
    "Parts",
    "Preference",
    "Question",
    "Reader",
    "Refused",
    "Report",
    "RowProblem",
    "Stored",
    "Text",
    "Turn",
    "Wanted",
    "data_file",
    "enumerated_rows",
    "keys_of",
    "load",
    "message",
    "notes_of",
    "read_file",
    "split",
    "Rendered",
    "chunks",
    "render",
    "render_answer",
    "render_answers",
    "render_question",
    "render_text",
    "written",
    "with_choices",
]
