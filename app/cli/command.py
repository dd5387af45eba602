"""What all commands share: exit codes, failures and options.

Scripts can use the exit codes; here is the one place where failures become them.
"""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from typer.core import TyperGroup

from app.cli.output import errors
from app.domain.plain_text import printable

JSON_WANTED = "app.cli.json"
"""Where the context keeps that the command was called with `--json`."""
EXIT_CODE_HELP = (
    "[bold]Exit codes[/]: 0 done; 1 the thing failed (a job that failed, a check that found something missing); "
    "2 wrong usage or settings; 3 no service answers; 4 the service refused (each reason is printed); "
    "5 the service failed; 130 interrupted."
)
DEFAULT_URL = "http://127.0.0.1:8000"
PROJECT_VARIABLE: Final = "DEEPE_PROJECT"


def _remember(ctx: typer.Context, wanted: bool) -> bool:
    ctx.meta[JSON_WANTED] = wanted
    return wanted


Url = Annotated[
    str, typer.Option("--url", envvar="DEEPE_URL", help="Address of the service.", rich_help_panel="Connection")
]

AsJson = Annotated[
    bool,
    typer.Option("--json", callback=_remember, help="Print JSON: one document, or one line per event of a stream."),
]
HomeFolder = Annotated[
    Path | None, typer.Option("--home", help="Folder of scripts, models, data sets and runs, instead of DEEPE_HOME.")
]
Text = Annotated[str | None, typer.Option("--text", "-q", help="Only those with this text in their name.")]
Description = Annotated[str, typer.Option("--description", help="A sentence for people.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="Print at most this many.")]


class ExitCode(IntEnum):
    """What the process says to the script that called it."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    SERVER_ERROR = 5
    INTERRUPTED = 130


class CliFailure(Exception):
    """Ends the command with `exit_code`; the text says what is wrong and what to do."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, notes: Sequence[str] = ()) -> None:
        self.message = message
        self.notes = tuple(notes)
        super().__init__(message)

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints to stderr."""
        return {"error": self.message, "notes": list(self.notes), "exit_code": int(self.exit_code)}


class Misused(CliFailure):
    """An argument or a setting cannot be used."""

    exit_code = ExitCode.USAGE


class HomeUnusable(CliFailure):
    """The home folder cannot be written."""

    def __init__(self, home: Path, error: OSError) -> None:
        super().__init__(
            f"The home folder {home} cannot be used: {error.strerror or error}.",
            notes=("Make it writable for this account, or choose another folder with DEEPE_HOME.",),
        )


class ReportingGroup(TyperGroup):
    """Turns `CliFailure` into a message on stderr and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CliFailure as failure:
            report(failure, as_json=ctx.meta.get(JSON_WANTED, False))
            raise typer.Exit(failure.exit_code) from None
        except BrokenPipeError:
            # `deepe jobs list | head`: the reader has seen enough; the interpreter must not complain at its end
            sys.stdout = None
            raise typer.Exit(ExitCode.OK) from None


_MIX_PART: Final = re.compile(r"(?P<dataset>[^:=]+)(:(?P<max_rows>[0-9]+))?(=(?P<weight>[0-9.]+))?")


def mix_part(given: str) -> dict[str, Any]:
    """Return the data set of a mix that `DATASET[:MAX_ROWS][=WEIGHT]` names, as the API takes it."""
    found = _MIX_PART.fullmatch(given)
    try:
        if found is None:
            raise ValueError
        part: dict[str, Any] = {"dataset": found["dataset"]}
        if found["max_rows"] is not None:
            part["max_rows"] = int(found["max_rows"])
        if found["weight"] is not None:
            part["weight"] = float(found["weight"])
    except ValueError:
        raise Misused(f"{given!r} must look like DATASET, DATASET:MAX_ROWS, DATASET=WEIGHT or both.") from None
    return part


def typed(arguments: str) -> str:
    """Return `deepe ARGUMENTS` as a person can type it here: the script is often not on PATH."""
    called = Path(sys.argv[0])
    script = called if called.name == "deepe" else Path(sys.executable).with_name("deepe")
    on_path = shutil.which("deepe")
    if not script.is_file():
        program = f"{shlex.quote(sys.executable)} -m app.cli"
    elif on_path is not None and Path(on_path).samefile(script):
        program = "deepe"
    else:
        script, here = script.absolute(), Path.cwd()
        program = shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))
    return f"{program} {arguments}"


def report(failure: CliFailure, *, as_json: bool) -> None:
    """Write a failure to stderr: what is wrong, then one line for each note; or one JSON document."""
    if as_json:
        sys.stderr.write(printable(json.dumps(failure.document(), ensure_ascii=False)) + "\n")
        return
    console = errors()
    console.print(f"[bold red]error:[/] {escape(failure.message)}", soft_wrap=True)
    for note in failure.notes:
        console.print(f"  {escape(note)}", soft_wrap=True)
