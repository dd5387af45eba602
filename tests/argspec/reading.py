"""Reads scripts in the tests' own process: those that cannot do harm."""

from collections.abc import Mapping

from app.argspec.modules import Modules, Source
from app.argspec.reader import read_arguments
from app.argspec.report import Arguments, Remark
from app.argspec.source import NotPython, parse
from app.domain.script_parameters import ScriptParameters
from app.presets import catalogue
from app.registry.methods.script_reading import script_parameters


def read_parameters(source: str, beside: Mapping[str, str] | None = None) -> ScriptParameters:
    """Return what the platform makes of a script; `beside` has modules by name, of a package with a slash behind."""
    sources = {name.rstrip("/"): Source(text.encode(), name.endswith("/")) for name, text in (beside or {}).items()}
    try:
        return script_parameters(read_arguments(parse(source), Modules(sources)))
    except NotPython as error:
        remark = Remark("unread_not_python", error.problem.line, error.problem.message)
        return script_parameters(Arguments(unread=(remark,)))


def read_shipped(name: str) -> ScriptParameters:
    """Return what the platform makes of a shipped script, with what it takes from our helpers."""
    helpers = {file.stem: file.read_text("utf-8") for file in catalogue.helpers_dir().glob("*.py")}
    return read_parameters(catalogue.script_path(name).read_text("utf-8"), helpers)
