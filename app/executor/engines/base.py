"""The protocol of an engine: what places, watches and ends the attempts of one node.

The node's agent claims jobs and writes their ends; where and how an attempt's process lives is the engine's business.
What every engine promises, whatever dies in between:

- An attempt's command runs at most once. `prepare`, `place`, `recover` and `stop` may be repeated by anyone.
- `observe` never guesses: an attempt is EXITED only with a record of its end, written after nothing of it was left.
- What `stop` was asked for happens, also if nothing of the attempt runs yet.

Every engine runs the same supervisor, so the specification of a launch and the record of an exit are the supervisor's.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from app.executor.supervisor.client import AttemptPhase, ExitRecord, ExitWhy, LaunchSpec
from app.executor.supervisor.program import SUPERVISOR_TERMINATED

__all__ = [
    "SUPERVISOR_TERMINATED",
    "AttemptPhase",
    "AttemptState",
    "Engine",
    "ExitRecord",
    "ExitWhy",
    "LaunchSpec",
    "Strays",
]


@dataclass(frozen=True)
class AttemptState:
    """What the engine knows of an attempt now.

    `supervised`: a supervisor is alive. `pending`: it was placed, and its supervisor may still be on the way.
    `stopping`: a stop was received. `pid`: the stage's own process on its machine. `heartbeat_age` and
    `running_seconds` (without what the machine slept) are None when they cannot be known.
    """

    phase: AttemptPhase
    supervised: bool = False
    pending: bool = False
    stopping: bool = False
    pid: int | None = None
    heartbeat_age: float | None = None
    running_seconds: float | None = None
    exit: ExitRecord | None = None


@dataclass(frozen=True)
class Strays:
    """Processes of an attempt that nothing supervised: how many were ended, and how many cannot be."""

    ended: int
    unkillable: int


class Engine(Protocol):
    """Places, watches and ends the attempts of one node. Attempts are named by their ids."""

    def running(self, notify: Callable[[], None]) -> AbstractContextManager[None]:
        """Keep what makes placing quick. Call `notify` in the running loop when an attempt has something new to show.

        Notifications may be missed. The other methods also work outside of the context, only more slowly.
        """

    def observe(self, attempt_id: str) -> AttemptState:
        """Return what is known now. Never waits: an engine that must ask a cluster answers from its last look."""

    async def prepare(self, attempt_id: str, spec: LaunchSpec) -> None:
        """Write down what is to run; nothing starts. The first specification of an attempt stays."""

    async def place(self, attempt_id: str) -> None:
        """Have the prepared attempt run."""

    async def recover(self, attempt_id: str) -> None:
        """Have an attempt supervised whose supervisor died. This never starts its command."""

    async def stop(self, attempt_id: str, reason: str) -> None:
        """Have the attempt end; the first reason stays. Returns before it has ended."""

    async def end_strays(self, attempt_id: str) -> Strays:
        """End what lives of an attempt that is not known any more."""

    async def is_empty(self, attempt_id: str) -> bool:
        """Say whether no process of the attempt is left, wherever it went."""

    async def known_attempts(self) -> Sequence[str]:
        """Return the attempts that were prepared here and not discarded."""

    async def discard(self, attempt_id: str) -> None:
        """Remove what is left of an attempt whose end is written; what cannot go yet goes at a later call."""

    def silent_seconds(self, attempt_id: str, signature: str) -> float:
        """Return for how long the attempt has shown this signature of its files; restarts do not count anew. Blocks."""
