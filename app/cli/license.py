"""`deepe license`: make keys, issue, install and show licences."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any

import typer

from app.access import licence as licences
from app.cli.client import call_service, language
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, HomeFolder, Misused, Url, typed
from app.cli.output import print_fields, print_json
from app.cli.service import load
from app.domain.errors import AppError

app = typer.Typer(no_args_is_help=True, help="Commercial licences: adding and deleting methods needs one.")


@app.command()
def show(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show the licence of the service and whether it counts."""
    status = call_service(url, lambda api: api.get("/license"), as_json=as_json)
    licence, problem = status["license"] or {}, status["problem"]
    print_fields(
        {
            "state": status["state"],
            "licensee": licence.get("licensee"),
            "features": ", ".join(licence.get("features", ())),
            "issued": licence.get("issued_at"),
            "expires": (licence.get("expires_at") or "never") if licence else None,
            "id": licence.get("id"),
            "problem": problem and problem["detail"],
        }
    )
    if status["state"] == "none":
        typer.echo(
            f"Custom01 and Custom02 can be adapted without one. Install one with: {typed('license install FILE')}"
        )


@app.command()
def install(
    file: Annotated[Path, typer.Argument(help="The licence as it was sent to you.")],
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Check a licence and put it into DEEPE_HOME; a running service sees it at once."""
    settings = load(home=home)
    with _explained():
        installed = licences.install(
            licences.read_file(file),
            licences.licence_path(settings.home),
            public_key=licences.load_public_key(settings.license_public_key),
            now=datetime.now(UTC),
        )
    _tell(
        {
            "id": installed.id,
            "licensee": installed.licensee,
            "features": list(installed.features),
            "expires_at": installed.expires_at.isoformat() if installed.expires_at else None,
            "path": str(licences.licence_path(settings.home)),
        },
        as_json=as_json,
    )


@app.command()
def keygen(
    folder: Annotated[Path, typer.Argument(help="Where to put the pair; made if it is missing.")],
    as_json: AsJson = False,
) -> None:
    """Make a key pair (for the issuer of licences). Keep the private key secret; nothing is overwritten."""
    with _explained():
        private_path, public_path = licences.keygen(folder)
    _tell({"private_key": str(private_path), "public_key": str(public_path)}, as_json=as_json)
    if not as_json:
        typer.echo(f"The service verifies with it when DEEPE_LICENSE_PUBLIC_KEY={public_path}")


@app.command()
def issue(
    private_key: Annotated[Path, typer.Option("--private-key", help="PEM file that `keygen` made.")],
    licensee: Annotated[str, typer.Option("--licensee", help="Whom the licence is for.")],
    expires: Annotated[
        str | None, typer.Option("--expires", help="Last day (YYYY-MM-DD, UTC); without it the licence never expires.")
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option("--feature", help="What it allows; may be repeated. Default: methods:write.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of stdout.")] = None,
) -> None:
    """Issue a licence, signed with a private key."""
    expires_at = _end_of(expires) if expires else None
    with _explained():
        text = licences.issue(
            licences.load_private_key(private_key),
            licensee=licensee,
            issued_at=datetime.now(UTC),
            expires_at=expires_at,
            features=feature or (licences.METHODS_WRITE,),
        )
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, "utf-8")


def _end_of(day: str) -> datetime:
    """Return the last moment of `day`: who reads "until the 31st" may use it on the 31st."""
    try:
        parsed = date.fromisoformat(day)
    except ValueError:
        raise Misused(f"--expires {day!r} is no day. Write it as YYYY-MM-DD.") from None
    return datetime.combine(parsed, time.max, tzinfo=UTC)


@contextmanager
def _explained() -> Iterator[None]:
    """Say in the person's language what a typed error or the system means."""
    try:
        yield
    except AppError as error:
        raise CliFailure(error.detail(language(os.environ))) from error
    except OSError as error:
        raise CliFailure(f"{error.filename}: {error.strerror}") from error


def _tell(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        print_fields(document)
