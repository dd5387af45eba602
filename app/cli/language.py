"""The person's language, from the variables that every program reads."""

from collections.abc import Mapping

from app.domain.texts import DEFAULT_LANGUAGE, Language

_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")  # the first one that is set decides, as POSIX says


def language(environ: Mapping[str, str]) -> Language:
    """Return the language of `environ`, English when it is none of ours."""
    locale = next((environ[name] for name in _VARIABLES if environ.get(name)), "")
    code = locale.replace("-", "_").partition("_")[0].lower()
    return Language(code) if code in list(Language) else DEFAULT_LANGUAGE


def accept_language(environ: Mapping[str, str]) -> str:
    """Return the header that asks for the person's language."""
    return language(environ).value
