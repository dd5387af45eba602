"""Negotiate the language of texts by `Accept-Language` (RFC 9110, section 12.5.4)."""

from typing import Annotated

from fastapi import Depends, Request, Response

from app.domain.texts import DEFAULT_LANGUAGE, Language

_BY_TAG = {language.value: language for language in Language}
_MAX_RANGES = 50  # a header of thousands of ranges is not a person's request


def negotiate(header: str | None) -> Language:
    """Return the language of the highest quality that we have; English when nothing fits."""
    best, best_quality = DEFAULT_LANGUAGE, 0.0
    for item in (header or "").split(",")[:_MAX_RANGES]:
        tag, _, parameters = item.strip().partition(";")
        language, quality = _language(tag), _quality(parameters)
        if language is not None and quality > best_quality:
            best, best_quality = language, quality
    return best


def language_headers(language: Language) -> dict[str, str]:
    """Return the headers of a response whose texts depend on the caller's language."""
    return {"Content-Language": language.value, "Vary": "Accept-Language"}


async def request_language(request: Request, response: Response) -> Language:
    """Dependency: the caller's language; marks the response as depending on it."""
    language = negotiate(request.headers.get("accept-language"))
    for name, value in language_headers(language).items():
        response.headers[name] = value
    return language


RequestLanguage = Annotated[Language, Depends(request_language)]


def _language(tag: str) -> Language | None:
    primary = tag.strip().lower().partition("-")[0]
    if primary == "*":
        return DEFAULT_LANGUAGE
    return _BY_TAG.get(primary)


def _quality(parameters: str) -> float:
    name, _, value = parameters.strip().partition("=")
    if not name:
        return 1.0
    try:
        return min(max(float(value), 0.0), 1.0) if name.strip().lower() == "q" else 1.0
    except ValueError:
        return 0.0
