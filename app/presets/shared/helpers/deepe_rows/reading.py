"""One reader of rows, for the upload, the submit, the preview and every script.

A row becomes an example, is left out and counted, or is refused with the place and the reason. What else is worth
telling is counted too. Nothing of a row is dropped without one of these.
"""

from collections.abc import Mapping
from typing import Any

from .forms import Form, find_form, form_called, named_form
from .kinds import READERS
from .problems import Refused, RowProblem, listed, shown
from .telling import REMEMBERED_SHAPES, Report, Telling, Wanted
from .values import Example


class Reader:
    """Reads rows as examples of the wanted kinds, and counts what becomes of them."""

    def __init__(self, wanted: Wanted, source: str = "") -> None:
        self._telling = Telling(wanted, source)
        self._fixed = _fixed_form(wanted)
        self._unseen = set(self._fixed.columns if self._fixed is not None else ())
        self._seen: dict[str, None] = {}
        self._forms: dict[tuple[tuple[str, ...], tuple[str, ...]], Form] = {}

    @property
    def report(self) -> Report:
        return self._telling.report

    def read(self, raw: Any, line: int) -> Example | None:
        """Return the example of a row; None if there is nothing to learn in it. Raises `RowProblem`."""
        telling = self._telling
        telling.begin(line)
        if not isinstance(raw, dict):
            raise RowProblem("row_not_object", found=shown(raw))
        form = self._form_of(raw)
        if self._fixed is not None:  # a column that a row lacks is one without a value
            raw = {**dict.fromkeys(form.columns), **raw}
        kind = next(kind for kind in form.kinds if kind in telling.wanted.kinds)
        telling.report.forms[form.name] += 1
        example = READERS[kind](form, raw, telling)
        if example is not None:
            telling.report.kinds[kind] += 1
        return example

    def close(self) -> None:
        """Raise `RowProblem` if no row has a column that was asked for: its name is wrong."""
        if self._unseen and self.report.rows:
            raise RowProblem("row_column_missing", column=min(self._unseen), columns=listed(self._seen))

    def _form_of(self, raw: Mapping[str, Any]) -> Form:
        if self._fixed is not None:
            if self._unseen:
                self._unseen.difference_update(raw)
                self._seen.update(dict.fromkeys(list(raw)[:REMEMBERED_SHAPES]))
            return self._fixed
        nulls = [name for name, value in raw.items() if value is None] if None in raw.values() else ()
        shape = (tuple(raw), tuple(nulls))
        form = self._forms.get(shape)
        if form is None:
            form = find_form(raw, self._telling.wanted.kinds)
            if len(self._forms) < REMEMBERED_SHAPES:
                self._forms[shape] = form
        return form


def _fixed_form(wanted: Wanted) -> Form | None:
    """Return the form that the user has chosen, by the names of columns or by its own."""
    if wanted.columns is not None:
        return named_form(wanted.columns, wanted.kinds)
    if wanted.form is None:
        return None
    form = form_called(wanted.form)
    if form is None or not any(kind in wanted.kinds for kind in form.kinds):
        raise Refused(f"data_form: there is no form {wanted.form} that can be learned here")
    return form
