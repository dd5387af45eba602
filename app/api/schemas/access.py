"""Over the wire: API keys, and who calls."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import AwareDatetime, Field

from app.api.errors import ProblemEntry
from app.api.schemas.common import RequestBody
from app.domain.access import Caller, CallerKind, Permission, Role
from app.domain.projects import DEFAULT_PROJECT
from app.domain.values import Value
from app.store.tables import AccessKeyRow

_ID = "2f6d1c8a-5b7e-4d3f-9a0c-1e2d3c4b5a69"
_NAME = "nightly-training"
_ROLE = "Viewer: read. Operator: run jobs, bring data and models. Developer: decide which code runs. Admin: all."
_LAST: Final = datetime(9999, 1, 1, tzinfo=UTC)  # later ones leave the calendar in some time zones
_EXPIRY = "The key ends at this time (RFC 3339, with its offset); null: never."


class KeyCreate(RequestBody):
    """A key to make."""

    name: str = Field(description="Whose key it is, or what for; unique among keys in use.", examples=[_NAME])
    role: Role = Field(description=_ROLE, examples=["operator"])
    expires_at: AwareDatetime | None = Field(
        default=None, lt=_LAST, description=_EXPIRY, examples=["2027-06-30T00:00:00Z"]
    )


class KeyChange(RequestBody):
    """What changes; members that are missing stay."""

    name: str | None = Field(default=None, examples=[_NAME])
    role: Role | None = Field(default=None, description=_ROLE)
    expires_at: AwareDatetime | None = Field(default=None, lt=_LAST, description=_EXPIRY)

    def changes(self) -> dict[str, Any]:
        """Return what changes; null takes the expiry away and leaves the others as they are."""
        given = self.model_dump(exclude_unset=True)
        return {name: value for name, value in given.items() if value is not None or name == "expires_at"}


class KeyRead(Value):
    """An API key."""

    id: str = Field(examples=[_ID])
    name: str = Field(examples=[_NAME])
    role: Role = Field(description="In its project, else in the installation.")
    project_id: str | None = Field(description="The only project that it opens; null: all.", examples=[None])
    prefix: str = Field(description="The first characters of the secret.", examples=["deepe_8sKq2w"])
    secret: str | None = Field(
        description="Send it as `Authorization: Bearer SECRET`. Shown once, when it is made; else null.",
        examples=[None],
    )
    created_by: str = Field(description="Name of the caller that made the key.", examples=["token"])
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")
    revoked_at: datetime | None


class OidcLogin(Value):
    """Where a program gets a token for a person, by the device flow (RFC 8628)."""

    issuer: str = Field(examples=["https://idp.example.com/realms/lab"])
    client_id: str = Field(examples=["deepe"])
    scopes: Sequence[str] = Field(examples=[["openid", "profile", "email", "offline_access"]])


class Login(Value):
    """How people log in."""

    oidc: OidcLogin | None = Field(description="The identity provider; null: people have API keys.")


class Me(Value):
    """Who sent the request, and what that caller may do."""

    name: str = Field(description="Name of the key or the person, else the kind.", examples=[_NAME])
    kind: CallerKind = Field(
        description="`local`: this machine, which needs no token; `token`: the installation's own; `network`: a "
        "network that the settings trust; `key`: an API key; `person`: a token of the identity provider."
    )
    principal: str = Field(
        description="Stays the same when the name changes, and is no other caller's: `key:ID`, "
        "`person:ISSUER#SUBJECT`, else the kind.",
        examples=[f"key:{_ID}"],
    )
    role: Role | None = Field(description="In the installation; null: none, see `role_in_project`.")
    project: str = Field(description="Where you are: the project that the address names.", examples=["default"])
    role_in_project: Role = Field(description="In that project.")
    permissions: Sequence[Permission] = Field(description="What you may do there.")
    key: str | None = Field(description="Id of the API key.", examples=[_ID])
    expires_at: datetime | None
    notices: Sequence[ProblemEntry] = Field(
        description="What people should know of this installation, such as a licence that expires soon."
    )


def key_read(row: AccessKeyRow, secret: str | None = None) -> KeyRead:
    """Return a key as it is shown; the secret to whom it was just made for only."""
    fields: dict[str, Any] = {name: getattr(row, name) for name in KeyRead.model_fields if name != "secret"}
    return KeyRead(**fields, secret=secret)


def me_read(caller: Caller, notices: Sequence[ProblemEntry]) -> Me:
    """Return the caller as it is shown."""
    return Me(
        name=caller.name,
        kind=caller.kind,
        principal=caller.principal,
        role=caller.role,
        project=caller.project or DEFAULT_PROJECT,
        role_in_project=(caller.role if caller.project is None else caller.role_in_project) or Role.VIEWER,
        permissions=[one for one in Permission if one in caller.permissions],
        key=caller.key_id,
        expires_at=caller.expires_at,
        notices=notices,
    )
