"""Who may do what: four roles, what each permits, and the caller of a request.

A caller has a role in the installation and may have others in projects. In the project `default` the role in the
installation counts; what concerns all projects, such as nodes, needs it everywhere.
"""

import json
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from app.domain.errors import NotAllowed


class Permission(StrEnum):
    """What a route demands of its caller."""

    READ = "read"
    """See everything but secrets."""
    RUN = "run"
    """Submit, stop and repeat jobs, ask models; bring and delete data sets, base models and models."""
    DEVELOP = "develop"
    """Decide which code runs: methods, scripts, presets, deploy targets, secrets."""
    APPROVE = "approve"
    """Approve, reject and withdraw code that somebody else changed."""
    MANAGE = "manage"
    """Say who works in a project: its members, keys and webhooks."""
    OBSERVE = "observe"
    """See what concerns all projects: metrics, housekeeping."""
    BUILD = "build"
    """Decide what is installed on nodes for all projects: environments."""
    ADMINISTER = "administer"
    """Everything else that all projects share: the projects themselves, nodes, queues, housekeeping."""

    @property
    def is_of_installation(self) -> bool:
        """Whether only a role in the installation permits it."""
        return self in (Permission.OBSERVE, Permission.BUILD, Permission.ADMINISTER)


class Role(StrEnum):
    """What a caller is to the installation or to a project; each may do what those before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    DEVELOPER = "developer"
    ADMIN = "admin"

    @property
    def permissions(self) -> frozenset[Permission]:
        """Return what the role permits."""
        return _PERMISSIONS[self]

    @classmethod
    def least(cls, permission: Permission) -> "Role":
        """Return the first role that permits it."""
        return next(role for role in cls if permission in role.permissions)


_ADDED: Final[Mapping[Role, Collection[Permission]]] = {
    Role.VIEWER: [Permission.READ, Permission.OBSERVE],
    Role.OPERATOR: [Permission.RUN],
    Role.DEVELOPER: [Permission.DEVELOP, Permission.APPROVE, Permission.BUILD],
    Role.ADMIN: [Permission.MANAGE, Permission.ADMINISTER],
}
_PERMISSIONS: Final[Mapping[Role, frozenset[Permission]]] = {
    role: frozenset(one for each in [*Role][: rank + 1] for one in _ADDED[each]) for rank, role in enumerate(Role)
}


class CallerKind(StrEnum):
    """How the service knows a caller."""

    LOCAL = "local"
    """A request of this machine, where the service demands no token."""
    TOKEN = "token"  # noqa: S105 - no password
    """The installation's own token."""
    NETWORK = "network"
    """A request from a network that the settings trust."""
    METRICS = "metrics"
    """The token that opens the metrics and nothing else."""
    KEY = "key"
    """An API key."""
    PERSON = "person"
    """A token that the company's identity provider signed."""


class PermissionMissing(NotAllowed):
    """The caller's role does not permit this."""

    code = "permission_missing"


class InstallationPermissionMissing(PermissionMissing):
    """It concerns all projects, and the caller's role in the installation does not permit it."""

    code = "installation_permission_missing"


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request. `name` is that of the key or the person, else that of the kind."""

    kind: CallerKind
    role: Role | None
    """Its role in the installation; None: it works in projects only."""
    name: str
    key_id: str | None = None
    expires_at: datetime | None = None
    issuer: str | None = None
    """Who signed a person's token."""
    subject: str | None = None
    """What the issuer never gives to another person; a name may change hands."""
    only_project: str | None = None
    """The only project that a key opens."""
    project: str | None = None
    """The project that the request names; None: `default`, with the role in the installation."""
    role_in_project: Role | None = None
    refusal: NotAllowed | None = None
    """Why the person has no role in the installation."""

    @property
    def permissions(self) -> frozenset[Permission]:
        """Return what the caller may do where it is."""
        everywhere = self.role.permissions if self.role is not None else frozenset()
        if self.project is None:
            return everywhere
        here = self.role_in_project.permissions if self.role_in_project is not None else frozenset()
        return frozenset(one for one in Permission if one in (everywhere if one.is_of_installation else here))

    @property
    def principal(self) -> str:
        """Return what stays the same for this caller, whatever its name becomes, and is no other caller's."""
        match self.kind:
            case CallerKind.KEY:
                return f"{self.kind.value}:{self.key_id}"
            case CallerKind.PERSON:
                return f"{self.kind.value}:{self.issuer}#{self.subject}"
            case _:
                return self.kind.value

    def require(self, permission: Permission) -> None:
        """Raise `PermissionMissing` unless the caller's role permits it."""
        if permission in self.permissions:
            return
        of_installation = permission.is_of_installation or self.project is None
        role = self.role if of_installation else self.role_in_project
        missing = InstallationPermissionMissing if self.project is not None and of_installation else PermissionMissing
        raise missing(caller=self.name, role=role.value if role else "-", needed=Role.least(permission).value)


LOCAL: Final = Caller(CallerKind.LOCAL, Role.ADMIN, CallerKind.LOCAL.value)
TOKEN: Final = Caller(CallerKind.TOKEN, Role.ADMIN, CallerKind.TOKEN.value)
NETWORK: Final = Caller(CallerKind.NETWORK, Role.ADMIN, CallerKind.NETWORK.value)
METRICS: Final = Caller(CallerKind.METRICS, Role.VIEWER, CallerKind.METRICS.value)

current_caller: Final[ContextVar[Caller | None]] = ContextVar("caller", default=None)
"""Whose request runs; None is the service itself."""


def caller_name() -> str:
    """Return the name of whose request runs; empty for the service itself."""
    caller = current_caller.get()
    return caller.name if caller is not None else ""


def parse_roles(text: str) -> dict[str, Role]:
    """Read `GROUP=ROLE,GROUP=ROLE`, or a JSON object of the same; raise `ValueError` with what is wrong."""
    try:
        given = json.loads(text) if text.startswith("{") else None
    except ValueError as error:
        raise ValueError(f"it begins like a JSON object and is none: {error}") from None
    pairs = (
        given.items() if given is not None else [part.rpartition("=")[::2] for part in text.split(",") if part.strip()]
    )
    roles: dict[str, Role] = {}
    for group, role in ((str(group).strip(), str(role).strip()) for group, role in pairs):
        if not group or role not in [*Role]:
            raise ValueError(f"{group}={role} must look like GROUP=ROLE, with a role of {', '.join(Role)}")
        if group in roles:
            raise ValueError(f"the group {group!r} is given twice")
        roles[group] = Role(role)
    return roles
