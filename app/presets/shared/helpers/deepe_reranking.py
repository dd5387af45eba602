"""Queries with documents, and how well each document answers: what a reranker learns from, is measured with and asked.

A reranker (a cross-encoder) reads a query and a document together and gives one number: a sequence classification
model of transformers with one output. Heavy imports happen when a model is loaded.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepe_loading as loading
from deepe_adapters import read_config
from deepe_rows import Graded, Pair, Refused

AT_ONCE = 64  # pairs in one forward pass where no gradients are kept
DEPTH = 10  # places that mrr@10 and ndcg@10 look at
Right = Mapping[str, frozenset[str]]
"""The documents that some row names as answers to a query."""


@dataclass(frozen=True)
class Group:
    """A query with documents and their grades: 0 does not answer it, the more the better."""

    query: str
    documents: tuple[str, ...]
    grades: tuple[float, ...]

    @property
    def negatives(self) -> list[str]:
        """Return the documents that do not answer the query."""
        return [text for text, grade in zip(self.documents, self.grades, strict=True) if grade == 0]

    @property
    def teaches(self) -> bool:
        """Say whether some of the documents are better than others."""
        return len(set(self.grades)) > 1

    def with_negatives(self, texts: Iterable[str]) -> "Group":
        """Return the group with more documents that do not answer the query."""
        more = tuple(texts)
        return Group(self.query, (*self.documents, *more), (*self.grades, *[0.0] * len(more)))


def groups_of(rows: Sequence[Pair | Graded]) -> list[Group]:
    """Return a group for each pair, and one for all graded documents of a query; a document comes once in a group."""
    graded: dict[str, dict[str, float]] = {}
    found: list[Group | str] = []
    for row in rows:
        if isinstance(row, Pair):
            negatives = [text for text in dict.fromkeys(row.negatives) if text != row.positive]
            found.append(Group(row.anchor, (row.positive,), (1.0,)).with_negatives(negatives))
            continue
        if row.query not in graded:
            found.append(row.query)
        grades = graded.setdefault(row.query, {})
        if grades.setdefault(row.document, row.grade) != row.grade:
            raise Refused(f"{row.place}: the document has another label in an earlier row of the same query")
    return [
        Group(one, tuple(graded[one]), tuple(graded[one].values())) if isinstance(one, str) else one for one in found
    ]


def right_documents(groups: Iterable[Group]) -> Right:
    """Return what some row names as an answer, by query."""
    found: dict[str, set[str]] = {}
    for group in groups:
        texts = (text for text, grade in zip(group.documents, group.grades, strict=True) if grade > 0)
        found.setdefault(group.query, set()).update(texts)
    return {query: frozenset(texts) for query, texts in found.items()}


def drawn(group: Group, documents: Sequence[str], right: Right, count: int, seed: int) -> list[str]:
    """Return documents of other queries, `count` or as many as there are; none that answers this one."""
    taken = right[group.query].union(group.documents)
    order = random.Random(f"{seed} {group.query} {group.documents[0]}")
    found: dict[str, None] = {}
    for _ in range(8 * count):  # a sample of a large corpus hardly ever meets what is taken
        text = documents[order.randrange(len(documents))]
        if text not in taken:
            found[text] = None
        if len(found) == count:
            return list(found)
    free = [text for text in documents if text not in taken and text not in found]
    return [*found, *order.sample(free, min(count - len(found), len(free)))]


# --- measures -------------------------------------------------------------------------------------------------------


def measures(groups: Sequence[Group], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return means over queries: the best document first, the place of the first right one, the gain by grade."""
    ranked = [ranking(group.grades, given) for group, given in zip(groups, scores, strict=True)]
    return {
        "accuracy@1": sum(grades[0] == max(grades) for grades in ranked) / len(ranked),
        f"mrr@{DEPTH}": sum(map(reciprocal_rank, ranked)) / len(ranked),
        f"ndcg@{DEPTH}": sum(gain(grades) / gain(sorted(grades, reverse=True)) for grades in ranked) / len(ranked),
    }


def ranking(grades: Sequence[float], scores: Sequence[float]) -> list[float]:
    """Return the grades by score, the highest first; of equal scores the worst, so that a constant gains nothing."""
    pairs = sorted(zip(scores, grades, strict=True), key=lambda one: (-one[0], one[1]))
    return [grade for _, grade in pairs]


def reciprocal_rank(grades: Sequence[float]) -> float:
    return next((1 / place for place, grade in enumerate(grades[:DEPTH], start=1) if grade > 0), 0.0)


def gain(grades: Sequence[float]) -> float:
    return sum((2**grade - 1) / math.log2(place + 1) for place, grade in enumerate(grades[:DEPTH], start=1))


def shown(score: float) -> str:
    """Return a score as people see it: from 0 to 1."""
    return f"{1 / (1 + math.exp(-min(max(score, -50.0), 50.0))):.3f}"


# --- a model that answers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reranker:
    """A loaded model with its tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path, base: Path | None = None) -> "Reranker":
        """Load a complete model, or an adapter with its base model (`base`, else the one that it names)."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

        logging.set_verbosity_error()  # a new head is no news
        adapter = read_config(folder)
        weights = Path(base or adapter["base_model_name_or_path"]) if adapter else folder
        safe = loading.weights(weights, folder)
        model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=1, dtype=torch.float32, **safe)
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder)
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return cls(model.to(device).eval(), AutoTokenizer.from_pretrained(folder, **loading.code(folder)))

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return how well each document answers the query, as the model's own numbers: shares would round to 1."""
        import torch

        found: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(documents), AT_ONCE):
                some = list(documents[start : start + AT_ONCE])
                encoded = self.tokenizer(
                    [query] * len(some), some, padding=True, truncation=True, return_tensors="pt"
                ).to(self.model.device)
                found += self.model(**encoded).logits[:, 0].float().tolist()
        return found
