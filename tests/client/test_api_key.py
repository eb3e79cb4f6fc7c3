"""Clients with a right, a wrong and no API key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from reflexarc.client import HttpPolicyClient, PolicyClient
from reflexarc.client.load import LoadSettings, run_load
from reflexarc.contract import Observation
from reflexarc.contract.errors import AuthenticationError, ConfigError, error_from_wire
from reflexarc.server import BackgroundServer, NullPolicy
from reflexarc.server.api_keys import ApiKeys
from reflexarc.server.protection import Protection

MakeObservation = Callable[..., Observation]
KEY = "a-key-of-the-robot-cell-7"
both = pytest.mark.parametrize("client", [PolicyClient, HttpPolicyClient])


@pytest.fixture(scope="module")
def guarded() -> Iterator[BackgroundServer]:
    with BackgroundServer(NullPolicy, protection=Protection(ApiKeys([KEY]))) as server:
        yield server


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFLEXARC_API_KEY", raising=False)


@both
def test_the_key_comes_as_an_argument_or_from_the_environment(
    client: Any, guarded: BackgroundServer, observe: MakeObservation, monkeypatch: Any
) -> None:
    with client(guarded.url, api_key=KEY) as policy:
        assert policy.infer(observe()).seed == 7
    monkeypatch.setenv("REFLEXARC_API_KEY", KEY)
    with client(guarded.url) as policy:
        assert policy.infer(observe()).seed == 7
    with pytest.raises(AuthenticationError):
        client(guarded.url, api_key="a-wrong-one")  # the argument goes before
    with pytest.raises(AuthenticationError, match="asks for an API key"):
        client(guarded.url, api_key="")


@both
@pytest.mark.parametrize("key", [None, "a-wrong-key-of-nobody"])
def test_a_wrong_key_is_named_at_once(
    client: Any, key: str | None, guarded: BackgroundServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(AuthenticationError) as refused:
        client(guarded.url, api_key=key, retry_for=60)
    assert "60 s" not in caplog.text, "it was asked again"
    assert refused.value.code == "unauthorized"
    assert "REFLEXARC_API_KEY" in refused.value.message
    said = caplog.text + refused.value.message + "".join(map(repr, _chain(refused.value)))
    assert key is None or key not in said


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@both
def test_a_server_that_comes_back_with_other_keys_is_not_asked_again(
    client: Any, observe: MakeObservation
) -> None:
    with BackgroundServer(NullPolicy, protection=Protection(ApiKeys([KEY]))) as first:
        policy = client(first.url, api_key=KEY)
        policy.infer(observe())
    other = Protection(ApiKeys([f"{KEY}-of-another-lab"]))
    with BackgroundServer(NullPolicy, port=first.port, protection=other):
        with pytest.raises(AuthenticationError, match="refused the API key"):
            policy.infer(observe())
        policy.close()


@both
@pytest.mark.parametrize("key", ["two words", "line\nbreak: x", "schlüssel"])
def test_what_no_header_can_hold_is_refused_unseen(client: Any, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        client("127.0.0.1:1", api_key=key, retry_for=0)
    assert key not in refused.value.message


def test_the_code_travels() -> None:
    error = error_from_wire(AuthenticationError("no").to_wire())
    assert isinstance(error, AuthenticationError)


def test_a_load_generator_without_the_key_says_so(guarded: BackgroundServer) -> None:
    settings = LoadSettings(guarded.url, seconds=0.2, headers={"Authorization": "Bearer wrong"})
    assert "wrong" not in repr(settings)
    with pytest.raises(AuthenticationError, match="refused the API key"):
        run_load(settings, ceiling=False)
