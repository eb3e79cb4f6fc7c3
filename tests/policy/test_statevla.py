"""StateVLA: it sees every modality, its rows are independent, its sizes are what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_JOINT,
    ActionSpec,
    History,
    libero_action,
    libero_cameras,
)
from reflexarc.policy.interface import Task, Tensors
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.model import StateVLA

Inputs = dict[str, Any]

# An untrained policy moves little. One that cannot see an input moves by exactly 0.
SEEN = 1e-6  # equal inputs of equal shape give equal bits, so any difference is the modality


def make_inputs(policy: StateVLA, rows: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    camera = policy.contract.cameras[0]
    shape = (rows, camera.height, camera.width, 3)
    return {
        "instructions": [policy.language.instructions[0]] * rows,
        "frames": {
            name: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            for name in policy.contract.camera_names
        },
        "state": torch.randn(rows, policy.contract.state.dimension, generator=generator),
        "noise": torch.randn(rows, *(policy.sampling.noise_shape or ()), generator=generator),
    }


def context_of(policy: StateVLA, inputs: Inputs) -> Tensors:
    task = policy.embed_task([Task(instruction=text) for text in inputs["instructions"]])
    window = {
        name: rows[:, None] for name, rows in policy.embed_frames(inputs["frames"], task).items()
    }
    window["state"] = inputs["state"][:, None]
    return policy.encode(task, window, torch.ones(len(inputs["state"]), 1, dtype=torch.bool))


@torch.no_grad()
def act(policy: StateVLA, inputs: Inputs, steps: int = 4) -> tuple[Tensor, Tensor]:
    context = context_of(policy, inputs)
    return context["z"], policy.sample_actions(context, inputs["noise"], steps=steps)


def other_instruction(policy: StateVLA, inputs: Inputs) -> None:
    inputs["instructions"] = [policy.language.instructions[1]] * len(inputs["instructions"])


def other_state(policy: StateVLA, inputs: Inputs) -> None:
    inputs["state"] = inputs["state"] + 2.0


def other_image(camera: str) -> Callable[[StateVLA, Inputs], None]:
    def change(policy: StateVLA, inputs: Inputs) -> None:
        inputs["frames"] = {**inputs["frames"], camera: inputs["frames"][camera].flip(1)}

    return change


CHANGES = {
    "instruction": other_instruction,
    "state": other_state,
    "agentview": other_image("agentview"),
    "eye_in_hand": other_image("eye_in_hand"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_z_and_actions_move_with_every_modality(policy: StateVLA, name: str) -> None:
    inputs = make_inputs(policy, 2)
    z, actions = act(policy, inputs)
    CHANGES[name](policy, inputs)
    other_z, other_actions = act(policy, inputs)
    assert (z - other_z).abs().max() > SEEN
    assert (actions - other_actions)[..., :6].abs().max() > SEEN


@pytest.mark.parametrize("name", CHANGES)
def test_the_gripper_moves_with_every_modality(policy: StateVLA, name: str) -> None:
    inputs = make_inputs(policy, 2)
    with torch.no_grad():
        logits = policy.gripper_logits(context_of(policy, inputs))
        CHANGES[name](policy, inputs)
        others = policy.gripper_logits(context_of(policy, inputs))
    assert logits.shape == (2, 5)
    assert (logits - others).abs().max() > SEEN


def test_the_cameras_are_not_interchangeable(policy: StateVLA) -> None:
    inputs = make_inputs(policy, 1)
    z, _ = act(policy, inputs)
    first, second = inputs["frames"].values()
    inputs["frames"] = {"agentview": second, "eye_in_hand": first}
    assert (act(policy, inputs)[0] - z).abs().max() > 1e-3


def test_cameras_are_taken_by_name_not_by_order(policy: StateVLA) -> None:
    inputs = make_inputs(policy, 1)
    z, _ = act(policy, inputs)
    inputs["frames"] = dict(reversed(inputs["frames"].items()))
    assert torch.equal(act(policy, inputs)[0], z)


def test_a_row_does_not_depend_on_its_neighbours(policy: StateVLA) -> None:
    inputs, others = make_inputs(policy, 4, seed=1), make_inputs(policy, 4, seed=2)
    _, actions = act(policy, inputs)
    mixed = {
        "instructions": [*inputs["instructions"][:1], *others["instructions"][1:]],
        "frames": {
            name: torch.cat([inputs["frames"][name][:1], others["frames"][name][1:]])
            for name in inputs["frames"]
        },
        "state": torch.cat([inputs["state"][:1], others["state"][1:]]),
        "noise": torch.cat([inputs["noise"][:1], others["noise"][1:]]),
    }
    # Equal batch shape: bit for bit.
    assert torch.equal(act(policy, mixed)[1][0], actions[0])
    # Another batch shape: to rounding.
    alone = {
        "instructions": inputs["instructions"][:1],
        "frames": {name: rows[:1] for name, rows in inputs["frames"].items()},
        "state": inputs["state"][:1],
        "noise": inputs["noise"][:1],
    }
    torch.testing.assert_close(act(policy, alone)[1][0], actions[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_weights_that_want_gradients_give_the_same_bits(policy: StateVLA, rows: int) -> None:
    """A trainer's weights require gradients, a server's do not; torch then multiplies otherwise."""
    inputs = make_inputs(policy, rows)
    z, actions = act(policy, inputs)
    policy.requires_grad_(False)
    with torch.inference_mode():
        served_z, served_actions = act(policy, inputs)
    assert torch.equal(served_z, z)
    assert torch.equal(served_actions, actions)


def test_shapes_of_everything_that_sessions_and_objectives_hold(policy: StateVLA) -> None:
    inputs = make_inputs(policy, 3)
    task = policy.embed_task([Task(instruction="pick up the milk")] * 3)
    assert task["language"].shape == (3, 16)
    vision = policy.embed_frames(inputs["frames"], task)["vision"]
    assert vision.shape == (3, 2, 4, 8)
    assert vision.dtype == torch.float32
    context = context_of(policy, inputs)
    assert context["z"].shape == (3, 2, 32)
    assert policy.sampling.noise_shape == (5, 6)
    assert policy.velocity(context, inputs["noise"], torch.rand(3)).shape == (3, 5, 6)
    actions = policy.sample_actions(context, inputs["noise"], steps=2)
    assert actions.shape == (3, 5, 7)
    assert set(actions[..., 6].unique().tolist()) <= {-1.0, 1.0}


def test_the_gripper_column_follows_its_logit(policy: StateVLA) -> None:
    context = context_of(policy, make_inputs(policy, 8))
    # Threshold 0 lies anywhere in an untrained classifier: spread its logits around it.
    with torch.no_grad():
        assert policy.gripper is not None
        logits = policy.gripper_logits(context)
        policy.gripper.layers[-1].bias.sub_(logits.median(0).values)
        actions = policy.sample_actions(context, torch.zeros(8, 5, 6), steps=1)
        closed = policy.gripper_logits(context) > 0
    assert closed.any() and not closed.all()
    assert torch.equal(actions[..., 6] > 0, closed)


def test_a_robot_without_gripper_has_six_continuous_dimensions(
    config: StateVLAConfig, embeddings: LanguageEmbeddings
) -> None:
    contract = PolicyContract(
        family="statevla",
        cameras=libero_cameras(size=64)[:1],
        state=LIBERO_STATE_JOINT,
        action=ActionSpec(
            names=("x", "turn"), horizon=3, kind="velocity", control_hz=10,
            low=(-1.0, -1.0), high=(1.0, 1.0),
        ),
    )  # fmt: skip
    policy = StateVLA(config, contract, embeddings)
    _, actions = act(policy, make_inputs(policy, 2))
    assert actions.shape == (2, 3, 2)
    with pytest.raises(ConfigError, match="no gripper"):
        policy.gripper_logits({"z": torch.zeros(1, 2, 32)})


def test_noise_scale_narrows_the_samples_and_zero_makes_them_one(
    config: StateVLAConfig, contract: PolicyContract, embeddings: LanguageEmbeddings
) -> None:
    def spread(scale: float) -> float:
        torch.manual_seed(0)
        scaled = config.model_copy(update={"noise_scale": scale})
        policy = StateVLA(scaled, contract, embeddings).eval()
        inputs = make_inputs(policy, 1)
        chunks = []
        for seed in range(4):
            inputs["noise"] = make_inputs(policy, 1, seed)["noise"]
            chunks.append(act(policy, inputs)[1])
        return torch.cat(chunks).std(0).mean().item()

    assert spread(0.0) == 0.0
    assert 0.0 < spread(0.3) < 0.5 * spread(1.0)


def test_every_trained_parameter_receives_a_gradient(policy: StateVLA) -> None:
    policy.train()
    inputs = make_inputs(policy, 3)
    context = context_of(policy, inputs)
    velocity = policy.velocity(context, inputs["noise"], torch.rand(3))
    (velocity.square().mean() + policy.gripper_logits(context).square().mean()).backward()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    frozen = [n for n, p in policy.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith("vision.") for name in frozen)


def test_component_sizes_of_the_published_width(embeddings: LanguageEmbeddings) -> None:
    """Pinned by component at d_model 256; a Mamba block has 437,760, its norm 256."""
    contract = PolicyContract(
        family="statevla",
        cameras=libero_cameras(),
        state=LIBERO_STATE_JOINT,
        action=libero_action(8),
    )
    language = LanguageEmbeddings(["x"], torch.zeros(1, 384), "none")
    policy = StateVLA(StateVLAConfig(), contract, language)
    blocks = 12 * (437_760 + 256) + 256
    stack = policy.representation.encoder.stack
    assert sum(p.numel() for p in stack.parameters()) == blocks == 5_256_448
    assert dict(policy.component_parameters()) == {
        "tokenizer": 223_200,
        "encoder": 5_322_752,
        "flow": 2_395_142,
        "gripper": 133_640,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "other"}, "family 'other'"),
        ({"cameras": ()}, "needs a camera"),
        ({"history": History(frames=2)}, "one frame and one state"),
        (
            {"cameras": (*libero_cameras(64)[:1], *libero_cameras(32)[1:])},
            "one image size for all cameras",
        ),
        ({"cameras": libero_cameras(16)}, "images are too small"),
    ],
)
def test_a_contract_that_does_not_fit_is_refused(
    config: StateVLAConfig,
    contract: PolicyContract,
    embeddings: LanguageEmbeddings,
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        StateVLA(config, contract.model_copy(update=changes), embeddings)


def test_embeddings_of_another_width_are_refused(
    config: StateVLAConfig, contract: PolicyContract
) -> None:
    wide = LanguageEmbeddings(["x"], torch.zeros(1, 384), "MiniLM")
    with pytest.raises(ConfigError, match=r"language_dimension is 16, but .* MiniLM have 384"):
        StateVLA(config, contract, wide)


def test_sampling_without_noise_is_refused(policy: StateVLA) -> None:
    context = context_of(policy, make_inputs(policy, 1))
    with pytest.raises(ConfigError, match="noise"):
        policy.sample_actions(context, None, steps=1)
