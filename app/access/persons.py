"""People: known by tokens that an identity provider (OpenID Connect) signed, named and given a role by their claims.

A token counts when its issuer is one of the settings, one of that issuer's keys signed it with an algorithm of the
settings, it was made for this service, and it is valid now. What the token says of keys (`jwk`, `jku`, `x5u`) is not
read: keys come from the issuer alone. The service keeps no people: a token holds all that it knows of one.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from app.access.signing_keys import Jwk
from app.domain.access import Caller, CallerKind, Role
from app.domain.errors import NotAllowed, Unauthenticated
from app.domain.names import MAX_NAME_LENGTH, name_key, normal_name
from app.domain.plain_text import shown

MAX_TOKEN_CHARACTERS: Final = 16 * 1024
MAX_SUBJECT_CHARACTERS: Final = 255  # OpenID Connect Core, section 2
_TYPES: Final = frozenset({"jwt", "at+jwt"})
_LAST: Final = datetime(9999, 1, 1, tzinfo=UTC)
_KIND_NAMES: Final = frozenset(kind.value for kind in CallerKind)

FindKey = Callable[[str | None, str], Awaitable[Jwk | None]]
"""Returns the key of an issuer with this id for this algorithm."""


class TokenRefused(Unauthenticated):
    """A signed token that does not count; the leaf says why."""


class TokenMalformed(TokenRefused):
    """Not a signed token, or one that is too large."""

    code = "token_malformed"


class TokenTypeWrong(TokenRefused):
    """Signed by the issuer for something else than a call: a logout, a proof."""

    code = "token_type_wrong"


class TokenAlgorithmRefused(TokenRefused):
    """Not signed, or by an algorithm that the settings do not allow."""

    code = "token_algorithm_refused"


class TokenIssuerUnknown(TokenRefused):
    """Nobody of the settings made it."""

    code = "token_issuer_unknown"


class TokenAudienceWrong(TokenRefused):
    """Made for another service."""

    code = "token_audience_wrong"


class TokenSignerUnknown(TokenRefused):
    """The issuer has no such key, or has it no more."""

    code = "token_signer_unknown"


class TokenForged(TokenRefused):
    """The signature is not that of the key."""

    code = "token_forged"


class TokenExpired(TokenRefused):
    """Its time is over."""

    code = "token_expired"


class TokenNotYetValid(TokenRefused):
    """Its time has not begun."""

    code = "token_not_yet_valid"


class TokenClaimMissing(TokenRefused):
    """It lacks a claim without which nobody can be known."""

    code = "token_claim_missing"


class RoleClaimMissing(NotAllowed):
    """The token does not say to which groups the person belongs, and nobody gets a role without."""

    code = "role_claim_missing"


class RoleNotMapped(NotAllowed):
    """The settings give none of the person's groups a role."""

    code = "role_not_mapped"


@dataclass(frozen=True)
class PersonOptions:
    """What the settings say of people."""

    audiences: Sequence[str]
    """Names of this service; a token must name one of them."""
    algorithms: Sequence[str] = ("RS256", "PS256", "ES256", "EdDSA")
    leeway: timedelta = timedelta(seconds=60)
    name_claims: Sequence[str] = ("preferred_username", "email", "sub")
    """The first one that holds a name is taken."""
    role_claim: str = "groups"
    roles: Mapping[str, Role] | None = None
    """Role by group; of several the highest counts."""
    default_role: Role | None = None
    """What a person gets whose groups have no role; None: nothing."""


class Persons:
    """Tells who sent a signed token."""

    def __init__(self, issuers: Mapping[str, FindKey], options: PersonOptions) -> None:
        self._issuers = issuers
        self._options = options

    async def caller(self, token: str) -> Caller:
        """Return whose token it is; raise a `TokenRefused`."""
        header, issuer, find_key = self._introduced(token)
        key = await find_key(header.get("kid"), header["alg"])
        if key is None:
            raise TokenSignerUnknown(kid=shown(str(header.get("kid", "-"))), issuer=issuer)
        claims = self._verified(token, key, algorithm=header["alg"], issuer=issuer)
        subject = claims["sub"]
        if not _is_plain(subject, limit=MAX_SUBJECT_CHARACTERS):
            raise TokenClaimMissing(claim="sub")
        name = self._name(claims)
        role = self._role(claims, name)
        return Caller(
            CallerKind.PERSON,
            role if isinstance(role, Role) else None,
            name,
            refusal=role if isinstance(role, NotAllowed) else None,
            expires_at=_moment(claims["exp"]),
            issuer=issuer,
            subject=subject,
        )

    def _introduced(self, token: str) -> tuple[Mapping[str, Any], str, FindKey]:
        """Return header, issuer and where its keys are, as the token says itself: nothing of it is known to be true."""
        import jwt  # few services have an issuer

        if len(token) > MAX_TOKEN_CHARACTERS:
            raise TokenMalformed
        with _refusals(self._options):
            said = jwt.decode_complete(token, options={"verify_signature": False})
        header, claims = said["header"], said["payload"]
        if header.get("alg") not in self._options.algorithms:
            allowed = ", ".join(self._options.algorithms)
            raise TokenAlgorithmRefused(algorithm=shown(str(header.get("alg"))), allowed=allowed)
        kind = str(header.get("typ", "JWT")).lower().removeprefix("application/")
        if kind not in _TYPES or "events" in claims:  # logout tokens name service and person too
            raise TokenTypeWrong(type=shown(kind))
        issuer = claims.get("iss")
        find_key = self._issuers.get(issuer) if isinstance(issuer, str) else None
        if find_key is None:
            raise TokenIssuerUnknown(issuer=shown(str(issuer)))
        return header, str(issuer), find_key

    def _verified(self, token: str, jwk: Jwk, *, algorithm: str, issuer: str) -> Mapping[str, Any]:
        """Return the claims of a token that was signed with the key and is meant for this service now."""
        import jwt

        with _refusals(self._options):
            claims: Mapping[str, Any] = jwt.decode(
                token,
                jwt.PyJWK(dict(jwk), algorithm),
                algorithms=[algorithm],
                audience=list(self._options.audiences),
                issuer=issuer,
                leeway=self._options.leeway,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        return claims

    def _name(self, claims: Mapping[str, Any]) -> str:
        """Return what the person is called; never a name by which the service knows other callers."""
        for claim in self._options.name_claims:
            name = _claim(claims, claim)
            if claim == "email" and claims.get("email_verified") is False:
                continue
            if _is_plain(name, limit=MAX_NAME_LENGTH) and name_key(name) not in _KIND_NAMES:
                return normal_name(name)
        return shown(claims["sub"], limit=MAX_NAME_LENGTH)

    def _role(self, claims: Mapping[str, Any], name: str) -> Role | NotAllowed:
        """Return the role in the installation, or why the person has none: it may be a member of a project."""
        given = _claim(claims, self._options.role_claim)
        roles = self._options.roles or {}
        found = {roles[group] for group in _groups(given) if group in roles}
        highest = next((role for role in reversed(Role) if role in found), self._options.default_role)
        if highest is not None:
            return highest
        missing = RoleClaimMissing if given is None else RoleNotMapped
        return missing(caller=name, claim=self._options.role_claim)


def is_signed_token(secret: str) -> bool:
    """Say whether it has the form of a signed token: its first part is a JSON object in base64."""
    return secret.startswith("ey") and secret.count(".") >= 2


def _groups(given: Any) -> Sequence[str]:
    """Return the groups of a claim: a list, an object by group, a text, or words in a text as in `scope`."""
    if isinstance(given, str):
        return [given, *given.split()]
    return [group for group in given if isinstance(group, str)] if isinstance(given, list | dict) else []


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """Return the claim with this name, else the one at this path with dots (`realm_access.roles`)."""
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_plain(value: Any, *, limit: int) -> bool:
    """Say whether it is a text that can be shown and kept as it is."""
    return isinstance(value, str) and 0 < len(value) <= limit and value.isprintable() and value == value.strip()


def _moment(seconds: float) -> datetime:
    try:
        return min(datetime.fromtimestamp(int(seconds), UTC), _LAST)
    except (ValueError, OverflowError, OSError):
        return _LAST


@contextmanager
def _refusals(options: PersonOptions) -> Iterator[None]:
    """Say in our words what is wrong with a token; no text of the token gets into a log or an answer."""
    import jwt

    try:
        yield
    except jwt.ExpiredSignatureError:
        raise TokenExpired from None
    except jwt.ImmatureSignatureError:
        raise TokenNotYetValid from None
    except jwt.InvalidAudienceError:
        raise TokenAudienceWrong(audience=", ".join(options.audiences)) from None
    except jwt.MissingRequiredClaimError as error:
        if error.claim == "aud":
            raise TokenAudienceWrong(audience=", ".join(options.audiences)) from None
        raise TokenClaimMissing(claim=error.claim) from None
    except jwt.exceptions.InvalidSubjectError:
        raise TokenClaimMissing(claim="sub") from None
    except jwt.InvalidSignatureError:
        raise TokenForged from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError, OverflowError):
        raise TokenMalformed from None
