"""Projects: what each owns, and which of them a session of the database sees."""

import re
from dataclasses import dataclass
from typing import Final

from app.domain.errors import InvalidRequest, Violation

DEFAULT_PROJECT: Final = "default"
"""The project of whoever names none. A single person never sees the word."""
MAX_PROJECT_ID: Final = 40
PROJECT_ID: Final = rf"[a-z0-9](?:[a-z0-9-]{{0,{MAX_PROJECT_ID - 2}}}[a-z0-9])?"
_PROJECT_ID = re.compile(PROJECT_ID)


@dataclass(frozen=True)
class Scope:
    """Whose rows a session sees and writes: one project's, or with None those of all projects.

    Workers and maintenance see all; a request sees one.
    """

    project: str | None


EVERY_PROJECT: Final = Scope(None)
DEFAULT_SCOPE: Final = Scope(DEFAULT_PROJECT)


def check_project_id(project_id: str) -> None:
    """Raise `InvalidRequest` unless it can stand in an address and name a folder."""
    if not _PROJECT_ID.fullmatch(project_id):
        raise InvalidRequest([Violation("/id", "project_id_wrong", {"id": project_id, "limit": MAX_PROJECT_ID})])
