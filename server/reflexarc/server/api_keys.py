"""Who may ask: API keys, compared so that no reply's time tells how much of one was right."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from reflexarc.contract.errors import ConfigError

API_KEYS_VARIABLE = "REFLEXARC_API_KEYS"
LEAST_CHARACTERS = 16
MOST_CHARACTERS = 4096  # websockets refuses longer header lines
HOW_TO_MAKE_ONE = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'
Headers = Iterable[tuple[bytes, bytes]]


class ApiKeys:
    """The keys that open a server; falsy where there are none, and then nobody is refused.

    Only digests are kept, under a secret of this process.

    Args:
        keys: of at least 16 printable ASCII characters each, without spaces and commas.

    Raises ConfigError naming by its place a key that is none; the key itself is never shown.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._secret = secrets.token_bytes(32)
        self._digests = tuple(
            self._digest(_checked(key, place).encode()) for place, key in enumerate(keys, 1)
        )

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self)} keys)"

    def accept(self, headers: Headers, *, browsed: bool = False) -> bool:
        """Whether a request's headers hold one of the keys.

        The time that it takes depends on how many keys there are, not on which fits how well.

        Args:
            headers: with lower-case names, as ASGI has them.
            browsed: whether a browser's ``Basic`` will do, with the key as password.
        """
        presented = presented_key(headers, browsed=browsed)
        if presented is None:
            return False
        digest = self._digest(presented)
        # All of them are compared: which one fits is nobody's business either.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, "sha256")


def presented_key(headers: Headers, *, browsed: bool = False) -> bytes | None:
    """The key of ``Authorization: Api-Key KEY`` or ``Bearer KEY``; None where there is not one.

    Two such headers are none: whoever stands in between may have read the other one.
    """
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, separator, rest = values[0].strip(b" \t").partition(b" ")
    key = rest.strip(b" \t")
    if not separator or not key or len(key) > MOST_CHARACTERS:
        return None
    if scheme.lower() in (b"api-key", b"bearer"):
        return key
    return _password(key) if browsed and scheme.lower() == b"basic" else None


def _password(credentials: bytes) -> bytes | None:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2] or None
    except binascii.Error:
        return None


def read_api_keys(file: Path | None = None) -> ApiKeys:
    """The keys of ``REFLEXARC_API_KEYS`` (comma separated) and of a file (one a line).

    In the file, blank lines and lines that begin with ``#`` are left out. Raises ConfigError for
    a file that cannot be read, and where one of the two is given but holds no key: a secret that
    was not filled in must not leave a server open.
    """
    keys: list[str] = []
    given = os.environ.get(API_KEYS_VARIABLE)
    if given is not None:
        keys += _some([key.strip() for key in given.split(",")], API_KEYS_VARIABLE)
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="ascii").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
            raise ConfigError(f"--api-keys-file {file}: {reason}", field="api_keys_file") from None
        keys += _some([key for key in lines if not key.startswith("#")], f"--api-keys-file {file}")
    return ApiKeys(keys)


def _some(keys: list[str], where: str) -> list[str]:
    found = [key for key in keys if key]
    if not found:
        raise ConfigError(
            f"{where} holds no API key; write one, for example from {HOW_TO_MAKE_ONE}, or leave "
            "it out to serve without keys",
            field="api_keys",
        )
    return found


def _checked(key: str, place: int) -> str:
    if not LEAST_CHARACTERS <= len(key) <= MOST_CHARACTERS:
        raise ConfigError(
            f"API key {place} has {len(key)} characters, where {LEAST_CHARACTERS} to "
            f"{MOST_CHARACTERS} are needed; make one with {HOW_TO_MAKE_ONE}",
            field="api_keys",
        )
    if not (key.isascii() and key.isprintable()) or " " in key or "," in key:
        raise ConfigError(
            f"API key {place} holds a character that no key can have (a space, a comma, one "
            f"that is not printable ASCII); make one with {HOW_TO_MAKE_ONE}",
            field="api_keys",
        )
    return key
