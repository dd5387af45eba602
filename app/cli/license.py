"""`deepe license`: make keys, issue, install and show licences."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta
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
    licence, problem, warning = status["license"] or {}, status["problem"], status.get("warning")
    projects = licence.get("projects")
    print_fields(
        {
            "state": status["state"],
            "licensee": licence.get("licensee"),
            "edition": licence.get("edition"),
            "features": ", ".join(licence.get("features", ())),
            "projects": ("no limit" if projects is None else projects) if licence else None,
            "issued": licence.get("issued_at"),
            "expires": (licence.get("expires_at") or "never") if licence else None,
            "counts until": licence.get("ends_at"),
            "id": licence.get("id"),
            "problem": problem and problem["detail"],
            "warning": warning and warning["detail"],
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
    remote: Annotated[
        bool, typer.Option("--remote", help="Send it to the service at --url, which installs it for administrators.")
    ] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Check a licence and put it into DEEPE_HOME; a running service sees it at once."""
    if remote:
        _install_there(file, url, as_json=as_json)
        return
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
        str | None,
        typer.Option("--expires", help="Last day (YYYY-MM-DD, UTC). Default: 30 days for a trial, else it never ends."),
    ] = None,
    edition: Annotated[
        str | None, typer.Option("--edition", help=f"Sets what is not given: {', '.join(licences.EDITIONS)}.")
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option("--feature", help="What it allows; may be repeated. Default: methods:write.")
    ] = None,
    projects: Annotated[
        int | None, typer.Option("--projects", min=1, max=licences.MAX_PROJECTS, help="How many it allows.")
    ] = None,
    grace_days: Annotated[
        int | None,
        typer.Option(
            "--grace-days",
            min=0,
            max=licences.MAX_GRACE_DAYS,
            help="Days that it goes on after its end, with a warning. Default: 14, for a trial 0.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of stdout.")] = None,
) -> None:
    """Issue a licence, signed with a private key."""
    terms = _terms(edition)
    now = datetime.now(UTC)
    usual_end = now + timedelta(days=terms.days) if terms.days is not None else None
    expires_at = _end_of(expires) if expires else usual_end
    with _explained():
        text = licences.issue(
            licences.load_private_key(private_key),
            licensee=licensee,
            issued_at=now,
            expires_at=expires_at,
            features=feature or terms.features,
            edition=edition,
            projects=projects if projects is not None else terms.projects,
            grace_days=grace_days if grace_days is not None else terms.grace_days,
        )
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, "utf-8")


def _install_there(file: Path, url: str, *, as_json: bool) -> None:
    with _explained():
        text = licences.read_file(file)
    try:
        document = json.loads(text)
    except ValueError:
        raise Misused(f"{file} is no licence file: it is no JSON.") from None
    status = call_service(url, lambda api: api.put("/license", document), as_json=as_json)
    _tell({"state": status["state"], **status["license"]}, as_json=False)


def _terms(edition: str | None) -> licences.Edition:
    if edition is None:
        return licences.Edition((licences.METHODS_WRITE,), projects=None)
    if edition not in licences.EDITIONS:
        raise Misused(f"--edition {edition!r} is none of: {', '.join(licences.EDITIONS)}.")
    return licences.EDITIONS[edition]


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
