"""Find out what the methods need of the environments of this node, and have it looked for there."""

import asyncio
import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.domain.environment_reports import EnvironmentState
from app.executor.environments.environment_probe import EnvironmentProbes, Needs
from app.executor.environments.local_environments import Look
from app.presets.shared.helpers.deepe_needs import MODULES
from app.registry.methods.pins import PinnedFile, pin_from_json
from app.registry.methods.script_modules import ScriptModules
from app.registry.methods.script_reading import ScriptReader
from app.registry.scripts.module_names import top_package
from app.store.methods import modules_by_environment, stages_by_environment
from app.store.session import Database


class MethodProbing:
    """Begins probes between the rounds of a node's agent."""

    def __init__(
        self, *, database: Database, modules: ScriptModules, reader: ScriptReader, probes: EnvironmentProbes
    ) -> None:
        self._database = database
        self._reader = reader
        self._modules = modules
        self.probes = probes

    async def turn(self, seen: Look) -> None:
        """Begin to look into what is ready and named by a method, now and then."""
        if not self.probes.due():
            return
        async with self._database.reading() as session:
            stages, modules = await stages_by_environment(session), await modules_by_environment(session)
        self.probes.begin(await asyncio.to_thread(self._wanted, stages, modules, seen))

    def _wanted(
        self, stages: Mapping[str, Sequence[Mapping[str, Any]]], modules: Mapping[str, Sequence[str]], seen: Look
    ) -> dict[Path, Needs]:
        wanted: dict[Path, Needs] = {}
        for environment in stages.keys() | modules.keys():
            found = seen.found.get(environment)
            if found is None or found.prefix is None or found.state is not EnvironmentState.READY:
                continue
            of_modules = functools.reduce(
                operator.or_, (self._needs_of(module, found.prefix) for module in modules.get(environment, ())), Needs()
            )
            files = map(pin_from_json, stages.get(environment, ()))
            needed = functools.reduce(operator.or_, map(self._needs, files), of_modules)
            if needed != Needs():
                wanted[found.prefix] = wanted.get(found.prefix, Needs()) | needed
        return wanted

    def _needs_of(self, module: str, prefix: Path) -> Needs:
        """Return what a module of the environment needs: its package, and the classes that its parser is made of."""
        script = self._reader.module(module, prefix)
        return Needs(frozenset([top_package(module)]), frozenset(one.path for one in script.parser_classes))

    def _needs(self, pinned: PinnedFile) -> Needs:
        script = self._reader.pinned(pinned)
        classes = frozenset(
            [*(use.path for use in script.option_classes), *(one.path for one in script.parser_classes)]
        )
        by_value = MODULES if script.option_classes else frozenset()
        return Needs(frozenset(self._modules.needed(pinned)) | by_value, classes)
