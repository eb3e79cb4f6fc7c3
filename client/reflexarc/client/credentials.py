"""How a client shows that it may ask: an API key, and a certificate that it trusts."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

from reflexarc.contract.errors import AuthenticationError, ConfigError

API_KEY_VARIABLE = "REFLEXARC_API_KEY"
API_KEY_FILE_VARIABLE = "REFLEXARC_API_KEY_FILE"  # a secret that an orchestrator mounts
# websockets writes all headers to its debug log; this one never gets there.
quiet_logger = logging.getLogger("reflexarc.client.websockets")
quiet_logger.setLevel(logging.INFO)


def authorization(api_key: str | None = None) -> dict[str, str]:
    """The header that holds a key; none where there is no key.

    Args:
        api_key: None takes that of the environment's ``REFLEXARC_API_KEY``, or of the file that
            ``REFLEXARC_API_KEY_FILE`` names; "" none at all.

    Raises ConfigError for what no header can hold, and for a file that cannot be read or holds
    no key; the key itself is not shown.
    """
    key = _of_environment() if api_key is None else api_key
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()) or " " in key:
        where = API_KEY_VARIABLE if api_key is None else "api_key"
        raise ConfigError(
            f"{where} holds a space or a character that is not printable ASCII; copy the key again",
            field="api_key",
        )
    return {"Authorization": f"Bearer {key}"}


def _of_environment() -> str:
    key, file = os.environ.get(API_KEY_VARIABLE, ""), os.environ.get(API_KEY_FILE_VARIABLE, "")
    if key or not file:
        return key
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise ConfigError(
            f"{API_KEY_FILE_VARIABLE} {file}: {reason}; name a file with one API key that this "
            "user can read",
            field="api_key",
        ) from None
    if not key:
        raise ConfigError(f"{API_KEY_FILE_VARIABLE} {file} holds no API key", field="api_key")
    return key


def refused(url: str, headers: dict[str, str]) -> AuthenticationError:
    """The error for an answer of 401 to a request with these headers of :func:`authorization`."""
    what = "refused the API key" if headers else "asks for an API key"
    return AuthenticationError(
        f"{url} {what}; pass api_key=, or set {API_KEY_VARIABLE}, to one of the keys that the "
        "server was started with"
    )


def verification(url: str) -> ssl.SSLContext | bool:
    """httpx' ``verify``, to trust whom websockets trusts: the system, or ``SSL_CERT_FILE``."""
    return ssl.create_default_context() if url.startswith("https") else True


def verification_error(error: BaseException) -> ssl.SSLCertVerificationError | None:
    """What httpx made an error of, where that is a certificate that is not trusted."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause


def untrusted(url: str, error: ssl.SSLCertVerificationError) -> ConfigError:
    """The error to raise where a server's certificate is not trusted."""
    return ConfigError(
        f"the certificate of {url} is not trusted ({error.verify_message}); set SSL_CERT_FILE to "
        "the certificate of who signed it, and use the host name that it was made for",
        field="server",
    )
