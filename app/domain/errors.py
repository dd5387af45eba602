"""Typed errors. A leaf class has a stable `code`; its sentence is in `texts/*.toml` in three languages.

Leaf classes live beside the only code that raises them. The HTTP status is decided once, in `app/api/errors.py`,
by family (`NotFound`, `Invalid`, ...).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from app.domain.texts import DEFAULT_LANGUAGE, Language, text

MAX_LISTED: Final = 100
"""Most violations that one answer lists; the others are counted."""


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with a request: where (RFC 6901 pointer), what (stable code), with which values."""

    pointer: str
    code: str
    params: dict[str, Any] = field(default_factory=dict)

    def detail(self, language: Language = DEFAULT_LANGUAGE) -> str:
        """Return the sentence that says what to do."""
        return text(self.code, language, **self.params)


class AppError(Exception):
    """Base of all expected errors. `params` fill the placeholders of the code's text."""

    code: ClassVar[str] = ""

    def __init__(self, *, pointer: str | None = None, **params: Any) -> None:
        self.pointer = pointer
        self.params = params
        super().__init__(self.detail())

    def detail(self, language: Language = DEFAULT_LANGUAGE) -> str:
        """Return the sentence for the caller in `language`."""
        return text(self.code, language, **self.params)

    def violations(self) -> Sequence[Violation]:
        """Return the entries of the problem document's `errors`."""
        return (Violation(self.pointer, self.code, self.params),) if self.pointer is not None else ()

    def violation_count(self) -> int:
        """Return how many there are, also of those that `violations` leaves out."""
        return len(self.violations())


class NotFound(AppError):
    """What the path names does not exist (404)."""


class Invalid(AppError):
    """The caller can fix the payload (422)."""


class TooMany(AppError):
    """The caller asks for more than the service allows, and may ask again in `seconds` (429)."""


class InvalidRequest(Invalid):
    """Several violations of one request at once (422)."""

    code = "invalid_request"

    def __init__(self, violations: Sequence[Violation], *, count: int | None = None) -> None:
        self._violations = tuple(violations)
        self._count = len(self._violations) if count is None else count
        super().__init__(count=self._count)

    def detail(self, language: Language = DEFAULT_LANGUAGE) -> str:
        count = self._count
        if count <= MAX_LISTED:
            return super().detail(language)
        return text("invalid_request_first", language, count=count, listed=MAX_LISTED, more=count - MAX_LISTED)

    def violations(self) -> Sequence[Violation]:
        return self._violations

    def violation_count(self) -> int:
        return self._count


@contextmanager
def together_with(found: Sequence[Violation]) -> Iterator[None]:
    """Raise `found` after the block, if there is any; what an `Invalid` of the block says comes with it."""
    try:
        yield
    except Invalid as error:
        if not found:
            raise
        raise InvalidRequest([*found, *error.violations()]) from error
    if found:
        raise InvalidRequest(found)


class Conflict(AppError):
    """The request does not fit the present state (409)."""


class PreconditionFailed(AppError):
    """`If-Match` names an older version (412)."""


class NotAllowed(AppError):
    """The caller may not do this (403); the text names the way out."""


class Unauthenticated(AppError):
    """No token or a wrong one (401)."""


class TooLarge(AppError):
    """The body or file is over a limit (413)."""


class Unavailable(AppError):
    """The service cannot answer now (503)."""
