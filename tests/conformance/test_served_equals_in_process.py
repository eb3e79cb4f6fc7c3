"""Save, load, serve, ask: the chunk is the one that the policy gives in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflexarc.client import HttpPolicyClient, PolicyClient
from reflexarc.contract import Observation
from reflexarc.contract.errors import UnknownInstructionError
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.server import BackgroundServer
from reflexarc.server.loading import CheckpointPolicy, verify_checkpoint


def as_observation(request: dict[str, Any], **fields: Any) -> Observation:
    return Observation(
        images={
            "agentview": request["observation/image"],
            "eye_in_hand": request["observation/wrist_image"],
        },
        state=request["observation/state"],
        instruction=request["prompt"],
        **fields,
    )


def test_bit_identical_over_websocket_and_http(
    tiny_checkpoint: Path, libero_request: Callable[..., dict[str, Any]]
) -> None:
    runtime = PolicyRuntime(load_checkpoint(tiny_checkpoint))
    with BackgroundServer(lambda: CheckpointPolicy.load(tiny_checkpoint, "cpu")) as server:
        for client_class in (PolicyClient, HttpPolicyClient):
            with client_class(server.url) as client:
                assert client.contract == runtime.contract == verify_checkpoint(tiny_checkpoint)
                for seed, steps in ((1, None), (2, None), (2**63 - 1, 2)):
                    observation = as_observation(libero_request(), seed=seed, denoising_steps=steps)
                    served = client.infer(observation)
                    expected = runtime.infer([observation])[0]
                    np.testing.assert_array_equal(served.actions, expected.actions)
                    assert served.seed == seed


def test_denoising_steps_of_the_command_are_the_default(
    tiny_checkpoint: Path, libero_request: Callable[..., dict[str, Any]]
) -> None:
    runtime = PolicyRuntime(load_checkpoint(tiny_checkpoint))
    observation = as_observation(libero_request(), seed=1, denoising_steps=2)
    expected = runtime.infer([observation])[0].actions

    def load() -> CheckpointPolicy:
        return CheckpointPolicy.load(tiny_checkpoint, "cpu", denoising_steps=2)

    with BackgroundServer(load) as server, PolicyClient(server.url) as client:
        assert client.metadata["sampling"]["denoising_steps"] == 2
        served = client.infer(as_observation(libero_request(), seed=1)).actions
    np.testing.assert_array_equal(served, expected)


def test_unknown_instruction_is_named(
    tiny_checkpoint: Path, libero_request: Callable[..., dict[str, Any]]
) -> None:
    with BackgroundServer(lambda: CheckpointPolicy.load(tiny_checkpoint, "cpu")) as server:
        for client_class in (PolicyClient, HttpPolicyClient):
            with (
                client_class(server.url) as client,
                pytest.raises(UnknownInstructionError, match="alphabet soup"),
            ):
                client.infer(as_observation(libero_request(prompt="dance")))
