"""Every refusal of the decoder, each by a frame that would harm a trusting one."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflexarc.contract import pack, unpack
from reflexarc.contract.codec import MAX_CONTAINER_LENGTH, MAX_DEPTH, MAX_FRAME_BYTES, MAX_VALUES
from reflexarc.contract.errors import CodecError


def array_map(**changes: Any) -> dict[bytes, Any]:
    fields = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2]} | changes
    return {key.encode(): value for key, value in fields.items() if value != "absent"}


def refused(message: object) -> str:
    return refused_frame(msgpack.packb(message))


def refused_frame(frame: bytes) -> str:
    with pytest.raises(CodecError) as caught:
        unpack(frame)
    return caught.value.message


@pytest.mark.parametrize(
    "dtype",
    [
        "|O", "O", "|O8", "object", "<c8", "<c16", "|V8", "<U2", "|S8", "<M8[s]", "<m8", "<f16",
        "<f4,<f4", "(2,)<f4", "[('a', '<f4')]", "<i3", "", "f", "float", "longdouble", "<F4",
        "<f4 ", "\x00<f4", "<f4" * 9999, b"|O", b"\xff", 4, None, ["<f4"], {"names": ["a"]}, True,
    ],
)  # fmt: skip
def test_dtypes(dtype: object) -> None:
    message = refused(array_map(dtype=dtype))
    assert message.startswith("dtype ") and "is refused; use bool, integers or floats" in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": bytes(7)}, "needs 8 bytes, got 7"),
        ({"data": bytes(9)}, "needs 8 bytes, got 9"),
        ({"data": b""}, "needs 8 bytes, got 0"),
        ({"data": "12345678"}, "must be bytes, got str"),
        ({"data": [0] * 8}, "must be bytes, got list"),
        ({"data": "absent"}, "must be bytes, got NoneType"),
        ({"shape": "absent"}, "list of at most 6 dimensions"),
        ({"shape": 2}, "list of at most 6 dimensions"),
        ({"shape": [1] * 7}, "list of at most 6 dimensions"),
        ({"shape": [-2]}, "dimension -2 is outside"),
        ({"shape": [-1, -2]}, "dimension -1 is outside"),
        ({"shape": [65_537]}, "dimension 65537 is outside"),
        ({"shape": [2**63]}, "is outside"),
        ({"shape": [True, 2]}, "dimension True is outside"),
        ({"shape": [2.0]}, "dimension 2.0 is outside"),
        ({"shape": ["2"]}, "dimension '2' is outside"),
        ({"shape": [[2]]}, "is outside"),
        # 2**64 elements wrap to 0 in 64-bit arithmetic
        ({"shape": [65_536] * 4, "data": b""}, "needs 73786976294838206464 bytes"),
        ({"shape": [65_536] * 5 + [0], "data": b""}, "is refused"),
    ],
)
def test_array_fields(changes: dict[str, Any], words: str) -> None:
    assert words in refused(array_map(**changes))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (300, "|i1"), (-1, "|u1"), (1.5, "<i4"), (float("nan"), "<i4"), ("1", "<f4"), (None, "<f4"),
        (b"\0\0\0\0", "<f4"), ([1.0], "<f4"), (True, "<f4"), (1, "|b1"), (True, "|u1"),
    ],
)  # fmt: skip
def test_scalars_that_do_not_fit(value: object, dtype: str) -> None:
    message = refused({b"__npgeneric__": True, b"data": value, b"dtype": dtype})
    assert "does not fit into" in message


def test_object_scalars() -> None:
    assert "'|O'" in refused({b"__npgeneric__": True, b"data": 1, b"dtype": "|O"})


class Exploding:
    """Unpickling one fails the test run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("encode", [str, str.encode])
def test_msgpack_numpys_pickle_path_does_not_exist(encode: Any) -> None:
    payload = pickle.dumps(Exploding())
    for kind in (b"O", "O", b"V", 79, True):
        fields = {"nd": True, "type": "|O", "kind": kind, "shape": [1], "data": payload}
        assert "pickle" in refused({encode(key): value for key, value in fields.items()})
    fields = {"nd": True, "type": "|O", "kind": b"", "shape": [1], "data": payload}
    assert "is refused" in refused({encode(key): value for key, value in fields.items()})
    structured = {"nd": True, "type": [["a", "<f4"]], "kind": b"", "shape": [1], "data": bytes(4)}
    assert "is refused" in refused({encode(key): value for key, value in structured.items()})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "gif", "data": b""}, "'gif' is not one of"),
        ({"format": None, "data": b""}, "None is not one of"),
        ({"format": ["png"], "data": b""}, "is not one of"),
        ({"format": "png", "data": "text"}, "must be bytes, got str"),
        ({"format": "raw", "data": b"", "shape": [1, 1, 1, 1]}, "at most 3"),
        ({"format": "raw", "data": b"", "shape": [-1, 1, 3]}, "is refused"),
        ({"format": "raw", "data": b"", "shape": [2**40, 1, 3]}, "is refused"),
        ({"format": "raw", "data": b"", "shape": [True, 1, 3]}, "is refused"),
        ({"format": "raw", "data": b"", "shape": "3"}, "must be a list"),
    ],
)
def test_images(fields: dict[str, Any], words: str) -> None:
    assert words in refused({"__image__": True} | fields)


def test_nesting() -> None:
    deepest = b"\x91" * MAX_DEPTH + b"\xc0"
    assert unpack(deepest) is not None
    for first in (b"\x91", b"\x81\xa0", b"\xdc\x00\x01"):
        assert f"deeper than {MAX_DEPTH}" in refused_frame(first * (MAX_DEPTH + 1) + b"\xc0")
    assert f"deeper than {MAX_DEPTH}" in refused_frame(b"\x91" * 10_000_000)


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
        b"\xdd\x00\x01\x00\x01" + b"\xc0" * (MAX_CONTAINER_LENGTH + 1),
    ],
)  # fmt: skip
def test_container_lengths(frame: bytes) -> None:
    assert f"is above {MAX_CONTAINER_LENGTH}" in refused_frame(frame)


def test_number_of_values() -> None:
    full = b"\xdc\xff\xff" + b"\xc0" * 65_535
    count = MAX_VALUES // 65_536
    assert len(unpack(bytes([0x90 + count - 1]) + full * (count - 1))) == count - 1
    assert "send arrays as arrays" in refused_frame(bytes([0x90 + count]) + full * count + b"\xc0")


@pytest.mark.parametrize(
    "value",
    [
        msgpack.ExtType(1, b"x"), msgpack.ExtType(7, bytes(3)), msgpack.ExtType(1, bytes(70_000)),
        msgpack.Timestamp(0, 0), msgpack.Timestamp(2**40, 5),
    ],
)  # fmt: skip
def test_extension_types(value: object) -> None:
    assert "extension types are refused" in refused({"a": value})


@pytest.mark.parametrize("key", [0, -1, 2**63, None, True, 1.5])
def test_map_keys_are_text_or_bytes(key: object) -> None:
    assert "is not allowed for map key" in refused({key: 1})


def test_maps_and_arrays_as_map_keys() -> None:
    for key in (b"\x80", b"\x90", b"\x91\x01", pack(np.zeros(2)), pack(np.float32(1))):
        assert "not a valid message" in refused_frame(b"\x81" + key + b"\x01")


def test_what_follows_the_message() -> None:
    assert refused_frame(pack(1) + b"\xc0") == "1 bytes follow the message"
    assert "3 bytes follow" in refused_frame(b"\x80" + b"\x80" * 3)


def test_reserved_byte_and_broken_text() -> None:
    assert "0xc1" in refused_frame(b"\xc1")
    assert "utf-8" in refused_frame(b"\xa2\xc3\x28")


@given(st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_every_truncation(length: int) -> None:
    frame = pack({"a": [1, 2.5, "text", b"x" * 300], "b": np.zeros((3, 2)), "c": {"d": None}})
    with pytest.raises(CodecError, match=r"ends in the middle|runs past the end"):
        unpack(frame[: min(length, len(frame) - 1)])


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_bytes(frame: bytes) -> None:
    try:
        value = unpack(frame)
    except CodecError:
        return
    pack(value)  # what decodes is a message


def test_lengths_that_lie_allocate_nothing() -> None:
    lies = [
        b"\xc6\xff\xff\xff\xff" + bytes(100),
        b"\xdb\x7f\xff\xff\xff" + bytes(100),
        b"\xdd\x00\x01\x00\x00" + b"\xc0" * 100,
        b"\xdf\x00\x01\x00\x00" + b"\xa1a\xc0" * 30,
    ]
    tracemalloc.start()
    try:
        for frame in lies:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            refused_frame(frame)
            assert tracemalloc.get_traced_memory()[1] - before < 64 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [b"\x80", b"\x90", b"\xa1a", b"\xcb\x3f\xf8\0\0\0\0\0\0", b"\x81\xa0\x90", b"\xcd\xff\xff"],
    ids=["maps", "lists", "text", "floats", "maps of lists", "integers"],
)
def test_the_worst_frames_allocate_less_than_the_cap(value: bytes) -> None:
    """As many values as a frame may hold, of the kinds that cost most once decoded."""
    children = {b"\x81\xa0\x90": 3}.get(value, 1)
    inner = (MAX_VALUES - 8) // 4 // children
    frame = b"\x94" + (b"\xdc" + inner.to_bytes(2, "big") + value * inner) * 4
    gc.collect()
    tracemalloc.start()
    try:
        unpack(frame)
        assert tracemalloc.get_traced_memory()[1] < MAX_FRAME_BYTES
    finally:
        tracemalloc.stop()
