"""The model card: a README.md beside the weights that says what the model is, where it comes from and how good it is.

Its front matter is what model hubs read; the rest is for people. It holds nothing that the database does not know.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from app.domain.enums import ModelState, TrainingType
from app.domain.training_types import TYPES
from app.executor.attempts.artifacts import ArtifactKind, FileDigest

FILE_NAME = "README.md"
SCRIPT_CARD = "README.script.md"
_MARK = "<!-- written by DeepExtension -->"
_HEAD_BYTES = 64 * 1024

_LIBRARIES = {
    ArtifactKind.ADAPTER: "peft",
    ArtifactKind.MLX_ADAPTER: "mlx",
    ArtifactKind.IMAGE_ADAPTER: "diffusers",
    ArtifactKind.MODEL: "transformers",
    ArtifactKind.PIPELINE: "diffusers",
}
# of techniques whose models do another task than others of their training type
_TASKS = {"reward": "text-classification", "reranking": "text-ranking"}
_ADAPTERS = {ArtifactKind.ADAPTER, ArtifactKind.MLX_ADAPTER, ArtifactKind.IMAGE_ADAPTER}


@dataclass(frozen=True)
class Score:
    """A score on held-out samples, before and after the training."""

    name: str
    before: float | None
    after: float | None
    samples: int


@dataclass(frozen=True)
class ModelCard:
    """What a model card says. `lineage` names ids, such as the job's and the parent model's."""

    name: str
    state: ModelState
    training_type: TrainingType
    kind: ArtifactKind
    technique: str
    base_model: str
    method: str
    method_version: int
    created_at: datetime
    dataset: str | None = None
    dataset_digest: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: Sequence[Score] = ()
    lineage: Mapping[str, str] = field(default_factory=dict)


def render(card: ModelCard) -> str:
    """Return the card as Markdown with YAML front matter."""
    sections = [
        f"---\n{_front_matter(card)}---\n{_MARK}",
        f"# {_inline(card.name)}",
        _summary(card),
        _table("Evaluation", ("score", "before", "after", "samples"), [_score_row(score) for score in card.scores]),
        _table("Final metrics", ("metric", "value"), [(name, _number(value)) for name, value in card.metrics.items()]),
        _table(
            "Parameters", ("parameter", "value"), [(name, _value(value)) for name, value in card.parameters.items()]
        ),
        _table("Lineage", ("what", "id"), list(card.lineage.items())),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_model_card(folder: Path, card: ModelCard) -> Path:
    """Write the card into the model's folder and return its path. A card that the script wrote is kept beside it."""
    make_way(folder)
    path = folder / FILE_NAME
    temporary = folder / (FILE_NAME + ".tmp")
    temporary.unlink(missing_ok=True)  # a script may have put a link there
    with temporary.open("x", encoding="utf-8") as file:
        file.write(render(card))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def make_way(folder: Path) -> None:
    """Move the card that the script wrote aside; one of ours, such as a copied one, goes. Safe to run again."""
    path = folder / FILE_NAME
    if path.is_file():
        if _is_ours(path):
            path.unlink()
        else:
            path.replace(folder / SCRIPT_CARD)


def with_card(files: Sequence[FileDigest], text: str) -> list[FileDigest]:
    """Return the files of a model as they are once its card is written."""
    content = text.encode()
    own = FileDigest(path=FILE_NAME, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    return sorted([*files, own], key=lambda file: file.path)


def _is_ours(path: Path) -> bool:
    """Whether we wrote the card: then the mark follows its front matter."""
    with path.open("rb") as file:
        return _MARK.encode() in file.read(_HEAD_BYTES)


def _front_matter(card: ModelCard) -> str:
    document: dict[str, Any] = {
        "library_name": _LIBRARIES[card.kind],
        "pipeline_tag": _TASKS.get(card.technique, TYPES[card.training_type].hub_task),
        "base_model": card.base_model,
        "base_model_relation": "adapter" if card.kind in _ADAPTERS else "finetune",
        "tags": ["deepextension", card.technique, card.state.value],
    }
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def _summary(card: ModelCard) -> str:
    lines = [
        f"- State: {card.state.value}",
        f"- Base model: {_inline(card.base_model)}",
        f"- Method: {_inline(card.method)}, version {card.method_version} ({_inline(card.technique)})",
    ]
    if card.dataset is not None:
        digest = f" (sha256 `{card.dataset_digest}`)" if card.dataset_digest else ""
        lines.append(f"- Data set: {_inline(card.dataset)}{digest}")
    lines.append(f"- Created: {card.created_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC")
    return "\n".join(lines)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [_row(head), _row(["---"] * len(head)), *(_row([_inline(cell) for cell in row]) for row in rows)]
    return f"## {title}\n\n" + "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _score_row(score: Score) -> tuple[str, str, str, str]:
    return score.name, _number(score.before), _number(score.after), str(score.samples)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _value(value: object) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _inline(text: str) -> str:
    """Return text that stays on its line and in its cell, and is no markup."""
    flat = " ".join(text.split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
