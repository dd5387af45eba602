"""Inference for rerankers: which of several documents answers a query best.

    python app/presets/reranker-demo/ask_reranker.py --base_model_path=tiny-encoder --model_path=reranker-out \
        --prompt='{"query": "How do I print?", "documents": ["Ask the desk.", "The printer is in room 4."]}'

The prompt is JSON with `query` and `documents`, or lines: the query, and a document in each further line. The documents
come back ordered, the best first, each with its score from 0 to 1. Of a chat the newest message counts.

Protocol: one JSON object a line on stdout, `{"status": "resp", "text": ...}` or `{"status": "error", "error": ...}`.
All other output belongs on stderr.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_ask as ask
from deepe_reranking import Reranker, shown
from deepe_rows import Refused

WAYS = 'write {"query": ..., "documents": [...]} as JSON, or the query and below it a document in each line'


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask a reranker.", allow_abbrev=False)
    parser.add_argument("--base_model_path", default=None, help="folder of the base model, or of the complete model")
    parser.add_argument("--model_path", default=None, help="folder of the customized or complete model")
    parser.add_argument("--prompt", default="", help="a query and documents")
    parser.add_argument("--history", default=None, help="JSON list of turns, the newest last; wins over the prompt")
    return parser


def main() -> None:
    parser = make_parser()
    parser.set_defaults(system_prompt=None)
    args, _unknown = parser.parse_known_args()
    ask.run(args, parser.get_default, answer)


def answer(args: argparse.Namespace) -> Iterator[str]:
    query, documents = asked_in(ask.turns_of(args)[-1]["content"])
    base, adapter = ask.folders(args)
    scores = Reranker.load(adapter or base, base).scores(query, documents)
    for score, text in sorted(zip(scores, documents, strict=True), key=lambda one: -one[0]):
        yield f"{shown(score)}  {text}\n"


def asked_in(text: str) -> tuple[str, list[str]]:
    """Return the query and the documents of a message. Raises `Refused` if one of them is missing."""
    if not text.lstrip().startswith("{"):
        query, *documents = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    else:
        try:
            given: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise Refused(f"the question begins like JSON and is none: {error}; {WAYS}") from error
        if more := given.keys() - {"query", "documents"}:
            raise Refused(f"{', '.join(sorted(more))}: not part of a question; {WAYS}")
        query, documents = given.get("query", ""), given.get("documents", [])
    if not isinstance(query, str) or not isinstance(documents, list) or not all(isinstance(d, str) for d in documents):
        raise Refused(f"a query is a text and documents are a list of texts; {WAYS}")
    if not query.strip() or not documents:
        raise Refused(f"a reranker compares documents for a query, and one of the two is missing; {WAYS}")
    return query, documents


if __name__ == "__main__":
    main()
