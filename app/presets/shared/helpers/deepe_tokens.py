"""Tokens that a base model does not know: added to its tokenizer, given a start, and learned.

`new_tokens` names them: a JSON list, a JSON object of each token and what it means, or a file with one of these, or
with a token in each line. The embedding of a token starts at the mean of the embeddings of what it means, else of all
tokens, and so does its row in the head of a model that does not share the two. An adapter learns these rows only
(`trainable_token_indices` of PEFT) and holds them; whoever loads it makes room in the base model first (`grow_for`).
"""

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from deepe_adapter_kinds import KINDS
from deepe_log import remark
from deepe_options import options_of
from deepe_rows import Refused

ABLE = tuple(name for name, kind in KINDS.items() if kind.alpha == "lora_alpha")
"""Kinds of adapters that can learn rows of embeddings besides."""
MOST = 10_000
DIVIDING = ("fsdp2", "zero2", "zero3")


def asked_tokens(args: argparse.Namespace) -> dict[str, str]:
    """Return the tokens to add, each with what it means (perhaps nothing). Raises `Refused`."""
    given = getattr(args, "new_tokens", None)
    if not given:
        return {}
    path, text = Path(given), given
    if not given.lstrip().startswith(("[", "{")):
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            raise Refused(
                f"new_tokens must be a JSON list of tokens, a JSON object of tokens and what they mean, or a file with "
                f"one token in each line; {given} cannot be read: {error}"
            ) from error
    found: Any
    if text.lstrip().startswith(("[", "{")):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise Refused(f"new_tokens is not valid JSON: {error}") from error
    else:
        found = [line for line in text.splitlines() if line.strip()]
    tokens = found if isinstance(found, dict) else dict.fromkeys(map(str, found), "")
    for token, meaning in tokens.items():
        if not token or token != token.strip() or not isinstance(meaning, str):
            raise Refused(
                f"new_tokens: {token!r} is no token: texts without blanks around them are, with a text or none"
            )
    if len(tokens) > MOST:
        raise Refused(f"new_tokens names {len(tokens)} tokens; at most {MOST} can be added")
    return tokens


def token_files(args: argparse.Namespace) -> list[Path]:
    """Return the file with the tokens, if the arguments name one."""
    given = getattr(args, "new_tokens", None) or "["
    return [Path(given)] if not given.lstrip().startswith(("[", "{")) and Path(given).is_file() else []


def check_tokens(args: argparse.Namespace, *, copies_base: bool = False) -> None:
    """Refuse new tokens where they cannot be learned. `copies_base`: the method reads the base a second time."""
    if not getattr(args, "new_tokens", None):
        return
    asked_tokens(args)
    whole = getattr(args, "finetuning_type", "lora")
    strategy = getattr(args, "distributed_strategy", "auto")
    if getattr(args, "adapter_name_or_path", None):
        raise Refused("new_tokens: the adapter to go on from learns on with its own tokens; leave one of the two out")
    if whole == "freeze":
        raise Refused("new_tokens: finetuning_type=freeze does not train embeddings; choose lora or full")
    if whole == "full" and copies_base:
        raise Refused(
            "new_tokens: finetuning_type=full compares with a second copy of the base model, which does not know them; "
            "choose lora, or teach the tokens with SFT-Demo first"
        )
    if whole == "lora" and args.adapter not in ABLE:
        raise Refused(f"new_tokens: adapter={args.adapter} cannot learn embeddings; these can: {', '.join(ABLE)}")
    if "trainable_token_indices" in options_of(args).given:
        raise Refused("new_tokens and trainable_token_indices both say which tokens learn; leave one of them out")
    if strategy in DIVIDING:
        raise Refused(f"new_tokens: embeddings cannot grow where {strategy} divides them; choose ddp")


def add_tokens(tokenizer: Any, args: argparse.Namespace) -> None:
    """Add the tokens that are asked for to a tokenizer; tell which it has already. They are `tokenizer.new_tokens`."""
    asked = asked_tokens(args)
    known = tokenizer.get_vocab()
    tokenizer.new_tokens = {}
    if not asked:
        return
    from tokenizers import AddedToken

    there = [token for token in asked if token in known]
    new = {token: meaning for token, meaning in asked.items() if token not in known}
    if there:
        remark(f"the tokenizer has {_listed(there)} already: not added, and not learned apart from the rest", args)
    if not new:
        return
    tokenizer.new_tokens = {
        token: tokenizer(meaning, add_special_tokens=False)["input_ids"] if meaning else []
        for token, meaning in new.items()
    }
    special = bool(getattr(args, "new_tokens_special", False))
    made = [AddedToken(token, special=special, normalized=False) for token in new]
    tokenizer.add_tokens(made, special_tokens=special)
    shown = "are left out of answers" if special else "are seen in answers"
    remark(f"{len(new)} new tokens, which {shown}: {_listed(new)}", args, warning=False)


def make_room(model: Any, tokenizer: Any) -> None:
    """Let a model know the new tokens of its tokenizer, with a start for each. They are `model.new_token_ids`."""
    new = getattr(tokenizer, "new_tokens", {})
    if not new:
        return
    import torch

    known = len(tokenizer) - len(new)
    grow(model, len(tokenizer))
    head = model.get_output_embeddings()
    tables = {id(part.weight): part.weight for part in (model.get_input_embeddings(), head) if part is not None}
    with torch.no_grad():
        for table in tables.values():
            mean = table[:known].float().mean(0)
            for token, meaning in new.items():
                start = table[meaning].float().mean(0) if meaning else mean
                table[tokenizer.convert_tokens_to_ids(token)] = start.to(table.dtype)
    model.new_token_ids = sorted(map(tokenizer.convert_tokens_to_ids, new))


def grow(model: Any, count: int) -> None:
    """Make the embeddings of a model at least so many."""
    if model.get_input_embeddings().weight.shape[0] < count:
        model.resize_token_embeddings(count, mean_resizing=False)


def grow_for(model: Any, adapter: Path) -> None:
    """Make the room in a base model that an adapter in a folder needs for tokens that it has learned."""
    try:
        learned = json.loads((adapter / "adapter_config.json").read_text("utf-8")).get("trainable_token_indices")
    except (OSError, ValueError):
        return
    ids = [one for some in learned.values() for one in some] if isinstance(learned, dict) else learned
    if ids:
        grow(model, max(ids) + 1)


def _listed(tokens: Collection[str]) -> str:
    some = list(tokens)[:8]
    return ", ".join(some) + (f" and {len(tokens) - len(some)} more" if len(tokens) > len(some) else "")
