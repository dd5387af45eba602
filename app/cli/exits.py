"""Exit codes that scripts can use, and the one place where failures become them."""

import json
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from app.domain.plain_text import printable


class ExitCode(IntEnum):
    """What the process says to the script that called it."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    SERVER_ERROR = 5
    INTERRUPTED = 130


JSON_WANTED = "app.cli.json"
"""Where the context keeps that the command was called with `--json`."""

EXIT_CODE_HELP = (
    "[bold]Exit codes[/]: 0 done; 1 the thing failed (a job that failed, a check that found something missing); "
    "2 wrong usage or settings; 3 no service answers; 4 the service refused (each reason is printed); "
    "5 the service failed; 130 interrupted."
)


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


def report(failure: CliFailure, *, as_json: bool) -> None:
    """Write a failure to stderr: what is wrong, then one line for each note; or one JSON document."""
    if as_json:
        sys.stderr.write(printable(json.dumps(failure.document(), ensure_ascii=False)) + "\n")
        return
    from rich.markup import escape

    from app.cli.output import errors

    console = errors()
    console.print(f"[bold red]error:[/] {escape(failure.message)}", soft_wrap=True)
    for note in failure.notes:
        console.print(f"  {escape(note)}", soft_wrap=True)
