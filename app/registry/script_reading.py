"""What scripts say about their command lines, read once per content."""

from app.domain.argparse_reader import read_parameters
from app.domain.script_parameters import ScriptParameters
from app.registry.method_files import FileState, MethodFiles, PinnedFile

_REMEMBERED = 1000


class ScriptReader:
    """Reads the parameters of scripts; the same bytes are read once. All methods block."""

    def __init__(self, files: MethodFiles) -> None:
        self._files = files
        self._read: dict[str, ScriptParameters] = {}

    def pinned(self, pinned: PinnedFile) -> ScriptParameters:
        """Return the parameters of exactly the pinned bytes."""
        known = self._read.get(pinned.sha256)
        return known or self._remember(pinned, self._files.versions.get(pinned.sha256))

    def current(self, pinned: PinnedFile) -> tuple[PinnedFile, ScriptParameters]:
        """Return the parameters of the file as it stands on disk now, and its digest."""
        if self._files.state(pinned) is FileState.UNCHANGED:
            return pinned, self.pinned(pinned)
        present, content = self._files.current(pinned)
        return present, self.content(present, content)

    def content(self, pinned: PinnedFile, content: bytes) -> ScriptParameters:
        """Return the parameters of bytes that nobody has kept yet."""
        return self._read.get(pinned.sha256) or self._remember(pinned, content)

    def _remember(self, pinned: PinnedFile, content: bytes) -> ScriptParameters:
        if len(self._read) >= _REMEMBERED:
            self._read.clear()
        found = read_parameters(content, filename=pinned.file)
        self._read[pinned.sha256] = found
        return found
