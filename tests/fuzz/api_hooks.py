"""What Schemathesis checks beside its own: no fault of the service, and nothing of another project in an answer."""

import os
from typing import Any

import schemathesis

MARK = os.environ["DEEPE_FUZZ_MARK"]


@schemathesis.check
def nothing_foreign(_context: Any, response: Any, _case: Any) -> None:
    """Fail where an answer holds the mark that stands in everything of the other project."""
    assert MARK not in response.text, "it shows something of another project"


@schemathesis.check
def no_internal_error(_context: Any, response: Any, _case: Any) -> None:
    """Fail at a server error other than 503: that one says which other server does not answer."""
    assert response.status_code < 500 or response.status_code == 503, f"{response.status_code}: {response.text[:500]}"
