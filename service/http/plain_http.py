"""uvicorn's HTTP protocol, which here ignores offers to switch to another one.

A client such as Java's HttpClient offers HTTP/2 with its first request (`Connection: Upgrade,
HTTP2-Settings`, `Upgrade: h2c`) and expects an ordinary answer from a server that has no HTTP/2
(RFC 9110, 7.8). But the parser takes all that follows the headers of such a request for the other
protocol, so its body would be lost. The request is therefore parsed again without the offer.
"""

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFER = (b"upgrade", b"http2-settings")


class PlainHttpProtocol(HttpToolsProtocol):
    """For requests without an offer the cost is two method calls, under a microsecond."""

    def parse(self, data: memoryview) -> None:
        """Parse what has come, which may be many requests or a part of one.

        Raises:
            HttpParserError: not HTTP, or a callback raised an error.
        """
        rest = data
        while (end := self._parsed_to(rest)) is not None:
            # A slice of a view copies nothing.
            head, rest = self._head_without_offer(), rest[end:]
            # A new parser, made as uvicorn makes it: the old one may have ended with
            # `Connection: close`.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(head)

    def on_headers_complete(self) -> None:
        if not self._has_offer():
            self.head_complete()

    def on_message_complete(self) -> None:
        if not self._has_offer():
            self.message_complete()

    def head_complete(self) -> None:
        """The headers of a request have come: it is answered from here on."""
        super().on_headers_complete()

    def message_complete(self) -> None:
        """All of a request has come."""
        super().on_message_complete()

    def _parsed_to(self, data: memoryview) -> int | None:
        """Where the headers of an offer end; None if all of the data was parsed."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # What follows CONNECT is never HTTP.
            return int(upgrade.args[0]) if self._has_offer() else None
        return None

    def _has_offer(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name not in _OFFER]
        return b"\r\n".join([*lines, b"", b""])
