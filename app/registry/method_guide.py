"""What a caller needs to know before starting a method: readiness, parameters, the form."""

import asyncio

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import MethodDefinition
from app.domain.errors import Violation
from app.registry.method_files import FileState, FileStatus, MethodFiles, file_pointer
from app.registry.methods import Clock, MethodRegistry
from app.registry.readiness import Readiness, readiness
from app.store import registry_facts


class MethodGuide:
    """Answers questions about methods; changes nothing."""

    def __init__(self, *, registry: MethodRegistry, files: MethodFiles, clock: Clock) -> None:
        self._registry = registry
        self._files = files
        self._clock = clock

    async def readiness(self, session: AsyncSession, method: str) -> Readiness:
        """Say whether the method could run now, stage by stage."""
        found = await self._registry.get(session, method)
        facts = await registry_facts.load(session)
        states = await asyncio.to_thread(self._files.states, found.files)
        problems = {status.stage: tuple(_file_problems(status, read_only=found.read_only)) for status in states}
        return readiness(found.definition, facts, file_problems=problems, now=self._clock())

    async def validate(
        self, session: AsyncSession, definition: MethodDefinition, *, instead_of: str | None = None
    ) -> tuple[list[Violation], Readiness]:
        """Say everything that a create would say, or a change of the method `instead_of`, and what is not ready."""
        found, facts = await self._registry.validate(session, definition, instead_of=instead_of)
        return found, readiness(definition, facts, file_problems={}, now=self._clock())


def _file_problems(status: FileStatus, *, read_only: bool) -> list[Violation]:
    """Return what stands in the way of running the file. A missing one does not (its stored bytes run), nor does an
    edit of a method of one's own: the next job takes it up."""
    if status.state is FileState.MODIFIED and read_only:
        return [Violation(file_pointer(status.stage), "file_modified_on_disk", {"file": status.pinned.file})]
    return []
