"""What a caller needs to know before starting a method: readiness, parameters, the form."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.called_parameters import as_called
from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind
from app.domain.errors import Violation
from app.domain.form import MethodForm, method_form
from app.domain.kinds import Stage
from app.domain.library_options import DescribedOptions, OptionClass, with_parser_classes
from app.domain.lifecycle import find_path, producing_stage, runnable_stages
from app.domain.names import BASE_ENVIRONMENT
from app.domain.parameters import json_schema, withheld_arguments
from app.domain.rendering import filled_arguments
from app.domain.script_parameters import OptionUse, ScriptParameters
from app.domain.stage_calls import stage_call
from app.domain.texts import Language
from app.domain.training_types import inference_form
from app.presets.catalogue import ParameterInfo, load_manifests
from app.registry.environments.described_options import Described, OptionClasses, described_options, prefix_of
from app.registry.methods.files import MethodFiles
from app.registry.methods.pins import PinnedFile, Pins
from app.registry.methods.readiness import Readiness, readiness, with_cells
from app.registry.methods.readiness_matrix import cells_of, matrix
from app.registry.methods.record import Method
from app.registry.methods.script_modules import ScriptModules
from app.registry.methods.script_reading import ScriptReader
from app.registry.methods.service import Clock, MethodRegistry
from app.registry.methods.stage_members import file_pointer, stage_environments
from app.registry.scripts.module_names import hidden, modules_of, provided
from app.store import registry_facts
from app.store.registry_facts import RegistryFacts

# passed only when there is something to pass
_OCCASIONAL = frozenset(
    {"system_prompt", "reset_context", "history", "model_path", "system", "parameters"}
    | {"enable_thinking", "chat_template_kwargs"}
)


@dataclass(frozen=True)
class OptionClassUse:
    """A configuration class whose fields a stage's script takes; `described` is None until a node did so."""

    use: OptionUse
    described: OptionClass | None


@dataclass(frozen=True)
class StageParameters:
    """What a stage's script takes, as a JSON Schema, and how far the script could be read.

    A module that only the environment has is no `file`.
    """

    stage: Stage
    file: PinnedFile | None
    module: str | None
    schema: Mapping[str, Any]
    partly_read: bool
    remarks: Sequence[Violation]
    classes: Sequence[OptionClassUse] = ()


class MethodGuide:
    """Answers questions about methods; changes nothing."""

    def __init__(
        self,
        *,
        registry: MethodRegistry,
        files: MethodFiles,
        reader: ScriptReader,
        options: OptionClasses,
        clock: Clock,
    ) -> None:
        self._registry = registry
        self._options = options
        self._files = files
        self._reader = reader
        self._modules = ScriptModules(files)
        self._clock = clock

    async def validate(
        self, session: AsyncSession, definition: MethodDefinition, *, instead_of: str | None = None
    ) -> tuple[list[Violation], Readiness]:
        """Say everything that a create would say, or a change of the method `instead_of`, and what is not ready."""
        found, check, facts = await self._registry.validate(session, definition, instead_of=instead_of)
        hiding = await asyncio.to_thread(self._hidden, definition, check.pins, facts)
        return found, readiness(definition, facts, file_problems=hiding, now=self._clock())

    async def readiness(self, session: AsyncSession, method: str) -> Readiness:
        """Say whether the method could run now, stage by stage."""
        (found,) = await self.readiness_of(session, [await self._registry.get(session, method)])
        return found

    async def readiness_of(self, session: AsyncSession, methods: Sequence[Method]) -> list[Readiness]:
        """Say whether the methods could run now, stage by stage and node by node."""
        now = self._clock()
        facts, found = await registry_facts.load(session), await matrix(session, now=now)
        answers = []
        for method in methods:
            problems = await asyncio.to_thread(self._hidden, method.definition, method.files, facts)
            plain = readiness(method.definition, facts, file_problems=problems, now=now)
            answers.append(with_cells(plain, await asyncio.to_thread(cells_of, method, found, self._modules)))
        return answers

    async def form(self, session: AsyncSession) -> MethodForm:
        """Return what a form for methods is made of, with what this installation has to choose from."""
        facts = await registry_facts.load(session)
        return method_form(
            deploy_targets=sorted(facts.deploy_targets),
            environments=sorted(facts.environments),
            custom_targets=facts.custom_targets,
        )

    async def parameters(self, session: AsyncSession, method: Method, language: Language) -> list[StageParameters]:
        """Return the parameters of every stage that runs a file of the method, as a job of now would find them."""
        described = await self._options.of(session, set(stage_environments(method.definition).values()))
        return await asyncio.to_thread(self._parameters, method, described, language)

    def _parameters(self, method: Method, described: Described, language: Language) -> list[StageParameters]:
        producer = producing_stage(method.definition.lifecycle or ())
        shipped = _shipped_parameters(method)
        environments = stage_environments(method.definition)
        calls = {stage: stage_call(method.definition, stage) for stage in runnable_stages(method.definition)}
        found = [
            _stage_parameters(
                stage,
                *self._read(stage, method, prefix_of(described, environments.get(stage) or BASE_ENVIRONMENT)),
                method.definition,
                shipped,
                described_options(described, environments.get(stage) or BASE_ENVIRONMENT),
                language,
                producing=stage is producer,
                unpinned=self._unpinned(method, stage),
            )
            for stage, call in calls.items()
            if stage in method.files or call.module is not None
        ]
        return [self._with_hint(one, method.definition) for one in found]

    def _with_hint(self, found: StageParameters, definition: MethodDefinition) -> StageParameters:
        """Add that the script of a customized model does not say where it finds the model."""
        config = definition.stage_config(found.stage)
        if found.file is None or found.stage is not JobKind.INFERENCE_CUSTOMIZED:
            return found
        hint = self._modules.model_unread(found.file, config)
        return found if hint is None else replace(found, remarks=[*found.remarks, hint])

    def _unpinned(self, method: Method, stage: Stage) -> Sequence[Violation]:
        """Return what reading could not see of what the stage runs."""
        pinned = method.files.get(stage)
        if pinned is None or pinned.shipped:
            return ()
        return self._files.tree_now(method.definition, stage, pinned).unpinned

    def _read(self, stage: Stage, method: Method, prefix: Path | None) -> tuple[PinnedFile | None, ScriptParameters]:
        pinned = method.files.get(stage)
        if pinned is None:
            return None, self._reader.module(stage_call(method.definition, stage).module or "", prefix)
        # an edited example does not start, so that its edit says nothing
        return (pinned, self._reader.pinned(pinned)) if method.read_only else self._reader.current(pinned)

    def _hidden(
        self, definition: MethodDefinition, pins: Pins, facts: RegistryFacts
    ) -> dict[Stage, tuple[Violation, ...]]:
        """Return what the files that the scripts run hide from them."""
        environments = stage_environments(definition)
        found: dict[Stage, tuple[Violation, ...]] = {}
        for stage, pinned in pins.items():
            if pinned.shipped:
                continue
            collected = self._files.tree_now(definition, stage, pinned)
            packages = modules_of(spec for name, spec in facts.specs.items() if name == environments.get(stage))
            brought = {path: provided(path) for path in collected.tree}
            beside = (
                hidden(path, module, packages=packages, pointer=file_pointer(stage))
                for path, (folder, module) in brought.items()
                if folder in collected.folders
            )
            found[stage] = tuple(filter(None, beside))
        return found


def withheld(definition: MethodDefinition, stage: Stage, script: ScriptParameters, at: str) -> list[Violation]:
    """Return which of the arguments that the platform fills in the stage's script does not get, and why."""
    if definition.arguments.declared_only or stage_call(definition, stage).is_explicit:
        return []
    path = find_path(definition.lifecycle)
    producer = producing_stage(path) if path else None
    own = filled_arguments(stage, inference_form(definition.training_type))
    passed = [*own, *(filled_arguments(JobKind.TRAINING) if stage is producer else ())]
    return withheld_arguments(script, dict.fromkeys(name for name in passed if name not in _OCCASIONAL), at)


def _stage_parameters(
    stage: Stage,
    file: PinnedFile | None,
    script: ScriptParameters,
    definition: MethodDefinition,
    shipped: Mapping[str, ParameterInfo],
    options: DescribedOptions,
    language: Language,
    *,
    producing: bool,
    unpinned: Sequence[Violation],
) -> StageParameters:
    classes = [OptionClassUse(use, options.classes.get(use.path)) for use in script.option_classes]
    classes += [
        OptionClassUse(OptionUse(path=one.path), options.classes.get(one.path)) for one in script.parser_classes
    ]
    call = stage_call(definition, stage)
    script = as_called(with_parser_classes(script, options), call)
    schema = json_schema(script, stage=stage, producing=producing, language=language, options=options, call=call)
    if stage is JobKind.TRAINING or producing:
        for name, schema_of in schema["properties"].items():
            if name in shipped and (texts := _shipped_texts(shipped[name], language)):
                schema_of |= texts
                schema_of.pop("x-advanced", None)  # the product explains what people set every day
    remarks = [*(remark.violation() for remark in (*script.unread, *script.notes)), *unpinned]
    remarks += withheld(definition, stage, script, "")
    undescribed = [one.use.path for one in classes if one.described is None]
    for path in undescribed:
        if detail := options.trouble.get(path):
            params = {"subject": path, "environment": options.environment, "detail": detail}
            remarks.append(Violation("", "options_not_readable", params))
    if waiting := [path for path in undescribed if path not in options.trouble]:
        params = {"subject": ", ".join(waiting), "environment": options.environment}
        remarks.append(Violation("", "options_not_described", params))
    return StageParameters(stage, file, call.module, schema, script.partly_read, remarks, classes)


def _shipped_parameters(method: Method) -> dict[str, ParameterInfo]:
    """Return what the manifest says of a preset's parameters; it knows them better than the platform's table."""
    manifest = next((manifest for manifest in load_manifests() if manifest.name == method.preset), None)
    return {} if manifest is None else {info.name: info for info in manifest.parameters}


def _shipped_texts(info: ParameterInfo, language: Language) -> dict[str, Any]:
    texts = {
        "title": info.label.get(language),
        "description": info.help.get(language),
        "x-typical-minimum": info.minimum,
        "x-typical-maximum": info.maximum,
        "x-typical-values": list(info.values) or None,
    }
    return {name: value for name, value in texts.items() if value is not None}
