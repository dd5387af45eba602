"""Which addresses may be called, and that connections go to no others: real sockets, and a resolver that lies."""

import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import URLError
from urllib.request import HTTPRedirectHandler

import pytest

from app.presets.shared.helpers.deepe_addresses import (
    POLICY,
    AddressPolicy,
    AddressRefused,
    is_refused,
    opener,
    refused_literal,
)

NEVER = [
    "169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fe80::1",
    "0.0.0.0", "0.1.2.3", "::", "224.0.0.1", "ff02::1",
    "::ffff:169.254.169.254", "::169.254.169.254", "::ffff:0:169.254.169.254", "2002:a9fe:a9fe::1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::169.254.169.254", "64:ff9b:1:a9fe:a9:fe00::", "64:ff9b:1:a9:fe:a9fe::",
    "64:ff9b:1:0:a9:fea9:fe00:0", "2001:0:1:2:3:4:5601:5601", "fd12::5efe:169.254.169.254",
    "2001:db8::200:5efe:a9fe:a9fe",
]  # fmt: skip
PRIVATE = [
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "::1", "fd12::1", "::ffff:10.0.0.1",
    "::10.0.0.1", "64:ff9b::10.0.0.1", "2002:a00:1::1", "64:ff9b:1::8.8.8.8",
]  # fmt: skip


class TestRule:
    @pytest.mark.parametrize("address", NEVER)
    def test_metadata_services_and_no_machines_are_always_refused(self, address: str) -> None:
        assert is_refused(ipaddress.ip_address(address), AddressPolicy.ANY)
        assert is_refused(ipaddress.ip_address(address), AddressPolicy.PUBLIC)

    @pytest.mark.parametrize("address", PRIVATE)
    def test_private_networks_are_a_matter_of_policy(self, address: str) -> None:
        assert not is_refused(ipaddress.ip_address(address), AddressPolicy.ANY)
        assert is_refused(ipaddress.ip_address(address), AddressPolicy.PUBLIC)

    @pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
    def test_public_addresses_are_open(self, address: str) -> None:
        assert not is_refused(ipaddress.ip_address(address), AddressPolicy.PUBLIC)

    @pytest.mark.parametrize(
        "host",
        ["169.254.169.254", "2852039166", "0xa9fea9fe", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376", "169.254.43518",
         "169.254.169.254.", "[::ffff:a9fe:a9fe]", "[fe80::1%25eth0]"],
    )  # fmt: skip
    def test_an_address_is_known_in_every_spelling(self, host: str) -> None:
        assert refused_literal(f"http://{host}:80/latest", AddressPolicy.ANY) is not None

    def test_a_name_is_judged_later(self) -> None:
        assert refused_literal("http://metadata.internal/", AddressPolicy.PUBLIC) is None


@contextmanager
def serving(location: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a server and the paths that it is asked for; with `location` it sends everybody there."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if location is None else 302)
            if location is not None:
                self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


class TestConnections:
    def test_go_to_the_address_that_was_judged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with serving() as (address, asked):
            port = int(address.rpartition(":")[2])
            resolved: list[str] = []
            real = socket.getaddrinfo

            def rebinding(host: str, *args: Any, **named: Any) -> Any:
                if host != "rebinding.example":
                    return real(host, *args, **named)
                resolved.append(host)  # harmless when it is first asked, the metadata service later
                there = "127.0.0.1" if len(resolved) == 1 else "169.254.169.254"
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (there, port))]

            monkeypatch.setattr(socket, "getaddrinfo", rebinding)

            with opener(AddressPolicy.ANY).open(f"http://rebinding.example:{port}/x", timeout=10) as answer:
                assert answer.status == 200
            with pytest.raises(URLError) as refused:
                opener(AddressPolicy.ANY).open(f"http://rebinding.example:{port}/y", timeout=10)

        assert isinstance(refused.value.reason, AddressRefused)
        assert (asked, len(resolved)) == (["/x"], 2)

    def test_one_refused_address_of_several_refuses_the_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def both(*_: Any, **__: Any) -> Any:
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (there, 80)) for there in ("127.0.0.1", "169.254.169.254")
            ]

        monkeypatch.setattr(socket, "getaddrinfo", both)

        with pytest.raises(URLError, match=r"169\.254\.169\.254"):
            opener(AddressPolicy.ANY).open("http://two.example/", timeout=10)

    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_a_redirect_is_judged_as_well(self, scheme: str) -> None:
        with serving(f"{scheme}://[::169.254.169.254]/latest") as (address, asked):
            with pytest.raises(URLError) as refused:
                opener(AddressPolicy.ANY, HTTPRedirectHandler()).open(f"http://{address}/", timeout=10)
            assert isinstance(refused.value.reason, AddressRefused)
            assert asked == ["/"]

    def test_the_job_says_the_policy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with serving() as (address, asked):
            opener().open(f"http://{address}/any", timeout=10).close()
            monkeypatch.setenv(POLICY, "public")
            with pytest.raises(URLError, match=r"127\.0\.0\.1"):
                opener().open(f"http://{address}/public", timeout=10)
        assert asked == ["/any"]
