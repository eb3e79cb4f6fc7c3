"""The named image steps of a contract, and the decoding of compressed images.

Training data and live images pass through :func:`prepare_image` alike, so that what was trained
is what is served.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from reflexarc.contract.codec import EncodedImage
from reflexarc.contract.errors import CodecError
from reflexarc.contract.policy_contract import Camera

UInt8Image = npt.NDArray[np.uint8]
MAX_IMAGE_SIDE = 4096
_UNDECODABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
)


def rotate_180(image: UInt8Image) -> UInt8Image:
    """Turn ``(H, W, 3)`` by half a turn (a view)."""
    return image[::-1, ::-1]


def resize_bilinear(image: UInt8Image, height: int, width: int) -> UInt8Image:
    """Resize ``uint8 (H, W, 3)`` with Pillow's antialiased bilinear filter.

    The same pixels as ``openpi_client.image_tools.resize_with_pad`` for square images.
    """
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    return np.asarray(resized)


def prepare_image(camera: Camera, rendered: UInt8Image) -> UInt8Image:
    """Apply ``camera.steps`` to an image as LIBERO renders it; returns ``(height, width, 3)``."""
    image = rotate_180(rendered) if camera.orientation == "rotated_180" else rendered
    return np.ascontiguousarray(resize_bilinear(image, camera.height, camera.width))


def decode_image(
    encoded: EncodedImage, size: tuple[int, int] | None = None, *, camera: Camera | None = None
) -> UInt8Image:
    """Decode JPEG, PNG or raw bytes to ``uint8 (H, W, 3)`` RGB.

    The header's size is checked before any pixel is decoded: against ``size``, the height and
    width that are wanted, or against the larger of what ``camera`` gives and the policy takes, or
    without both against the most that any camera has. Raises CodecError.
    """
    if encoded.format == "raw":
        return _raw_image(encoded)
    try:
        with Image.open(io.BytesIO(encoded.data), formats=[encoded.format.upper()]) as image:
            width, height = image.size
            if not (0 < width <= MAX_IMAGE_SIDE and 0 < height <= MAX_IMAGE_SIDE):
                raise CodecError(f"image of {width}x{height} is above {MAX_IMAGE_SIDE} a side")
            if camera is not None and size is None:
                _refuse_larger(camera, height, width)
            if size is not None and (height, width) != size:
                raise CodecError(
                    f"image is {height} high and {width} wide, expected {size[0]} and {size[1]}; "
                    "resize it"
                )
            return np.asarray(image.convert("RGB"))
    except _UNDECODABLE as error:
        raise CodecError(f"the {encoded.format} image cannot be decoded: {error}") from error


def _refuse_larger(camera: Camera, height: int, width: int) -> None:
    if height > max(camera.height, camera.source_height) or width > max(
        camera.width, camera.source_width
    ):
        raise CodecError(
            f"image is {height} high and {width} wide, larger than what the policy takes "
            f"({camera.height} and {camera.width}) and than what its camera {camera.name!r} gives "
            f"({camera.source_height} and {camera.source_width}); resize it before sending"
        )


def _raw_image(encoded: EncodedImage) -> UInt8Image:
    shape = encoded.shape
    if shape is None or len(shape) != 3 or shape[2] != 3:
        raise CodecError(f"a raw image needs shape (H, W, 3), got {shape}")
    if len(encoded.data) != shape[0] * shape[1] * 3:
        raise CodecError(f"a raw image {shape} needs {shape[0] * shape[1] * 3} bytes")
    return np.frombuffer(encoded.data, dtype=np.uint8).reshape(shape)


def encode_image(image: UInt8Image, image_format: str = "jpeg", quality: int = 90) -> EncodedImage:
    """Compress ``uint8 (H, W, 3)`` for a slow network. JPEG is lossy, PNG is not."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": quality} if image_format == "jpeg" else {}
    Image.fromarray(image).save(buffer, format=image_format.upper(), **options)
    return EncodedImage(format=image_format, data=buffer.getvalue(), shape=tuple(image.shape))
