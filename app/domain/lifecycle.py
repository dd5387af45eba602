"""The lifecycle rules: six paths, what every state on a path needs, and what follows from it for jobs.

`PATHS` and the rows of `app.domain.kinds` are the only places where the rules are written down; the violations here and
the form of `app.domain.form` are both read off them.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from app.domain.call_rules import call_violations
from app.domain.definition import (
    CUSTOM_TARGET,
    FALSE_AS,
    ROW_KINDS,
    ConfigTemplate,
    LauncherConfig,
    MethodDefinition,
    RunConfig,
    Wire,
)
from app.domain.enums import JobKind, ModelState, TrainingType
from app.domain.errors import Invalid, Violation
from app.domain.kinds import GROUP_STAGES, KINDS, METHOD_STAGES, OUTPUT_STAGES, STAGES, Member, Stage, stages_where
from app.domain.launchers import GROUP_KINDS, MAX_PROCESSES, LauncherKind
from app.domain.names import MAX_TECHNIQUE_LENGTH, is_label, name_violations
from app.domain.plain_text import shown
from app.domain.pointers import pointer
from app.domain.stage_calls import platform_placeholders

Lifecycle = tuple[ModelState, ...]

PATHS: tuple[Lifecycle, ...] = (
    (ModelState.CUSTOMIZED,),
    (ModelState.CUSTOMIZED, ModelState.COMPLETE),
    (ModelState.CUSTOMIZED, ModelState.ONLINE),
    (ModelState.CUSTOMIZED, ModelState.COMPLETE, ModelState.ONLINE),
    (ModelState.COMPLETE,),
    (ModelState.COMPLETE, ModelState.ONLINE),
)


@dataclass(frozen=True)
class StateRule:
    """What a state needs: the stage that produces its model, and the stage that asks it once switched on."""

    producer: Stage
    inference: Stage | None


def _state_rule(state: ModelState) -> StateRule:
    (producer,) = stages_where(lambda rule: rule.produces is state)
    inference = stages_where(lambda rule: rule.asks is state)
    return StateRule(producer=producer, inference=inference[0] if inference else None)


STATE_RULES: dict[ModelState, StateRule] = {state: _state_rule(state) for state in ModelState}

# Allowed on a path without its state, if complete; it then runs first.
OPTIONAL_OFF_PATH: Final[Stage] = JobKind.TRAINING

# The state whose model a stage produces or asks.
STATE_OF_STAGE: dict[Stage, ModelState] = {
    stage: state for stage in STAGES if (state := KINDS[stage].state) is not None
}

MAX_OUTPUT: Final = 200
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)

# What every stage consists of, with the code for its absence; a module stands for the file.
STAGE_MEMBERS = {"file": "missing_file", "conda_env": "missing_environment"}
# What the program of a configured deploy target leaves no room for.
_CALL_MEMBERS = (*STAGE_MEMBERS, "module", "arguments", "config", "env", "working_directory", "include")


class StateNotOnPath(Invalid):
    """A job shall reach a state that its method's path does not have."""

    code = "state_not_on_path"


def find_path(lifecycle: Sequence[str] | None) -> Lifecycle | None:
    """Return the path that equals `lifecycle`, order included; `None` if there is none."""
    return next((path for path in PATHS if lifecycle is not None and list(path) == list(lifecycle)), None)


def states(lifecycle: Sequence[str]) -> Lifecycle:
    """Return the states of a lifecycle that is known to be one of the six; raises `ValueError` otherwise."""
    path = find_path(lifecycle)
    if path is None:
        raise ValueError(f"{list(lifecycle)} is not a lifecycle")
    return path


def path_text(lifecycle: Sequence[str]) -> str:
    """Return a path as people read it: `customized → complete`."""
    return " → ".join(lifecycle)


def producing_stage(lifecycle: Sequence[str]) -> Stage:
    """Return the stage that makes a method's first model: training, or saving on the paths without `customized`."""
    return STATE_RULES[states(lifecycle)[0]].producer


def trains(lifecycle: Sequence[str], stage: Stage) -> bool:
    """Whether `stage` of the method trains: training, or saving on the paths without `customized`."""
    return stage in (OPTIONAL_OFF_PATH, producing_stage(lifecycle))


def chain(lifecycle: Sequence[str], through: str, *, with_training: bool = False) -> tuple[Stage, ...]:
    """Return the jobs that bring a base model to the state `through`, in order.

    `with_training` says that the method has a training stage; it matters on the paths without `customized`, where
    training is optional and runs first.
    """
    path = states(lifecycle)
    if through not in path:
        raise StateNotOnPath(pointer="/through", state=shown(str(through)), path=path_text(path))
    reached = path[: path.index(ModelState(through)) + 1]
    stages = [STATE_RULES[state].producer for state in reached]
    if with_training and OPTIONAL_OFF_PATH not in stages:
        stages.insert(0, OPTIONAL_OFF_PATH)
    return tuple(stages)


def source_state(lifecycle: Sequence[str], stage: Stage) -> ModelState | None:
    """Return the state of the model that `stage` works on; `None` is the base model."""
    path, state = states(lifecycle), STATE_OF_STAGE[stage]
    if STATE_RULES[state].inference is stage:
        return state
    position = path.index(state) if state in path else 0
    return path[position - 1] if position > 0 else None


def runnable_stages(definition: MethodDefinition) -> tuple[Stage, ...]:
    """Return the stages that a valid method can run, in the order of the stages."""
    return tuple(stage for stage in STAGES if definition.stage_config(stage) is not None)


def violations(
    definition: MethodDefinition, *, deploy_targets: Collection[str], custom_targets: Collection[str] = ()
) -> list[Violation]:
    """Return everything that is wrong with a method, in the order of its members.

    `deploy_targets` are the names of the configured targets, `custom_targets` those to which scripts of users deploy.
    Where the lifecycle is not one of the six, the rest is judged as far as it does not depend on the path.
    """
    path = find_path(definition.lifecycle)
    return [
        *name_violations(definition.name),
        *_label_violations(definition),
        *_stage_violations(definition, path),
        *_launcher_violations(definition),
        *_output_violations(definition),
        *_call_violations(definition, path),
        *_inference_violations(definition, path),
        *_deployment_violations(definition, path, deploy_targets=deploy_targets, custom_targets=custom_targets),
        *_argument_violations(definition),
        *_data_violations(definition),
        *_repository_violations(definition),
        *_unknown_fields(definition),
    ]


def _label_violations(definition: MethodDefinition) -> Iterator[Violation]:
    if definition.training_type is None:
        yield Violation("/training_type", "missing_training_type", {"known": _listed(list(TrainingType))})
    elif definition.training_type not in list(TrainingType):
        params = {"value": shown(definition.training_type), "known": _listed(list(TrainingType))}
        yield Violation("/training_type", "unknown_training_type", params)
    if not is_label(definition.technique):
        limits = {"value": shown(definition.technique), "limit": MAX_TECHNIQUE_LENGTH}
        yield Violation("/technique", "invalid_technique", limits)
    known_paths = "; ".join(path_text(path) for path in PATHS)
    if definition.lifecycle is None:
        yield Violation("/lifecycle", "missing_lifecycle", {"known": known_paths})
    elif find_path(definition.lifecycle) is None:
        params = {"value": shown(path_text(definition.lifecycle)) or "[]", "known": known_paths}
        yield Violation("/lifecycle", "unknown_lifecycle", params)


def _stage_violations(definition: MethodDefinition, path: Lifecycle | None) -> Iterator[Violation]:
    for stage in METHOD_STAGES:
        if STATE_RULES[STATE_OF_STAGE[stage]].inference is stage:
            yield from _asking_stage(definition, path, stage)
        else:
            yield from _producing_stage(definition, path, stage)
    for name, config in definition.stages.items():
        if name not in METHOD_STAGES and config is not None:
            params = {"stage": shown(name), "known": _listed(METHOD_STAGES)}
            yield Violation(pointer("stages", name), "unknown_stage", params)


def _producing_stage(definition: MethodDefinition, path: Lifecycle | None, stage: Stage) -> Iterator[Violation]:
    config = definition.stage_config(stage)
    if path is not None and STATE_OF_STAGE[stage] in path:
        yield from _missing_members(config, stage)
    elif config is None:
        return
    elif path is None:
        yield from _missing_members(config, stage)
    elif stage is OPTIONAL_OFF_PATH:
        for member in _absent(config):
            params = {"member": member, "path": path_text(path)}
            yield Violation(pointer("stages", stage, member), "incomplete_training", params)
    else:
        yield _stage_off_path(stage, path)


def _asking_stage(definition: MethodDefinition, path: Lifecycle | None, stage: Stage) -> Iterator[Violation]:
    config, state = definition.stage_config(stage), STATE_OF_STAGE[stage]
    on_path = path is None or state in path
    if on_path and definition.switched_on(state):
        yield from _missing_members(config, stage)
    elif config is None:
        return
    elif path is not None and not on_path:
        yield _stage_off_path(stage, path)
    else:
        yield Violation(pointer("stages", stage), "inference_not_switched_on", {"stage": stage, "state": state})


def _missing_members(config: RunConfig | None, stage: Stage) -> Iterator[Violation]:
    for member in _absent(config):
        params = {"stage": stage, "state": STATE_OF_STAGE[stage]}
        yield Violation(pointer("stages", stage, member), STAGE_MEMBERS[member], params)


def _stage_off_path(stage: Stage, path: Lifecycle) -> Violation:
    params = {"stage": stage, "state": STATE_OF_STAGE[stage], "path": path_text(path)}
    return Violation(pointer("stages", stage), "stage_off_path", params)


def _launcher_violations(definition: MethodDefinition) -> Iterator[Violation]:
    for stage in METHOD_STAGES:
        launcher = _launcher(definition, stage)
        if launcher is None:
            continue
        if stage in GROUP_STAGES:
            yield from _wrong_launcher(launcher, ("stages", stage, "launcher"))
        else:
            params = {"stage": stage, "known": _listed(GROUP_STAGES)}
            yield Violation(pointer("stages", stage, "launcher"), "launcher_not_for_stage", params)


def _wrong_launcher(launcher: LauncherConfig, at: tuple[str, ...]) -> Iterator[Violation]:
    known = _listed(list(LauncherKind))
    if _blank(launcher.kind):
        yield Violation(pointer(*at, "kind"), "missing_launcher", {"known": known})
    elif launcher.kind not in list(LauncherKind):
        yield Violation(pointer(*at, "kind"), "unknown_launcher", {"value": shown(str(launcher.kind)), "known": known})
    if launcher.processes is None:
        return
    if launcher.kind == LauncherKind.PYTHON:
        yield Violation(pointer(*at, "processes"), "processes_of_python", {"known": _listed(GROUP_KINDS)})
    elif not 1 <= launcher.processes <= MAX_PROCESSES:
        params = {"value": launcher.processes, "limit": MAX_PROCESSES}
        yield Violation(pointer(*at, "processes"), "processes_out_of_range", params)


def _output_violations(definition: MethodDefinition) -> Iterator[Violation]:
    for stage in METHOD_STAGES:
        output = definition.output(stage)
        if output is None:
            continue
        parts = output.split("/")
        if stage not in OUTPUT_STAGES:
            params: dict[str, Any] = {"stage": stage, "known": _listed(OUTPUT_STAGES)}
            yield Violation(pointer("stages", stage, "output"), "output_not_for_stage", params)
        elif not output.isprintable() or len(output) > MAX_OUTPUT or "\\" in output or _wrong_parts(parts):
            params = {"value": shown(output), "limit": MAX_OUTPUT}
            yield Violation(pointer("stages", stage, "output"), "invalid_output", params)


def _wrong_parts(parts: Sequence[str]) -> bool:
    """Say whether a path leaves its folder, or has parts that mean something else in patterns."""
    return any(part in ("", ".", "..") or "**" in part for part in parts)


def _call_violations(definition: MethodDefinition, path: Lifecycle | None) -> Iterator[Violation]:
    for stage in STAGES:
        config = definition.stage_config(stage)
        if config is None:
            continue
        # while the path is unknown, saving may turn out to be what trains
        producing = stage is JobKind.SAVING if path is None else stage is producing_stage(path)
        known = platform_placeholders(stage, definition.training_type, producing=producing)
        at = ("deployment",) if KINDS[stage].member is Member.DEPLOYMENT else ("stages", stage)
        yield from call_violations(config, at, known)


def _inference_violations(definition: MethodDefinition, path: Lifecycle | None) -> Iterator[Violation]:
    for state, rule in STATE_RULES.items():
        if rule.inference and definition.switched_on(state) and path is not None and state not in path:
            params = {"state": state, "path": path_text(path)}
            yield Violation(pointer("inference", state), "inference_off_path", params)


def _deployment_violations(
    definition: MethodDefinition,
    path: Lifecycle | None,
    *,
    deploy_targets: Collection[str],
    custom_targets: Collection[str],
) -> Iterator[Violation]:
    deployment = definition.deployment
    known = ", ".join([CUSTOM_TARGET, *sorted(deploy_targets)])
    if deployment is None:
        if path is not None and ModelState.ONLINE in path:
            yield Violation("/deployment/target", "missing_deploy_target", {"known": known})
    elif path is not None and ModelState.ONLINE not in path:
        yield Violation("/deployment", "deployment_off_path", {"path": path_text(path)})
    elif _blank(deployment.target):
        yield Violation("/deployment/target", "missing_deploy_target", {"known": known})
    elif deployment.target == CUSTOM_TARGET or deployment.target in custom_targets:
        for member in _absent(deployment):
            yield Violation(pointer("deployment", member), "incomplete_custom_deployment", {"member": member})
    elif deployment.target in deploy_targets:
        for member in _present(deployment, _CALL_MEMBERS):
            params = {"member": member, "target": deployment.target}
            yield Violation(pointer("deployment", member), "deployment_file_not_custom", params)
    else:
        params = {"target": shown(str(deployment.target)), "known": known}
        yield Violation("/deployment/target", "unknown_deploy_target", params)


def _argument_violations(definition: MethodDefinition) -> Iterator[Violation]:
    value = definition.arguments.false_as
    if value not in FALSE_AS:
        params = {"value": shown(value), "known": ", ".join(f'"{text}"' for text in FALSE_AS)}
        yield Violation("/arguments/false_as", "unknown_false_as", params)


def _data_violations(definition: MethodDefinition) -> Iterator[Violation]:
    for place, kind in enumerate(definition.data.learns_from if definition.data is not None else ()):
        if kind not in ROW_KINDS:
            params = {"kind": shown(kind), "known": ", ".join(ROW_KINDS)}
            yield Violation(pointer("data", "learns_from", str(place)), "unknown_row_kind", params)


def _repository_violations(definition: MethodDefinition) -> Iterator[Violation]:
    repository = definition.repository
    if repository is None:
        return
    git, commit = repository.git or "", repository.commit or ""
    if not git.removeprefix("file://").startswith("/") or not git.isprintable():
        yield Violation("/repository/git", "repository_not_local", {"value": shown(git)})
    if not _COMMIT.fullmatch(commit):
        yield Violation("/repository/commit", "commit_not_full", {"value": shown(commit)})


def _unknown_fields(definition: MethodDefinition) -> Iterator[Violation]:
    parts: list[tuple[tuple[str, ...], Wire | None]] = [
        ((), definition),
        *((("stages", stage), definition.stages.get(stage)) for stage in METHOD_STAGES),
        *((("stages", stage, "launcher"), _launcher(definition, stage)) for stage in METHOD_STAGES),
        *((("stages", stage, "config"), _config(definition.stages.get(stage))) for stage in METHOD_STAGES),
        (("inference",), definition.inference),
        (("deployment",), definition.deployment),
        (("deployment", "config"), _config(definition.deployment)),
        (("arguments",), definition.arguments),
        (("data",), definition.data),
        (("repository",), definition.repository),
    ]
    for parents, part in parts:
        if part is None:
            continue
        for name in part.unknown:
            params = {"field": shown(name), "known": ", ".join(type(part).model_fields)}
            yield Violation(pointer(*parents, name), "unknown_field", params)


def _launcher(definition: MethodDefinition, stage: Stage) -> LauncherConfig | None:
    config = definition.stages.get(stage)
    return config.launcher if config is not None else None


def _config(config: RunConfig | None) -> ConfigTemplate | None:
    return config.config if config is not None else None


def _absent(config: RunConfig | None) -> list[str]:
    has_module = config is not None and not _blank(config.module)
    return [
        member
        for member in STAGE_MEMBERS
        if config is None or (_blank(getattr(config, member)) and not (member == "file" and has_module))
    ]


def _present(config: RunConfig, members: Collection[str]) -> list[str]:
    values = {member: getattr(config, member) for member in members}
    return [
        member
        for member, value in values.items()
        if (not _blank(value) if isinstance(value, str) else value is not None)
    ]


def _blank(value: str | None) -> bool:
    return value is None or not value.strip()


def _listed(values: Collection[str]) -> str:
    return ", ".join(values)
