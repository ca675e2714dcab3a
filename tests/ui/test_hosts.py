"""Which names a server answers to, and which origins are its own."""

import socket

import pytest

from ui.hosts import Hosts, is_loopback, name_of


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_what_only_this_machine_reaches(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "localhost.example", "", "ana"])
def test_what_others_reach(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:7860", "localhost"),
        ("votes.example.", "votes.example"),
        ("[::1]:7860", "::1"),
        ("192.0.2.1:80", "192.0.2.1"),
        ("a b", None),
        ("a@b", None),
        ("a/b", None),
        ("localhost:x", None),
        ("localhost\n", None),
        ("", None),
    ],
)
def test_the_name_in_a_host_header(host: str, name: str | None) -> None:
    assert name_of(host) == name


def test_a_server_of_the_loopback_goes_by_the_names_of_the_loopback() -> None:
    hosts = Hosts("127.0.0.1")
    served = ["localhost:1", "127.0.0.1", "[::1]"]
    others = ["evil.example", "192.0.2.1", "0.0.0.0", socket.gethostname() + "x", "a b"]
    assert all(map(hosts.serves, served))
    assert not any(map(hosts.serves, others))


def test_a_server_of_all_addresses_goes_by_any_address_and_its_own_name() -> None:
    """Rebinding needs a name: an address in the Host header is an address that was typed."""
    hosts = Hosts("0.0.0.0", ["votes.example"])
    served = ["192.0.2.1:7860", "[2001:db8::1]", socket.gethostname(), "votes.example", "localhost"]
    assert all(map(hosts.serves, served))
    assert not hosts.serves("evil.example")
    assert not hosts.serves("x.votes.example")


def test_the_origin_is_the_host_that_was_asked() -> None:
    hosts = Hosts("127.0.0.1")
    assert hosts.owns("http://localhost:7860", "localhost:7860")
    assert hosts.owns("https://localhost:7860", "LOCALHOST:7860")
    for origin in (
        "http://localhost:7861",
        "http://localhost",
        "http://127.0.0.1:7860",
        "http://localhost:7860.evil.example",
        "http://localhost:7860@evil.example",
        "null",
        "",
        "file://",
        "chrome-extension://localhost:7860",
    ):
        assert not hosts.owns(origin, "localhost:7860")


def test_behind_a_proxy_the_origin_is_the_proxy() -> None:
    """Which may ask us by the name of the loopback."""
    for hosts in (
        Hosts("127.0.0.1", ["votes.example"]),
        Hosts("127.0.0.1", root_url="https://votes.example/app"),
    ):
        assert hosts.serves("votes.example")
        assert hosts.owns("https://votes.example", "127.0.0.1:7860")
        assert not hosts.owns("https://votes.example:8443", "127.0.0.1:7860")
        assert not hosts.owns("https://evil.example", "127.0.0.1:7860")
