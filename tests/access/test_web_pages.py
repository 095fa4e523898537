"""Which names the service answers to without keys, and which web pages may change something."""

import pytest

from service.access.web_pages import KnownHosts, KnownOrigins
from service.errors import Forbidden


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "[::1]"),
        *("x.localhost:8000", "localhost.", "192.0.2.1", "[fe80::1%eth0]:8000", None, ""),
        *("idspam.example.org", "IDSPAM.example.org:8000", "a.b.test", "a.test:1", "service:8000"),
    ],
)
def test_addresses_localhost_and_configured_names_are_known(host: str | None) -> None:
    KnownHosts(("idspam.example.org", "*.test")).check(host)


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "x.evil"),
        *("a.xtest", "idspam.example.org.evil.example", "127.0.0.1@evil.example", "[evil.x]"),
        *("localhost evil.example", "evil.example:127.0.0.1", "xidspam.example.org", "1.2.3.4.5"),
    ],
)
def test_a_name_that_a_page_may_have_made_point_here_is_not(host: str) -> None:
    with pytest.raises(Forbidden, match="does not know the name"):
        KnownHosts(("idspam.example.org", "*.test")).check(host)
    KnownHosts(("*",)).check(host)


def test_many_names_take_no_memory() -> None:
    hosts = KnownHosts(("*.test",))
    for number in range(3000):
        hosts.check(f"{number}.test")
    assert len(hosts._accepted) == 1000


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:8000", "localhost:8000"),
        ("http://LOCALHOST:8000", "localhost:8000"),
        ("http://127.0.0.1", "127.0.0.1:80"),
        ("https://x.example", "x.example"),
        ("https://x.example", "x.example:443"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("https://app.example.org", "anything"),
        (None, "anything"),
    ],
)
def test_the_services_own_page_and_allowed_ones_may_change_something(
    origin: str | None, host: str
) -> None:
    headers = {"host": host} | ({"origin": origin} if origin else {})
    KnownOrigins(("https://app.example.org",)).check(headers)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://evil.example", "localhost:8000"),
        ("http://localhost:3000", "localhost:8000"),
        ("http://localhost", "localhost:8000"),
        ("https://x.example", "x.example:80"),
        ("null", "localhost:8000"),
        ("file://", "localhost:8000"),
        ("", ""),
        ("http://", ""),
        ("http://[", "["),
        ("http://app.example.org", "localhost"),
        ("https://app.example.org.evil.example", "localhost"),
        ("https://app.example.org/", "localhost"),
        ("localhost:8000", "localhost:8000"),
    ],
)
def test_a_page_of_another_origin_may_not(origin: str, host: str) -> None:
    with pytest.raises(Forbidden, match="may not do this"):
        KnownOrigins(("https://app.example.org",)).check({"origin": origin, "host": host})
    KnownOrigins(("*",)).check({"origin": origin, "host": host})


def test_a_browser_that_says_cross_site_without_an_origin_is_believed() -> None:
    with pytest.raises(Forbidden):
        KnownOrigins(()).check({"sec-fetch-site": "cross-site"})
    KnownOrigins(()).check({"sec-fetch-site": "same-origin"})
