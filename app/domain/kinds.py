"""What each kind of job is: one row per kind. No other module holds a set of kinds.

A new kind is a member of `JobKind` and a row of `_rule`: without the row neither mypy nor the import passes. A kind
that is a stage of methods stands in `Stage` as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal, assert_never, get_args

from app.domain.enums import JobKind, ModelState

Stage = Literal[
    JobKind.TRAINING,
    JobKind.SAVING,
    JobKind.INFERENCE_CUSTOMIZED,
    JobKind.INFERENCE_COMPLETE,
    JobKind.DEPLOYMENT,
]
"""A step of a method: a Python file and a conda environment."""


class Member(StrEnum):
    """Member of a method's definition that says what a stage runs."""

    STAGES = "stages"  # by the stage's name
    DEPLOYMENT = "deployment"


class SlotPool(StrEnum):
    """Slots of a node that kinds share, so that a short job does not wait for a long one."""

    STAGES = "stages"
    INFERENCE = "inference"
    BUILDS = "builds"


class AcceleratorUse(StrEnum):
    """What a job has of its node's accelerators."""

    EXCLUSIVE = "exclusive"  # holds those that it asks for
    SHARED = "shared"  # holds none, sees the one with most free memory
    NONE = "none"


class ArgumentStyle(StrEnum):
    """How the contract writes the arguments of a stage's script."""

    EQUALS = "equals"  # --name=value
    PAIRS = "pairs"  # --name value


class EventSubject(StrEnum):
    """What the events of a job are about: the first half of their names."""

    JOB = "job"
    QUESTION = "question"
    ENVIRONMENT = "environment"
    BASE_MODEL = "base-model"


@dataclass(frozen=True, kw_only=True)
class KindRule:
    """Everything that depends on a job's kind alone; what a row leaves out, the kind has not."""

    member: Member | None = None
    """Where a method's definition says what it runs; `None`: it is no stage of a method."""
    produces: ModelState | None = None
    """State of the model that it makes."""
    asks: ModelState | None = None
    """State of the model that it asks: it is inference, and its output is the answer."""

    needs_environment: bool
    """Runs in its environment, which its node must have."""
    pool: SlotPool
    accelerators: AcceleratorUse
    counts_in_limits: bool = False
    """Counts against the limits of its queue."""
    may_be_group: bool = False
    """May be a group of processes: its result is in files, not in what one of them prints."""
    safe_to_repeat: bool
    """A script that had begun may be run again unasked: it writes into a fresh folder only."""

    submitted_alone: bool = False
    """May be submitted as a single stage."""
    listed: bool
    """Is in a list of jobs that does not name kinds."""

    reaches_out: bool = False
    """Publishes to a server by its nature: contained, it keeps its network and the folder that servers read."""
    argument_style: ArgumentStyle | None = None
    """`None`: what runs is a program of the product."""
    has_checkpoints: bool = False
    """Resumes from the newest checkpoint of earlier attempts."""
    checkpoints_expire: bool = False
    """Its checkpoints are removed some time after it succeeded."""
    has_forecast: bool = False
    """Its end is foreseen by its time limit and its progress."""
    reports_status_key: bool = False
    """Shares a status key with DeepExtension's scripts and backend."""
    reports_pid: bool = False
    """Its pid is in the status key."""
    event_subject: EventSubject | None = None
    """`None`: webhooks hear nothing of it."""

    @property
    def is_stage(self) -> bool:
        """Whether a method says what it runs."""
        return self.member is not None

    @property
    def is_inference(self) -> bool:
        """Whether it asks a model."""
        return self.asks is not None

    @property
    def answers_request(self) -> bool:
        """Whether it runs for one request; its output is of no use afterwards."""
        return not self.listed

    @property
    def holds_accelerators(self) -> bool:
        """Whether it has accelerators for itself."""
        return self.accelerators is AcceleratorUse.EXCLUSIVE

    @property
    def state(self) -> ModelState | None:
        """State of the model that it makes or asks."""
        return self.produces or self.asks


def _rule(kind: JobKind) -> KindRule:
    match kind:
        case JobKind.TRAINING:
            return KindRule(
                member=Member.STAGES,
                produces=ModelState.CUSTOMIZED,
                needs_environment=True,
                pool=SlotPool.STAGES,
                accelerators=AcceleratorUse.EXCLUSIVE,
                counts_in_limits=True,
                may_be_group=True,
                safe_to_repeat=True,
                submitted_alone=True,
                listed=True,
                argument_style=ArgumentStyle.EQUALS,
                has_checkpoints=True,
                checkpoints_expire=True,
                has_forecast=True,
                reports_status_key=True,
                reports_pid=True,
                event_subject=EventSubject.JOB,
            )
        case JobKind.SAVING:
            return KindRule(
                member=Member.STAGES,
                produces=ModelState.COMPLETE,
                needs_environment=True,
                pool=SlotPool.STAGES,
                accelerators=AcceleratorUse.EXCLUSIVE,
                counts_in_limits=True,
                may_be_group=True,
                safe_to_repeat=True,
                submitted_alone=True,
                listed=True,
                argument_style=ArgumentStyle.PAIRS,
                has_checkpoints=True,
                has_forecast=True,
                reports_status_key=True,
                event_subject=EventSubject.JOB,
            )
        case JobKind.DEPLOYMENT:
            return KindRule(
                member=Member.DEPLOYMENT,
                produces=ModelState.ONLINE,
                needs_environment=True,
                pool=SlotPool.STAGES,
                accelerators=AcceleratorUse.NONE,
                counts_in_limits=True,
                safe_to_repeat=False,  # it may have changed something that the service cannot see
                reaches_out=True,
                submitted_alone=True,
                listed=True,
                argument_style=ArgumentStyle.PAIRS,
                has_forecast=True,
                reports_status_key=True,
                event_subject=EventSubject.JOB,
            )
        case JobKind.INFERENCE_CUSTOMIZED:
            return _inference(ModelState.CUSTOMIZED)
        case JobKind.INFERENCE_COMPLETE:
            return _inference(ModelState.COMPLETE)
        case JobKind.ENVIRONMENT:
            return KindRule(
                needs_environment=False,
                pool=SlotPool.BUILDS,
                accelerators=AcceleratorUse.NONE,
                safe_to_repeat=True,
                listed=True,
                event_subject=EventSubject.ENVIRONMENT,
            )
        case JobKind.BASE_MODEL:
            return KindRule(
                needs_environment=True,
                pool=SlotPool.STAGES,
                accelerators=AcceleratorUse.NONE,  # the same seed makes the same weights, on a CPU
                safe_to_repeat=True,
                listed=True,
                has_forecast=True,
                event_subject=EventSubject.BASE_MODEL,
            )
        case JobKind.PREVIEW:
            return KindRule(
                needs_environment=True,
                pool=SlotPool.INFERENCE,
                accelerators=AcceleratorUse.NONE,
                safe_to_repeat=True,
                listed=False,
            )
        case _:
            assert_never(kind)


def _inference(state: ModelState) -> KindRule:
    return KindRule(
        member=Member.STAGES,
        asks=state,
        needs_environment=True,
        pool=SlotPool.INFERENCE,
        accelerators=AcceleratorUse.SHARED,
        safe_to_repeat=False,  # the caller has read a part of the answer already
        listed=False,
        argument_style=ArgumentStyle.EQUALS,
        event_subject=EventSubject.QUESTION,
    )


KINDS: Final[Mapping[JobKind, KindRule]] = MappingProxyType({kind: _rule(kind) for kind in JobKind})

STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


def stages_where(applies: Callable[[KindRule], bool]) -> tuple[Stage, ...]:
    """Return the stages whose row says so, in the order of the stages."""
    return tuple(stage for stage in STAGES if applies(KINDS[stage]))


def kinds_where(applies: Callable[[KindRule], bool]) -> frozenset[JobKind]:
    """Return the kinds whose row says so."""
    return frozenset(kind for kind, rule in KINDS.items() if applies(rule))


LISTED_KINDS: Final = kinds_where(lambda rule: rule.listed)
LIMITED_KINDS: Final = kinds_where(lambda rule: rule.counts_in_limits)
HOLDING_KINDS: Final = kinds_where(lambda rule: rule.holds_accelerators)
KINDS_IN_ENVIRONMENTS: Final = kinds_where(lambda rule: rule.needs_environment)
INFERENCE_KINDS: Final = kinds_where(lambda rule: rule.is_inference)
METHOD_STAGES: Final = stages_where(lambda rule: rule.member is Member.STAGES)
GROUP_STAGES: Final = stages_where(lambda rule: rule.may_be_group)
OUTPUT_STAGES: Final = stages_where(lambda rule: rule.member is Member.STAGES and rule.produces is not None)
"""Their result is a folder of files."""


def kinds_of(pool: SlotPool) -> frozenset[JobKind]:
    """Return the kinds that share the slots of a pool."""
    return kinds_where(lambda rule: rule.pool is pool)


def as_stage(kind: JobKind) -> Stage:
    """Return a kind that is a stage. Raises `ValueError` for what runs a program of the product."""
    if kind is JobKind.ENVIRONMENT or kind is JobKind.BASE_MODEL or kind is JobKind.PREVIEW:
        raise ValueError(f"{kind} is not a stage")
    return kind
