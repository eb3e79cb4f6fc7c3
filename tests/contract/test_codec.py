"""What a message may hold comes back unchanged, in openpi's bytes."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from reflexarc.contract import EncodedImage, pack, unpack
from reflexarc.contract.codec import array_from_bytes
from reflexarc.contract.errors import CodecError, FrameTooLargeError

DTYPES = [
    *("|b1", "|i1", "|u1"),
    *(f"{order}{kind}" for order in "<>" for kind in ("i2", "i4", "i8", "u2", "u4", "u8")),
    *(f"{order}{kind}" for order in "<>" for kind in ("f2", "f4", "f8")),
]
shapes = npst.array_shapes(min_dims=0, max_dims=6, min_side=0, max_side=4)
arrays = st.sampled_from(DTYPES).flatmap(lambda dtype: npst.arrays(dtype, shapes))
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats() | st.booleans() | st.none()
leaves = numbers | st.text(max_size=40) | st.binary(max_size=80) | arrays
messages = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


def assert_same(sent: Any, got: Any) -> None:
    if isinstance(sent, dict):
        assert isinstance(got, dict) and list(got) == list(sent)
        for key in sent:
            assert_same(sent[key], got[key])
    elif isinstance(sent, list | tuple):
        assert isinstance(got, list) and len(got) == len(sent)
        for a, b in zip(sent, got, strict=True):
            assert_same(a, b)
    elif isinstance(sent, np.ndarray):
        assert isinstance(got, np.ndarray)
        assert got.dtype == sent.dtype and got.shape == sent.shape
        assert got.tobytes() == sent.tobytes()
    elif isinstance(sent, float) and math.isnan(sent):
        assert math.isnan(got)
    else:
        assert type(got) is type(sent) and got == sent


@given(messages)
@settings(max_examples=300, deadline=None)
def test_round_trip(message: Any) -> None:
    assert_same(message, unpack(pack(message)))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_decodes(kind: type) -> None:
    message = {"state": np.arange(3.0), "text": "é"}
    assert_same(message, unpack(kind(pack(message))))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(4, 6)[::2, ::-1],
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(6, dtype=np.uint8).reshape(2, 3).T,
        np.broadcast_to(np.float32(2), (3, 2)),
        np.zeros((2, 0, 3), np.float16),
        np.array(5, dtype=">i4"),
    ],
)
def test_arrays_of_any_memory_layout(array: np.ndarray) -> None:
    got = unpack(pack(array))
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype and got.shape == array.shape and got.flags.c_contiguous


def test_arrays_are_read_only() -> None:
    got = unpack(pack(np.zeros(4)))
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1


@pytest.mark.parametrize(
    "scalar",
    [
        np.bool_(True), np.int8(-128), np.uint8(255), np.int16(-5), np.uint32(2**32 - 1),
        np.int64(-(2**63)), np.uint64(2**64 - 1), np.float16(0.5), np.float32(1.1),
        np.float32("nan"), np.float32("-inf"),
    ],
)  # fmt: skip
def test_numpy_scalars(scalar: np.generic) -> None:
    got = unpack(pack({"scalar": scalar}))["scalar"]
    assert type(got) is type(scalar) and got.tobytes() == scalar.tobytes()


def test_encoded_images() -> None:
    for image in (
        EncodedImage("jpeg", b"\xff\xd8", (8, 8, 3)),
        EncodedImage("png", b"", None),
        EncodedImage("raw", bytes(12), (2, 2, 3)),
    ):
        assert unpack(pack([image])) == [image]


def test_bytes_equal_openpis_encoding() -> None:
    """openpi documents its maps by their bin keys, in this order; written out byte by byte."""
    frame = pack({"a": np.array([[1, 2]], dtype=np.uint8)})
    assert frame == (
        b"\x81\xa1a"
        b"\x84"
        b"\xc4\x0b__ndarray__\xc3"
        b"\xc4\x04data\xc4\x02\x01\x02"
        b"\xc4\x05dtype\xa3|u1"
        b"\xc4\x05shape\x92\x01\x02"
    )
    assert pack(np.float32(1.5)) == (
        b"\x83"
        b"\xc4\x0d__npgeneric__\xc3"
        b"\xc4\x04data\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00"
        b"\xc4\x05dtype\xa3<f4"
    )


def test_bytes_of_a_whole_libero_request_equal_openpis() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
    state = rng.normal(size=8)

    def documented(array: np.ndarray) -> dict[bytes, Any]:
        return {
            b"__ndarray__": True,
            b"data": array.tobytes(),
            b"dtype": array.dtype.str,
            b"shape": array.shape,
        }

    expected = msgpack.packb(
        {
            "observation/image": documented(image),
            "observation/state": documented(state),
            "prompt": "pick up the milk",
        }
    )
    message = {"observation/image": image, "observation/state": state, "prompt": "pick up the milk"}
    assert pack(message) == expected
    assert_same(message, unpack(expected))


@pytest.mark.parametrize("encode", [str, str.encode], ids=["str", "bin"])
def test_maps_of_other_projects(encode: Any) -> None:
    """vla-eval sends str keys; msgpack-numpy sends ``nd``, ``type``, ``kind``."""
    data = np.arange(4, dtype="<f4")
    ours = {encode("__ndarray__"): True, encode("data"): data.tobytes()}
    ours |= {encode("dtype"): "<f4", encode("shape"): [2, 2]}
    theirs = {encode("nd"): True, encode("type"): "<f4", encode("kind"): b""}
    theirs |= {encode("shape"): [2, 2], encode("data"): data.tobytes()}
    scalar = {encode("nd"): False, encode("type"): "<f4", encode("data"): data[3:].tobytes()}
    image = {encode("__image__"): True, encode("format"): "png", encode("data"): b"x"}
    got = unpack(msgpack.packb([ours, theirs, scalar, image]))
    for array in got[:2]:
        np.testing.assert_array_equal(array, data.reshape(2, 2))
    assert got[2] == np.float32(3) and isinstance(got[2], np.float32)
    assert got[3] == EncodedImage("png", b"x", None)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.array([None, "x"], dtype=object), "dtype object"),
        (np.zeros(2, dtype=[("a", "<f4")]), "cannot travel"),
        (np.zeros(2, dtype="<c8"), "complex64"),
        (np.array(["text"]), "<U4"),
        (np.array([b"text"]), "S4"),
        (np.zeros(2, dtype="M8[s]"), "datetime64"),
        (np.zeros(1, dtype=np.longdouble), "cannot travel"),
        (np.complex64(1), "complex64"),
        (np.zeros((1,) * 7), "at most 6 dimensions"),
        (np.zeros(65_537, np.uint8), "at most 65536"),
        (object(), "builtins.object"),
        ({1, 2}, "set"),
        (2**64, "cannot be encoded"),
        ("\ud800", "cannot be encoded"),
    ],
)
def test_what_cannot_travel_is_named(value: object, words: str) -> None:
    with pytest.raises(CodecError, match="this message cannot be encoded") as caught:
        pack({"value": value})
    assert words in caught.value.message


def test_frame_cap() -> None:
    frame = pack(np.zeros(100, np.uint8))
    assert unpack(frame, max_bytes=len(frame)).shape == (100,)
    with pytest.raises(FrameTooLargeError, match=f"{len(frame)} bytes is above the cap of 99"):
        unpack(frame, max_bytes=99)
    assert FrameTooLargeError.code == "frame_too_large"


def test_array_from_bytes_checks_as_unpack_does() -> None:
    np.testing.assert_array_equal(array_from_bytes(b"\1\0\2\0", "<i2", [2]), [1, 2])
    with pytest.raises(CodecError, match="needs 4 bytes, got 3"):
        array_from_bytes(b"\1\0\2", "<i2", [2])
