"""Read conda's `environment.yml`. Every problem is found at once, each with its line.

`name` and `prefix` are hints of conda and decide nothing here: an environment's name is its name in the registry.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from app.domain.errors import Invalid, InvalidRequest, Violation
from app.domain.plain_text import shown

POINTER = "/spec"

# name, then what conda allows behind it: a version with or without operator, and a build
_DEPENDENCY = re.compile(
    r"^(?:(?P<channel>[^\s:]+)::)?(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)(?P<rest>(?:\s|[=<>!~\[]).*)?$"
)
_VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


MAX_SPEC_CHARACTERS = 64 * 1024
_MAX_TEXT = 2000


class EnvironmentSpecTooLong(Invalid):
    """The text is longer than any specification that a person wrote."""

    code = "environment_spec_too_long"


class EnvironmentSpecUnreadable(Invalid):
    """The text is no YAML."""

    code = "environment_spec_unreadable"


@dataclass(frozen=True)
class Dependency:
    """One conda dependency as written, and its parts."""

    text: str
    name: str
    version: str  # "" if any will do
    channel: str | None = None


@dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment consists of. `pip` holds requirement lines, `variables` are set at activation."""

    channels: tuple[str, ...] = ()
    dependencies: tuple[Dependency, ...] = ()
    pip: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def needs(self, name: str) -> Dependency | None:
        """Return the dependency on a package, if there is one."""
        return next((dependency for dependency in self.dependencies if dependency.name == name), None)


BASE_SPEC = "name: base\ndependencies:\n  - python\n  - pip\n"


def parse_spec(text: str) -> EnvironmentSpec:
    """Read a specification; raise `InvalidRequest` with every problem, or why it cannot be read at all.

    A long text takes a second: call it in a thread.
    """
    if len(text) > MAX_SPEC_CHARACTERS:
        raise EnvironmentSpecTooLong(pointer=POINTER, length=len(text), limit=MAX_SPEC_CHARACTERS)
    root = _compose(text)
    problems: list[Violation] = []
    spec = _Reader(problems).spec(root)
    if problems:
        raise InvalidRequest(problems)
    return spec


def spec_hash(spec: EnvironmentSpec) -> str:
    """Return the digest that names what is built: equal for specs that differ in comments or layout only."""
    content = {
        "channels": spec.channels,
        "dependencies": sorted(dependency.text for dependency in spec.dependencies),
        "pip": spec.pip,
        "variables": sorted(spec.variables),
    }
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not readable"
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise EnvironmentSpecUnreadable(pointer=POINTER, line=line, column=column, problem=problem) from error
    except RecursionError as error:
        raise EnvironmentSpecUnreadable(pointer=POINTER, line=1, column=1, problem="nested too deeply") from error
    except (ValueError, OverflowError) as error:  # an escape that stands for no character
        raise EnvironmentSpecUnreadable(pointer=POINTER, line=1, column=1, problem=shown(str(error))) from error


class _Reader:
    """Walks the YAML nodes, which know their lines."""

    def __init__(self, problems: list[Violation]) -> None:
        self._problems = problems

    def spec(self, root: yaml.Node | None) -> EnvironmentSpec:
        if root is None:
            return EnvironmentSpec()
        members = self._members(root, "environment.yml")
        if "dependencies" not in members:
            self._problem(root, "environment_spec_without_dependencies")
        dependencies, pip = self._dependencies(members.get("dependencies"))
        return EnvironmentSpec(
            channels=tuple(self._texts(members.get("channels"), "channels")),
            dependencies=tuple(dependencies),
            pip=tuple(pip),
            variables=tuple(self._variables(members.get("variables"))),
        )

    def _dependencies(self, node: yaml.Node | None) -> tuple[list[Dependency], list[str]]:
        dependencies: list[Dependency] = []
        pip: list[str] = []
        for item in self._items(node, "dependencies"):
            if isinstance(item, yaml.MappingNode):
                members = self._members(item, "dependencies")
                pip += self._texts(members.get("pip"), "pip")
                for name in members.keys() - {"pip"}:
                    self._problem(item, "environment_spec_installer_unknown", name=name)
            elif (value := self._text(item, "dependencies")) is not None:
                dependency = parse_dependency(value)
                if dependency is None:
                    self._problem(item, "environment_spec_bad_dependency", value=value)
                else:
                    dependencies.append(dependency)
        return dependencies, pip

    def _variables(self, node: yaml.Node | None) -> Iterator[tuple[str, str]]:
        if node is None or _is_null(node):
            return
        for name, value in self._members(node, "variables").items():
            if not _VARIABLE.match(name) or name == "PATH":
                self._problem(value, "environment_spec_bad_variable", name=name)
            elif (text := self._text(value, f"variables.{name}")) is not None:
                yield name, text

    def _members(self, node: yaml.Node, where: str) -> Mapping[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self._problem(node, "environment_spec_no_mapping", where=where)
            return {}
        return {str(key.value): value for key, value in node.value}

    def _items(self, node: yaml.Node | None, where: str) -> Sequence[yaml.Node]:
        if node is None or _is_null(node):
            return ()
        if not isinstance(node, yaml.SequenceNode):
            self._problem(node, "environment_spec_no_list", where=where)
            return ()
        return list(node.value)

    def _texts(self, node: yaml.Node | None, where: str) -> list[str]:
        texts = (self._text(item, where) for item in self._items(node, where))
        return [text for text in texts if text is not None]

    def _text(self, node: yaml.Node, where: str) -> str | None:
        if not isinstance(node, yaml.ScalarNode) or _is_null(node) or not str(node.value).strip():
            self._problem(node, "environment_spec_no_text", where=where)
            return None
        if len(node.value) > _MAX_TEXT:
            self._problem(node, "environment_spec_text_too_long", length=len(node.value), limit=_MAX_TEXT)
            return None
        return str(node.value).strip()

    def _problem(self, node: yaml.Node, code: str, **params: Any) -> None:
        self._problems.append(Violation(POINTER, code, {"line": node.start_mark.line + 1, **params}))


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def parse_dependency(text: str) -> Dependency | None:
    """Split `channel::name=version=build` in any of conda's spellings; None if it has no package name."""
    match = _DEPENDENCY.match(text)
    if match is None:
        return None
    rest = re.sub(r"\s*([<>=!~,|]+)\s*", r"\1", (match["rest"] or "").strip())
    version = re.split(r"[\s\[]", rest, maxsplit=1)[0]
    return Dependency(text=text, name=match["name"].lower(), version=_without_build(version), channel=match["channel"])


def _without_build(version: str) -> str:
    """Drop the build of `=3.11=h123_0`."""
    found = re.match(r"^(=?[^=<>!~]+)=[^=]+$", version)
    return found[1] if found else version


def version_matches(constraint: str, version: str) -> bool:
    """Say whether a plain release such as "3.11.7" satisfies a conda version constraint."""
    return any(
        all(_clause_matches(clause.strip(), version) for clause in alternative.split(","))
        for alternative in constraint.split("|")
    )


_OPERATORS: tuple[tuple[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]], ...] = (
    (">=", lambda have, want: have >= want),
    ("<=", lambda have, want: have <= want),
    ("==", lambda have, want: have == want),
    (">", lambda have, want: have > want),
    ("<", lambda have, want: have < want),
)


def _clause_matches(clause: str, version: str) -> bool:
    if clause in {"", "*"}:
        return True
    if clause.startswith("!="):
        return not _clause_matches(clause[2:], version)
    if clause.startswith("~="):
        release = clause[2:]
        return _compare(version, ">=", release) and _starts_with(version, release.rpartition(".")[0])
    if clause.endswith("*"):
        return _starts_with(version, clause.lstrip("=").rstrip("*").rstrip("."))
    for operator, _ in _OPERATORS:
        if clause.startswith(operator):
            return _compare(version, operator, clause[len(operator) :])
    if clause.startswith("="):
        return _starts_with(version, clause[1:])
    return _compare(version, "==", clause)


def _compare(version: str, operator: str, wanted: str) -> bool:
    have, want = _release(version), _release(wanted)
    width = max(len(have), len(want))
    padded = [release + (0,) * (width - len(release)) for release in (have, want)]
    return dict(_OPERATORS)[operator](padded[0], padded[1])


def _starts_with(version: str, wanted: str) -> bool:
    want = _release(wanted)
    return _release(version)[: len(want)] == want


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a release; what is behind them (rc1, .dev0) does not matter for a Python."""
    numbers = re.match(r"[\s=]*(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in numbers[1].split(".")) if numbers else ()
