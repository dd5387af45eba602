"""How a script that was not written for the platform could be called: a proposal for a person to confirm.

Rests on names: which of the platform's values goes into which option is data (`known_options.toml`). Every value that
is placed has its reason, and says whether the name is certain; what the base model, the data set or the output
folder does not reach is said, never left out in silence.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, assert_never

from app.domain.enums import JobKind, ModelState, TrainingType
from app.domain.errors import Violation
from app.domain.kinds import STAGES, Stage, as_stage
from app.domain.known_programs import OptionRow, Program, class_row, known_table, plain
from app.domain.launchers import LauncherKind
from app.domain.rendering import ArgumentForm
from app.domain.script_parameters import Named, OtherInputs, ScriptParameter, ScriptParameters, Variable

_OTHERS = "{parameters}"
_NO_PARSER = "unread_no_parser"
_FOLDER_WORDS = ("folder", "directory", "hugging face", "huggingface", "hub")
_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_SUBJECTS = {"model": ("base_model", "model"), "data": ("data",), "output": ("output",)}


@dataclass(frozen=True)
class Target:
    """What is to be run: a file or a module, how, and with which imports."""

    file: str | None = None
    module: str | None = None
    launcher: LauncherKind = LauncherKind.PYTHON
    program: Program | None = None
    imports: Sequence[str] = ()
    classes: Sequence[str] = ()
    """Argument classes of libraries that its parser takes."""

    @property
    def name(self) -> str:
        """Return what a method that runs it could be called."""
        if self.file is not None:
            return self.file.rpartition("/")[2].removesuffix(".py").replace("_", "-")
        return (self.module or "").replace(".", "-").replace("_", "-")


@dataclass(frozen=True)
class Placed:
    """A value of the platform in an option, and why it is there."""

    option: str
    value: str
    why: Sequence[Violation]
    certain: bool


@dataclass(frozen=True)
class LeftOver:
    """An option that no value of the platform goes into."""

    option: str
    required: bool
    default: Any
    why: Violation


@dataclass(frozen=True)
class Suggestion:
    """How a stage could be called. `config` is the stage's part of a method."""

    stage: Stage
    config: Mapping[str, Any]
    placed: Sequence[Placed]
    left_over: Sequence[LeftOver]
    notes: Sequence[Violation]
    method: Mapping[str, Any] | None = None
    """A method with this stage; `None` for stages that need others."""


def suggest(
    script: ScriptParameters,
    target: Target,
    *,
    stage: Stage | None = None,
    environment: str | None = None,
    inputs: OtherInputs | None = None,
) -> Suggestion:
    """Return how `target` could be called at `stage`; `script` is what was read of it, with its library's classes."""
    at = stage or _stage_of(script, target.program)
    return _Suggesting(script, target, at, environment, inputs or OtherInputs()).suggestion()


def _stage_of(script: ScriptParameters, program: Program | None) -> Stage:
    """Return the stage that a script is written for; training where nothing says another."""
    if program is not None:
        return as_stage(JobKind(program.stage))
    fitting = (stage for stage in STAGES if _takes_platform_arguments(script, stage))
    return next(fitting, JobKind.TRAINING)


def _takes_platform_arguments(script: ScriptParameters, stage: Stage) -> bool:
    declared = set(script.declared_names)
    return any(set(names) <= declared for names in known_table().platform_style[stage])


@dataclass
class _Suggesting:
    """Makes one suggestion."""

    script: ScriptParameters
    target: Target
    stage: Stage
    environment: str | None
    inputs: OtherInputs
    placed: list[Placed] = field(default_factory=list)
    notes: list[Violation] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    """Role → the option that has it."""
    fixed: set[str] = field(default_factory=set)

    def suggestion(self) -> Suggestion:
        program = self.target.program
        config: dict[str, Any] = {}
        if program is not None and program.arguments is not None:
            config |= self._of_program(program)
        elif _takes_platform_arguments(self.script, self.stage):
            self._note_platform_style()
        else:
            config["arguments"] = self._arguments()
            if "output" not in self.roles and any(map(_is_in_output, self.inputs.named)):
                config["working_directory"] = "run"
            if variables := self._variables():
                config["env"] = variables
            self._note_missing()
        rows = [row for path in self.target.classes if (row := class_row(path)) is not None]
        for code in dict.fromkeys(code for one in (*rows, program) if one is not None for code in one.notes):
            self.notes.append(Violation("", code))
        if program is not None and program.output is not None:
            config["output"] = program.output
        self.notes += [one.violation() for one in self.script.unread if one.code != _NO_PARSER]
        whole = {**self._what_runs(), **config}
        return Suggestion(
            stage=self.stage,
            config=whole,
            placed=self.placed,
            left_over=list(self._left_over()),
            notes=self.notes,
            method=self._method(whole) if self.stage is JobKind.TRAINING else None,
        )

    # ---- what runs --------------------------------------------------------------------------------------------------

    def _what_runs(self) -> dict[str, Any]:
        target = self.target
        what: dict[str, Any] = {"module": target.module} if target.module else {"file": target.file}
        if self.environment is not None:
            what["conda_env"] = self.environment
        else:
            modules = ", ".join(target.imports) or "-"
            self.notes.append(Violation("", "suggest_no_environment", {"modules": modules}))
        if target.launcher is not LauncherKind.PYTHON:
            what["launcher"] = {"kind": target.launcher.value}
        return what

    def _method(self, stage: Mapping[str, Any]) -> dict[str, Any]:
        program, table = self.target.program, known_table()
        known = (table.training_types[one] for one in self.target.imports if one in table.training_types)
        guessed = program.training_type if program is not None else next(known, None)
        words = self.target.name.split("-")
        technique = next((one for one in words if one in ("sft", "dpo", "grpo", "kto", "orpo", "ppo", "reward")), None)
        return {
            "name": self.target.name,
            "training_type": guessed or TrainingType.CHAT.value,
            **({"technique": technique} if technique else {}),
            "lifecycle": [ModelState.CUSTOMIZED.value],
            "stages": {self.stage.value: dict(stage)},
        }

    def _note_platform_style(self) -> None:
        self.notes.append(Violation("", "suggest_platform_style"))
        for row in self._rows():
            for name in row.names:
                if name in self.script.declared_names and row.role not in self.roles:
                    by_contract = Violation("", "suggest_by_contract")
                    self._place(row, name, f"--{name}", value=row.value, because=by_contract)

    def _of_program(self, program: Program) -> dict[str, Any]:
        """Return the form of a program whose arguments are known as a whole."""
        config: dict[str, Any] = {"arguments": list(program.arguments or ())}
        if program.config is not None:
            config["config"] = {"name": program.config_name, "content": program.config}
        if program.env:
            config["env"] = dict(program.env)
        if program.working_directory is not None:
            config["working_directory"] = program.working_directory
        known = {row.value: row for row in reversed(self._rows())} | {
            row.folder: row for row in self._rows() if row.folder is not None
        }
        for option, text in [*_options_of(program.arguments or ()), *_entries_of(program.config)]:
            if row := next((row for value, row in known.items() if value in text), None):
                self._place(row, option, option, value=text, because=_by_program(program))
        return config

    # ---- arguments --------------------------------------------------------------------------------------------------

    def _rows(self) -> list[OptionRow]:
        return [row for row in known_table().options if self.stage in row.stages]

    def _arguments(self) -> list[Any]:
        program = self.target.program
        words: list[Any] = list(self._fixed()) + list(program.words if program is not None else ())
        options = self._options()
        positionals = {plain(one.name): one.name for one in self.script.positionals}
        at_position: dict[str, str] = {}
        for row in self._rows():
            for name in row.names:
                if row.role in self.roles:
                    break
                if (parameter := options.get(plain(name))) is not None:
                    words.append(self._item(row, parameter))
                elif (positional := positionals.get(plain(name))) is not None:
                    at_position[positional] = row.value
                    self._place(row, positional, positional, value=row.value)
        if self._takes_options:
            words.append(_OTHERS)
        for one in self.script.positionals:
            if one.name in at_position or one.required:
                words.append(at_position.get(one.name, f"{{param:{one.name}}}"))
        return words + (self._positions() if not self._takes_options and not self.script.positionals else [])

    @property
    def _takes_options(self) -> bool:
        script = self.script
        known = bool(script.parameters or self.target.classes or self.target.program)
        return known or any(remark.code != _NO_PARSER for remark in script.unread)

    def _options(self) -> dict[str, ScriptParameter]:
        """Return the options by their plain names; of classes that no environment described those that are known."""
        found = {plain(name): one for one in self.script.parameters for name in (*one.aliases, one.name)}
        program = self.target.program
        of_classes = [name for path in self.target.classes if (row := class_row(path)) for name in row.options]
        for name in (*of_classes, *(program.options if program is not None else ())):
            found.setdefault(plain(name), ScriptParameter(name=name, of_library=True))
        return found

    def _fixed(self) -> Iterator[str]:
        """Yield what is always passed to a script that has an option, as the table says."""
        program, options = self.target.program, self._options()
        for row in known_table().fixed:
            option = options.get(row.name)
            of_program = program is not None and row.name in program.options
            own = of_program or (option is not None and not option.of_library)
            if self.stage in row.stages and (set(self.target.classes) & set(row.classes) if row.classes else own):
                reason = Violation("", "suggest_fixed")
                self.placed.append(Placed(f"--{row.name}", row.argument, [reason], certain=True))
                self.fixed.add(row.name)
                yield row.argument

    def _item(self, row: OptionRow, parameter: ScriptParameter) -> str | list[str]:
        value, because = self._value(row, parameter)
        self._place(row, parameter.name, f"--{parameter.name}", value=value, because=because)
        if parameter.form is ArgumentForm.WORDS:
            return [f"--{parameter.name}", value]
        return f"--{parameter.name}={value}"

    def _value(self, row: OptionRow, parameter: ScriptParameter) -> tuple[str, Violation | None]:
        """Return what goes into an option, and why it is that where the name alone does not say it."""
        program = self.target.program
        if program is not None and parameter.name in program.values:
            return program.values[parameter.name], _by_program(program)
        if row.folder is None:
            return row.value, None
        default = parameter.default if isinstance(parameter.default, str) else ""
        if default and not default.endswith(_FILE_SUFFIXES):
            return row.folder, Violation("", "suggest_folder_by_default", {"default": default})
        if any(word in parameter.help.lower() for word in _FOLDER_WORDS):
            return row.folder, Violation("", "suggest_folder_by_help", {"help": parameter.help[:200]})
        return row.value, None

    def _place(
        self,
        row: OptionRow,
        name: str,
        option: str,
        *,
        value: str,
        because: Violation | None = None,
        sure: bool = True,
    ) -> None:
        """Note that a value goes into an option; `sure`: it is an option, whose name says what it takes."""
        self.roles[row.role] = name
        role = f"suggest_role_{row.role}"
        known = because is not None and because.code in ("suggest_by_program", "suggest_by_contract")
        certain = known or (because is None and sure and not row.uncertain)
        said = {"option": option if option.startswith("--") else name}
        by_name = Violation("", "suggest_by_name" if certain else "suggest_by_name_uncertain", said)
        self.placed.append(Placed(option, value, [Violation("", role), because or by_name], certain))

    # ---- scripts without options ------------------------------------------------------------------------------------

    def _row_of(self, name: str) -> OptionRow | None:
        """Return the row whose value a name stands for, if nothing has it yet."""
        rows = (row for row in self._rows() if row.role not in self.roles)
        return next((row for row in rows if plain(name) in map(plain, row.names)), None)

    def _positions(self) -> list[str]:
        """Return words for the places that the script reads itself, up to the last that has a value."""
        words: list[str] = []
        for expected, one in enumerate(self.inputs.words, start=1):
            if one.position != expected:
                break
            row = self._row_of(one.name)
            if row is None:
                words.append(f"{{param:{one.name}}}")
                continue
            words.append(row.value)
            self._place(row, one.name, f"sys.argv[{one.position}]", value=row.value, sure=False)
        while words and words[-1].startswith("{param:"):
            words.pop()
        return words

    def _variables(self) -> dict[str, str]:
        found = {}
        for one in self._own_variables():
            if row := self._row_of(one.name):
                found[one.name] = row.value
                self._place(row, one.name, one.name, value=row.value, sure=False)
        return found

    def _own_variables(self) -> Iterator[Variable]:
        others = known_table().variables["of_others"]
        for one in self.inputs.variables:
            if not any(fnmatchcase(one.name, pattern) for pattern in others):
                yield one

    # ---- what is said of the rest -----------------------------------------------------------------------------------

    def _note_missing(self) -> None:
        """Say what the script takes from nowhere, and what it names itself instead."""
        for role in _needed(self.stage):
            if role in self.roles:
                continue
            named = {one.value: one for one in reversed(self.inputs.named) if role in _SUBJECTS[one.subject]}
            for one in named.values():
                itself = f"suggest_names_{one.subject}_itself"
                self.notes.append(Violation("", itself, {"value": one.value, "line": one.line}))
            if not named:
                missing = f"suggest_missing_{role}"
                self.notes.append(Violation("", missing))
        if not self._takes_options and not self.script.positionals and not self.inputs.words:
            self.notes.append(Violation("", "suggest_no_arguments"))

    def _left_over(self) -> Iterator[LeftOver]:
        """Yield the options without a value of the platform: required ones first."""
        if _takes_platform_arguments(self.script, self.stage):
            return
        taken = {*self.roles.values(), *self.fixed}
        rest = [one for one in self.script.parameters if one.name not in taken]
        for one in sorted(rest, key=lambda one: not one.required):
            yield LeftOver(f"--{one.name}", one.required, one.default, self._why_left(one))
        for positional in self.script.positionals:
            if positional.name not in taken:
                code = "suggest_left_required" if positional.required else "suggest_left_positional"
                yield LeftOver(positional.name, positional.required, None, Violation("", code))
        for variable in self._own_variables():
            if variable.name not in taken:
                why = Violation("", "suggest_left_variable", {"line": variable.line})
                yield LeftOver(variable.name, variable.required, None, why)

    def _why_left(self, parameter: ScriptParameter) -> Violation:
        names = {plain(name) for name in (parameter.name, *parameter.aliases)}
        for row in self._rows():
            if names & set(map(plain, row.names)) and row.role in self.roles:
                return Violation("", "suggest_left_for_other", {"other": self.roles[row.role]})
        return Violation("", "suggest_left_required" if parameter.required else "suggest_left_parameter")


def _is_in_output(named: Named) -> bool:
    """Whether it is the folder `output` of where the script runs, or one in it."""
    return named.subject == "output" and named.value.removeprefix("./").partition("/")[0] == "output"


def _by_program(program: Program) -> Violation:
    return Violation("", "suggest_by_program", {"program": program.name})


def _options_of(arguments: Iterable[str]) -> Iterator[tuple[str, str]]:
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals:
            yield name, value


def _entries_of(document: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts of a configuration file, each with the path of its keys."""
    match document:
        case str():
            yield at, document
        case dict():
            for key, value in document.items():
                yield from _entries_of(value, f"{at}.{key}" if at else key)
        case list():
            for place, value in enumerate(document):
                yield from _entries_of(value, f"{at}[{place}]")


def _needed(stage: Stage) -> tuple[str, ...]:
    """Return what a script of the stage can hardly do without."""
    match stage:
        case JobKind.TRAINING:
            return ("base_model", "data", "output")
        case JobKind.SAVING:
            return ("base_model", "adapter", "output")
        case JobKind.INFERENCE_CUSTOMIZED:
            return ("base_model", "adapter", "prompt")
        case JobKind.INFERENCE_COMPLETE:
            return ("model", "prompt")
        case JobKind.DEPLOYMENT:
            return ("model", "server", "name")
        case _:
            assert_never(stage)
