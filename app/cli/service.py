"""Commands that are the service: `serve`, `worker`, `migrate`, `settings`."""

import asyncio
import contextlib
import os
from dataclasses import asdict
from multiprocessing import resource_tracker
from typing import Annotated, Any

import typer

from app import collect_as_usual
from app.cli.command import AsJson, CliFailure, HomeUnusable, Misused, typed
from app.cli.output import Markup, console, print_json, table
from app.domain.projects import EVERY_PROJECT
from app.secret_values import hide_secrets
from app.settings import Settings, SettingsError, describe_settings, load_settings, unknown_variables

Host = Annotated[str | None, typer.Option("--host", help="Address to listen on, instead of DEEPE_HOST.")]
Port = Annotated[
    int | None,
    typer.Option("--port", min=0, max=65535, help="Port to listen on, instead of DEEPE_PORT; 0: a free one."),
]

STARTUP_FAILED = 3
STREAMS_END_SECONDS = 3
"""How long the API waits at its end for answers under way; event streams never end by themselves."""


def load(*, serves: bool = False, **overrides: Any) -> Settings:
    """Return the settings, or fail with every problem they have."""
    try:
        return load_settings(serves=serves, **overrides)
    except SettingsError as error:
        raise Misused("Settings cannot be used.", notes=error.problems) from None


def load_and_hide(*, serves: bool = True, **overrides: Any) -> Settings:
    """Return the settings of a process of the service, and hide its secrets from other processes."""
    settings = load(serves=serves, **overrides)
    hide_secrets()
    return settings


def serve(
    host: Host = None,
    port: Port = None,
    processes: Annotated[int, typer.Option("--processes", min=1, max=64, help="API processes on this port.")] = 1,
) -> None:
    """Serve the HTTP API only.

    DEEPE_* settings say where its database and Redis are; jobs wait until a worker is there, too.
    """
    settings = load_and_hide(host=host, port=port)

    # after the hiding, because it takes a second
    import uvicorn

    from app.api.http_server import HttpProtocol
    from app.main import create_app
    from app.observability import configure_logging

    # here already: what the application raises at its start is printed with a traceback
    asyncio.run(_prepare(settings))
    configure_logging(level=settings.log_level, form=settings.log_format)
    if processes > 1:
        # it lives as long as we do and would show the secrets that it inherits
        resource_tracker.ensure_running()
        # each process builds its application by the factory, which reads the environment
        os.environ.update(settings.secret_variables() | {"DEEPE_HOST": settings.host, "DEEPE_PORT": str(settings.port)})
    collect_as_usual()
    options: dict[str, Any] = {
        "app": create_app(settings) if processes == 1 else "app.main:create_app",
        "factory": processes > 1,
        "host": settings.host,
        "port": settings.port,
        "workers": processes,
        "http": HttpProtocol,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,  # who is local is judged by the peer; `app.api.caller_address` reads what proxies say
        "limit_concurrency": settings.max_connections or None,
        "timeout_graceful_shutdown": STREAMS_END_SECONDS,
    }
    if settings.runner_port is None:
        uvicorn.run(**options)
    else:
        _serve_two_ports(options, settings.runner_host, settings.runner_port)


def _serve_two_ports(options: dict[str, Any], host: str, port: int) -> None:
    """Serve as `uvicorn.run` does, on the runner's port as well: the application tells the two apart."""
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    config = uvicorn.Config(**options)
    # a configuration sets up the logging again unless it has none
    sockets = [config.bind_socket(), uvicorn.Config("", host=host, port=port, log_config=None).bind_socket()]
    server = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt):
        if config.workers > 1:
            Multiprocess(config, sockets=sockets).run()
            return
        server.run(sockets=sockets)
    if not server.started:
        raise typer.Exit(STARTUP_FAILED)


def worker() -> None:
    """Run the worker of this node only.

    It claims jobs, runs their stages and watches them. Stages go on when it stops; its next start adopts them.
    """
    settings = load_and_hide(serves=False)

    # after the hiding, because it takes a second
    from app.worker import run

    collect_as_usual()
    raise typer.Exit(run(settings))


def migrate(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing when all is well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the database to the newest schema.

    Safe to run again, and by several machines at once.
    """
    settings = load()
    asyncio.run(_prepare(settings))
    if as_json:
        print_json({"database": settings.database_url.partition("+")[0], "up_to_date": True})
    elif not quiet:
        typer.echo("The database is up to date.")


async def _prepare(settings: Settings) -> None:
    """Make the home, bring the database to the newest schema, or fail with a sentence."""
    from app.store.home import Home
    from app.store.migrate import DatabaseUnusable, upgrade
    from app.store.session import Database

    try:
        Home(settings.home).create()
    except OSError as error:
        raise HomeUnusable(settings.home, error) from error
    database = Database(settings.database_url, scope=EVERY_PROJECT)
    try:
        await upgrade(database)
    except DatabaseUnusable as error:
        raise CliFailure(str(error), notes=(error.advice,)) from error
    except Exception as error:
        raise CliFailure(
            "The database could not be brought up to date.",
            notes=(f"{type(error).__name__}: {error}", f"Look at DEEPE_DATABASE_URL with: {typed('settings')}"),
        ) from error
    finally:
        await database.close()


def settings(as_json: AsJson = False) -> None:
    """Show every DEEPE_* variable and its value."""
    rows = describe_settings(load(serves=True))
    unread = unknown_variables()
    if as_json:
        print_json({"settings": [asdict(row) for row in rows], "unknown": unread})
        return
    lines = [
        (Markup(f"[bold]{row.name}[/]" if row.is_set else row.name), row.current or "-", row.type, row.description)
        for row in rows
    ]
    console().print(table(("variable (bold: set)", "value", "type", "meaning"), lines))
    for name, meant in unread.items():
        hint = f"; did you mean {meant}?" if meant else ""
        typer.echo(f"{name} is set, but nothing reads it{hint}", err=True)
