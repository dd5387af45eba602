"""The form of a method as data: what may be filled in on which path, what has a star, and when.

It is read off the tables of `app.domain.lifecycle`, so that a frontend needs no second copy of the rules. A field that
a path does not list must be left out. A listed field may be filled in if `allowed_when` is null or holds, and must be
if it is `required` or `required_when` holds.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any

from pydantic import ConfigDict, Field

from app.domain.definition import CUSTOM_TARGET, FALSE_AS
from app.domain.enums import ModelState
from app.domain.kinds import GROUP_STAGES, KINDS, METHOD_STAGES, Member, Stage
from app.domain.launchers import GROUP_KINDS, LauncherKind
from app.domain.lifecycle import (
    OPTIONAL_OFF_PATH,
    PATHS,
    STAGE_MEMBERS,
    STATE_OF_STAGE,
    STATE_RULES,
    Lifecycle,
    path_text,
)
from app.domain.pointers import pointer
from app.domain.texts import Language, labels
from app.domain.training_types import TYPES
from app.domain.values import Value

# Labels that the product proposes; any other label is taken as well.
TECHNIQUES = ("sft", "peft", "grpo", "ppo", "dpo", "orpo", "vl", "sd", "custom")

Labels = dict[Language, str]


class FieldKind(StrEnum):
    """What a field holds."""

    NAME = "name"
    TEXT = "text"
    CHOICE = "choice"
    SWITCH = "switch"
    NUMBER = "number"
    FILE = "file"
    ENVIRONMENT = "environment"
    DEPLOY_TARGET = "deploy_target"


_KIND_OF_MEMBER = {"file": FieldKind.FILE, "conda_env": FieldKind.ENVIRONMENT}


class _Frozen(Value):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Choice(_Frozen):
    """One value with its label."""

    value: str
    label: Labels


class Condition(_Frozen):
    """Holds if the member at `pointer` equals `equals`, or is one of `one_of`.

    If both are null, it holds if anything is given there or below.
    """

    pointer: str
    equals: Any = None
    one_of: list[str] | None = None


class FormField(_Frozen):
    """One field of the form."""

    pointer: str = Field(description="Where the value stands in the method (RFC 6901)")
    kind: FieldKind
    label: Labels
    help: Labels
    required: bool = Field(description="Always needed: the form shows a star")
    required_when: Condition | None = Field(default=None, description="Needed when this holds")
    allowed_when: Condition | None = Field(default=None, description="To be left out unless this holds")


class FormPath(_Frozen):
    """One of the six lifecycles with its fields."""

    lifecycle: list[ModelState]
    text: str
    label: Labels
    fields: list[FormField]


class MethodForm(_Frozen):
    """Everything a form for methods is made of."""

    fields: list[FormField] = Field(description="Fields of every method, whatever its lifecycle")
    training_types: list[Choice]
    techniques: list[Choice] = Field(description="Proposals; other labels are taken as well")
    states: list[Choice]
    stages: list[Choice]
    lifecycles: list[FormPath]
    deploy_targets: list[Choice] = Field(description="The configured ones, and `custom`")
    environments: list[str]
    false_as: list[str]
    launchers: list[Choice]


def method_form(
    *, deploy_targets: Sequence[str], environments: Sequence[str], custom_targets: Sequence[str] = ()
) -> MethodForm:
    """Return the form for an installation with these deploy targets, custom ones among them, and environments."""
    custom = Choice(value=CUSTOM_TARGET, label=labels("label_target_custom"))
    return MethodForm(
        fields=list(_common_fields()),
        training_types=[Choice(value=one, label=labels(rule.label)) for one, rule in TYPES.items()],
        techniques=[_choice("label_technique", word) for word in TECHNIQUES],
        states=[_choice("label_state", word) for word in ModelState],
        stages=[_choice("label_stage", word) for word in METHOD_STAGES],
        lifecycles=[_path(path, custom_targets) for path in PATHS],
        deploy_targets=[*(Choice(value=name, label=dict.fromkeys(Language, name)) for name in deploy_targets), custom],
        environments=list(environments),
        false_as=list(FALSE_AS),
        launchers=[_choice("label_launcher", word) for word in LauncherKind],
    )


def _path(path: Lifecycle, custom_targets: Sequence[str]) -> FormPath:
    label = {
        language: " → ".join(labels(f"label_state_{_code(state)}")[language] for state in path) for language in Language
    }
    fields = list(_path_fields(path, custom_targets))
    return FormPath(lifecycle=list(path), text=path_text(path), label=label, fields=fields)


def _common_fields() -> Iterator[FormField]:
    yield _field("/name", FieldKind.NAME, "name", required=True)
    yield _field("/description", FieldKind.TEXT, "description")
    yield _field("/training_type", FieldKind.CHOICE, "training_type", required=True)
    yield _field("/technique", FieldKind.CHOICE, "technique")
    yield _field("/lifecycle", FieldKind.CHOICE, "lifecycle", required=True)
    yield _field("/arguments/false_as", FieldKind.CHOICE, "false_as")
    yield _field("/arguments/declared_only", FieldKind.SWITCH, "declared_only")


def _path_fields(path: Lifecycle, custom_targets: Sequence[str]) -> Iterator[FormField]:
    if STATE_OF_STAGE[OPTIONAL_OFF_PATH] not in path:
        given = Condition(pointer=pointer("stages", OPTIONAL_OFF_PATH))
        yield from _stage_fields(OPTIONAL_OFF_PATH, required_when=given)
    for state in path:
        rule = STATE_RULES[state]
        if KINDS[rule.producer].member is Member.DEPLOYMENT:
            yield from _deployment_fields(custom_targets)
        else:
            yield from _stage_fields(rule.producer, required=True)
        if rule.inference is not None:
            switch = pointer("inference", state)
            on = Condition(pointer=switch, equals=True)
            yield _field(switch, FieldKind.SWITCH, f"inference_{_code(state)}")
            yield from _stage_fields(rule.inference, required_when=on, allowed_when=on)


def _stage_fields(
    stage: Stage,
    *,
    required: bool = False,
    required_when: Condition | None = None,
    allowed_when: Condition | None = None,
) -> Iterator[FormField]:
    for member in STAGE_MEMBERS:
        yield FormField(
            pointer=pointer("stages", stage, member),
            kind=_KIND_OF_MEMBER[member],
            label=labels(f"label_{_code(stage)}_{member}"),
            help=labels(f"help_{member}"),
            required=required,
            required_when=required_when,
            allowed_when=allowed_when,
        )
    if stage in GROUP_STAGES:
        yield from _launcher_fields(stage)


def _launcher_fields(stage: Stage) -> Iterator[FormField]:
    """Both are left empty for one Python process."""
    launcher = pointer("stages", stage, "launcher")
    kind = f"{launcher}/kind"
    yield FormField(
        pointer=kind,
        kind=FieldKind.CHOICE,
        label=labels(f"label_{_code(stage)}_launcher"),
        help=labels("help_launcher"),
        required=False,
        required_when=Condition(pointer=launcher),
    )
    yield FormField(
        pointer=f"{launcher}/processes",
        kind=FieldKind.NUMBER,
        label=labels(f"label_{_code(stage)}_processes"),
        help=labels("help_processes"),
        required=False,
        allowed_when=Condition(pointer=kind, one_of=list(GROUP_KINDS)),
    )


def _deployment_fields(custom_targets: Sequence[str]) -> Iterator[FormField]:
    custom = allowed = Condition(pointer="/deployment/target", equals=CUSTOM_TARGET)
    if custom_targets:  # one that brings a script fills in what is left out
        allowed = Condition(pointer="/deployment/target", one_of=[CUSTOM_TARGET, *custom_targets])
    yield _field("/deployment/target", FieldKind.DEPLOY_TARGET, "target", required=True)
    for member in STAGE_MEMBERS:
        yield FormField(
            pointer=pointer("deployment", member),
            kind=_KIND_OF_MEMBER[member],
            label=labels(f"label_deployment_{member}"),
            help=labels(f"help_{member}"),
            required=False,
            required_when=custom,
            allowed_when=allowed,
        )


def _field(at: str, kind: FieldKind, name: str, *, required: bool = False) -> FormField:
    return FormField(
        pointer=at, kind=kind, label=labels(f"label_{name}"), help=labels(f"help_{name}"), required=required
    )


def _choice(prefix: str, word: str) -> Choice:
    return Choice(value=word, label=labels(f"{prefix}_{_code(word)}"))


def _code(word: str) -> str:
    return word.replace("-", "_")
