"""What people look for in the repository is there and says today's truth."""

import re
from pathlib import Path

import pytest
import yaml

from scripts import permission_table, settings_table
from tests.ops.dependencies import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link or link.startswith("mailto:"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


def test_index_names_every_page() -> None:
    docs = ROOT / "docs"
    named = {(docs / link).resolve() for link in LINK.findall((docs / "README.md").read_text("utf-8"))}

    assert {docs / "decisions", *docs.glob("*.md")} - {docs / "README.md"} <= named


def test_settings_table_is_that_of_the_settings() -> None:
    page = settings_table.PAGE.read_text("utf-8")

    assert page == settings_table.with_table(page), "run: python -m scripts.settings_table"


def test_table_of_roles_is_that_of_the_routes() -> None:
    page = permission_table.PAGE.read_text("utf-8")

    assert page == permission_table.with_table(page), "look what changed, then run: python -m scripts.permission_table"


def test_pre_commit_runs_what_make_check_runs() -> None:
    recipe = (ROOT / "Makefile").read_text("utf-8").partition("\ncheck: ")[2].partition("\n\n")[0]
    commands = [line.strip().removeprefix("@") for line in recipe.splitlines()[1:]]
    document = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))

    hooks = [hook for repository in document["repos"] for hook in repository["hooks"]]

    assert [hook["entry"] for hook in hooks] == [command.replace("$(BIN)", ".venv/bin") for command in commands]
    assert {repository["repo"] for repository in document["repos"]} == {"local"}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts make them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text("utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
