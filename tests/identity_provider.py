"""A small identity provider in a thread: discovery, keys, and the device flow of OAuth (RFC 8628)."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE: Final = "deepe"
CLIENT: Final = "deepe-cli"
Answer = tuple[int, bytes, Mapping[str, str]]


@cache
def private_key(name: str) -> Any:
    """Return the key of this name, made once in a process; the name begins with its kind: `rsa`, `ec`, `ed`."""
    match name.partition("-")[0]:
        case "rsa":
            return rsa.generate_private_key(public_exponent=65537, key_size=2048)
        case "weak":
            return rsa.generate_private_key(public_exponent=65537, key_size=1024)
        case "ec":
            return ec.generate_private_key(ec.SECP256R1())
        case _:
            return ed25519.Ed25519PrivateKey.generate()


def jwk(name: str, **members: Any) -> dict[str, Any]:
    """Return the public half of a key as it is published."""
    public = private_key(name).public_key()
    algorithm = {"rsa": RSAAlgorithm, "weak": RSAAlgorithm, "ec": ECAlgorithm}.get(name.partition("-")[0], OKPAlgorithm)
    document: dict[str, Any] = algorithm.to_jwk(public, as_dict=True)  # type: ignore[attr-defined]
    document.pop("key_ops", None)
    return {**document, "kid": name, **members}


class IdentityProvider:
    """What the provider publishes and answers; tests change it while it runs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys: list[Any] = [jwk("rsa-1")]
        self.asked = Counter[str]()
        self.answers: dict[str, Callable[[], Answer]] = {}
        """What a path answers instead."""
        self.discovery: dict[str, Any] = {
            "issuer": url,
            "jwks_uri": f"{url}/keys",
            "device_authorization_endpoint": f"{url}/device",
            "token_endpoint": f"{url}/token",
            "revocation_endpoint": f"{url}/revoke",
            "scopes_supported": ["openid", "profile", "offline_access"],
        }
        self.lifetime = 300.0
        """Seconds that the tokens of the device flow are valid."""
        self.outcomes: list[str] = []
        """What the token address answers before it gives a token: errors of RFC 8628."""
        self.forms: list[dict[str, str]] = []
        self.refresh_tokens: set[str] = set()

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Return the claims of a good token; None takes one away."""
        now = time.time()
        claims = {
            **{"iss": self.url, "aud": AUDIENCE, "sub": "u-1", "preferred_username": "ada", "groups": ["ml"]},
            **{"iat": now - 5, "exp": now + 300},
            **changes,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(
        self, key: str = "rsa-1", algorithm: str = "RS256", headers: Mapping[str, Any] | None = None, **claims: Any
    ) -> str:
        """Return a token that the key signed."""
        # not by `jwt.encode`, which refuses to make bad tokens
        payload = json.dumps(self.claims(**claims)).encode()
        sent = {name: value for name, value in {"kid": key, **(headers or {})}.items() if value is not None}
        return jwt.PyJWS().encode(payload, private_key(key), algorithm, headers=sent)

    def answer(self, path: str, form: dict[str, str]) -> Answer:
        """Return status, body and headers."""
        self.asked[path] += 1
        if path in self.answers:
            return self.answers[path]()
        match path:
            case "/.well-known/openid-configuration":
                return _json(self.discovery)
            case "/keys":
                return _json({"keys": self.keys})
            case "/device":
                self.forms.append(form)
                return _json(
                    {
                        **{"device_code": "device-1", "user_code": "WDJB-MJHT", "expires_in": 600, "interval": 0},
                        "verification_uri": f"{self.url}/activate",
                    }
                )
            case "/token":
                self.forms.append(form)
                return self._grant(form)
            case "/revoke":
                self.refresh_tokens.discard(form.get("token", ""))
                return 200, b"", {}
            case _:
                return 404, b"", {}

    def _grant(self, form: dict[str, str]) -> Answer:
        if self.outcomes:
            return _json({"error": self.outcomes.pop(0)}, status=400)
        if form["grant_type"] == "refresh_token" and form["refresh_token"] not in self.refresh_tokens:
            return _json({"error": "invalid_grant", "error_description": "the session is over"}, status=400)
        self.refresh_tokens.discard(form.get("refresh_token", ""))  # rotated at each use
        refresh = f"refresh-{len(self.forms)}"
        self.refresh_tokens.add(refresh)
        token = self.token(exp=time.time() + self.lifetime)
        return _json(
            {"access_token": token, "token_type": "Bearer", "expires_in": self.lifetime, "refresh_token": refresh}
        )


def _json(document: Any, *, status: int = 200) -> Answer:
    return status, json.dumps(document).encode(), {"Content-Type": "application/json"}


@contextmanager
def identity_provider() -> Iterator[IdentityProvider]:
    """Run a provider for the duration of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"])).decode()
            self._reply({name: values[0] for name, values in parse_qs(content).items()})

        def _reply(self, form: dict[str, str]) -> None:
            status, body, headers = provider.answer(self.path, form)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True  # the caller had enough

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    provider = IdentityProvider(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
