"""Proposes how a script, a module of an environment or a known program could be called at a stage of a method.

A script is read as a method's would be. A module's source is looked for in the environments that stand on this
machine; where none has it, what is known of the program has to do. Nothing is registered or run.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlmodel.ext.asyncio.session import AsyncSession

from app.argspec.client import Reading
from app.argspec.inputs import Inputs
from app.domain.environment_reports import EnvironmentReport, EnvironmentState
from app.domain.errors import InvalidRequest, NotFound, Violation
from app.domain.kinds import Stage
from app.domain.known_programs import command_of, known_program
from app.domain.library_options import with_parser_classes
from app.domain.script_parameters import Named, OtherInputs, Variable, Word
from app.domain.suggestions import Suggestion, Target, suggest
from app.registry.environments.described_options import OptionClasses, described_options
from app.registry.environments.on_nodes import modules_found
from app.registry.methods.files import MethodFiles, python_problem
from app.registry.methods.pins import pin
from app.registry.methods.script_modules import ModulesBeside, module_source, package_finder
from app.registry.methods.script_reading import script_parameters
from app.registry.scripts.module_names import modules_of
from app.registry.scripts.names import SUFFIX, script_path
from app.store import registry_facts
from app.store.nodes import all_nodes


class NothingToSuggest(NotFound):
    """The name is neither that of a script nor that of a module."""

    code = "nothing_to_suggest"


@dataclass(frozen=True)
class _Environment:
    """An environment as far as its modules matter. `prefix`: where it stands on a node, perhaps on this machine."""

    name: str
    modules: frozenset[str]
    prefix: Path | None
    ready: bool


class MethodSuggestions:
    """Makes suggestions; changes nothing."""

    def __init__(self, *, files: MethodFiles, options: OptionClasses) -> None:
        self._files = files
        self._options = options

    async def suggest(
        self,
        session: AsyncSession,
        what: str,
        *,
        source: str | None = None,
        stage: Stage | None = None,
        environment: str | None = None,
    ) -> Suggestion:
        """Propose how `what` is called: a script, a module, or the beginning of a command line.

        `source` is the text of a script that is not in the script root yet.
        """
        launcher, name = command_of(what)
        known = await _environments(session)
        if environment is not None:
            known = [one for one in known if one.name == environment] or [
                _Environment(environment, frozenset(), None, ready=False)
            ]
        content = None if source is None else source.encode("utf-8", "replace")
        target, reading, inputs = await asyncio.to_thread(self._read, name, content, known)
        target = replace(target, launcher=launcher)
        chosen, notes = _chosen(known, target) if environment is None else (environment, [])
        described = await self._options.of(session, [chosen] if chosen is not None else [])
        script = script_parameters(reading.arguments, filename=target.file or target.module or "")
        if chosen is not None:
            script = with_parser_classes(script, described_options(described, chosen))
        found = suggest(script, target, stage=stage, environment=chosen, inputs=_other_inputs(inputs))
        if target.module is not None and reading == Reading():
            notes.append(Violation("", "suggest_module_unread", {"module": target.module}))
        return replace(found, notes=[*found.notes, *notes])

    def _read(self, name: str, content: bytes | None, known: Sequence[_Environment]) -> tuple[Target, Reading, Inputs]:
        """Return what is to be run, and what was read of it. Blocks."""
        reader = self._files.reader
        is_file = content is not None or "/" in name or name.endswith(SUFFIX)
        if is_file or not all(part.isidentifier() for part in name.split(".")):
            path = script_path(name)
            content = self._files.scripts.read(path) if content is None else content
            if content is None:
                raise NothingToSuggest(name=name)
            if (problem := python_problem(reader.check(content), path)) is not None:
                raise InvalidRequest([problem])
            imports = reader.read(content).imports
            reading = reader.read(content, ModulesBeside(self._files, pin(path, content), imports).find)
            beside = ModulesBeside(self._files, pin(path, content), imports)
            needed = [module for module in imports.modules if beside.find(module) is None]
            classes = [one.path for one in reading.arguments.parser_classes]
            return Target(file=path, imports=needed, classes=classes), reading, reader.inputs(content)
        package = name.partition(".")[0]
        target = Target(module=name, program=known_program(name), imports=[package])
        for one in known:
            if one.prefix is not None and (found := module_source(one.prefix, name)) is not None:
                reading = reader.read(found.content, package_finder(one.prefix, name), package=name.rpartition(".")[0])
                classes = [use.path for use in reading.arguments.parser_classes]
                return replace(target, classes=classes), reading, reader.inputs(found.content)
        return target, Reading(), Inputs()


async def _environments(session: AsyncSession) -> list[_Environment]:
    """Return the environments, those that stand ready and have most in them first."""
    facts, nodes = await registry_facts.load(session), await all_nodes(session)
    reports = [EnvironmentReport.read(node.environment_states or []) for node in nodes]
    found = []
    for name in facts.environments:
        of_it = [named[name] for named in reports if name in named]
        ready = [one for one in of_it if one.state is EnvironmentState.READY]
        prefix = next((Path(one.prefix) for one in ready if one.prefix is not None), None)
        specified = modules_of([facts.specs[name]] if name in facts.specs else [])
        found.append(_Environment(name, specified | modules_found(nodes, [name]), prefix, bool(ready)))
    return sorted(found, key=lambda one: (not one.ready, -len(one.modules), one.name))


def _chosen(known: Sequence[_Environment], target: Target) -> tuple[str | None, list[Violation]]:
    """Return the environment that has most of what is imported, and what is to be said of it."""
    needed = set(target.imports)
    best = max(known, key=lambda one: len(needed & one.modules), default=None)  # of several the first
    if best is None or not needed & best.modules:
        return None, []
    missing = needed - best.modules
    code = "suggest_environment_partly" if missing else "suggest_environment_by_imports"
    names = ", ".join(sorted(missing or needed))
    return best.name, [Violation("", code, {"environment": best.name, "modules": names})]


def _other_inputs(inputs: Inputs) -> OtherInputs:
    return OtherInputs(
        variables=tuple(Variable(name=one.name, required=one.required, line=one.line) for one in inputs.variables),
        words=tuple(Word(position=one.position, name=one.name, line=one.line) for one in inputs.words),
        named=tuple(Named(subject=one.subject, value=one.value, line=one.line) for one in inputs.named),
    )
