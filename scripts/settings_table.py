"""Write the table of settings in docs/operations.md, from the descriptions in `app/settings.py`.

.venv/bin/python -m scripts.settings_table
"""

import re
from pathlib import Path

from app.settings import describe_settings, load_settings

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN = "<!-- settings: written by python -m scripts.settings_table -->"
END = "<!-- end of the settings -->"


def main() -> None:
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")


def with_table(page: str) -> str:
    """Return the page with the table of today's settings between its two marks."""
    return between(BEGIN, END, page, table())


def between(begin: str, end: str, page: str, text: str) -> str:
    """Return the page with `text` between its two marks."""
    before, _, rest = page.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"the page lacks {begin!r} or {end!r}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def table() -> str:
    """Return the settings as a Markdown table, in the order of `app/settings.py`."""
    rows = [
        f"| `{row.name}` | {_cell(row.type)} | {_cell(row.default)} | {_words(row.description)} |"
        for row in describe_settings(load_settings(), environ={})
    ]
    return "\n".join(("| variable | type | default | meaning |", "|---|---|---|---|", *rows))


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`" if text else ""


def _words(text: str) -> str:
    # angle brackets would be read as HTML
    return re.sub(r"<([a-z]+)>", r"`<\1>`", text).replace("|", "\\|")


if __name__ == "__main__":
    main()
