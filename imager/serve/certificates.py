"""TLS of the server: its certificate, and whose certificates it lets in."""

from __future__ import annotations

import ssl
from pathlib import Path

from imager.errors import ImagerError


def server_context(
    certificate: Path, key: Path | None = None, clients: Path | None = None
) -> ssl.SSLContext:
    """``certificate`` may hold the key too. With ``clients``, the certificates of authorities,
    only clients that show a certificate signed by one of them are let in. PEM files.

    Raises ImagerError naming the file that can't be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        files = " or ".join(str(path) for path in (certificate, key) if path)
        raise ImagerError(f"{files}: no usable certificate and key: {error}") from None
    if clients is not None:
        try:
            context.load_verify_locations(clients)
        except (OSError, ssl.SSLError) as error:
            raise ImagerError(f"{clients}: no usable certificates: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context
