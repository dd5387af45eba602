"""Show what a training with a shipped method would be given and would learn of single rows of a data set.

    python preview.py REQUEST ANSWER

REQUEST is a JSON file: `base_model` and `data` are paths, `lines` numbers of lines (null: the first rows), `kinds`,
`tools`, `pictures`, `columns`, `form` and `limit` say how the rows are read, `parameters` are those of the training
that matter here (`deepe_rows.preview.PARAMETERS`). `measure` asks for the lengths of a sample of all rows as well.
ANSWER is written as JSON: `rows` (see `deepe_rows.preview`) and `lengths` (see `deepe_rows.lengths`), or `refused`
with a code and its values.

It runs in the environment of the training and calls what the training calls. Only the tokenizer is loaded: without
torch, transformers is there in a third of the time, and its tokenizers are the same.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from itertools import accumulate
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this file.
sys.path.append(str(Path(__file__).resolve().parent / "helpers"))
import deepe_chat as chat
import deepe_examples as examples
import deepe_llm as llm
import deepe_loading as loading
import deepe_pictures as pictures
from deepe_rewards import with_instruction
from deepe_rows import (
    MARK,
    Caption,
    Conversation,
    Graded,
    Labelled,
    Pair,
    Preference,
    Question,
    Refused,
    Rendered,
    RowProblem,
    Text,
    render_answer,
    render_text,
    written,
)
from deepe_rows.lengths import RowLength, measure, row_length
from deepe_rows.preview import SHOWN_SEQUENCES, Fate, TokenizedText, preview, spans
from deepe_rows.survey import wanted_of
from deepe_tokens import add_tokens

HEAVY = frozenset({"torch", "torchvision", "torchaudio", "tensorflow", "flax", "jax"})


def main() -> None:
    request, answer = Path(sys.argv[1]), Path(sys.argv[2])
    document = json.dumps(answer_to(json.loads(request.read_text("utf-8"))))
    unfinished = answer.with_suffix(".tmp")
    unfinished.write_text(document, "utf-8")
    unfinished.replace(answer)


def answer_to(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows, or why there are none."""
    paths = {"model_path": request["base_model"], "dataset_path": request["data"]}
    args = argparse.Namespace(**request["parameters"] | paths)
    try:
        tokenizer, own_template, own_end = load_tokenizer(args, pictured=request["pictures"])
    except Refused as error:
        return _refused("preview_template_refused", reason=str(error))
    except ImportError as error:
        return _refused("preview_without_transformers", error=str(error))
    except Exception as error:  # files of any origin, read by a library that raises many things
        return _refused("preview_tokenizer_unreadable", error=f"{type(error).__name__}: {error}")
    path, wanted, limit = Path(args.dataset_path), wanted_of(request), request["limit"]
    try:
        rows = preview(
            path, wanted, request["lines"], limit=limit, show=lambda example: shown(example, tokenizer, args)
        )
        lengths = (
            measure(path, wanted, lambda example: length_of(example, tokenizer, args), limit=limit)
            if request["measure"]
            else None
        )
    except Refused as error:
        return _refused("dataset_rows_unreadable", reason=str(error))
    end = {"end": tokenizer.eos_token, "eos": own_end} if own_end else None
    return {"rows": rows, "own_template": own_template, "turn_end": end, "lengths": lengths}


def load_tokenizer(args: argparse.Namespace, *, pictured: bool) -> tuple[Any, bool, str]:
    """Return the tokenizer as the training has it.

    Also whether its chat template is the base model's own, and the base's own end where turns end otherwise.
    """
    llm.prepare_environment(args)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it warns that there is no torch
    find_spec = importlib.util.find_spec

    def find_light(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in HEAVY else find_spec(name, package)

    importlib.util.find_spec = find_light
    from transformers import AutoTokenizer

    path = Path(args.model_path)
    tokenizer = AutoTokenizer.from_pretrained(path, **loading.code(path))
    beside = path / "chat_template.json"  # where processors of earlier releases keep theirs
    if pictured and tokenizer.chat_template is None and beside.is_file():
        tokenizer.chat_template = json.loads(beside.read_text("utf-8"))["chat_template"]
    add_tokens(tokenizer, args)
    own = tokenizer.chat_template is not None or getattr(args, "chat_template", "auto") != "auto"
    if pictured:
        pictures.choose_template(tokenizer, path, args, tokenizer, image=MARK)
    else:
        chat.choose_template(tokenizer, path, args)
    return tokenizer, own, chat.end_turns(tokenizer, path)


# ---- sequences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequence:
    """A sequence of the training. `whole` is the text that it is a part of, from the token `begins` on."""

    rendered: Rendered
    role: str
    weight: int
    whole: TokenizedText
    begins: int = 0


def shown(example: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return the first sequences of an example, how many there are, and what is told of them; {} if it has none."""
    if isinstance(example, Pair | Graded | Caption):
        return {}
    found = sequences_of(example, tokenizer, args)
    over = [[] if isinstance(example, Text) else examples.exceeded_limits(one.rendered, args) for one in found]
    whole = isinstance(example, Preference)
    notes = dict.fromkeys(code for one in found for code in one.rendered.notes)
    if isinstance(example, Text) and len(found) > 1:
        notes["text_split"] = None
    if any(over):
        notes["row_too_long" if whole or all(over) else "answer_too_long"] = None
    if isinstance(example, Conversation) and example.pictures:
        notes["pictures_not_counted"] = None
    return {
        "notes": list(notes),
        "sequence_count": len(found),
        "sequences": [
            {
                "role": one.role,
                "used": not (any(over) if whole else exceeded),
                "exceeded": {name: getattr(args, name) for name in exceeded},
                **counted(one, exceeded, args),
            }
            for one, exceeded in zip(found[:SHOWN_SEQUENCES], over, strict=False)
        ],
    }


def sequences_of(example: Any, tokenizer: Any, args: argparse.Namespace) -> list[Sequence]:
    """Return what the training makes of an example; pictures are marks in the text."""
    match example:
        case Text():
            return _pieces(example, tokenizer, args)
        case Question():
            one = _asked(example, tokenizer, args)
            text = written(one.example.prompt, one.example.tools, tokenizer, add_generation_prompt=True)
            return [Sequence(one, "question", 1, TokenizedText(text, one.tokens, tokenizer))]
        case Preference():
            roles = [("chosen", 1), ("rejected", -1)]
        case Labelled():
            roles = [("answer", 1 if example.label else -1)]
        case _:
            roles = [("answer", 1)] * len(example.learned)
    found = []
    for one, (role, weight) in zip(_answers(example, tokenizer, args), roles, strict=True):
        turns = [*one.example.prompt, one.example.completion]
        text = written(turns, one.example.tools, tokenizer, add_generation_prompt=False)
        found.append(Sequence(one, role, weight, TokenizedText(text, one.tokens, tokenizer)))
    return found


def length_of(example: Any, tokenizer: Any, args: argparse.Namespace) -> RowLength | None:
    """Return the tokens of what the training makes of an example; of a text before it is split."""
    match example:
        case Pair() | Graded() | Caption():
            return None
        case Text():
            return row_length([(0, len(render_text(example, tokenizer).tokens))], split=True)
        case Question():
            found = [_asked(example, tokenizer, args)]
        case _:
            found = _answers(example, tokenizer, args)
    return row_length([(min(one.start, len(one.tokens)), len(one.tokens)) for one in found])


def _asked(example: Question, tokenizer: Any, args: argparse.Namespace) -> Rendered:
    (one,) = examples.sequences_of(
        with_instruction(example, getattr(args, "system_prompt", None) or ""), tokenizer, args
    )
    return one


def _answers(example: Any, tokenizer: Any, args: argparse.Namespace) -> list[Rendered]:
    if not getattr(example, "pictures", ()):
        return examples.sequences_of(example, tokenizer, args)
    try:
        folders = pictures.picture_folders(args, Path(args.dataset_path))
        return [render_answer(answer, tokenizer) for answer in pictures.answers_of(example, folders)]
    except Refused as error:
        raise RowProblem("row_refused", reason=str(error)) from error


def _pieces(example: Text, tokenizer: Any, args: argparse.Namespace) -> list[Sequence]:
    """Return a document in the pieces that are learned; they share its text, with its beginning and end."""
    limited = any(name in args for name in examples.LIMITS)
    found = examples.sequences_of(example, tokenizer, args) if limited else [render_text(example, tokenizer)]
    tokens = [token for one in found for token in one.tokens]
    bare = list(tokenizer(example.text, add_special_tokens=False)["input_ids"])
    before = next((place for place in range(len(tokens)) if tokens[place : place + len(bare)] == bare), 0)
    first, last = (
        "".join(tokenizer.convert_ids_to_tokens(some)) for some in (tokens[:before], tokens[before + len(bare) :])
    )
    whole = TokenizedText(first + example.text + last, tokens, tokenizer)
    begins = accumulate((len(one.tokens) for one in found), initial=0)
    return [Sequence(one, "text", 1, whole, place) for one, place in zip(found, begins, strict=False)]


def counted(one: Sequence, over: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Return the tokens of a sequence, counted and as spans."""
    count, start = len(one.rendered.tokens), one.rendered.start
    learned_from = 0 if getattr(args, "mask_prompt", True) is False else min(start, count)
    fates = [
        Fate(one.weight if number >= learned_from else 0, cut=_beyond(number, start, over, args))
        for number in range(count)
    ]
    return {
        "tokens": count,
        "given": learned_from,
        "learned": count - learned_from,
        "spans": spans(one.whole, one.begins, fates),
    }


def _beyond(number: int, start: int, over: list[str], args: argparse.Namespace) -> bool:
    """Say whether a token is beyond a limit that its sequence exceeds."""
    if "max_input_length" in over and args.max_input_length <= number < start:
        return True
    if "max_content_length" in over and number >= start + args.max_content_length:
        return True
    return "max_seq_length" in over and number >= args.max_seq_length


def _refused(code: str, **params: str) -> dict[str, Any]:
    return {"refused": {"code": code, "params": params}}


if __name__ == "__main__":
    main()
