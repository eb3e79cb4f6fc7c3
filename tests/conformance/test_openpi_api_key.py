"""The unmodified openpi-client 0.1.2 against a server that asks for an API key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from reflexarc.server import BackgroundServer, NullPolicy
from reflexarc.server.api_keys import ApiKeys
from reflexarc.server.protection import Protection

KEY = "a-key-of-the-robot-cell-7"


def test_openpi_client_sends_its_key(
    openpi: Any, libero_request: Callable[..., dict[str, Any]]
) -> None:
    with BackgroundServer(NullPolicy, protection=Protection(ApiKeys([KEY]))) as server:
        for key in (None, "a-wrong-key-of-nobody"):
            with pytest.raises(RuntimeError, match=r"InvalidStatus.*401"):
                openpi.call("connect", url=server.url, api_key=key)
        metadata = openpi.call("connect", url=server.url, api_key=KEY)
        assert metadata["contract"]["family"] == "null"
        reply = openpi.call("infer", observation=libero_request())
        assert reply["actions"].shape == (10, 7)
