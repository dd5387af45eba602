"""The root of the `deepe` command. Everything heavy is imported by the command that needs it."""

from importlib import metadata
from typing import Annotated

import typer

from app.cli import jobs, methods, models, nodes, queues, resources, service, webhooks
from app.cli import license as license_commands
from app.cli.clean import clean
from app.cli.demo import demo
from app.cli.dev import dev
from app.cli.doctor import doctor
from app.cli.exits import EXIT_CODE_HELP, ReportingGroup

SERVICE = "Run the service"
WORK = "Work with a service"
UPKEEP = "Look after it"

app = typer.Typer(
    name="deepe",
    cls=ReportingGroup,
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
) -> None:
    pass


def product_version() -> str:
    """Return the installed version; a source tree that was never installed has none."""
    try:
        return metadata.version("deepextension")
    except metadata.PackageNotFoundError:
        return "unknown"


app.command(rich_help_panel=SERVICE)(demo)
app.command(rich_help_panel=SERVICE)(dev)
app.command(rich_help_panel=SERVICE)(service.serve)
app.command(rich_help_panel=SERVICE)(service.worker)
app.add_typer(methods.app, name="methods", rich_help_panel=WORK)
app.add_typer(jobs.app, name="jobs", rich_help_panel=WORK)
app.add_typer(queues.app, name="queues", rich_help_panel=WORK)
app.add_typer(models.app, name="models", rich_help_panel=WORK)
app.add_typer(resources.datasets, name="datasets", rich_help_panel=WORK)
app.add_typer(resources.base_models, name="base-models", rich_help_panel=WORK)
app.add_typer(resources.environments, name="environments", rich_help_panel=WORK)
app.add_typer(resources.presets, name="presets", rich_help_panel=WORK)
app.add_typer(nodes.nodes, name="nodes", rich_help_panel=WORK)
app.add_typer(webhooks.app, name="webhooks", rich_help_panel=UPKEEP)
app.command(rich_help_panel=UPKEEP)(service.migrate)
app.command(rich_help_panel=UPKEEP)(service.settings)
app.command(rich_help_panel=UPKEEP)(doctor)
app.command(rich_help_panel=UPKEEP)(clean)
app.add_typer(license_commands.app, name="license", rich_help_panel=UPKEEP)
