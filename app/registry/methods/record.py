"""A method as the services hand it out: one version of it, with what is known of the method itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.domain.definition import MethodDefinition
from app.domain.enums import VersionSource
from app.domain.kinds import Stage
from app.domain.names import name_key
from app.registry.methods.pins import Pins, pins_from_json
from app.store.tables import MethodRow, MethodVersionRow


@dataclass(frozen=True)
class Method:
    """One version of a method. Two equal records mean the same definition and the same bytes."""

    id: str
    name: str
    version: int
    definition: MethodDefinition
    files: Pins
    source: VersionSource
    preset: str | None
    preset_version: int | None
    read_only: bool
    created_by: str
    created_at: datetime
    updated_at: datetime
    version_created_by: str
    version_created_at: datetime
    deleted_at: datetime | None

    @property
    def tag(self) -> str:
        """Names this version in `ETag` and `If-Match`; never equal to that of another method of the same name."""
        return version_tag(self.id, self.version)

    def environment(self, stage: Stage) -> str | None:
        """Return the conda environment that `stage` runs in."""
        config = self.definition.stage_config(stage)
        return None if config is None else config.conda_env


def method_of(row: MethodRow, version: MethodVersionRow) -> Method:
    """Return the record of a version."""
    return Method(
        id=row.id,
        name=row.name,
        version=version.number,
        definition=MethodDefinition.model_validate(version.definition),
        files=pins_from_json(version.files),
        source=version.source,
        preset=row.preset,
        preset_version=row.preset_version,
        read_only=row.read_only,
        created_by=row.created_by,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version_created_by=version.created_by,
        version_created_at=version.created_at,
        deleted_at=row.deleted_at,
    )


def version_tag(method_id: str, version: int) -> str:
    """Return what names a version of a method in `ETag`."""
    return f"{method_id[:8]}.{version}"


def row_values(definition: MethodDefinition) -> Mapping[str, Any]:
    """Return the columns of a method's row that repeat a valid definition."""
    assert definition.name is not None
    assert definition.lifecycle is not None
    return {
        "name": definition.name,
        "name_key": name_key(definition.name),
        "description": definition.description,
        "training_type": definition.training_type,
        "technique": definition.technique,
        "lifecycle": lifecycle_text(definition.lifecycle),
    }


def lifecycle_text(lifecycle: Sequence[str]) -> str:
    """Return a path as the table and the list's filter have it."""
    return ",".join(lifecycle)
