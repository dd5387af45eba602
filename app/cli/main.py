"""The root of the `deepe` command. What a command needs is imported when it is called."""

import copy
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any, Final

import typer

from app.cli.command import EXIT_CODE_HELP, PROJECT_VARIABLE, ReportingGroup

SERVICE: Final = "Run the service"
WORK: Final = "Work with a service"
MAINTENANCE: Final = "Maintenance"


@dataclass(frozen=True)
class Entry:
    """A command or group: where it stands (`module:name`), under which heading, its first line of help."""

    target: str
    panel: str
    help: str


COMMANDS: Final = {
    "demo": Entry("demo:demo", SERVICE, "Train, save and ask a model for real."),
    "dev": Entry("dev:dev", SERVICE, "Run everything on this machine."),
    "serve": Entry("service:serve", SERVICE, "Serve the HTTP API only."),
    "worker": Entry("service:worker", SERVICE, "Run the worker of this node only."),
    "methods": Entry("methods:app", WORK, "Training methods: recipes of how models are made."),
    "jobs": Entry("jobs:app", WORK, "Run the stages of methods and watch them."),
    "queues": Entry("operations:queues", WORK, "Queues: limits of jobs that run at once."),
    "models": Entry("models:app", WORK, "Models that jobs made: customized, complete, online."),
    "datasets": Entry("datasets:app", WORK, "Data sets: what models are trained with."),
    "base-models": Entry("base_models:app", WORK, "Base models: what trainings start from."),
    "environments": Entry("environments:app", WORK, "Conda environments that stages run in."),
    "targets": Entry("targets:targets", WORK, "Deploy targets: servers that models are deployed to."),
    "presets": Entry("presets:app", WORK, "Methods that the product ships."),
    "nodes": Entry("nodes:nodes", WORK, "Machines with a worker."),
    "import": Entry("imports:app", MAINTENANCE, "Take over what another platform holds: DeepExtension."),
    "login": Entry(
        "login:login",
        WORK,
        "Log in to a service: at its identity provider, else with an API key. Later commands need no token then.",
    ),
    "logout": Entry("login:logout", WORK, "Forget the login to a service, and let the identity provider end it."),
    "me": Entry("access:me", WORK, "Say who you are to the service, and what you may do."),
    "projects": Entry("projects:app", MAINTENANCE, "Projects: methods, data, jobs and people kept apart."),
    "keys": Entry("access:keys", MAINTENANCE, "API keys: callers with a name and a role."),
    "secrets": Entry("secrets:app", WORK, "Secrets: values that scripts get by their names, and nobody can read."),
    "reviews": Entry("reviews:app", WORK, "Code that a second person approves before it runs."),
    "audit": Entry("audit:app", MAINTENANCE, "The audit trail: who changed what, and which code was started."),
    "webhooks": Entry("operations:webhooks", MAINTENANCE, "Addresses that get a message when a job ends."),
    "migrate": Entry("service:migrate", MAINTENANCE, "Bring the database to the newest schema."),
    "settings": Entry("service:settings", MAINTENANCE, "Show every DEEPE_* variable and its value."),
    "doctor": Entry("doctor:doctor", MAINTENANCE, "Say what is missing on this machine and how to get it."),
    "clean": Entry(
        "operations:clean",
        MAINTENANCE,
        "Remove files and rows that are older than the DEEPE_KEEP_... settings allow. The service does it every hour.",
    ),
    "backup": Entry("backups:backup", MAINTENANCE, "Write the database, scripts and licence into one file."),
    "restore": Entry("backups:restore", MAINTENANCE, "Make an installation of a backup, in an empty home."),
    "license": Entry("license:app", MAINTENANCE, "Commercial licences: adding and deleting methods needs one."),
}


class LazyGroup(ReportingGroup):
    """Imports a command of `COMMANDS` when it is called; to list them, their first lines of help suffice."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self.commands and self.commands[cmd_name] is None:
            self.commands[cmd_name] = _load(cmd_name)
        return self.commands.get(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        return self._listing().shell_complete(ctx, incomplete)

    def _listing(self) -> ReportingGroup:
        """Return a group whose commands are stand-ins with name, heading and help."""
        listing = copy.copy(self)
        listing.__class__ = ReportingGroup  # type: ignore[assignment]
        listing.commands = {
            name: ReportingGroup(name=name, help=entry.help, rich_help_panel=entry.panel)
            for name, entry in COMMANDS.items()
        }
        return listing


app = typer.Typer(
    name="deepe",
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Training methods as a service: register, train, save, deploy and ask fine-tuned models.",
    epilog=EXIT_CODE_HELP,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepe {product_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
    project: Annotated[
        str | None,
        typer.Option("--project", metavar="ID", envvar=PROJECT_VARIABLE, help="Work in this project of the service."),
    ] = None,
) -> None:
    if project:
        os.environ[PROJECT_VARIABLE] = project  # for whatever command calls the service


def product_version() -> str:
    """Return the installed version; a source tree that was never installed has none."""
    try:
        return metadata.version("deepextension")
    except metadata.PackageNotFoundError:
        return "unknown"


def _load(name: str) -> Any:
    module, _, attribute = COMMANDS[name].target.partition(":")
    found: typer.Typer | Callable[..., None] = getattr(importlib.import_module(f"app.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        command: Any = typer.main.get_group(found)
    else:
        alone = typer.Typer(add_completion=False)
        alone.command(name)(found)
        command = typer.main.get_command(alone)
    command.name = name
    return command
