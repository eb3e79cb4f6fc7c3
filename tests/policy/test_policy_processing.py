"""What is normalised comes back; the gripper is never normalised; limits hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reflexarc.contract import FeatureStatistics, NormalizationStatistics, PolicyContract
from reflexarc.contract.errors import ConfigError, ContractViolationError
from reflexarc.contract.policy_contract import Gripper
from reflexarc.policy.devices import resolve_device
from reflexarc.policy.processing import Processor

MODES = ("mean_std", "min_max", "q01_q99", "identity")


def in_mode(contract: PolicyContract, mode: str) -> PolicyContract:
    return contract.model_copy(update={"state_normalization": mode, "action_normalization": mode})


@pytest.mark.parametrize("mode", MODES)
def test_actions_come_back_and_the_gripper_is_untouched(
    contract: PolicyContract, statistics: NormalizationStatistics, mode: str
) -> None:
    processor = Processor(in_mode(contract, mode), statistics)
    actions = np.random.default_rng(0).uniform(-0.9, 0.9, (4, 5, 7))
    actions[..., 6] = np.where(actions[..., 6] > 0, 1.0, -1.0)
    normalised = processor.normalize_actions(actions)
    assert normalised.dtype == torch.float32
    np.testing.assert_array_equal(normalised[..., 6].numpy(), actions[..., 6])
    restored = processor.actions_to_robot(normalised)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, actions, atol=1e-6)
    np.testing.assert_array_equal(restored[..., 6], actions[..., 6])


def test_the_training_data_is_normalised_to_mean_0_and_deviation_1(
    contract: PolicyContract,
) -> None:
    states = np.random.default_rng(1).normal(3.0, 5.0, (500, 8))
    statistics = NormalizationStatistics(
        state=FeatureStatistics.from_rows(states, contract.state.names),
        action=FeatureStatistics.from_rows(np.zeros((2, 7)), contract.action.names),
        dataset_fingerprint="",
    )
    normalised = Processor(contract, statistics).normalize_state(states)
    torch.testing.assert_close(normalised.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std(0, correction=0), torch.ones(8))


def test_equal_inputs_give_equal_bits_wherever_numpy_put_them(
    contract: PolicyContract, statistics: NormalizationStatistics
) -> None:
    """Matrix products round differently by alignment, so tensors must come aligned."""
    processor = Processor(contract, statistics)
    buffer = np.zeros(1024, np.uint8)
    for offset in range(0, 128, 8):
        state = buffer[offset : offset + 3 * 8 * 8].view(np.float64).reshape(3, 8)
        assert processor.normalize_state(state).data_ptr() % 64 == 0
        actions = buffer[offset : offset + 2 * 7 * 8].view(np.float64).reshape(2, 7)
        assert processor.normalize_actions(actions).data_ptr() % 64 == 0


def test_actions_are_clipped_to_the_contract(
    contract: PolicyContract, statistics: NormalizationStatistics
) -> None:
    robot = Processor(contract, statistics).actions_to_robot(torch.full((1, 5, 7), 50.0))
    assert (robot == 1.0).all()


def test_other_gripper_commands_are_mapped(
    contract: PolicyContract, statistics: NormalizationStatistics
) -> None:
    """A gripper that opens at 1 and closes at 0, as many robots' do."""
    gripper = Gripper(index=6, open=1.0, closed=0.0)
    action = contract.action.model_copy(update={"gripper": gripper})
    processor = Processor(contract.model_copy(update={"action": action}), statistics)
    commands = np.zeros((2, 7))
    commands[:, 6] = (1.0, 0.0)
    normalised = processor.normalize_actions(commands)
    assert normalised[:, 6].tolist() == [-1.0, 1.0]
    assert processor.actions_to_robot(normalised)[:, 6].tolist() == [1.0, 0.0]


def test_read_only_images_are_accepted(
    contract: PolicyContract, statistics: NormalizationStatistics
) -> None:
    processor = Processor(contract, statistics)
    image = np.frombuffer(bytes(64 * 64 * 3), np.uint8).reshape(1, 64, 64, 3)
    frames = processor.frames({"agentview": image, "eye_in_hand": image[:, ::-1]})
    assert {name: tuple(rows.shape) for name, rows in frames.items()} == {
        "agentview": (1, 64, 64, 3),
        "eye_in_hand": (1, 64, 64, 3),
    }


def test_frames_keep_the_pixels_of_a_view(
    contract: PolicyContract, statistics: NormalizationStatistics
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    frames = Processor(contract, statistics).frames(
        {"agentview": image[:, ::-1, ::-1], "eye_in_hand": image}
    )
    np.testing.assert_array_equal(frames["agentview"].numpy(), image[:, ::-1, ::-1])


def test_wrong_images_are_refused_by_name(
    contract: PolicyContract, statistics: NormalizationStatistics
) -> None:
    processor = Processor(contract, statistics)
    image = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(ContractViolationError, match=r"'eye_in_hand' needs .* got nothing"):
        processor.frames({"agentview": image})
    with pytest.raises(ContractViolationError, match="float32"):
        processor.frames({"agentview": image.astype(np.float32), "eye_in_hand": image})


def test_statistics_of_another_layout_are_refused(
    contract: PolicyContract, statistics: NormalizationStatistics
) -> None:
    names = tuple(reversed(contract.state.names))
    other = statistics.model_copy(
        update={"state": statistics.state.model_copy(update={"names": names})}
    )
    with pytest.raises(ConfigError, match="the statistics describe the state"):
        Processor(contract, other)


def test_devices_are_resolved_or_refused() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="no such device 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ConfigError, match="'cuda:99' is not available"):
        resolve_device("cuda:99")
