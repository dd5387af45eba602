"""The environments of this node as the worker sees them: found on disk, judged against their specifications, reported.

A look costs a few hundred `stat` calls; specifications are parsed once, markers read again only when they change.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.domain.environment_reports import EnvironmentReport, EnvironmentState, Trouble
from app.domain.errors import AppError
from app.domain.names import BASE_ENVIRONMENT
from app.executor.environments.builders import (
    Builder,
    BuildRules,
    EnvironmentNeedsPack,
    Tools,
    choose_builders,
    needs_network,
)
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environment_archive import EnvironmentArchive, this_platform
from app.executor.environments.environment_probe import EnvironmentProbes
from app.executor.environments.environments import EnvironmentFinder, FoundEnvironment, last_use
from app.executor.environments.shipped import accelerator_refusal, shipped_as
from app.registry.environments.specs import BASE_SPEC, EnvironmentSpec, parse_spec

TOOLS_SECONDS = 60.0  # how long a conda that was installed meanwhile goes unnoticed


@dataclass(frozen=True)
class Look:
    """What one look found, by name, and what is to be reported of it."""

    found: Mapping[str, FoundEnvironment]
    reports: Sequence[EnvironmentReport]

    @property
    def ready(self) -> frozenset[str]:
        """Names of the environments that stages can run in."""
        return frozenset(name for name, found in self.found.items() if found.state is EnvironmentState.READY)

    def documents(self) -> list[dict[str, Any]]:
        """Return the reports as the database keeps them."""
        return [report.document() for report in self.reports]


class LocalEnvironments:
    """Looks at one node's disk."""

    def __init__(
        self, *, envs_dir: Path, search: CondaSearch, rules: BuildRules, probes: EnvironmentProbes | None = None
    ) -> None:
        self._probes = probes
        self._envs_dir = envs_dir
        self._search = search
        self._rules = rules
        self._finder = EnvironmentFinder(envs_dir=envs_dir, search=search, cuda="cuda" in rules.devices)
        self._tools: tuple[float, Tools] | None = None

    def look(self, specs: Mapping[str, str | None]) -> Look:
        """Look at everything that stands here or is registered (`specs`, by name); blocks."""
        scan = self._finder.scan()
        found = {environment.name: environment for environment in scan.ready()}
        read = {name: _read(text) for name, text in {BASE_ENVIRONMENT: None, **specs}.items()}
        found |= {name: scan.find(name, one.spec) for name, one in read.items()}
        return Look(found, [self._report(found[name], read.get(name, _NO_SPEC)) for name in sorted(found)])

    def _report(self, found: FoundEnvironment, registered: "_Registered") -> EnvironmentReport:
        there = found.source is not None and found.prefix is not None
        trouble = None
        if found.state in (EnvironmentState.KNOWN, EnvironmentState.STALE, EnvironmentState.MISSING):
            trouble = registered.trouble or self._in_the_way(found.name, registered.spec)
        unbuildable = found.state is EnvironmentState.KNOWN and trouble is not None
        build, prefix = found.build, found.prefix
        used_at = last_use(self._envs_dir, prefix) if there and prefix else None
        version = build.python_version if build else self._finder.python_version(prefix) if there and prefix else None
        return EnvironmentReport(
            name=found.name,
            state=EnvironmentState.MISSING if unbuildable else found.state,
            source=found.source,
            prefix=str(prefix) if there else None,
            spec_hash=build.spec_hash if build else None,
            builder=build.builder if build else None,
            python=version or None,
            size_bytes=build.size_bytes if build else None,
            built_at=_time(build.built_at) if build else None,
            used_at=_time(used_at) if used_at is not None else None,
            lock=(build.lock or None) if build else None,
            trouble=trouble,
            probe=self._probes.of(prefix) if there and prefix and self._probes else None,
        )

    def _in_the_way(self, name: str, spec: EnvironmentSpec | None) -> Trouble | None:
        """Say why this node cannot build the environment; None if it can."""
        if spec is None and name != BASE_ENVIRONMENT:
            return Trouble(code="environment_without_spec", params={"environment": name})
        wanted = None if self._rules.builder == "auto" else Builder(self._rules.builder)
        spec = spec or _BASE
        shipped = shipped_as(spec)
        if shipped is not None and (refusal := accelerator_refusal(shipped, self._rules.devices)) is not None:
            return Trouble(code=refusal.code, params=refusal.params)
        try:
            if self._rules.offline and needs_network(spec):
                raise EnvironmentNeedsPack(environment=name, platform=this_platform())
            choose_builders(spec, self._known_tools(), wanted=wanted, channels=self._rules.channels)
        except AppError as error:
            archive = EnvironmentArchive(self._rules.archive, name, spec) if self._rules.archive else None
            packed = archive is not None and archive.usable_pack(cuda="cuda" in self._rules.devices) is not None
            return None if packed else Trouble(code=error.code, params=error.params)
        return None

    def _known_tools(self) -> Tools:
        now = time.monotonic()
        if self._tools is None or now - self._tools[0] > TOOLS_SECONDS:
            self._tools = (now, Tools.found(self._search))
        return self._tools[1]


@dataclass(frozen=True)
class _Registered:
    """A registered specification; one that an older version took and we cannot read is trouble."""

    spec: EnvironmentSpec | None = None
    trouble: Trouble | None = None


_NO_SPEC = _Registered()
_BASE = parse_spec(BASE_SPEC)


@functools.lru_cache(maxsize=512)
def _read(text: str | None) -> _Registered:
    if text is None:
        return _NO_SPEC
    try:
        return _Registered(spec=parse_spec(text))
    except AppError as error:
        return _Registered(trouble=Trouble(code=error.code, params=error.params))


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC)
