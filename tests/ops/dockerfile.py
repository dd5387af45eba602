"""Read a Dockerfile as far as the tests need it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction: its keyword in capitals and all that follows, continuation lines joined."""

    keyword: str
    value: str

    @property
    def words(self) -> list[str]:
        """The arguments, of the JSON form as well."""
        if self.value.startswith("["):
            words: list[str] = json.loads(self.value)
            return words
        return [word for word in self.value.split() if not word.startswith("--")]


def read_stages(path: Path) -> list[list[Instruction]]:
    """Return the instructions of each stage, its FROM first."""
    text = "\n".join(line for line in path.read_text("utf-8").splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    stages: list[list[Instruction]] = []
    for keyword, _, value in (line.partition(" ") for line in lines if line.strip()):
        if keyword.upper() == "FROM":
            stages.append([])
        stages[-1].append(Instruction(keyword.upper(), value.strip()))
    return stages


def find(stage: list[Instruction], keyword: str) -> list[Instruction]:
    """Return the instructions of this kind."""
    return [instruction for instruction in stage if instruction.keyword == keyword]
