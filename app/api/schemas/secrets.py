"""Secrets over the wire: values come in and never go out."""

from datetime import datetime

from pydantic import Field, SecretStr

from app.access.secrets import LONGEST, SHORTEST
from app.api.schemas.common import RequestBody
from app.domain.secret_references import SCHEME
from app.domain.values import Value
from app.store.tables import SecretRow


class SecretWrite(RequestBody):
    """The value of a secret."""

    value: SecretStr = Field(
        description=f"At least {SHORTEST} characters, at most {LONGEST} bytes, not a number.",
        examples=["correct-horse-battery"],
    )


class SecretRead(Value):
    """A secret without its value."""

    name: str = Field(examples=["hub-token"])
    reference: str = Field(
        description="Stands for the value in a job's parameters, a method's variables, a deploy target's settings.",
        examples=["secret://hub-token"],
    )
    created_by: str = Field(description="Name of the caller that made it.", examples=["ada"])
    created_at: datetime
    changed_by: str = Field(description="Name of the caller that set the value.", examples=["ada"])
    changed_at: datetime


def secret_read(row: SecretRow) -> SecretRead:
    """Return a secret as it is shown."""
    return SecretRead(
        name=row.name,
        reference=SCHEME + row.name,
        created_by=row.created_by,
        created_at=row.created_at,
        changed_by=row.changed_by,
        changed_at=row.changed_at,
    )
