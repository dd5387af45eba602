"""Code that a second person approves: what it is, and which states a review of it has.

The code of a stage is everything that decides what its process does before parameters and data: the files that run, the
module, and how the method calls it. Its digest names exactly that, so that an approval of it is of nothing else.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from app.domain.access import Permission, Role
from app.domain.errors import Violation


class CodeApproval(StrEnum):
    """Whether stages run code only that a second person has approved."""

    OFF = "off"
    REQUIRED = "required"


class ReviewState(StrEnum):
    """State of a review. Only `approved` code starts."""

    WAITING = "waiting"
    APPROVED = "approved"
    REJECTED = "rejected"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True)
class Code:
    """What a stage runs.

    `file`, `sha256`: its file; None for a module of the environment. `tree`: digest of all files that run with it; None
    for a file of the product, and for one that an earlier release pinned alone, of which nobody knows what it imports.
    `call`: how the method calls it, without what is default.
    """

    file: str | None = None
    sha256: str | None = None
    tree: str | None = None
    module: str | None = None
    shipped: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Return the sha256 that names this code."""
        text = json.dumps(self.document(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """Return what people know it by: its file, else its module."""
        return self.file or f"-m {self.module or self.call.get('module')}"

    def document(self) -> dict[str, Any]:
        """Return the JSON that is kept of it."""
        members: dict[str, Any] = {"file": self.file, "sha256": self.sha256, "tree": self.tree, "module": self.module}
        members |= {"shipped": self.shipped or None, "call": dict(self.call) or None}
        return {name: value for name, value in members.items() if value is not None}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Return the code that a document is kept of."""
        return cls(**document)


@dataclass(frozen=True)
class Author:
    """Who changed code: a principal, and its name at that time."""

    principal: str
    name: str


def not_approved(pointer: str, stage: str, code: Code, state: ReviewState, authors: frozenset[Author]) -> Violation:
    """Return the violation of a job whose stage, or named file, runs code that is not approved."""
    params = {
        "stage": stage,
        "file": code.name,
        "digest": code.digest,
        "state": state.value,
        "roles": approving_roles(),
    }
    if not authors:
        return Violation(pointer, "code_not_approved_author_unknown", params)
    names = ", ".join(sorted({author.name for author in authors}))
    return Violation(pointer, "code_not_approved", params | {"authors": names})


def approving_roles() -> str:
    """Return the roles that may approve code, as texts name them."""
    return ", ".join(role.value for role in Role if Permission.APPROVE in role.permissions)
