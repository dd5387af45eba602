"""Read a `tokenizer.json` from standard input and print what it says of its tokens, as JSON.

A program of the standard library that runs in a process of its own: such a file has up to tens of megabytes, and
decoding it holds the interpreter's lock and takes much memory. Its argument is a list of tokens to
look up.
"""

import contextlib
import json
import resource
import sys
from typing import Any

MEMORY_BYTES = 1024 * 1024 * 1024
CPU_SECONDS = 20
MAX_ADDED = 20_000
MAX_ID = 2**31
MAX_ANSWER_BYTES = 4 * 1024 * 1024


def facts(document: Any, wanted: list[str]) -> dict[str, Any]:
    """Return the number of ids, the special tokens, the ids of `wanted` and what is put before every text."""
    model = document["model"]
    entries = model.get("vocab") or {}
    # a Unigram vocabulary is a list of pairs, and its ids are the positions
    ids = {entry[0]: number for number, entry in enumerate(entries)} if isinstance(entries, list) else dict(entries)
    special = []
    for token in document.get("added_tokens") or []:
        ids[token["content"]] = token["id"]
        if token.get("special") and isinstance(token["content"], str):
            special.append(token["content"])
    numbers = [number for number in ids.values() if isinstance(number, int) and 0 <= number < MAX_ID]
    return {
        "ids": max(numbers) + 1 if numbers else 0,
        "special": special[:MAX_ADDED],
        "wanted": {token: ids.get(token) for token in wanted},
        "names": {str(ids[token]): token for token in special[:MAX_ADDED]},
        "first": _first(document.get("post_processor")),
    }


def _first(processor: Any) -> str | None:
    """Return the token that the post-processor puts before a single text."""
    match processor:
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
            return token
        case {"cls": [str(token), *_]}:
            return token
        case {"type": "Sequence", "processors": [*inner]}:
            return next((first for one in inner if (first := _first(one)) is not None), None)
        case _:
            return None


def main() -> None:
    # a platform that has no such limit (macOS) is left with that of time
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    answer = json.dumps(facts(json.load(sys.stdin), json.loads(sys.argv[1])))
    if len(answer) > MAX_ANSWER_BYTES:
        raise SystemExit("the answer is too long")
    sys.stdout.write(answer)


if __name__ == "__main__":
    main()
