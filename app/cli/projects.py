"""`deepe projects`: methods, data, jobs and people kept apart. `deepe --project ID ...` works in one."""

from typing import Annotated

import typer

from app.cli.client import Api, segment
from app.cli.command import DEFAULT_URL, AsJson, Limit, Url, typed
from app.cli.output import ago, print_json, print_table, write

app = typer.Typer(no_args_is_help=True, help="Projects: methods, data, jobs and people kept apart.")

Principal = Annotated[str, typer.Argument(metavar="PRINCIPAL", help="key:ID or person:ISSUER#SUBJECT: see deepe me.")]


@app.command("list")
def list_projects(limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the projects that you may enter."""
    with Api(url) as api:
        found = list(api.items("/projects", limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [(one["id"], one["title"], one["created_by"], ago(one["created_at"])) for one in found]
    hint = f"No projects of yours. An administrator makes one: {typed('projects create ID')}"
    print_table(("id", "title", "made by", "made"), rows, nothing=hint)


@app.command("create")
def create_project(
    project: Annotated[str, typer.Argument(metavar="ID", help="Small letters, digits, hyphens; it never changes.")],
    title: Annotated[str, typer.Option("--title", help="What people call it.")] = "",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make a project with the shipped methods and samples."""
    with Api(url) as api:
        made = api.post("/projects", {"id": project, "title": title})
    if as_json:
        print_json(made)
        return
    write(f"{project} made. Work in it: {typed(f'--project {project} methods list')}, or set DEEPE_PROJECT\n")


@app.command("members")
def list_members(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List who has a role in the project."""
    with Api(url) as api:
        found = api.get("/members")["items"]
    if as_json:
        print_json({"items": found})
        return
    rows = [(one["name"], one["role"], one["principal"], one["created_by"]) for one in found]
    hint = f"No members. Add one: {typed('projects add PRINCIPAL --role operator')}"
    print_table(("name", "role", "principal", "added by"), rows, nothing=hint)


@app.command("add")
def add_member(
    principal: Principal,
    role: Annotated[str, typer.Option("--role", help="viewer, operator, developer or admin.")],
    name: Annotated[str, typer.Option("--name", help="By which people know the member.")] = "",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Give somebody a role in the project, in the place of the one they had."""
    with Api(url) as api:
        member = api.put("/members", {"principal": principal, "role": role, "name": name})
    if as_json:
        print_json(member)
    else:
        write(f"{member['principal']} is {member['role']}\n")


@app.command("remove")
def remove_member(principal: Principal, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Take somebody out of the project."""
    with Api(url) as api:
        api.delete_at_once(f"/members?principal={segment(principal)}")
    if as_json:
        print_json({"removed": principal})
    else:
        write(f"{principal} removed\n")
