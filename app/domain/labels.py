"""Labels of nodes: what jobs may ask for beside accelerators and environments.

The worker says some (found on its machine, or given by its operator), people set others over the API, which win.
"""

import re
from collections.abc import Mapping, Sequence

from pydantic import TypeAdapter, ValidationError

from app.domain.accelerators import Accelerator
from app.domain.demand import LabelName, LabelValue
from app.domain.enums import Platform

MAX_NODE_LABELS = 64
_LABELS: TypeAdapter[dict[str, str]] = TypeAdapter(dict[LabelName, LabelValue])


def parse_labels(text: str) -> dict[str, str]:
    """Read `gpu=a100,zone=b`; raise `ValueError` with what is wrong."""
    labels: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"{part!r} is no label; write NAME=VALUE, several with commas between them")
        if name in labels:
            raise ValueError(f"the label {name!r} is given twice")
        labels[name] = value
    return checked_labels(labels)


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels; raise `ValueError` when one is not such that a job could ask for it."""
    try:
        checked = _LABELS.validate_python(dict(labels))
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise ValueError(
            f"{name}={labels.get(name, '')} is no label: name and value have at most 63 letters, digits, '.', '_' or "
            "'-' (a name may have '/'), a letter or digit first and last"
        ) from None
    if len(checked) > MAX_NODE_LABELS:
        raise ValueError(f"a node has at most {MAX_NODE_LABELS} labels")
    return checked


def automatic_labels(name: str, platform: Platform, accelerators: Sequence[Accelerator]) -> dict[str, str]:
    """Return what a node says of itself unasked: its name, its platform and what all its accelerators are called."""
    names = {accelerator.name for accelerator in accelerators}
    said = {"node": name, "platform": platform.value, "accelerator": names.pop() if len(names) == 1 else ""}
    return {label: value for label, text in said.items() if (value := label_value(text))}


def label_value(text: str) -> str:
    """Return the text as a label can have it: `NVIDIA L4` becomes `NVIDIA-L4`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63].strip("._-")
