"""Whatever a message holds, a dialect answers with an observation or with a named error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reflexarc.contract import EncodedImage, Observation, ReflexarcError, pack
from reflexarc.contract.images import encode_image
from reflexarc.server import libero_contract
from reflexarc.server.dialects import groot, openpi, openvla, starvla, vla_eval

CONTRACT = libero_contract()
KEYS = [
    *("observation/image", "observation/wrist_image", "observation/state", "prompt"),
    *("examples", "image", "lang", "state", "type", "payload", "request_id"),
    *("images", "agentview", "wrist", "states", "task_description", "seq", "protocol_version"),
    *("full_image", "wrist_image", "left_wrist_image", "instruction", "encoded", "unnorm_key"),
    *("observation", "video.image", "video.wrist_image", "state.x", "state.gripper"),
    *("annotation.human.action.task_description", "__numpy__", "__ndarray__", "dtype", "shape"),
]
PICTURE = np.zeros((4, 4, 3), np.uint8)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64), st.floats(), st.text(max_size=8),
    st.sampled_from(["infer", "ping", "observation", "hello", "AAAA", "<f4", "|u1", "|O", "{}"]),
)  # fmt: skip
ARRAYS = st.sampled_from(
    [
        PICTURE,
        PICTURE[None],
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros(8),
        np.zeros((1, 8), np.float32),
        np.full(8, np.nan),
        np.zeros(()),
        np.zeros(0),
        np.arange(8),
        np.float32(1),
        EncodedImage("png", b"no image"),
        EncodedImage("raw", b"", (4, 4, 3)),
        encode_image(PICTURE, "png"),
    ]
)


def messages(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=8),
        ),
        max_leaves=12,
    )


FRAMES, BODIES = messages(SCALARS | ARRAYS), messages(SCALARS)


def read_starvla(message: Any) -> None:
    if starvla.speaks(message):
        request = starvla.request_from_message(message)
        starvla.observations_from_payload(CONTRACT, request.payload)


def read_vla_eval(message: Any) -> None:
    read = vla_eval.message_from_map(message)
    vla_eval.refusal(CONTRACT, read.payload)
    session = vla_eval.Session(CONTRACT, 10)
    session.observation(read.payload)


def read_openvla(message: Any) -> Observation:
    return openvla.observation_from_request(CONTRACT, openvla.unwrapped(message)[0])


READERS: dict[str, tuple[Callable[[Any], Any], st.SearchStrategy[Any]]] = {
    "openpi": (lambda message: openpi.observation_from_request(CONTRACT, message), FRAMES),
    "starvla": (read_starvla, FRAMES),
    "vla_eval": (read_vla_eval, FRAMES),
    "openvla": (read_openvla, BODIES),
    "groot": (lambda message: groot.observation_from_request(CONTRACT, message), BODIES),
}


@pytest.mark.parametrize("reader,values", READERS.values(), ids=READERS.keys())
def test_only_named_errors_leave(reader: Callable[[Any], Any], values: Any) -> None:
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(values)
    def read(message: Any) -> None:
        try:
            reader(message)
        except ReflexarcError as error:
            for reply in (
                starvla.error_reply(error, starvla.request_id_of({"request_id": message})),
                vla_eval.error_reply(error, vla_eval.seq_of(message)),
                openvla.error_map(error),
                groot.error_map(error),
                openpi.error_text(error),
            ):
                pack(reply)

    read()


def whole_requests() -> dict[str, tuple[Callable[[Any], Any], dict[str, Any]]]:
    """Of each dialect a request that is right, for changing one value of it."""
    state = np.zeros(8)
    pictures = {"image": [PICTURE, PICTURE], "lang": "a", "state": state}
    parts = {f"state.{part}": [[0.0]] for part in ("x", "y", "z", "roll", "pitch", "yaw")}
    listed = PICTURE[None].tolist()
    return {
        "openpi": (READERS["openpi"][0], {
            "observation/image": PICTURE, "observation/wrist_image": PICTURE,
            "observation/state": state, "prompt": "a"}),
        "starvla": (lambda m: starvla.observations_from_payload(CONTRACT, {"examples": [m]}),
                    pictures),
        "vla_eval": (vla_eval.Session(CONTRACT, 10).observation, {
            "images": {"agentview": PICTURE, "wrist": PICTURE}, "states": state,
            "task_description": "a"}),
        "openvla": (read_openvla, {
            "full_image": PICTURE.tolist(), "wrist_image": PICTURE.tolist(),
            "state": state.tolist(), "instruction": "a"}),
        "groot": (lambda m: groot.observation_from_request(CONTRACT, {"observation": m}), {
            "video.image": listed, "video.wrist_image": listed, **parts,
            "state.gripper": [[0.0, 0.0]], "annotation.human.action.task_description": ["a"]}),
    }  # fmt: skip


@pytest.mark.parametrize("dialect", READERS)
def test_one_changed_value_is_an_observation_or_a_named_error(dialect: str) -> None:
    reader, request = whole_requests()[dialect]
    assert isinstance(reader(request), Observation | list)
    values = READERS[dialect][1]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(request)), values)
    def read(key: str, value: Any) -> None:
        with suppress(ReflexarcError):
            reader({**request, key: value})

    read()
