"""Image steps, and compressed images that lie about their size."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from reflexarc.contract import EncodedImage
from reflexarc.contract.errors import CodecError
from reflexarc.contract.images import (
    MAX_IMAGE_SIDE,
    decode_image,
    encode_image,
    prepare_image,
    resize_bilinear,
    rotate_180,
)
from reflexarc.contract.policy_contract import libero_cameras

RENDERED = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:256, 0:256], 128), axis=-1).astype(np.uint8)


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG whose header says ``width`` x ``height``, whatever it holds."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_rotation_and_resize() -> None:
    np.testing.assert_array_equal(rotate_180(RENDERED), RENDERED[::-1, ::-1])
    assert resize_bilinear(RENDERED, 256, 256) is RENDERED
    half = resize_bilinear(SMOOTH, 128, 128)
    assert half.shape == (128, 128, 3) and half.dtype == np.uint8
    assert np.abs(half.astype(int) - SMOOTH[::2, ::2]).max() <= 1
    pillow = Image.fromarray(RENDERED).resize((100, 60), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize_bilinear(RENDERED, 60, 100), np.asarray(pillow))


def test_prepare_image_applies_the_cameras_steps() -> None:
    camera = libero_cameras(224, 256)[0]
    prepared = prepare_image(camera, RENDERED)
    np.testing.assert_array_equal(prepared, resize_bilinear(RENDERED[::-1, ::-1], 224, 224))
    assert prepared.flags.c_contiguous
    opengl = libero_cameras(256, 256)[0].model_copy(update={"orientation": "opengl"})
    np.testing.assert_array_equal(prepare_image(opengl, RENDERED), RENDERED)


def test_lossless_and_lossy_round_trips() -> None:
    np.testing.assert_array_equal(decode_image(encode_image(RENDERED, "png")), RENDERED)
    decoded = decode_image(encode_image(SMOOTH, "jpeg", quality=95)).astype(int)
    assert np.abs(decoded - SMOOTH).mean() < 3
    raw = EncodedImage("raw", RENDERED.tobytes(), (256, 256, 3))
    np.testing.assert_array_equal(decode_image(raw), RENDERED)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.zeros((8, 9), np.uint16)).save(buffer, "PNG")
    else:
        Image.fromarray(RENDERED[:8, :9]).convert(mode).save(buffer, "PNG")
    decoded = decode_image(EncodedImage("png", buffer.getvalue()))
    assert decoded.shape == (8, 9, 3) and decoded.dtype == np.uint8


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (MAX_IMAGE_SIDE + 1, 1), (1, MAX_IMAGE_SIDE + 1), (20_000, 20_000),
        (2**31 - 1, 2**31 - 1), (0, 5),
    ],
)  # fmt: skip
def test_bombs_are_refused_by_their_header(width: int, height: int) -> None:
    bomb = EncodedImage("png", png(width, height, bytes(10_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode_image(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (EncodedImage("jpeg", b""), "jpeg image cannot be decoded"),
        (EncodedImage("png", b"no image"), "png image cannot be decoded"),
        (EncodedImage("png", png(8, 8, b"\0" * 20)[:-30]), "png image cannot be decoded"),
        (EncodedImage("jpeg", png(8, 8, bytes(200))), "jpeg image cannot be decoded"),
        (EncodedImage("raw", bytes(12), None), "needs shape (H, W, 3)"),
        (EncodedImage("raw", bytes(12), (2, 2)), "needs shape (H, W, 3)"),
        (EncodedImage("raw", bytes(16), (2, 2, 4)), "needs shape (H, W, 3)"),
        (EncodedImage("raw", bytes(11), (2, 2, 3)), "needs 12 bytes"),
    ],
)
def test_broken_images_are_named(image: EncodedImage, words: str) -> None:
    with pytest.raises(CodecError) as caught:
        decode_image(image)
    assert words in caught.value.message


def test_only_the_stated_format_is_opened() -> None:
    """A GIF, TIFF or EPS in a field that says PNG never reaches its decoder."""
    for other in ("GIF", "TIFF", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(RENDERED[:8, :8]).save(buffer, other)
        with pytest.raises(CodecError, match="cannot be decoded"):
            decode_image(EncodedImage("png", buffer.getvalue()))


def test_damaged_images_raise_nothing_but_codec_errors() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for image_format in ("png", "jpeg"):
        whole = encode_image(RENDERED[:32, :32], image_format).data
        for _ in range(500):
            damaged = bytearray(whole)
            for position in rng.integers(0, len(whole), 3):
                damaged[position] = rng.integers(256)
            try:
                decode_image(EncodedImage(image_format, bytes(damaged)))
            except CodecError:
                refused += 1
    assert refused > 100
