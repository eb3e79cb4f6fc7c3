"""Throw mutated frames at the codec: ``python -m tests.contract.fuzz_codec --frames 1000000``.

What must hold for every frame: nothing but CodecError leaves ``unpack``; what it returns holds
only the types that a message may hold; its peak allocation stays within a multiple of the frame;
no frame takes seconds. What decodes also passes through the readers of observations, chunks and
images, out of which only named errors may come. A frame depends on the seed and its index alone,
so ``--start INDEX --frames 1`` repeats one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import re
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import msgpack
import numpy as np
import typer
from tqdm import tqdm

from reflexarc.contract import (
    ActionChunk,
    EncodedImage,
    Observation,
    PolicyContract,
    check_observation,
    pack,
    unpack,
)
from reflexarc.contract.codec import MAX_FRAME_BYTES
from reflexarc.contract.errors import CodecError, ReflexarcError, error_from_wire
from reflexarc.contract.images import decode_image, encode_image
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_EEF,
    libero_action,
    libero_cameras,
)

HANG_CPU_SECONDS = 10.0
# Decoded, an empty map costs 72 bytes and arrives as one; hooks and messages come on top.
PEAK_PER_BYTE = 256
PEAK_FLOOR = 128 * 1024
_LEAVES = (str, bytes, int, float, type(None), np.generic, EncodedImage)
_TOKENS = [
    *(bytes([first]) for first in range(0x80, 0x100)),
    b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff", b"\xc6\x04\x00\x00\x00", b"\xdd\x00\x01\x00\x00", b"\xc1",
    b"\xde\xff\xff", b"\xdc\xff\xff", b"\xc7\xff\x00", b"\xd6\xff\x00\x00\x00\x00",
    b"\x81" * 40, b"\x91" * 40, b"\x80" * 200, b"\x01\x02", b"\xff" * 8,
    b"\xc4\x0b__ndarray__\xc3", b"\xc4\x0d__npgeneric__\xc3", b"\xa9__image__\xc3",
    b"\xc4\x02nd\xc3", b"\xa2nd\xc2", b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xcb\x7f\xf8" * 3,
]  # fmt: skip
_DTYPES = [
    b"|O", b"|O8", b"O", b"object", b"|V4", b"<U4", b"|S4", b"<M8[s]", b"<c8", b"<f16", b"<f2",
    b">f4", b"|b1", b"bool", b"<i8", b"=u4", b"f4,f4", b"(2,)f4", b"<f99", b"", b"\xff\xfe",
    b"a", b"S", b"{'names':['a'],'formats':['O']}",
]  # fmt: skip
_DTYPE_IN_FRAME = re.compile(rb"[\xa0-\xbf][<>|=][fiub][1248]")
_KEYS: list[Any] = [
    b"__ndarray__", "__ndarray__", b"__image__", b"nd", b"data", "dtype", b"shape", "images",
    "state", "actions", "\x00", "", b"", 0, None, 1.5, "é" * 99,
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64 - 1, -(2**63), 0.0, 1e308, float("nan"),
    float("inf"), "", "|O8", "raw", "png", "gif", "\x00", "é" * 5000, b"", b"|O8", b"O", b"\0" * 64,
    [], {}, [-1], [0], [2**40, 0], [65536] * 5 + [0], [0] * 7, [1.5], [True], [[]], [None] * 70000,
    {"a": {}}, {b"__ndarray__": True}, {b"__npgeneric__": True, b"data": 300, b"dtype": "|i1"},
    {b"__npgeneric__": True, b"data": float("nan"), b"dtype": "<i4"},
    {b"__image__": True, b"format": "jpeg", b"data": b"\xff\xd8\xff"},
    {b"__image__": True, b"format": "raw", b"data": b"", b"shape": [0, 65536, 3]},
    {b"nd": True, b"type": "O", b"kind": b"O", b"shape": [1], b"data": b"cos\nsystem\n"},
    msgpack.ExtType(5, b"data"), msgpack.Timestamp(0, 0),
]  # fmt: skip
_SHAPES = [b"\x91\xff", b"\x92\xff\xff", b"\x96" + b"\xce\x00\x01\x00\x00" * 6, b"\x91\xca\0\0\0\0"]


def contract_of_corpus() -> PolicyContract:
    return PolicyContract(
        family="fuzz",
        cameras=libero_cameras(8, 8),
        state=LIBERO_STATE_EEF,
        action=libero_action(4),
    )


def valid_frames() -> list[bytes]:
    """One frame of every kind that travels."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    images = {"agentview": image, "eye_in_hand": image[::-1]}
    state = rng.normal(size=8)
    own = Observation(images, state, "pick up the milk", "session", "request", 3, 12, 10)
    arrays = [np.zeros(shape, dtype) for dtype in "?bBhHiIqQefd" for shape in ((), (0, 3), (2, 2))]
    old = {b"nd": True, b"type": "<f8", b"kind": b"", b"shape": [8], b"data": state.tobytes()}
    named = {"__ndarray__": True, "data": image.tobytes(), "dtype": "|u1", "shape": [8, 8, 3]}
    compressed = {n: encode_image(image, f) for n, f in zip(images, ("jpeg", "png"), strict=True)}
    messages: list[object] = [
        own.to_wire(),
        Observation(compressed, state.astype(np.float32), "go").to_wire(),  # type: ignore[arg-type]
        {"observation/image": image, "observation/state": state, "prompt": "pick up the milk"},
        {"examples": [{"image": [image], "lang": "go", "state": state}], "type": "infer"},
        {"type": "observation", "seq": 1, "payload": {"images": {"agentview": named}}},
        ActionChunk(np.ones((4, 7), np.float32), 3, "r", "s", {"queue_ms": 0.5}).to_wire(),
        {"protocol": "reflexarc", "contract": contract_of_corpus().model_dump(mode="json")},
        {"error": {"code": "contract_violation", "message": "state: missing", "field": "state"}},
        {"state": old, "scalar": {b"nd": False, b"type": "<f4", b"data": b"\0\0\0\0"}},
        {"scalars": [np.float32(1.5), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True)]},
        {"arrays": arrays},
        {"raw": EncodedImage("raw", image.tobytes(), (8, 8, 3)), "nested": [[[[{"a": [{}]}]]]]},
        [None, True, -1, 2**63, 1e300, float("nan"), "é" * 40, b"\0" * 300, [0] * 20, {"k": {}}],
    ]
    return [pack(message) for message in messages]


def _flip_bits(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    for _ in range(rng.randint(1, 8)):
        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)


def _truncate(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    del frame[rng.randrange(1, len(frame) + 1) :]


def _splice(rng: random.Random, frame: bytearray, corpus: list[bytes]) -> None:
    other = rng.choice(corpus)
    start = rng.randrange(len(other))
    position = rng.randrange(len(frame))
    frame[position : position + rng.randint(0, 64)] = other[start : start + rng.randint(1, 256)]


def _put_token(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    token = rng.choice(_TOKENS)
    position = rng.randrange(len(frame))
    frame[position : position + rng.choice((0, 1, len(token)))] = token


def _edit_length(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    """Overwrite what follows a header that states a length; lengths of short values are in it."""
    headers = [i for i, byte in enumerate(frame) if byte in b"\xc4\xc5\xc6\xd9\xda\xdb\xdc\xdd\xde"]
    if headers:
        position = rng.choice(headers) + 1
        width = rng.choice((1, 2, 4))
        value = rng.choice((0, 1, rng.randrange(256), 2 ** (8 * width - 1), 2 ** (8 * width) - 1))
        frame[position : position + width] = value.to_bytes(width, "big")


def _put_dtype(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    found = list(_DTYPE_IN_FRAME.finditer(frame))
    if found:
        dtype, match = rng.choice(_DTYPES), rng.choice(found)
        frame[match.start() : match.end()] = bytes([0xA0 + min(len(dtype), 31)]) + dtype


def _put_shape(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    position = frame.find(b"shape", rng.randrange(len(frame)))
    if position >= 0:
        shape = rng.choice(_SHAPES)
        frame[position + 5 : position + 5 + rng.randint(1, len(shape))] = shape


def _repeat(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    start = rng.randrange(len(frame))
    piece = frame[start : start + rng.randint(1, 64)]
    frame[start:start] = piece * rng.randint(1, 32)


def _noise(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    frame[:] = rng.randbytes(rng.randint(1, 200))


_MUTATIONS: list[Callable[[random.Random, bytearray, list[bytes]], None]] = [
    _flip_bits, _truncate, _splice, _put_token, _edit_length, _put_dtype, _put_shape, _repeat,
    _noise,
]  # fmt: skip


def _edit_tree(rng: random.Random, value: Any) -> Any:
    """The message with one value somewhere in it, or one key, replaced: lengths stay right."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        edited = dict(value)
        replaced = _edit_tree(rng, edited.pop(key))
        edited[rng.choice(_KEYS) if rng.random() < 0.1 else key] = replaced
        return edited
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], _edit_tree(rng, value[index]), *value[index + 1 :]]
    if isinstance(value, bytes) and rng.random() < 0.3:
        return rng.choice((value[:-1], value + b"\0", value.hex(), [*value[:9]]))
    return rng.choice(_VALUES)


def mutated_frame(seed: int, index: int, corpus: list[bytes]) -> bytes:
    """Frame ``index`` of the run ``seed``: a valid frame after one to four mutations."""
    rng = random.Random((seed << 40) + index)
    original = rng.choice(corpus)
    if rng.random() < 0.4:
        tree = _edit_tree(rng, msgpack.unpackb(original))
        return msgpack.packb(_edit_tree(rng, tree) if rng.random() < 0.3 else tree)
    frame = bytearray(original)
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        if frame:
            rng.choice(_MUTATIONS)(rng, frame, corpus)
    return bytes(frame)


def _measured_unpack(frame: bytes) -> tuple[Any, str, int]:
    """``(message or None, outcome, peak bytes allocated)`` of one decoding."""
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        message = unpack(frame)
    except CodecError as error:
        message, outcome = None, re.sub(r"\(.*|'.*|-?\d+", "*", error.message)[:24]
    else:
        outcome = "decoded"
    return message, outcome, max(0, tracemalloc.get_traced_memory()[1] - before)


def check_frame(frame: bytes, contract: PolicyContract) -> tuple[str, int]:
    """``(outcome, peak bytes allocated by unpack)``; any error but a named one propagates."""
    message, outcome, peak = _measured_unpack(frame)
    allowed = min(MAX_FRAME_BYTES, PEAK_FLOOR + PEAK_PER_BYTE * len(frame))
    if peak > allowed:
        # msgpack interns the keys of maps, and the interpreter's one table of interned strings
        # is copied (1 to 4 MB) once in tens of thousands of new keys, at whichever frame comes
        # then. What a frame itself allocates, it allocates again.
        message, outcome, peak = _measured_unpack(frame)
    if peak > allowed:
        raise AssertionError(f"unpack of {len(frame)} bytes allocated {peak}, allowed {allowed}")
    if outcome == "decoded":
        _check_types(message)
        _read_on(message, contract)
    return outcome, peak


def _check_types(value: Any) -> None:
    if isinstance(value, dict):
        assert all(isinstance(key, str | bytes) for key in value), value
        for item in value.values():
            _check_types(item)
    elif isinstance(value, list):
        for item in value:
            _check_types(item)
    elif isinstance(value, np.ndarray):
        assert value.dtype.kind in "biuf" and not value.flags.writeable, value.dtype
        value.sum(dtype=np.float64) if value.dtype.kind in "iu" else value.tobytes()
    else:
        assert isinstance(value, _LEAVES), type(value)


def _read_on(message: Any, contract: PolicyContract) -> None:
    """What server and client do next with a decoded message."""
    with contextlib.suppress(ReflexarcError):
        observation = Observation.from_wire(message)
        for image in observation.images.values():
            if isinstance(image, EncodedImage):
                with contextlib.suppress(CodecError):
                    decode_image(image)
        check_observation(contract, observation)
    with contextlib.suppress(ReflexarcError):
        ActionChunk.from_wire(message)
    if isinstance(message, dict) and isinstance(message.get("error"), dict):
        error_from_wire(message["error"])


def run(
    frames: Annotated[int, typer.Option(min=1, help="How many mutated frames.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other frames.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="Index of the first frame.")] = 0,
) -> None:
    """Check frames ``start`` to ``start + frames``; the first failure ends the run."""
    corpus, contract = valid_frames(), contract_of_corpus()
    outcomes: Counter[str] = Counter()
    worst = 0
    faulthandler.enable()
    # A hang is counted in processor time, so that a busy machine or a pause is none: the traceback
    # is printed even from within C code, then the signal's default action ends the process.
    faulthandler.register(signal.SIGPROF, chain=True)
    tracemalloc.start()
    began = time.perf_counter()
    for index in tqdm(range(start, start + frames), unit="frame", mininterval=1.0, disable=None):
        signal.setitimer(signal.ITIMER_PROF, HANG_CPU_SECONDS)
        frame = mutated_frame(seed, index, corpus)
        try:
            outcome, peak = check_frame(frame, contract)
        except BaseException:
            print(f"frame {index} of seed {seed}: {frame.hex()}", flush=True)
            raise
        outcomes[outcome] += 1
        worst = max(worst, peak)
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.perf_counter() - began
    for outcome, count in outcomes.most_common(20):
        print(f"{count:9d}  {outcome}")
    print(
        f"{frames} frames of seed {seed}: {outcomes['decoded']} decoded, "
        f"{frames - outcomes['decoded']} refused, nothing else; largest allocation "
        f"{worst / 1024:.0f} KiB; {seconds:.0f} s"
    )


if __name__ == "__main__":
    typer.run(run)
