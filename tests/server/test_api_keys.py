"""Reading keys, and reading them from headers."""

from __future__ import annotations

import hmac
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflexarc.contract.errors import ConfigError
from reflexarc.server.api_keys import API_KEYS_VARIABLE, ApiKeys, presented_key, read_api_keys

ONE, TWO, THREE = ("one-of-the-robot-cells", "two-of-the-robot-cells", "a" * 16)
KEY_TEXT = st.text(string.ascii_letters + string.digits + "-_.~+/=", min_size=16, max_size=64)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"authorization", b"x-api-key", b"cookie"]),
        st.one_of(
            st.binary(max_size=80),
            st.builds(
                lambda scheme, gap, rest: scheme + gap + rest,
                st.sampled_from([b"Api-Key", b"bearer", b"Basic", b"Digest", b""]),
                st.sampled_from([b"", b" ", b"\t", b"   "]),
                st.binary(max_size=60),
            ),
        ),
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(headers=HEADERS, browsed=st.booleans())
def test_any_header_is_read_without_an_exception(headers: Any, browsed: bool) -> None:
    keys = ApiKeys([ONE, TWO])
    key = presented_key(headers, browsed=browsed)
    if key is not None:
        (value,) = [value for name, value in headers if name == b"authorization"]
        assert value.strip(b" \t").split(b" ")[0].lower() in (b"api-key", b"bearer", b"basic")
        assert browsed or value.strip(b" \t").endswith(key)
    assert keys.accept(headers, browsed=browsed) is (key in (ONE.encode(), TWO.encode()))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    keys=st.lists(KEY_TEXT, min_size=1, max_size=4, unique=True),
    scheme=st.sampled_from(["Api-Key", "Bearer", "bEARER", "api-key"]),
    gap=st.sampled_from([" ", "   "]),
    data=st.data(),
)
def test_each_key_opens_and_no_other_text_does(
    keys: list[str], scheme: str, gap: str, data: st.DataObject
) -> None:
    known = ApiKeys(keys)
    for key in keys:
        assert known.accept([(b"authorization", f"{scheme}{gap}{key}".encode())])
    text = data.draw(st.one_of(KEY_TEXT, st.sampled_from([keys[0][:-1], keys[0] + "x"])))
    assert known.accept([(b"authorization", f"Bearer {text}".encode())]) is (text in keys)


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare_digest = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare_digest(a, b)

    keys = ApiKeys([ONE, TWO, THREE])
    monkeypatch.setattr(hmac, "compare_digest", compare)
    counts = []
    for key in (ONE, THREE, "wrong", ONE[:-1], "x" * 4000):
        compared.clear()
        keys.accept([(b"authorization", f"Api-Key {key}".encode())])
        counts.append(len(compared))
        # Digests: of one length whatever was sent, and unknown to who sent it.
        assert {len(part) for pair in compared for part in pair} == {32}
        assert all(ONE.encode() not in part for pair in compared for part in pair)
    assert counts == [3] * 5


def test_keys_come_from_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEYS_VARIABLE, raising=False)
    assert not read_api_keys()
    file = tmp_path / "keys"
    file.write_text(f"# of cell 2\n\n  {TWO}  \n")
    monkeypatch.setenv(API_KEYS_VARIABLE, f" {ONE} ,{THREE},")
    keys = read_api_keys(file)
    for key in (ONE, TWO, THREE):
        assert keys.accept([(b"authorization", f"Bearer {key}".encode())])
    assert len(keys) == 3 and ONE not in repr(keys)


@pytest.mark.parametrize(
    ("variable", "content", "named"),
    [
        ("", None, f"{API_KEYS_VARIABLE} holds no API key"),
        (" , ", None, f"{API_KEYS_VARIABLE} holds no API key"),
        (None, "# nothing\n", "keys holds no API key"),
        (f"{ONE},short-secret", None, "API key 2 has 12 characters"),
        (None, f"{ONE}\nwith a space inside\n", "API key 2 holds a character"),
        ("schlüssel-mit-umlaut-zeichen", None, "API key 1 holds a character"),
        (None, "schlüssel", "not ASCII"),
        (None, f"{ONE},{TWO}", "API key 1 holds a character"),
    ],
)
def test_wrong_keys_are_refused_and_never_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    content: str | None,
    named: str,
) -> None:
    monkeypatch.delenv(API_KEYS_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(API_KEYS_VARIABLE, variable)
    file = None if content is None else tmp_path / "keys"
    if file is not None:
        file.write_text(content or "", encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        read_api_keys(file)
    assert named in refused.value.message
    for secret in ("short-secret", "with a space", "schl", ONE, TWO):
        assert secret not in refused.value.message


def test_a_file_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEYS_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="No such file"):
        read_api_keys(tmp_path / "none")
