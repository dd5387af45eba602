"""How a language model is talked to: its chat template, and the tokens at which an answer ends.

What is chosen here is saved with the tokenizer, so that questions and other servers do as the training did.
Standard library only; tokenizers and models come from the caller. `writer` has the template: the tokenizer, or the
processor of a model that is shown pictures.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepe_arguments import json_object
from deepe_log import remark
from deepe_rows import Refused
from deepe_rows.rendering import special_ids

PLAIN_TEMPLATE = (  # for a base model that was never taught a chat format
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' + message['content'] }}"
    "{{ eos_token + '\\n' if message['role'] == 'assistant' else '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
CONTENT_TEMPLATE = (  # `chat_template=none`: a prompt and its completion as they are
    "{% for message in messages %}"
    "{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n\\n' if message['role'] == 'system' else '' }}"
    "{% endfor %}"
)
NAME = "generation_config.json"
OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize")
"""Names that a template is always given: they are no arguments that a user sets."""


def choose_template(
    tokenizer: Any,
    path: Path,
    args: argparse.Namespace,
    writer: Any = None,
    *,
    plain: str = PLAIN_TEMPLATE,
    contents: str = CONTENT_TEMPLATE,
) -> None:
    """Give the writer the template that the arguments ask for, with its arguments in it as defaults.

    A base (in `path`) without a template gets the `plain` one; `contents` is that of `chat_template=none`.
    """
    writer = writer or tokenizer
    chosen = getattr(args, "chat_template", None) or "auto"
    begin = "{{ bos_token }}" if _begins_texts(tokenizer) else ""
    if chosen == "none":
        template: Any = begin + contents
    elif chosen == "auto":
        template = writer.chat_template or begin + plain
    else:
        template = _given(chosen)
    given = template_arguments(args)
    texts = list(template.values()) if isinstance(template, Mapping) else [template]
    for name in given:
        if not any(re.search(rf"\b{name}\b", text) for text in texts):
            raise Refused(f"{name} has no effect: the chat template of {path} does not read it; leave it out")
    writer.chat_template = _each(template, lambda text: "".join(_defaults(given)) + text)


def template_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a template is given besides the turns: `chat_template_kwargs`, and `enable_thinking` by itself."""
    found = getattr(args, "chat_template_kwargs", None) or {}
    try:
        given = json_object(found) if isinstance(found, str) else dict(found)
    except argparse.ArgumentTypeError as error:
        raise Refused(f"chat_template_kwargs {error}") from error
    for name in given:
        if not name.isidentifier() or name in OWN:
            raise Refused(f"chat_template_kwargs: {name!r} is not a name that can be set")
    thinking = str(getattr(args, "enable_thinking", None) or "auto").lower()
    if thinking not in ("auto", "true", "false"):
        raise Refused(f"enable_thinking must be auto, true or false, it is {thinking}")
    if thinking != "auto":
        if given.get("enable_thinking", thinking == "true") != (thinking == "true"):
            raise Refused("enable_thinking and chat_template_kwargs contradict each other; give one of them")
        given["enable_thinking"] = thinking == "true"
    return given


def end_turns(tokenizer: Any, path: Path, writer: Any = None) -> str:
    """Make the token that ends an assistant's turn the tokenizer's `eos_token`; return the one that was it before.

    Everything that answers stops at `eos_token`: generation, TRL's trainers, other servers. Documents keep the end
    that the base in `path` knows, and so does a template that writes `eos_token`. An empty text: nothing is changed.
    """
    writer = writer or tokenizer
    own = tokenizer.eos_token
    tokenizer.document_end_id = document_end(tokenizer, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = own
    end = end_of_turn(tokenizer, writer)
    if end is None or end == tokenizer.eos_token_id:
        return ""
    before = _exchange(writer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if _exchange(writer) != before:
        fixed = f"{{%- set eos_token = {_literal(own)} %}}"
        writer.chat_template = _each(writer.chat_template, lambda text: fixed + text)
    return str(own)


def tell_end(tokenizer: Any, own: str, args: argparse.Namespace) -> None:
    """Tell the user that answers end at another token than the base's `own`."""
    if own:
        document = tokenizer.convert_ids_to_tokens(tokenizer.document_end_id)
        remark(
            f"the chat template ends a turn with {tokenizer.eos_token}, the tokenizer's own end is {own}: answers end "
            f"at both, here, in questions and in the complete model; plain text still ends with {document}",
            args,
            warning=False,
        )


def end_of_turn(tokenizer: Any, writer: Any = None) -> int | None:
    """Return the first token that a template puts behind an answer and that text cannot be; `None` if there is none."""
    whole = _exchange(writer or tokenizer)
    if whole is None:
        return None
    behind = tokenizer(whole.rpartition("xq1")[2], add_special_tokens=False)["input_ids"]
    return next((token for token in behind if token in special_ids(tokenizer)), None)


def document_end(tokenizer: Any, path: Path) -> int | None:
    """Return the token that ends a document: the one of the base's configuration.

    A tokenizer that was saved by a training has the end of a turn as its `eos_token`.
    """
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        config = {}
    end = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    return end if isinstance(end, int) and end in special_ids(tokenizer) else tokenizer.eos_token_id


def ends_of(tokenizer: Any, known: int | list[int] | None, writer: Any = None) -> list[int]:
    """Return the tokens at which answering stops: the end of a turn, the tokenizer's, and what was `known` before."""
    known = known if isinstance(known, list) else [known]
    found = [end_of_turn(tokenizer, writer), tokenizer.eos_token_id, *known]
    return list(dict.fromkeys(token for token in found if token is not None))


def stop_at_turn_ends(model: Any, tokenizer: Any, writer: Any = None) -> None:
    """Let `generate`, and what reads the model's `generation_config.json`, stop at each end."""
    ends = ends_of(tokenizer, model.generation_config.eos_token_id, writer)
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None


def write_ends(base: Path, target: Path, ends: int | list[int] | None) -> None:
    """Write the `generation_config.json` of an adapter or a model: that of its base, with the ends."""
    try:
        config = json.loads((base / NAME).read_text("utf-8"))
    except OSError:
        config = {}
    (target / NAME).write_text(json.dumps({**config, "eos_token_id": ends}, indent=2), "utf-8")


# --- reasoning ------------------------------------------------------------------------------------------------------


def after_reasoning(text: str) -> str:
    """Return what is said after the reasoning, of all of it if there is none."""
    return text.rpartition("</think>")[2].strip()


def is_cut_in_reasoning(prompt: str, text: str) -> bool:
    """Say whether a block of reasoning was begun, by the prompt or the answer, and not ended."""
    _before, ended, rest = text.rpartition("</think>")
    return "<think>" in rest or (not ended and prompt.rstrip().endswith("<think>"))


# --- templates ------------------------------------------------------------------------------------------------------


def template_files(args: argparse.Namespace) -> list[Path]:
    """Return the file with the template, if the arguments name one."""
    chosen = getattr(args, "chat_template", None) or "auto"
    is_named = chosen not in ("auto", "none") and "{{" not in chosen and "{%" not in chosen
    return [Path(chosen)] if is_named and Path(chosen).is_file() else []


def _given(chosen: str) -> str:
    """Return the template that the user wrote, as text or as a file."""
    if "{{" in chosen or "{%" in chosen:
        return chosen
    try:
        return Path(chosen).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise Refused(
            f"chat_template must be auto, none, a Jinja template or a file with one; {chosen} cannot be read: {error}"
        ) from error


def _begins_texts(tokenizer: Any) -> bool:
    """Say whether the tokenizer itself puts a token before every text."""
    first = tokenizer.bos_token_id
    return first is not None and list(tokenizer("")["input_ids"])[:1] == [first]


def _each(template: Any, change: Callable[[str], str]) -> Any:
    """Change a template; a tokenizer may have several, by name."""
    if isinstance(template, Mapping):
        return {name: change(text) for name, text in template.items()}
    return change(template)


def _defaults(given: Mapping[str, Any]) -> Iterator[str]:
    for name, value in given.items():
        yield f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"


def _literal(value: Any) -> str:
    """Return a value of JSON as Jinja writes it."""
    match value:
        case None:
            return "none"
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            return f"{{{', '.join(f'{_literal(key)}: {_literal(one)}' for key, one in value.items())}}}"
        case _:
            return json.dumps(value, ensure_ascii=False)


def _exchange(writer: Any) -> str | None:
    """Return a question and an answer as the template writes them; contents are texts, or lists of parts."""
    for content in (str, lambda text: [{"type": "text", "text": text}]):
        turns = [{"role": role, "content": content(text)} for role, text in (("user", "xq0"), ("assistant", "xq1"))]
        try:
            found = str(writer.apply_chat_template(turns, tokenize=False))
        except Exception:  # noqa: S112 (a template is a program: it may refuse in any way)
            continue
        if "xq1" in found:
            return found
    return None
