"""The address that a request came from, behind proxies and without."""

import logging
from ipaddress import ip_network

import httpx
import pytest
from starlette.datastructures import Headers

from app.api.application import HttpOptions, new_application
from app.api.caller_address import MAX_HOPS, caller_address
from app.api.guards import AccessPolicy
from app.observability import ACCESS_LOGGER

PROXIES = (ip_network("10.0.0.0/24"), ip_network("2001:db8:1::/48"))
TOKEN = "the-token-of-the-installation"
XFF = "x-forwarded-for"


def address_of(peer: str | None, *headers: tuple[str, str]) -> str | None:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    return caller_address(peer, Headers(raw=raw), PROXIES)


@pytest.mark.parametrize(
    ("peer", "headers", "address"),
    [
        # nobody is trusted who is not named
        ("203.0.113.7", [(XFF, "198.51.100.1")], "203.0.113.7"),
        (None, [(XFF, "198.51.100.1")], None),
        # what the caller wrote itself stands before what the proxy added
        ("10.0.0.2", [(XFF, "127.0.0.1, 198.51.100.1")], "198.51.100.1"),
        ("10.0.0.2", [(XFF, "127.0.0.1"), (XFF, "198.51.100.1")], "198.51.100.1"),
        ("10.0.0.2", [(XFF, "127.0.0.1, 198.51.100.1, 10.0.0.3")], "198.51.100.1"),
        ("::ffff:10.0.0.2", [(XFF, "::ffff:198.51.100.1")], "198.51.100.1"),
        ("2001:db8:1::2", [(XFF, "[2001:db8:2::7]:4711")], "2001:db8:2::7"),
        ("10.0.0.2", [(XFF, "198.51.100.1:55555")], "198.51.100.1"),
        ("10.0.0.2", [("forwarded", 'for="[2001:db8:2::7]:4711";proto=https')], "2001:db8:2::7"),
        ("10.0.0.2", [("forwarded", "for=127.0.0.1, proto=http;For=198.51.100.1;by=10.0.0.2")], "198.51.100.1"),
        # the proxies' own: the first of them, which the caller may be
        ("10.0.0.2", [(XFF, "10.0.0.4, 10.0.0.3")], "10.0.0.4"),
        ("10.0.0.2", [], "10.0.0.2"),
        # not readable: the last proxy is all that is known
        ("10.0.0.2", [(XFF, "198.51.100.1, unknown")], "10.0.0.2"),
        ("10.0.0.2", [(XFF, "198.51.100.1, , 10.0.0.3")], "10.0.0.3"),
        ("10.0.0.2", [("forwarded", "for=_hidden")], "10.0.0.2"),
        ("10.0.0.2", [("forwarded", "proto=https")], "10.0.0.2"),
        # a caller may write the header that its proxy does not
        ("10.0.0.2", [(XFF, "198.51.100.1"), ("forwarded", "for=127.0.0.1")], "10.0.0.2"),
        ("10.0.0.2", [(XFF, "198.51.100.1"), ("forwarded", "for=198.51.100.1")], "198.51.100.1"),
        ("10.0.0.2", [(XFF, "198.51.100.1" + ", 10.0.0.3" * MAX_HOPS)], "10.0.0.3"),
    ],
)
def test_is_the_first_that_is_no_proxy(peer: str | None, headers: list[tuple[str, str]], address: str | None) -> None:
    assert address_of(peer, *headers) == address


def client_of(peer: str, **policy: object) -> httpx.AsyncClient:
    application = new_application(HttpOptions(version="1", access=AccessPolicy(proxies=PROXIES, **policy)))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(application, client=(peer, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


async def test_stands_in_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    client = client_of("10.0.0.2", token=TOKEN)

    with caplog.at_level(logging.INFO, ACCESS_LOGGER):
        for secret in (TOKEN, "wrong"):
            headers = {XFF: "127.0.0.1, 198.51.100.1", "Authorization": f"Bearer {secret}"}
            await client.get("/api/v1/nothing", headers=headers)

    logged = [vars(record) for record in caplog.records if record.getMessage() == "http_request"]
    assert [(one["caller"], one["address"]) for one in logged] == [("token", "198.51.100.1"), (None, "198.51.100.1")]


async def test_makes_nobody_local() -> None:
    """Neither a proxy elsewhere nor one on this machine can say that its caller is local."""
    near = AccessPolicy(proxies=(ip_network("127.0.0.0/8"),))
    transport = httpx.ASGITransport(new_application(HttpOptions(version="1", access=near)), client=("127.0.0.1", 1))
    local = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")

    through = await local.get("/api/v1/nothing", headers={XFF: "127.0.0.1"})
    foreign = await client_of("10.0.0.2").get("/api/v1/nothing", headers={XFF: "127.0.0.1"})

    assert (through.status_code, through.json()["code"]) == (403, "through_proxy")
    assert (foreign.status_code, foreign.json()["code"]) == (403, "foreign_client")


async def test_opens_no_network_that_is_trusted() -> None:
    client = client_of("10.0.0.2", token=TOKEN, trusted_networks=(ip_network("172.18.0.0/16"),))

    refused = await client.get("/api/v1/nothing", headers={XFF: "172.18.0.5"})

    assert refused.status_code == 401
