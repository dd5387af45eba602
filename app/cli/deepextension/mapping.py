"""The file of `--map`: how tables and columns are called in a DeepExtension database, and what values mean here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ConfigDict, Field, ValidationError, field_validator

from app.cli.command import Misused
from app.cli.methods import read_document
from app.domain.enums import TrainingType
from app.domain.lifecycle import PATHS
from app.domain.values import Value
from app.store.deepextension import ROWS, TABLES, Naming

KINDS: Final = ("environments", "deploy_targets", "base_models", "datasets", "methods", "profiles", "models")
VALUES: Final[Mapping[str, Mapping[str, Any]]] = {
    "life_cycle": {str(number): list(path) for number, path in enumerate(PATHS, 1)},
    "training_type": {str(number): kind.value for number, kind in enumerate(TrainingType, 1)},
    "deployment_tools": {},
    "model_type": {},
}
"""What numbers mean unless the file says otherwise: DeepExtension publishes none of them."""


class ImportMap(Value):
    """What the file may say; each part may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_name: str = Field(default="public", alias="schema")
    tables: dict[str, str] = {}
    columns: dict[str, dict[str, str]] = {}
    values: dict[str, dict[str, Any]] = {}
    environments: dict[str, str] = {}
    folders: dict[str, str] = {}
    names: dict[str, dict[str, str]] = {}
    leave_out: dict[str, list[str]] = {}
    methods: dict[str, dict[str, Any]] = {}

    @field_validator("values", mode="before")
    @classmethod
    def _text_keys(cls, value: Any) -> Any:
        """YAML reads `1:` as a number."""
        if not isinstance(value, dict):
            return value
        return {
            name: {str(key): meaning for key, meaning in one.items()} if isinstance(one, dict) else one
            for name, one in value.items()
        }

    @field_validator("tables", "columns")
    @classmethod
    def _known_tables(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = {**TABLES, "rows": ROWS}
        for table, named in value.items():
            if table not in known:
                raise ValueError(f"{table} is none of {', '.join(known)}")
            if isinstance(named, dict) and (strange := named.keys() - known[table].columns.keys()):
                raise ValueError(f"{table} has {', '.join(known[table].columns)}, not {', '.join(sorted(strange))}")
        return value

    @field_validator("values")
    @classmethod
    def _known_values(cls, value: dict[str, Any]) -> dict[str, Any]:
        if strange := value.keys() - VALUES.keys():
            raise ValueError(f"{', '.join(sorted(strange))}: known are {', '.join(VALUES)}")
        return value

    @field_validator("names", "leave_out")
    @classmethod
    def _known_kinds(cls, value: dict[str, Any]) -> dict[str, Any]:
        if strange := value.keys() - set(KINDS):
            raise ValueError(f"{', '.join(sorted(strange))}: known are {', '.join(KINDS)}")
        return value

    @property
    def naming(self) -> Naming:
        """Return how tables and columns are called."""
        return Naming(self.schema_name, self.tables, self.columns)

    def meaning(self, name: str, value: Any) -> tuple[Any, bool]:
        """Return what a value means, None if it is unknown, and whether that is an assumption of ours."""
        given = self.values.get(name, {})
        if str(value) in given:
            return given[str(value)], False
        return VALUES[name].get(str(value)), True


def read_map(file: Path | None) -> ImportMap:
    """Return what the file says. Raises `Misused` with the member that is wrong."""
    if file is None:
        return ImportMap()
    try:
        return ImportMap.model_validate(read_document(file))
    except ValidationError as error:
        notes = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise Misused(f"{file} is no map of an import; docs/from-deepextension.md shows one.", notes=notes) from None


def text_in(value: Any) -> str:
    """Return the text of a name, of which there may be one for each language."""
    if isinstance(value, dict):
        by_language = {str(key).replace("_", "-").lower(): text for key, text in value.items() if text}
        order = sorted(by_language, key=lambda key: (not key.startswith("en"), not key.startswith("zh"), key))
        return str(by_language[order[0]]) if order else ""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
