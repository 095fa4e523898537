"""The certificate of a service that speaks TLS itself: checked at the start, read again when it is
renewed."""

import logging
import os
import ssl
from pathlib import Path
from typing import NamedTuple

from service.settings import Settings

logger = logging.getLogger(__name__)


class BadCertificate(Exception):
    """The files cannot be used. The text names the setting and the file."""


class Certificate(NamedTuple):
    """The files of a certificate, with its chain, and of its private key; both PEM."""

    cert: Path
    key: Path

    def load(self, context: ssl.SSLContext) -> None:
        """Make a context use these files for new connections.

        Raises:
            BadCertificate: they cannot be used; the context may have changed in part.
        """
        _require_readable(self.cert, "IDSPAM_TLS_CERT")
        _require_readable(self.key, "IDSPAM_TLS_KEY")
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(self.cert, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise BadCertificate(self._fault(error)) from None

    def check(self) -> None:
        """
        Raises:
            BadCertificate: they cannot be used.
        """
        self.load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Changes when one of the files does."""
        return _signature(self.cert), _signature(self.key)

    def _fault(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            return f"IDSPAM_TLS_KEY: {self.key} is not the key of {self.cert}"
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(self.cert)
        except ssl.SSLError:
            return f"IDSPAM_TLS_CERT: {self.cert} has no certificate in PEM format"
        return f"IDSPAM_TLS_KEY: {self.key} has no private key in PEM format without a password"


class Renewal:
    """Puts renewed files into the context of a running service.

    Args:
        context: uses the certificate now.
    """

    def __init__(self, certificate: Certificate, context: ssl.SSLContext) -> None:
        self._certificate = certificate
        self._context = context
        self._signature = certificate.signature()
        # Why renewed files cannot be used now.
        self._trouble: str | None = None

    def check(self) -> None:
        """Use the files if they have changed; files that cannot be used change nothing."""
        signature = self._certificate.signature()
        if signature == self._signature:
            return
        try:
            self._certificate.check()
            self._certificate.load(self._context)
        except BadCertificate as error:
            # It is tried again at the next check.
            if str(error) != self._trouble:
                logger.error("the certificate stays as it was: %s", error)
            self._trouble = str(error)
        else:
            self._signature, self._trouble = signature, None
            logger.info("certificate read again file=%s", self._certificate.cert)


def certificate_of(settings: Settings) -> Certificate | None:
    """The certificate that the settings name; None is a service without TLS.

    Raises:
        BadCertificate: one of the two files is not named.
    """
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None and key is None:
        return None
    if key is None:
        raise BadCertificate("IDSPAM_TLS_KEY: missing, IDSPAM_TLS_CERT is set")
    if cert is None:
        raise BadCertificate("IDSPAM_TLS_CERT: missing, IDSPAM_TLS_KEY is set")
    return Certificate(cert, key)


def _require_readable(path: Path, variable: str) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise BadCertificate(f"{variable}: {path} cannot be read: {reason}") from None


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
