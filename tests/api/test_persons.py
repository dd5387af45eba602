"""Tokens of an identity provider over HTTP: who gets in, as whom, and every token that must not."""

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from app.access.signing_keys import KeysUnusable, SigningKeys, document_of, usable_keys
from app.main import create_app
from app.settings import load_settings
from app.store.migrate import upgrade
from app.store.session import Database
from tests.identity_provider import AUDIENCE, Answer, IdentityProvider, identity_provider, jwk, private_key

TOKEN = "k3J9-very-random-token"
ADDRESSES = count(1)


@pytest.fixture(scope="module")
def running() -> Iterator[IdentityProvider]:
    with identity_provider() as provider:
        yield provider


@pytest.fixture
def provider(running: IdentityProvider) -> IdentityProvider:
    running.__init__(running.url)  # type: ignore[misc]
    return running


@asynccontextmanager
async def service(provider: IdentityProvider, tmp_path: Path, **options: Any) -> AsyncIterator["Service"]:
    """Return the service that the settings make."""
    settings = load_settings(
        home=tmp_path,
        api_token=TOKEN,
        **{"oidc_issuers": provider.url, "oidc_audiences": AUDIENCE, "oidc_roles": "ml=developer,ops=admin", **options},
    )
    application = create_app(settings)
    database: Database = application.state.services.database
    await upgrade(database)  # whoever has no role may be a member of a project

    def client(port: int = 8000) -> httpx.AsyncClient:
        # an address of its own for each request: wrong tokens slow an address down
        transport = httpx.ASGITransport(app=application, client=(f"203.0.113.{next(ADDRESSES) % 250}", 1))
        return httpx.AsyncClient(transport=transport, base_url=f"http://gpu.example.com:{port}")

    try:
        yield Service(client)
    finally:
        await database.close()


class Service:
    def __init__(self, client: Any) -> None:
        self._client = client

    async def get(self, path: str, token: str, *, port: int = 8000, language: str = "en") -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}", "Accept-Language": language}
        async with self._client(port) as client:
            response: httpx.Response = await client.get(path, headers=headers)
            return response

    async def me(self, token: str) -> dict[str, Any]:
        body: dict[str, Any] = (await self.get("/api/v1/me", token)).json()
        return body

    async def outcome(self, token: str) -> str:
        """Return the role, or the code of the refusal."""
        me = await self.me(token)
        return str(me.get("role") or me["code"])


def part(document: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")


class TestPerson:
    async def test_has_name_role_and_end_of_the_token(self, provider: IdentityProvider, tmp_path: Path) -> None:
        end = int(time.time()) + 120

        async with service(provider, tmp_path) as running:
            me = await running.me(provider.token(exp=end))

        assert (me["kind"], me["name"], me["role"], me["key"]) == ("person", "ada", "developer", None)
        assert me["principal"] == f"person:{provider.url}#u-1"
        assert me["expires_at"].startswith(time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(end)))

    async def test_is_called_by_the_first_claim_that_holds_a_name(
        self, provider: IdentityProvider, tmp_path: Path
    ) -> None:
        email = "ada@lab.example"
        cases: list[tuple[dict[str, Any], str]] = [
            ({}, "ada"),
            ({"preferred_username": None, "email": email}, email),
            ({"preferred_username": None, "email": email, "email_verified": False}, "u-1"),
            ({"preferred_username": "token", "email": email}, email),
            ({"preferred_username": "a\x1b[2J", "email": 7}, "u-1"),
            ({"preferred_username": "x" * 200}, "u-1"),
        ]

        async with service(provider, tmp_path) as running:
            found = [(await running.me(provider.token(**claims)))["name"] for claims, _ in cases]

        assert found == [name for _, name in cases]

    async def test_gets_the_highest_role_of_the_groups(self, provider: IdentityProvider, tmp_path: Path) -> None:
        groups: list[tuple[Any, str]] = [
            (["guests", "ml"], "developer"),
            (["ml", "ops"], "admin"),
            ("ops", "admin"),
            ("openid ml", "developer"),
            ({"ml": {"1": "lab"}}, "developer"),
            (["guests"], "role_not_mapped"),
            ([["ml"], 7], "role_not_mapped"),
            (None, "role_claim_missing"),
        ]

        async with service(provider, tmp_path) as running:
            found = [await running.outcome(provider.token(groups=given)) for given, _ in groups]

        assert found == [expected for _, expected in groups]

    async def test_without_a_role_is_told_where_it_was_looked_for(
        self, provider: IdentityProvider, tmp_path: Path
    ) -> None:
        token = provider.token(groups=None, realm={"roles": ["none"]})

        async with service(provider, tmp_path, oidc_role_claim="realm.groups") as running:
            answers = [await running.get("/api/v1/me", token, language=language) for language in ("en", "zh", "de")]

        assert {answer.status_code for answer in answers} == {403}
        assert all("realm.groups" in answer.json()["detail"] for answer in answers)
        assert len({answer.json()["detail"] for answer in answers}) == 3

    async def test_role_comes_from_a_path_a_name_with_dots_or_the_default(
        self, provider: IdentityProvider, tmp_path: Path
    ) -> None:
        nested = provider.token(groups=None, realm_access={"roles": ["CN=ops,DC=lab"]})
        claims: dict[str, Any] = {"groups": None, "https://lab.example/roles": ["ml"]}
        flat = provider.token(**claims)
        roles = '{"CN=ops,DC=lab": "admin", "ml": "operator"}'

        async with service(provider, tmp_path, oidc_role_claim="realm_access.roles", oidc_roles=roles) as by_path:
            found = [await by_path.outcome(nested)]
        async with service(
            provider,
            tmp_path,
            oidc_role_claim="https://lab.example/roles",
            oidc_roles=roles,
            oidc_default_role="viewer",
        ) as by_name:
            found += [await by_name.outcome(flat), await by_name.outcome(nested)]

        assert found == ["admin", "operator", "viewer"]

    async def test_may_what_the_role_may_and_is_named_in_the_log(
        self, provider: IdentityProvider, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        token = provider.token()

        async with service(provider, tmp_path, log_level="debug", log_format="json") as running:
            refused = await running.get("/api/v1/keys", token)
            await running.get("/api/v1/me", provider.token(exp=time.time() - 900))

        logged = capsys.readouterr().err
        assert (refused.status_code, refused.json()["code"]) == (403, "permission_missing")
        requests = [json.loads(line) for line in logged.splitlines() if "http_request" in line]
        assert [request["caller"] for request in requests] == ["ada", None]
        assert not any(piece in logged for piece in token.split("."))

    async def test_may_call_the_runners_port_from_operator_on(self, provider: IdentityProvider, tmp_path: Path) -> None:
        async with service(provider, tmp_path, runner_port=8011, oidc_roles="ml=operator,guests=viewer") as running:
            answers = [
                await running.get("/nothing", token, port=8011)
                for token in (provider.token(), provider.token(groups=["guests"]), provider.token(aud="other"))
            ]

        assert [answer.status_code for answer in answers] == [404, 403, 401]

    async def test_key_of_any_kind_signs(self, provider: IdentityProvider, tmp_path: Path) -> None:
        provider.keys = [jwk("rsa-1"), jwk("ec-1"), jwk("ed-1")]
        signed = [("rsa-1", "RS256"), ("rsa-1", "PS256"), ("ec-1", "ES256"), ("ed-1", "EdDSA")]

        async with service(provider, tmp_path) as running:
            found = [await running.outcome(provider.token(key, algorithm)) for key, algorithm in signed]

        assert found == ["developer"] * len(signed)


class TestRefused:
    async def test_tokens_that_are_not_for_this_service_now(self, provider: IdentityProvider, tmp_path: Path) -> None:
        now = time.time()
        cases: list[tuple[dict[str, Any], str]] = [
            ({"iss": "https://evil.example"}, "token_issuer_unknown"),
            ({"iss": provider.url + "/"}, "token_issuer_unknown"),
            ({"iss": [provider.url]}, "token_issuer_unknown"),
            ({"iss": None}, "token_issuer_unknown"),
            ({"aud": "other-client"}, "token_audience_wrong"),  # also an ID token of another client
            ({"aud": ["other-client", "account"]}, "token_audience_wrong"),
            ({"aud": f"{AUDIENCE}-other"}, "token_audience_wrong"),
            ({"aud": f"other {AUDIENCE}"}, "token_audience_wrong"),
            ({"aud": {AUDIENCE: 1}}, "token_audience_wrong"),
            ({"aud": [AUDIENCE, 7]}, "token_audience_wrong"),
            ({"aud": []}, "token_audience_wrong"),
            ({"aud": None}, "token_audience_wrong"),
            ({"aud": ["other-client", AUDIENCE]}, "developer"),
            ({"exp": now - 61}, "token_expired"),
            ({"exp": now - 30}, "developer"),  # within the leeway
            ({"exp": None}, "token_claim_missing"),
            ({"exp": "soon"}, "token_malformed"),
            ({"exp": 1e300}, "developer"),
            ({"exp": float("inf")}, "token_malformed"),
            ({"exp": True}, "token_expired"),
            ({"nbf": now + 120}, "token_not_yet_valid"),
            ({"nbf": now + 30}, "developer"),
            ({"iat": now + 120}, "token_not_yet_valid"),
            ({"sub": None}, "token_claim_missing"),
            ({"sub": ""}, "token_claim_missing"),
            ({"sub": "x" * 256}, "token_claim_missing"),
            ({"sub": "a\nb"}, "token_claim_missing"),
            ({"events": {"http://schemas.openid.net/event/backchannel-logout": {}}}, "token_type_wrong"),
        ]

        async with service(provider, tmp_path) as running:
            found = [(claims, await running.outcome(provider.token(**claims))) for claims, _ in cases]

        assert found == cases

    async def test_tokens_that_nobody_signed(self, provider: IdentityProvider, tmp_path: Path) -> None:
        """What the header says of algorithms and keys lets nobody in."""
        provider.keys = [jwk("rsa-1"), jwk("rsa-2"), jwk("ec-1")]
        public = private_key("rsa-1").public_key()
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        good = provider.token()
        header, claims, signature = good.split(".")

        def stolen(**headers: Any) -> str:
            return provider.token("rsa-thief", headers=headers)

        def hmac_of(secret: bytes) -> str:
            signed = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'rsa-1'})}.{claims}"
            mac = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
            return f"{signed}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"

        cases = {
            "none": (f"{part({'alg': 'none'})}.{claims}.", "token_algorithm_refused"),
            "None": (f"{part({'alg': 'NoNe', 'kid': 'rsa-1'})}.{claims}.{signature}", "token_algorithm_refused"),
            "no algorithm": (f"{part({'kid': 'rsa-1'})}.{claims}.{signature}", "token_algorithm_refused"),
            "HS256 with the public key": (hmac_of(pem), "token_algorithm_refused"),
            "HS256 with the modulus": (hmac_of(jwk("rsa-1")["n"].encode()), "token_algorithm_refused"),
            "not of the settings": (provider.token(algorithm="RS512"), "token_algorithm_refused"),
            "signature cut": (f"{header}.{claims}.", "token_forged"),
            "other claims": (f"{header}.{part(provider.claims(groups=['ops']))}.{signature}", "token_forged"),
            "kid of another key": (provider.token(headers={"kid": "rsa-2"}), "token_forged"),
            "kid of another kind": (provider.token(headers={"kid": "ec-1"}), "token_signer_unknown"),
            "no kid, several keys": (provider.token(headers={"kid": None}), "token_signer_unknown"),
            "no kid, one key": (provider.token("ec-1", "ES256", headers={"kid": None}), "developer"),
            "kid unknown": (stolen(), "token_signer_unknown"),
            "jwk": (stolen(kid="rsa-1", jwk=jwk("rsa-thief")), "token_forged"),
            "jku": (stolen(jku="https://evil.example/keys"), "token_signer_unknown"),
            "x5u": (stolen(kid="rsa-1", x5u="https://evil.example/x"), "token_forged"),
            "kid is a path": (stolen(kid="../../dev/null"), "token_signer_unknown"),
            "kid is SQL": (stolen(kid="' OR 1=1 --"), "token_signer_unknown"),
            "crit": (provider.token(headers={"crit": ["exp"], "exp": 1}), "token_malformed"),
            "logout": (provider.token(headers={"typ": "logout+jwt"}), "token_type_wrong"),
            "huge": (provider.token(filler="x" * 20_000), "token_malformed"),
            "deep": (
                f"{part({'alg': 'RS256'})}.{base64.urlsafe_b64encode(b'[' * 9000).decode()}.AA",
                "token_malformed",
            ),
            "no base64": ("ey!.ey?.x", "token_malformed"),
            "encrypted": (".".join([part({"alg": "RSA-OAEP", "enc": "A256GCM"}), *"abcd"]), "token_malformed"),
            "no object": (f"{part({'alg': 'RS256'})}.{part([1])}.AA", "token_malformed"),
        }

        async with service(provider, tmp_path) as running:
            found = {name: await running.outcome(token) for name, (token, _) in cases.items()}
            answer = await running.get("/api/v1/me", cases["none"][0])

        assert found == {name: expected for name, (_, expected) in cases.items()}
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert not any("evil" in path for path in provider.asked)

    async def test_key_that_the_issuer_took_away_ends_its_tokens(
        self, provider: IdentityProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SigningKeys, "PAUSE_SECONDS", 0.0)
        old = provider.token()

        async with service(provider, tmp_path) as running:
            before = await running.outcome(old)
            provider.keys = [jwk("rsa-2")]
            found = [await running.outcome(token) for token in (provider.token("rsa-2"), old)]

        assert (before, found) == ("developer", ["developer", "token_signer_unknown"])

    async def test_are_slowed_down(self, provider: IdentityProvider, tmp_path: Path) -> None:
        application = create_app(
            load_settings(
                home=tmp_path,
                api_token=TOKEN,
                oidc_issuers=provider.url,
                oidc_audiences=AUDIENCE,
                oidc_roles="ml=admin",
            )
        )
        transport = httpx.ASGITransport(app=application)
        async with httpx.AsyncClient(transport=transport, base_url="http://gpu.example.com") as client:
            headers = {"Authorization": f"Bearer {provider.token(aud='other')}"}
            took = []
            for _ in range(8):
                begun = time.monotonic()
                await client.get("/api/v1/me", headers=headers)
                took.append(time.monotonic() - begun)

        assert min(took[6:]) > 0.09  # at least the pause; how long the rest takes is the machine's


class TestKeys:
    async def test_of_a_file_need_no_network(self, provider: IdentityProvider, tmp_path: Path) -> None:
        file = tmp_path / "keys.json"
        file.write_text(json.dumps({"keys": [jwk("rsa-1")]}))

        async with service(provider, tmp_path, oidc_keys=str(file)) as running:
            outcome = await running.outcome(provider.token())

        assert outcome == "developer"
        assert not provider.asked

    async def test_of_several_issuers_are_not_mixed(self, provider: IdentityProvider, tmp_path: Path) -> None:
        other = "https://other.example"
        file = tmp_path / "keys.json"
        file.write_text(json.dumps({"keys": [jwk("rsa-2")]}))
        options = {"oidc_issuers": f"{provider.url},{other}", "oidc_keys": f"{provider.url}/keys,{file}"}

        async with service(provider, tmp_path, **options) as running:
            found = [
                await running.outcome(provider.token(key, iss=issuer))
                for key, issuer in (
                    ("rsa-1", provider.url),
                    ("rsa-2", other),
                    ("rsa-2", provider.url),
                    ("rsa-1", other),
                )
            ]

        assert found == ["developer", "developer", "token_signer_unknown", "token_signer_unknown"]

    async def test_that_cannot_be_had_let_nobody_in_until_they_can(
        self, provider: IdentityProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SigningKeys, "PAUSE_SECONDS", 0.0)
        provider.answers["/keys"] = lambda: (500, b"", {})

        async with service(provider, tmp_path) as running:
            away = await running.get("/api/v1/me", provider.token())
            provider.answers.clear()
            outcome = await running.outcome(provider.token())

        assert (away.status_code, away.json()["code"], outcome) == (503, "issuer_unavailable", "developer")

    async def test_that_are_garbage_huge_slow_or_elsewhere_are_not_taken(
        self, provider: IdentityProvider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.access.signing_keys.FETCH_SECONDS", 0.2)
        ended = threading.Event()

        def slow() -> Answer:
            ended.wait()
            return 200, b"{}", {}

        answers: dict[str, Callable[[], Answer]] = {
            "no JSON": lambda: (200, b"<html>", {}),
            "too deep": lambda: (200, b"[" * 100_000, {}),
            "huge": lambda: (200, b'{"keys": ["' + b"x" * 10_000_000, {}),
            "a redirect": lambda: (302, b"", {"Location": f"{provider.url}/elsewhere"}),
            "packed": lambda: (200, gzip.compress(b'{"keys": []}'), {"Content-Encoding": "gzip"}),
            "slow": slow,
        }
        for what, answer in answers.items():
            provider.answers["/keys"] = answer
            with pytest.raises(KeysUnusable):
                pytest.fail(f"{what}: {await document_of(provider.url, '')()}")
        ended.set()
        provider.answers.clear()
        for name, value in (
            ("issuer", "https://evil.example"),
            ("jwks_uri", "http://keys.example"),
            ("jwks_uri", None),
        ):
            monkeypatch.setitem(provider.discovery, name, value)
            with pytest.raises(KeysUnusable):
                pytest.fail(f"{value}: {await document_of(provider.url, '')()}")

        assert provider.asked["/elsewhere"] == 0

    async def test_are_kept_while_the_issuer_is_away(self, provider: IdentityProvider) -> None:
        now = 0.0
        keys = SigningKeys(provider.url, document_of(provider.url, ""), clock=lambda: now)
        assert await keys.find("rsa-1", "RS256")

        provider.answers["/.well-known/openid-configuration"] = lambda: (500, b"", {})
        for hours in (1, 24, 1000):
            now = hours * 3600.0
            assert await keys.find("rsa-1", "RS256")
            assert await keys.find("rsa-9", "RS256") is None

    async def test_are_looked_for_at_a_bounded_rate_one_look_at_a_time(self, provider: IdentityProvider) -> None:
        now = 0.0
        keys = SigningKeys(provider.url, document_of(provider.url, f"{provider.url}/keys"), clock=lambda: now)
        at_start = await asyncio.gather(*(keys.find("rsa-1", "RS256") for _ in range(20)))
        first = provider.asked["/keys"]

        await asyncio.gather(*(keys.find(f"guessed-{number}", "RS256") for number in range(50)))
        guessed = provider.asked["/keys"]
        now = 11.0
        provider.keys.append(jwk("rsa-2"))
        new = await asyncio.gather(*(keys.find("rsa-2", "RS256") for _ in range(20)))

        assert all(at_start)
        assert all(new)
        assert (first, guessed, provider.asked["/keys"]) == (1, 1, 2)

    def test_that_are_no_keys_for_signatures_are_left_out(self) -> None:
        good = jwk("rsa-1")
        private = {**good, "d": "AQAB"}
        document = {
            "keys": [
                private,
                jwk("rsa-2", use="enc"),
                jwk("rsa-3", key_ops=["sign"]),
                jwk("weak-1"),
                jwk("rsa-4", alg="none"),
                jwk("ec-1", alg="HS256"),
                jwk("ec-2", crv="P-521"),
                jwk("ed-1", alg="RS256"),
                {"kty": "oct", "kid": "shared", "k": "c2VjcmV0"},
                {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
                {"kty": ["RSA"]},
                {**good, "kid": 7},
                "text",
            ]
        }

        assert usable_keys(document) == [good]

    @pytest.mark.parametrize("document", [[], "keys", {}, {"keys": {}}, {"keys": [{}] * 101}])
    def test_come_as_a_set_of_bounded_size(self, document: Any) -> None:
        with pytest.raises(KeysUnusable):
            usable_keys(document)


class TestLogin:
    async def test_is_told_to_whoever_asks(self, provider: IdentityProvider, tmp_path: Path) -> None:
        async with service(provider, tmp_path, oidc_client_id="deepe-cli", oidc_scopes="openid groups") as running:
            told = await running.get("/api/v1/login", "")

        assert (told.status_code, told.json()) == (
            200,
            {"oidc": {"issuer": provider.url, "client_id": "deepe-cli", "scopes": ["openid", "groups"]}},
        )
