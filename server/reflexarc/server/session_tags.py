"""Short names of sessions for logs and the status page.

A session's id lets whoever knows it ask in its name, or end it. Its tag shows that two requests
are of one session and nothing else: the key is drawn anew by every process and never leaves it.
"""

from __future__ import annotations

import hashlib
import secrets

_KEY = secrets.token_bytes(32)
_TAG_BYTES = 5


def session_tag(session: str) -> str:
    """Ten hexadecimal digits; the same for the same session as long as the process lives."""
    name = session.encode(errors="surrogatepass")
    return hashlib.blake2b(name, key=_KEY, digest_size=_TAG_BYTES).hexdigest()
