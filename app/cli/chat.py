"""`deepe models chat`: one question, or a conversation at a terminal."""

import base64
import mimetypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cli.exits import CliFailure
from app.cli.output import print_json_line, write

if TYPE_CHECKING:
    from app.cli.client import Api

LEAVE = frozenset({"/bye", "/exit", "/quit"})
AGAIN = "/new"
WHOLE = frozenset({"stop", "length"})
"""Ways to finish that leave an answer."""


class AnswerFailed(CliFailure):
    """The model gave no whole answer."""


def ask(api: "Api", model: str, messages: list[dict[str, Any]], options: Mapping[str, Any], *, as_json: bool) -> str:
    """Stream one answer to stdout and return it."""
    from app.cli.client import segment

    pieces: list[str] = []
    end: dict[str, Any] | None = None
    body = {"messages": messages, **options}
    for event in api.stream("POST", f"/models/{segment(model)}/chat", body=body):
        if as_json:
            print_json_line({"event": event.event, "data": event.data})
        match event.event:
            case "piece":
                pieces.append(event.data["text"])
                if not as_json:
                    write(event.data["text"])
            case "done":
                end = event.data
            case "problem":
                raise AnswerFailed(event.data["detail"], notes=[str(e["detail"]) for e in event.data.get("errors", ())])
    if not as_json:
        write("\n")
    if end is None:
        raise AnswerFailed("The answer broke off.")
    if end["finish_reason"] not in WHOLE:
        told = (end["error"], end["reason_detail"], f"Its output: deepe jobs logs {end['job']}")
        raise AnswerFailed("The model could not answer.", notes=[line for line in told if line])
    return "".join(pieces)


def picture(path: Path) -> dict[str, str]:
    """Return a picture file as a message carries it."""
    kind = mimetypes.guess_type(path.name, strict=False)[0] or ""
    if not kind.startswith("image/"):
        raise CliFailure(f"{path} is not called like a picture (.png, .jpg, .webp, .gif, .bmp).")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CliFailure(f"{path} cannot be read: {error.strerror}") from error
    return {"data": f"data:{kind};base64,{base64.b64encode(content).decode()}"}


def converse(api: "Api", model: str, options: Mapping[str, Any]) -> None:
    """Ask what the person types until the input ends; the model sees the whole conversation."""
    print(f"Talking to {model}. {AGAIN} forgets what was said, {'/bye'} or Ctrl-D ends.", file=sys.stderr)
    messages: list[dict[str, Any]] = []
    while (question := _question()) is not None:
        if question == AGAIN:
            messages = []
        elif question:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": ask(api, model, messages, options, as_json=False)})


def _question() -> str | None:
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        write("\n")
        return None
    return None if line in LEAVE else line
