"""`deepe projects`: methods, data, jobs and people kept apart. `deepe --project ID ...` works in one."""

from typing import Annotated

import typer

from app.cli.client import Api, segment
from app.cli.command import DEFAULT_URL, AsJson, Limit, Url, typed
from app.cli.output import ago, print_fields, print_json, print_table, size, write

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


@app.command("show")
def show_project(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show the project, what it may use and what it does."""
    with Api(url) as api:
        found = api.get("/project")
    if as_json:
        print_json(found)
        return
    limits, use = found["limits"], found["use"]
    print_fields(
        {
            "id": found["id"],
            "title": found["title"],
            "jobs": _of(use["jobs"], limits["jobs"]),
            "yours": _of(use["jobs_of_yours"], limits["jobs_per_person"]),
            "disk": _of(size(use["disk_bytes"]), limits["disk_bytes"] and size(limits["disk_bytes"])),
            "accelerators": f"at most {limits['accelerators_per_job']} for a job"
            if limits["accelerators_per_job"] is not None
            else None,
            "queue": limits["queue"],
        }
    )


@app.command("limit")
def limit_project(
    jobs: Annotated[int | None, typer.Option("--jobs", min=0, help="Stages that wait or run at once.")] = None,
    per_person: Annotated[
        int | None, typer.Option("--jobs-per-person", min=0, help="Those of one caller at once.")
    ] = None,
    accelerators: Annotated[
        int | None, typer.Option("--accelerators-per-job", min=0, help="Most that a job may take.")
    ] = None,
    disk_gib: Annotated[float | None, typer.Option("--disk-gib", min=0, help="Data sets and models together.")] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="The queue that all of its jobs go into.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say what the project may use; what is not given is not limited any more."""
    given = {
        "jobs": jobs,
        "jobs_per_person": per_person,
        "accelerators_per_job": accelerators,
        "disk_bytes": None if disk_gib is None else int(disk_gib * 1024**3),
        "queue": queue,
    }
    with Api(url) as api:
        changed = api.put("/project/limits", given)
    if as_json:
        print_json(changed)
        return
    said = ", ".join(f"{name} {value}" for name, value in changed["limits"].items() if value is not None)
    write(f"{changed['id']}: {said or 'nothing is limited'}\n")


def _of(present: object, limit: object) -> str:
    return str(present) if limit is None else f"{present} of {limit}"


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
