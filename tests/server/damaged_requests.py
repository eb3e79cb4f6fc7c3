"""Valid requests of every dialect, and hypothesis strategies that damage them."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st

from reflexarc.contract import EncodedImage, pack
from reflexarc.contract.images import encode_image

SIZE = 16
IMAGE = np.arange(SIZE * SIZE * 3, dtype=np.uint8).reshape(SIZE, SIZE, 3)
STATE = np.linspace(-0.1, 0.1, 8)
TEXT = "pick up the bowl"


def json_array(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


PNG = {"format": "png", "data": base64.b64encode(encode_image(IMAGE, "png").data).decode()}
ROW = {"step_index": 0, "state": STATE.tolist(), "images": {"agentview": PNG}}
# Valid requests of every dialect that HTTP speaks, as JSON values.
HTTP_BODIES: list[dict[str, Any]] = [
    {
        "images": {"agentview": json_array(IMAGE), "eye_in_hand": PNG},
        "state": STATE.tolist(),
        "instruction": TEXT,
        "seed": 1,
        "session_id": "a",
        "request_id": "b",
        "step_index": 3,
        "denoising_steps": 4,
        "deadline_ms": 1e6,
        "history": [ROW],
        "goal_image": {"agentview": PNG},
        "action_prefix": [[0.0] * 7, [0.1] * 7],
    },
    {"image": json_array(IMAGE), "instruction": TEXT, "unnorm_key": "x"},
    {
        "full_image": json_array(IMAGE),
        "wrist_image": json_array(IMAGE),
        "state": json_array(STATE),
        "instruction": TEXT,
    },
    {"encoded": json.dumps({"image": json_array(IMAGE), "instruction": TEXT})},
    {
        "observation": {
            "video.image": json_array(IMAGE[None]),
            "video.wrist_image": json_array(IMAGE[None]),
            "state.x": json_array(STATE[None, :1]),
            "annotation.human.action.task_description": [TEXT],
        }
    },
]
# Valid messages of every dialect on a websocket, by its path.
OWN: dict[str, Any] = {
    "images": {"agentview": IMAGE, "eye_in_hand": EncodedImage("png", b"\x89PNG")},
    "state": STATE,
    "instruction": TEXT,
    "session_id": "s",
    "step_index": 1,
    "history": [{"step_index": 0, "state": STATE, "images": {"agentview": IMAGE}}],
    "action_prefix": np.zeros((2, 7), np.float32),
}
SOCKET_MESSAGES: dict[str, list[dict[str, Any]]] = {
    "/v1/policy": [
        OWN,
        {"images": {"agentview": IMAGE, "eye_in_hand": IMAGE}, "state": STATE, "instruction": TEXT},
    ],
    "/": [
        {
            "observation/image": IMAGE,
            "observation/wrist_image": IMAGE,
            "observation/state": STATE,
            "prompt": TEXT,
        },
        {"examples": [{"image": [IMAGE, IMAGE], "lang": TEXT, "state": STATE}], "unnorm_key": "x"},
        {
            "type": "infer",
            "request_id": "r",
            "payload": {"examples": [{"image": [IMAGE], "lang": TEXT}], "use_ddim": True},
        },
        {"type": "ping"},
    ],
    "/vla-eval": [
        {
            "type": "hello",
            "payload": {"harness_version": "0.8", "protocol_version": 1, "benchmark": "b"},
            "seq": 0,
            "timestamp": 0.0,
        },
        {"type": "episode_start", "payload": {"task": {"name": TEXT, "task_id": 1}}, "seq": 1},
        {
            "type": "observation",
            "payload": {
                "images": {"agentview": IMAGE, "wrist": IMAGE},
                "task_description": TEXT,
                "states": STATE,
            },
            "seq": 2,
        },
        {"type": "episode_end", "payload": {}, "seq": 3},
    ],
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([-1, 0, 2**31, 2**53, 2**63, 2**64 - 1, 10**30]),
    st.floats(),
    st.text(max_size=20),
)
odd_maps = st.sampled_from(
    [
        {"__numpy__": "AAAA", "dtype": "|O8", "shape": [1]},
        {"__numpy__": "AAAA", "dtype": "<f4", "shape": [-1, 2**40]},
        {"__numpy__": 5, "dtype": None, "shape": "x"},
        {"__ndarray__": True, "data": "AAAA", "dtype": "<f4", "shape": [2**33]},
        {"nd": True, "type": "<f4", "kind": "O", "shape": [1], "data": "x"},
        {"__image__": True, "format": "png", "data": "x", "shape": [1, 1, 3]},
        {"format": "png", "data": "iVBORw0KGgo="},
        {"format": "gif", "data": ""},
        {"encoded": '{"encoded": "{}"}'},
        {"": {"": {"": []}}},
    ]
).map(copy.deepcopy)  # a value that is damaged further is damaged in place
plain = st.recursive(
    st.one_of(scalars, odd_maps),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)
arrays = st.sampled_from(
    [
        np.zeros((), np.float32),
        np.zeros((0, 7), np.float32),
        np.full(8, np.nan),
        np.zeros((SIZE, SIZE, 4), np.uint8),
        np.zeros((1, 1, 1, 1, 1, 1), np.int64),
        np.ones(8, bool),
        np.float16(1.5),
        EncodedImage("jpeg", b""),
        EncodedImage("raw", bytes(12), (2, 2, 3)),
    ]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every part of a nested value, the whole included."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


@st.composite
def damaged(draw: Any, whole: Any, junk: st.SearchStrategy[Any]) -> Any:
    """A value with up to three parts replaced, removed, renamed or doubled."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(junk)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"]))
        if what == "replace":
            parent[path[-1]] = draw(junk)
        elif what == "remove":
            del parent[path[-1]]
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = parent.pop(path[-1])
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
    return value


@st.composite
def broken_bytes(draw: Any, whole: bytes) -> bytes:
    """Mostly as they are; else cut, lengthened or with a few bytes changed."""
    what = draw(st.sampled_from(["whole", "whole", "whole", "cut", "longer", "changed"]))
    if what == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    if what == "longer":
        return whole + draw(st.binary(max_size=20))
    data = bytearray(whole)
    if what == "changed" and data:
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def packed(message: Any) -> bytes:
    """As msgpack; what cannot travel as the text of its representation."""
    try:
        return pack(message)
    except Exception:
        return pack({"text": repr(message)[:200]})
