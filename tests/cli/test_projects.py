"""`deepe projects`, and `--project` before any command."""

import json

from typer.testing import CliRunner

from app.cli import app
from tests.cli.standin import Answer, Request, document, stand_in

LIMITS = {"jobs": 20, "jobs_per_person": None, "accelerators_per_job": 4, "disk_bytes": 2**40, "queue": None}
USE = {"jobs": 3, "jobs_of_yours": 1, "disk_bytes": 2**30}
PROJECT = {"id": "bikes", "title": "Bike hire", "created_by": "ada", "created_at": "2026-12-01T00:00:00Z"}
MEMBER = {"principal": "key:1", "role": "operator", "name": "ada", "created_by": "token"}


def answers(request: Request) -> Answer:
    if request.method == "DELETE":
        return Answer(204)
    if "/project" in request.path.removeprefix("/projects/bikes").replace("/projects", ""):
        return document({**PROJECT, "limits": LIMITS, "use": USE})
    if "/members" in request.path:
        return document({"items": [MEMBER]} if request.method == "GET" else MEMBER)
    return document({"items": [PROJECT], "next_cursor": None} if request.method == "GET" else PROJECT)


def test_project_is_named_before_the_command_or_by_a_variable() -> None:
    runner = CliRunner()
    with stand_in(answers) as (url, asked):
        runner.invoke(app, ["--project", "bikes", "jobs", "list", "--url", url], env={"DEEPE_PROJECT": None})
        runner.invoke(app, ["jobs", "list", "--url", url], env={"DEEPE_PROJECT": "cars/1"})
        runner.invoke(app, ["jobs", "list", "--url", url], env={"DEEPE_PROJECT": None})

    paths = [one.path.partition("?")[0] for one in asked]
    assert paths == ["/projects/bikes/api/v1/jobs", "/projects/cars%2F1/api/v1/jobs", "/api/v1/jobs"]


def test_limits_are_set_and_shown_beside_what_is_used() -> None:
    runner, project = CliRunner(), {"DEEPE_PROJECT": "bikes"}
    with stand_in(answers) as (url, asked):
        shown = runner.invoke(app, ["projects", "show", "--url", url], env=project)
        changed = runner.invoke(
            app, ["projects", "limit", "--jobs", "20", "--disk-gib", "1.5", "--url", url], env=project
        )

    assert "3 of 20" in shown.stdout
    assert "1024.0 MiB of 1048576.0 MiB" in shown.stdout
    assert "at most 4 for a job" in shown.stdout
    assert changed.exit_code == 0, changed.output
    put = next(one for one in asked if one.method == "PUT")
    assert put.path == "/projects/bikes/api/v1/project/limits"
    assert {name: value for name, value in json.loads(put.body).items() if value is not None} == {
        "jobs": 20,
        "disk_bytes": 3 * 2**29,
    }


def test_projects_and_members() -> None:
    runner, project = CliRunner(), {"DEEPE_PROJECT": "bikes"}
    with stand_in(answers) as (url, asked):
        made = runner.invoke(app, ["projects", "create", "bikes", "--title", "Bike hire", "--url", url])
        listed = runner.invoke(app, ["projects", "list", "--url", url])
        added = runner.invoke(app, ["projects", "add", "key:1", "--role", "operator", "--url", url], env=project)
        members = runner.invoke(app, ["projects", "members", "--url", url], env=project)
        removed = runner.invoke(app, ["projects", "remove", "person:https://idp#1", "--url", url], env=project)

    assert [one.exit_code for one in (made, listed, added, members, removed)] == [0] * 5
    assert "deepe --project bikes methods list" in made.stdout
    assert "Bike hire" in listed.stdout
    assert "key:1" in members.stdout
    put, delete = (next(one for one in asked if one.method == method) for method in ("PUT", "DELETE"))
    assert put.path == "/projects/bikes/api/v1/members"
    assert json.loads(put.body) == {"principal": "key:1", "role": "operator", "name": ""}
    assert delete.path == "/projects/bikes/api/v1/members?principal=person%3Ahttps%3A%2F%2Fidp%231"
