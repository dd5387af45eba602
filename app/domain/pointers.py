"""JSON pointers (RFC 6901) and JSON merge patches (RFC 7396)."""

from collections.abc import Mapping
from typing import Any


def pointer(*parts: str | int) -> str:
    """Return the pointer to the member at `parts`; no part at all is the whole document."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def merge_patch(target: Any, patch: Any) -> Any:
    """Return `target` changed by `patch` (RFC 7396): null removes, objects merge, everything else replaces."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged
