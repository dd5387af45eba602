"""Print the parameters that a method's stages take."""

from typing import Any

from rich.markup import escape

from app.cli.output import Markup, console, print_table


def print_parameters(document: dict[str, Any]) -> None:
    """Print one table for each stage, and what could not be read."""
    for stage in document["stages"]:
        console().print(f"\n[bold]{stage['stage']}[/]  {escape(stage['file'])}")
        schema = stage["schema"]
        required = set(schema.get("required", ()))
        rows = [
            (
                _name(name, required=name in required),
                _type(entry),
                _default(entry),
                _meaning(entry),
            )
            for name, entry in schema["properties"].items()
            if not entry.get("x-platform")
        ]
        print_table(("parameter (bold: required)", "type", "default", "meaning"), rows, nothing="takes none")
        for remark in stage["remarks"]:
            console().print(f"  {remark['detail']}", markup=False, style="yellow")


def _name(name: str, *, required: bool) -> str:
    return Markup(f"[bold]{escape(name)}[/]") if required else name


def _type(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return " | ".join(str(choice) for choice in entry["enum"])
    kind = entry.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _default(entry: dict[str, Any]) -> str:
    return "" if entry.get("default") is None else str(entry["default"])


def _meaning(entry: dict[str, Any]) -> str:
    low, high = entry.get("x-typical-minimum"), entry.get("x-typical-maximum")
    bounds = (("from", low), ("to", high))
    typical = " ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    text = str(entry.get("description") or entry.get("title") or "")
    return f"{text} (typically {typical})" if typical else text
