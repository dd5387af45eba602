"""Convert pydantic's errors into violations: pointer, stable code, values for the text."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.errors import Violation
from app.domain.pointers import pointer

_EXPECTED_TYPE = {
    "string": "string",
    "int": "integer",
    "float": "number",
    "decimal": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
    "model": "object",
    "model_attributes": "object",
    "dataclass": "object",
    "none_required": "null",
    "uuid": "UUID",
    "url": "URL",
    "date": "date (RFC 3339)",
    "datetime": "date and time (RFC 3339)",
    "time": "time",
}
_CONSTRAINTS: dict[str, tuple[str, str, str]] = {
    # pydantic's type: (our code, our parameter, pydantic's context key)
    "string_too_long": ("field_too_long", "limit", "max_length"),
    "string_too_short": ("field_too_short", "limit", "min_length"),
    "too_long": ("field_too_long", "limit", "max_length"),
    "too_short": ("field_too_short", "limit", "min_length"),
    "string_pattern_mismatch": ("field_pattern", "pattern", "pattern"),
    "literal_error": ("field_choice", "allowed", "expected"),
    "enum": ("field_choice", "allowed", "expected"),
    "union_tag_invalid": ("field_choice", "allowed", "expected_tags"),
}
_BOUNDS: dict[str, tuple[str, str, str]] = {
    # pydantic's type: (our code, pydantic's context key, sign)
    "greater_than_equal": ("field_too_small", "ge", "≥"),
    "greater_than": ("field_too_small", "gt", ">"),
    "less_than_equal": ("field_too_large", "le", "≤"),
    "less_than": ("field_too_large", "lt", "<"),
}


def violations_of(errors: Sequence[Mapping[str, Any]], body: Any = None) -> list[Violation]:
    """Return one violation per complaint, the same place and code once (unions complain once per member)."""
    unique: dict[tuple[str, str], Violation] = {}
    for error in errors:
        code, params = _code(error)
        place = pointer_of(error["loc"], body)
        unique.setdefault((place, code), Violation(place, code, params))
    return list(unique.values())


def pointer_of(location: Sequence[str | int], body: Any = None) -> str:
    """Return where: RFC 6901 into the body; `?name` a query parameter, `{name}` a path one, `Name:` a header."""
    place, *parts = location or ("body",)
    name = str(parts[0]) if parts else ""
    match place:
        case "query":
            return f"?{name}"
        case "path":
            return "{" + name + "}"
        case "header":
            return "-".join(word.capitalize() for word in name.replace("_", "-").split("-")) + ":"
        case "cookie":
            return f"Cookie: {name}"
        case _:
            return pointer(*_real_parts(parts, body))


def _real_parts(parts: Sequence[str | int], body: Any) -> list[str | int]:
    """Remove the steps that name a union's member or a validator: they are not in the document."""
    real: list[str | int] = []
    for index, part in enumerate(parts):
        match body:
            case dict():
                if part not in body and index < len(parts) - 1:
                    continue
                body = body.get(part)
            case list():
                if not isinstance(part, int):
                    continue
                body = body[part] if part < len(body) else None
            case _:
                break  # a leaf has nothing below it
        real.append(part)
    return real


def _code(error: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kind, context = str(error["type"]), error.get("ctx") or {}
    if kind in {"missing", "union_tag_not_found"}:
        return "field_required", {}
    if kind == "extra_forbidden":
        return "field_unknown", {}
    if kind in _CONSTRAINTS:
        code, parameter, key = _CONSTRAINTS[kind]
        return code, {parameter: str(context.get(key, "")).replace(" or ", ", ").replace("'", "")}
    if kind in _BOUNDS:
        code, key, sign = _BOUNDS[kind]
        return code, {"bound": f"{sign} {context.get(key)}"}
    expected = _expected_type(kind)
    if expected:
        return "field_type", {"expected": expected}
    return "field_invalid", {"problem": str(error.get("msg", "")).removeprefix("Value error, ").rstrip(".")}


def _expected_type(kind: str) -> str | None:
    for suffix in ("_type", "_parsing", "_parsing_size", "_from_float", "_from_datetime_parsing", "_from_date_parsing"):
        if kind.endswith(suffix) and kind.removesuffix(suffix) in _EXPECTED_TYPE:
            return _EXPECTED_TYPE[kind.removesuffix(suffix)]
    return None
