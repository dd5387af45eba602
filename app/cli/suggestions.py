"""`deepe methods suggest`: propose how a foreign script is called."""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from app.cli.client import call_service, segment
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, Url
from app.cli.output import errors, write

_WIDTH = 118
_LISTED = 12


def suggest(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|MODULE|COMMAND",
            help="A Python file, one of the script root, a module (mlx_lm.lora), or what starts it in a shell "
            "(llamafactory-cli train).",
        ),
    ],
    stage: Annotated[str | None, typer.Option("--stage", help="The stage that it is for.")] = None,
    environment: Annotated[str | None, typer.Option("--env", help="The environment that is to run it.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Propose the definition of a method that runs a script, module or program; nothing is registered.

    The proposal is YAML for `deepe methods create`, with the reason for each value as a comment. Look at what is
    UNCERTAIN, and save it: deepe methods suggest train.py > train.yaml
    """
    words, source = list(what), None
    for place, word in enumerate(words):
        if word.endswith(".py") and (file := Path(word)).is_file():
            source = _text(file)
            words[place] = file.name
            break
    body = {"source": source, "stage": stage, "conda_env": environment}
    found = call_service(
        url, lambda api: api.post(f"/scripts/{segment(' '.join(words))}:suggest", body), as_json=as_json
    )
    write(_document(found))
    for note in found["notes"]:
        errors().print(note["detail"], markup=False, style="yellow")


def _document(found: dict[str, Any]) -> str:
    """Return the proposal as YAML, with its reasons as comments."""
    lines = [
        f"# {'' if one['certain'] else 'UNCERTAIN '}{one['option']} = {one['value']}: {one['why']}"
        for one in found["placed"]
    ]
    rest = found["left_over"]
    lines += [f"# without a value: {one['option']} ({one['why']})" for one in rest if one["required"]]
    if others := [one["option"] for one in rest if not one["required"]]:
        more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        lines.append(f"# may be given: {', '.join(others[:_LISTED])}{more}")
    lines += [f"# {one['detail']}" for one in found["notes"]]
    comments = "\n".join(
        textwrap.fill(line, _WIDTH, subsequent_indent="#   ", break_long_words=False, break_on_hyphens=False)
        for line in lines
    )
    document = found["method"] or {"stages": {found["kind"]: found["stage"]}}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return f"{comments}\n{text}" if comments else text


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CliFailure(f"{file} cannot be read: {error}") from None
