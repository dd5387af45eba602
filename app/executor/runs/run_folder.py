"""Names of the files in an attempt's run folder. Each has one writer.

`output.log`, `events.jsonl`, `ranks` and `cache` are written by the stage (when it has ended, its supervisor may add
a note to the events), the other two by the worker that watches it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class RunFolder:
    """The folder of one attempt: `runs/<job id>/<attempt number>`."""

    REDACTIONS: ClassVar = ".redactions.json"

    path: Path

    @property
    def redactions(self) -> Path:
        """Return the file with the secrets that are hidden from readers while the attempt runs (`redaction`)."""
        return self.path / self.REDACTIONS

    @property
    def output_log(self) -> Path:
        """Return the file that holds the stage's stdout and stderr, byte for byte."""
        return self.path / "output.log"

    @property
    def events(self) -> Path:
        """Return the file that the script itself appends events to (`DEEPE_EVENTS`)."""
        return self.path / "events.jsonl"

    @property
    def projected_events(self) -> Path:
        """Return the file of events that were found in the output."""
        return self.path / "events-from-log.jsonl"

    @property
    def output(self) -> Path:
        """Return the folder of artefacts."""
        return self.path / "output"

    @property
    def cache(self) -> Path:
        """Return the folder that the attempts of the job share, for what they need not do again."""
        return self.path.parent / "cache"

    @property
    def parameters(self) -> Path:
        """Return the file that holds the parameters of the job (`DEEPE_PARAMS`)."""
        return self.path / "params.json"

    @property
    def helpers(self) -> Path:
        """Return the folder of users' copies of helper modules."""
        return self.path / "helpers"

    @property
    def ranks(self) -> Path:
        """Return the folder for the output of the processes of a group other than rank 0."""
        return self.path / "ranks"

    @property
    def accelerate_config(self) -> Path:
        """Return the configuration with which accelerate starts a group."""
        return self.path / "accelerate.yaml"

    @property
    def preview(self) -> Path:
        """Return the answer of a preview of rows."""
        return self.output / "preview.json"

    @property
    def result(self) -> Path:
        """Return the result manifest."""
        return self.path / "result.json"
