"""Whether the bytes of a msgpack frame are a message that can be decoded without harm."""

from __future__ import annotations

from reflexarc.contract.errors import CodecError

MAX_DEPTH = 32
MAX_CONTAINER_LENGTH = 65_536
MAX_VALUES = 262_144


def _fixed_sizes() -> list[tuple[int, int] | None]:
    """First byte of a msgpack value -> (bytes of payload, child values); None where stated later.

    After https://github.com/msgpack/msgpack/blob/master/spec.md.
    """
    sizes: list[tuple[int, int] | None] = [None] * 256
    for first in (*range(0x80), *range(0xE0, 0x100)):  # small integers
        sizes[first] = (0, 0)
    for count in range(16):
        sizes[0x80 + count] = (0, 2 * count)  # map
        sizes[0x90 + count] = (0, count)  # array
    for length in range(32):
        sizes[0xA0 + length] = (length, 0)  # str
    for first in (0xC0, 0xC2, 0xC3):  # nil, false, true
        sizes[first] = (0, 0)
    for first, length in ((0xCA, 4), (0xCB, 8)):  # floats
        sizes[first] = (length, 0)
    for power in range(4):  # unsigned and signed integers
        sizes[0xCC + power] = sizes[0xD0 + power] = (1 << power, 0)
    return sizes


_FIXED_SIZES = _fixed_sizes()
# First byte -> (bytes of the length, length counts bytes, child values a unit of length).
_STATED_SIZES = {
    0xC4: (1, True, 0), 0xC5: (2, True, 0), 0xC6: (4, True, 0),  # bin
    0xD9: (1, True, 0), 0xDA: (2, True, 0), 0xDB: (4, True, 0),  # str
    0xDC: (2, False, 1), 0xDD: (4, False, 1),  # array
    0xDE: (2, False, 2), 0xDF: (4, False, 2),  # map
}  # fmt: skip


def check_structure(frame: bytes | bytearray | memoryview) -> None:
    """Walk the frame without decoding it; raise CodecError before anything is allocated.

    A list of one-byte values costs eight bytes of pointers a value once decoded, so the number
    of values is bounded here, and a container's stated length is checked against the cap.
    """
    end, position, values = len(frame), 0, 1
    left = 1  # values still to come in the innermost open container
    outer: list[int] = []  # the same of the containers around it
    while left or outer:
        if not left:
            left = outer.pop()
            continue
        left -= 1
        if position >= end:
            raise CodecError(f"the frame ends in the middle of a message, after {end} bytes")
        sizes = _FIXED_SIZES[frame[position]]
        position += 1
        if sizes is None:
            position, payload, children = _stated_size(frame, position)
        else:
            payload, children = sizes
        position += payload
        if position > end:
            raise CodecError(f"a value of {payload} bytes runs past the end of the frame")
        if children:
            values += children
            if values > MAX_VALUES:
                raise CodecError(f"more than {MAX_VALUES} values in a frame; send arrays as arrays")
            if len(outer) >= MAX_DEPTH:
                raise CodecError(f"nested deeper than {MAX_DEPTH}")
            outer.append(left)
            left = children
    if position != end:
        raise CodecError(f"{end - position} bytes follow the message")


def _stated_size(frame: bytes | bytearray | memoryview, position: int) -> tuple[int, int, int]:
    """``(position after the length, payload, child values)`` of a value that states its length."""
    first = frame[position - 1]
    kind = _STATED_SIZES.get(first)
    if kind is None:
        raise CodecError(f"byte 0x{first:02x} at {position - 1}: extension types are refused")
    width, counts_bytes, children = kind
    after = position + width
    if after > len(frame):
        raise CodecError("the frame ends in the middle of a length")
    length = frame[position] if width == 1 else int.from_bytes(frame[position:after], "big")
    if counts_bytes:
        return after, length, 0
    if length > MAX_CONTAINER_LENGTH:
        raise CodecError(f"a container of {length} values is above {MAX_CONTAINER_LENGTH}")
    return after, 0, children * length
