"""Write the table of roles in docs/access.md, from the routes of the API.

.venv/bin/python -m scripts.permission_table
"""

from pathlib import Path

from fastapi.routing import APIRoute

from app.api.routing import permission_of
from app.domain.access import Role
from app.main import ROUTERS
from scripts.settings_table import between

PAGE = Path(__file__).parents[1] / "docs" / "access.md"
BEGIN = "<!-- roles: written by python -m scripts.permission_table -->"
END = "<!-- end of the roles -->"


def main() -> None:
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")


def with_table(page: str) -> str:
    """Return the page with today's routes between its two marks."""
    return between(BEGIN, END, page, table())


def table() -> str:
    """Return every route with the least role that may call it, as a Markdown table."""
    rows = []
    for route in (route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)):
        needed = permission_of(route)
        role = Role.least(needed).value if needed else "everybody"
        rows.append((route.path.removeprefix("/api/v1"), " ".join(sorted(route.methods or ())), role))
    lines = [f"| `{methods} {path}` | {role} |" for path, methods, role in sorted(rows)]
    return "\n".join(("| route | least role |", "|---|---|", *lines))


if __name__ == "__main__":
    main()
