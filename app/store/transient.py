"""Which failures pass by themselves: those of the database's or the machine's state, not those of what is written."""

import errno
from typing import Final

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, NotSupportedError, SQLAlchemyError, StatementError

_REFUSED: Final = (DataError, IntegrityError, NotSupportedError)
_REFUSED_STATES: Final = ("22", "23")  # SQLSTATE classes: data exception, integrity constraint violation
_OF_THE_FILE: Final = frozenset(
    {
        errno.EACCES,
        errno.EILSEQ,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
    }
)


def is_transient(error: BaseException) -> bool:
    """Return whether the same work may succeed later, because a server, a disk or a network was in the way.

    False for what was refused because of its contents (a value, a constraint, a file that cannot be read), and for
    every error of the program itself: repeating those gives the same.
    """
    match error:
        case DBAPIError():
            state = getattr(error.orig, "sqlstate", None) or ""
            return not isinstance(error, _REFUSED) and not state.startswith(_REFUSED_STATES)
        case StatementError():  # a value that has no form in the database
            return False
        case SQLAlchemyError():
            return True
        case OSError():
            return error.errno not in _OF_THE_FILE
        case _:
            return False
