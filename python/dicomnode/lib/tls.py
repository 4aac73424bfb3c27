"""TLS as DICOM wants it: the BCP 195 profile (PS3.15 section B.9), for receiving and for sending."""

import os
import ssl
from dataclasses import dataclass

from dicomnode.errors import IncorrectlyConfigured

# TLS 1.2 with forward secrecy and AES-GCM; those of TLS 1.3 are all good.
_CIPHERS = (
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256"
)


@dataclass(frozen=True)
class TLS:
    """Who we are, and whom we believe: files in PEM.

    `certificate` and `key` are ours; the certificate may be followed by those above it. `ca` holds the
    authorities whose peers are believed: as receiver, every sender has to have a certificate of them;
    without `ca` any sender may connect, encrypted. As sender, the peer's certificate has to be
    of `ca`, else of an authority that this machine trusts, and name the host that was called;
    `check_host` False leaves the name out, for peers that are called by another address.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    ca: str | os.PathLike[str] | None = None
    check_host: bool = True

    def server(self) -> ssl.SSLContext:
        """For receiving. Raises IncorrectlyConfigured where a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._prepare(context)
        if self.ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self) -> ssl.SSLContext:
        """For sending. Raises IncorrectlyConfigured where a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._prepare(context)
        context.check_hostname = self.check_host
        if self.ca is None:
            context.load_default_certs()
        return context

    def _prepare(self, context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(_CIPHERS)
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        try:
            context.load_cert_chain(self.certificate, self.key, password="")
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise IncorrectlyConfigured(
                f"tls: certificate {str(self.certificate)!r}, key {str(self.key)!r} or ca "
                f"{str(self.ca)!r} cannot be used: {reason}; each has to be a readable file in PEM, "
                "the key without a password"
            ) from error
