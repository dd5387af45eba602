"""What scripts say about their command lines, read once per content."""

from dataclasses import dataclass, replace
from pathlib import Path

from app.argspec.report import Arguments, Option, Remark
from app.domain import script_parameters as domain
from app.domain.definition import MethodDefinition
from app.domain.errors import Violation
from app.domain.known_parameters import KNOWN
from app.domain.rendering import ArgumentForm
from app.domain.script_parameters import ParameterKind, ScriptParameter, ScriptParameters, from_text
from app.registry.methods.files import FileCheck, FileState, MethodFiles
from app.registry.methods.pins import PinnedFile
from app.registry.methods.script_modules import ModulesBeside, module_source, package_finder
from app.registry.scripts.module_names import folder_of

_REMEMBERED = 1000


@dataclass(frozen=True)
class _Known:
    """What was read of a script, and of which modules beside it."""

    parameters: ScriptParameters
    beside: ModulesBeside


class ScriptReader:
    """Reads the parameters of scripts; the same bytes are read once. All methods block.

    Modules beside a script may declare arguments for it: those that its tree pins, or, of a script as it is on disk,
    those on disk; what was read of it holds as long as they stay the same.
    """

    def __init__(self, files: MethodFiles) -> None:
        self._files = files
        self._read: dict[PinnedFile, _Known] = {}

    def pinned(self, pinned: PinnedFile) -> ScriptParameters:
        """Return the parameters of exactly the pinned bytes."""
        return self._known(pinned) or self._remember(pinned, self._files.versions.get(pinned.sha256))

    def current(self, pinned: PinnedFile) -> tuple[PinnedFile, ScriptParameters]:
        """Return the parameters of the file as it is on disk now, and its digest."""
        if pinned.committed:
            return pinned, self.pinned(pinned)
        pinned = replace(pinned, tree=None)
        if self._files.state(pinned) is FileState.UNCHANGED:
            return pinned, self.pinned(pinned)
        present, content = self._files.current(pinned)
        return present, self.content(present, content)

    def content(self, pinned: PinnedFile, content: bytes | None) -> ScriptParameters:
        """Return the parameters of bytes that may not be stored yet, with the modules that are beside them now."""
        pinned = replace(pinned, tree=None)
        return self._known(pinned) or self._remember(
            pinned, self._files.versions.get(pinned.sha256) if content is None else content
        )

    def module(self, module: str, prefix: Path | None) -> ScriptParameters:
        """Return the parameters of a module of an environment, as far as its source is found below `prefix`.

        A node may have another version: what is not declared here, or missing, is left to the module. Classes that its
        parser is made of are described by the environment, like those of a script.
        """
        source = None if prefix is None else module_source(prefix, module)
        if prefix is None or source is None:
            return unread_module(module)
        finder, package = package_finder(prefix, module), module.rpartition(".")[0]
        found = script_parameters(
            self._files.reader.read(source.content, finder, package=package).arguments, filename=module
        )
        if not found.parameters and not found.parser_classes:
            return unread_module(module)
        remark = domain.Remark(code="read_module", line=0, subject=module)
        parameters = tuple(one.model_copy(update={"required": False}) for one in found.parameters)
        known = {
            "parameters": parameters,
            "positionals": (),
            "exclusive": (),
            "option_classes": (),
        }
        return found.model_copy(update={**known, "unread": (remark, *found.unread)})

    def _known(self, pinned: PinnedFile) -> ScriptParameters | None:
        known = self._read.get(pinned)
        return known.parameters if known is not None and known.beside.unchanged() else None

    def _remember(self, pinned: PinnedFile, content: bytes) -> ScriptParameters:
        if len(self._read) >= _REMEMBERED:
            self._read.clear()
        reader, package = self._files.reader, _package(pinned)
        imports = reader.read(content).imports
        beside = ModulesBeside(self._files, pinned, imports)
        reading = reader.read(content, beside.find, package=package)
        found = script_parameters(reading.arguments, filename=pinned.file)
        if reading.lasting:
            self._read[pinned] = _Known(found, beside)
        return found


def _package(pinned: PinnedFile) -> str:
    """Return the package that the relative imports of a file start from; empty if it does not run as a module."""
    return "" if pinned.module is None else folder_of(pinned.file).replace("/", ".")


def unread_module(module: str) -> ScriptParameters:
    """Return what is known of the arguments of a module that only its environment has: nothing."""
    remark = domain.Remark(code="unread_module", line=0, subject=module)
    return ScriptParameters(filename=module, unread=(remark,), accepts_unknown=False)


def unreadable(reader: ScriptReader, definition: MethodDefinition, check: FileCheck) -> list[Violation]:
    """Return why arguments cannot be limited to those that the scripts declare: nothing was read of them. Blocks."""
    if not definition.arguments.declared_only:
        return []
    found = []
    for stage, pinned in check.pins.items():
        is_kept = pinned.committed
        script = reader.pinned(pinned) if is_kept else reader.content(pinned, check.contents.get(pinned.sha256))
        if script.unread and not script.parameters and not script.parser_classes:
            params = {"file": pinned.file, "stage": stage, "line": script.unread[0].line}
            found.append(Violation("/arguments/declared_only", "declared_only_unread", params))
    return found


def script_parameters(arguments: Arguments, *, filename: str = "") -> ScriptParameters:
    """Return what the platform makes of a script's arguments: of several names of an option it takes one it knows."""
    parameters = {option.names[0]: _parameter(option) for option in arguments.options}
    name_of = {first: parameter.name for first, parameter in parameters.items()}
    return ScriptParameters(
        filename=filename,
        parameters=tuple(parameters.values()),
        positionals=tuple(
            domain.Positional(name=one.name, required=one.required, line=one.line) for one in arguments.positionals
        ),
        exclusive=tuple(
            domain.ExclusiveGroup(names=tuple(name_of[name] for name in group.names), required=group.required)
            for group in arguments.exclusive
        ),
        accepts_unknown=arguments.accepts_unknown,
        abbreviates=arguments.abbreviates,
        unread=tuple(map(_remark, arguments.unread)),
        notes=tuple(map(_remark, arguments.notes)),
        parser_classes=tuple(domain.ParserClass(path=one.path, line=one.line) for one in arguments.parser_classes),
        option_classes=tuple(
            domain.OptionUse(
                path=one.path,
                when={name: tuple(values) for name, values in one.when.items() if name in name_of},
            )
            for one in arguments.option_classes
        ),
        options_instead=arguments.options_instead,
    )


def _parameter(option: Option) -> ScriptParameter:
    name = next((name for name in option.names if name in KNOWN), option.names[0])
    kind = ParameterKind(option.kind)
    default = option.default
    if isinstance(default, str):  # argparse reads a default that is a text as if it were given
        default = bool(default) if option.reads_false_as_true else from_text(default, kind)
    return ScriptParameter(
        name=name,
        aliases=tuple(other for other in option.names if other != name),
        kind=kind,
        typed=option.typed,
        form=ArgumentForm(option.form),
        required=option.required,
        has_default=option.has_default,
        default=default,
        default_text=option.default_source,
        choices=None if option.choices is None else tuple(option.choices),
        help=option.help,
        group=option.group,
        line=option.line,
        reads_false_as_true=option.reads_false_as_true,
    )


def _remark(remark: Remark) -> domain.Remark:
    return domain.Remark(code=remark.code, line=remark.line, subject=remark.subject)
