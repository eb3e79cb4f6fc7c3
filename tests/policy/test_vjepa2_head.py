"""The V-JEPA 2 policy head: sizes, what its actions depend on, and what it computes when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reflexarc.contract import (
    FeatureStatistics,
    HistoryRow,
    NormalizationStatistics,
    Observation,
    PolicyContract,
)
from reflexarc.contract.errors import (
    CheckpointError,
    ConfigError,
    ContractViolationError,
    HistoryMissingError,
)
from reflexarc.policy.backbones.clip_encoder import ClipEncoderConfig
from reflexarc.policy.checkpoint import load_checkpoint, save_checkpoint
from reflexarc.policy.interface import Tensors
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.registry import policy_class
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.policy.vjepa2_head.config import VJEPA2HeadConfig
from reflexarc.policy.vjepa2_head.model import VJEPA2Head
from reflexarc.policy.vjepa2_head.network import ActionDecoder, Context, ProprioceptionEncoder

from .vjepa2_samples import (
    CHANNELS,
    INSTRUCTIONS,
    SIZE,
    save_tiny_vjepa2,
    tiny_contract,
    tiny_head_config,
)

KEYPOINTS = {
    "keypoints": {"number": 4, "hidden": 8, "tokens": 2}, "state_octaves": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vjepa2(tmp_path_factory.mktemp("vjepa2"))


def build(folder: Path, contract: PolicyContract, **changes: Any) -> VJEPA2Head:
    torch.manual_seed(0)
    config = VJEPA2HeadConfig.model_validate(tiny_head_config(folder, **changes))
    language = None
    if contract.needs_language:
        language = LanguageEmbeddings(INSTRUCTIONS, torch.randn(len(INSTRUCTIONS), 12), "random")
    return VJEPA2Head(config, contract, language).eval()


def published(**changes: Any) -> VJEPA2HeadConfig:
    clips = ClipEncoderConfig(path="facebook/vjepa2-vitg-fpc64-256")
    return VJEPA2HeadConfig(clips=clips, **changes)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_published_size_layer_by_layer() -> None:
    """The document's ~8.5 M for the head is wrong: its own description has these layers."""
    config = published()
    with torch.device("meta"):
        proprioception = ProprioceptionEncoder(config, steps=5, state=15)
        context = Context(config, channels=1408, cameras=1, goal=True, language=False)
        decoder = ActionDecoder(config, horizon=50, actions=7)
    assert parameters(proprioception) == 42_752
    layers = {
        "video projection": parameters(context.video),
        "goal projection": parameters(context.goal),
        "proprioception to 4 tokens": parameters(context.proprioception),
        "modality embeddings": context.modality.numel(),
        "spatial positions": context.position.numel(),
        "queries": decoder.queries.numel(),
        "decoder layers": parameters(decoder.layers),
        "norm": parameters(decoder.norm),
        "output": parameters(decoder.out),
    }
    assert layers == {
        "video projection": 722_432,
        "goal projection": 722_432,
        "proprioception to 4 tokens": 530_432,
        "modality embeddings": 1_536,
        "spatial positions": 32_768,
        "queries": 25_600,
        "decoder layers": 16_816_128,
        "norm": 1_024,
        "output": 266_247,
    }
    assert parameters(context) + parameters(decoder) == sum(layers.values()) == 19_118_599


def test_the_published_size_has_132_context_tokens_and_50_actions_of_7() -> None:
    config = published()
    with torch.device("meta"):
        context = Context(config, channels=1408, cameras=1, goal=True, language=False)
        decoder = ActionDecoder(config, horizon=50, actions=7)
        encoder = ProprioceptionEncoder(config, steps=5, state=15)
        streams = {"video": torch.zeros(2, 1, 64, 1408), "goal": torch.zeros(2, 64, 1408)}
        tokens = context(streams, encoder(torch.zeros(2, 5, 15)))
        assert tokens.shape == (2, 132, 512)
        assert decoder(tokens).shape == (2, 50, 7)
        wrist = Context(config, channels=1408, cameras=2, goal=True, language=True)
        streams = {"video": torch.zeros(2, 2, 64, 1408), "goal": torch.zeros(2, 64, 1408),
                   "language": torch.zeros(2, 384)}  # fmt: skip
        assert wrist(streams, encoder(torch.zeros(2, 5, 15))).shape == (2, 132 + 64 + 1, 512)


def inputs(contract: PolicyContract) -> tuple[Tensors, Tensors, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    task: Tensors = {}
    if contract.needs_goal_image:
        task["goal"] = random(2, 4, CHANNELS)
    if contract.needs_language:
        task["language"] = random(2, 12)
    window = {
        "clip": random(2, 1, len(contract.cameras), 4, CHANNELS),
        "state": random(2, 5, 15),
    }
    return task, window, torch.ones(2, 16, dtype=torch.bool)


@torch.no_grad()
def predicted(policy: VJEPA2Head, task: Tensors, window: Tensors, valid: Tensor) -> Tensor:
    return policy.predict(policy.encode(task, window, valid))


@pytest.mark.parametrize("told", [{"goal": True}, {"goal": False, "language": True},
                                  {"goal": True, "language": True}])  # fmt: skip
@pytest.mark.parametrize("sight", [{}, KEYPOINTS], ids=["grid", "keypoints"])
def test_every_stream_moves_the_actions(
    folder: Path, told: dict[str, bool], sight: dict[str, Any]
) -> None:
    contract = tiny_contract(cameras=2, **told)
    policy = build(folder, contract, **sight)
    task, window, valid = inputs(contract)
    before = predicted(policy, task, window, valid)
    for camera in range(2):
        clip = window["clip"].clone()
        clip[0, :, camera, 3] = clip[0, :, camera, 3].roll(1, dims=-1)
        after = predicted(policy, task, {**window, "clip": clip}, valid)
        assert not torch.allclose(after[0], before[0], atol=1e-6)
        torch.testing.assert_close(after[1], before[1])
    for step in range(5):
        state = window["state"].clone()
        state[0, step] += 1
        after = predicted(policy, task, {**window, "state": state}, valid)
        assert not torch.allclose(after[0], before[0], atol=1e-6)
    for name in task:
        other = {**task, name: task[name].roll(1, dims=0)}
        assert not torch.allclose(predicted(policy, other, window, valid), before, atol=1e-6)
    assert set(task) == {name for name, shown in told.items() if shown}


def test_the_goal_decides_what_the_cameras_keypoints_look_for(folder: Path) -> None:
    contract = tiny_contract(cameras=2)
    policy = build(folder, contract, **KEYPOINTS)
    images = policy.context.keypoints
    assert images is not None
    task, window, _ = inputs(contract)
    other = {"goal": task["goal"].roll(1, dims=0)}

    def seen(rows: Tensors) -> Tensor:
        with torch.no_grad():
            *cameras, goal = images(policy.streams(rows, window), None)
        assert [tuple(part.shape) for part in (*cameras, goal)] == [(2, 2, 32)] * 3
        return torch.stack(cameras)

    torch.testing.assert_close(seen(task), seen(other))  # nothing is preferred at first
    assert images.video.film is not None
    torch.nn.init.normal_(images.video.film.weight)
    assert not torch.allclose(seen(task), seen(other), atol=1e-3)


def test_where_a_token_lies_counts(folder: Path) -> None:
    contract = tiny_contract()
    policy = build(folder, contract)
    task, window, valid = inputs(contract)
    before = predicted(policy, task, window, valid)
    turned = {**window, "clip": window["clip"].flip(3)}
    assert not torch.allclose(predicted(policy, task, turned, valid), before, atol=1e-6)


def test_normalised_tokens_know_no_length(folder: Path) -> None:
    contract = tiny_contract()
    task, window, valid = inputs(contract)
    longer = {**window, "clip": 7 * window["clip"]}
    for normalize in (True, False):
        policy = build(folder, contract, normalize=normalize)
        same = torch.allclose(
            predicted(policy, task, longer, valid), predicted(policy, task, window, valid)
        )
        assert same is normalize


def test_the_gripper_is_a_command_or_a_number(folder: Path) -> None:
    contract = tiny_contract()
    task, window, valid = inputs(contract)
    for gripper in ("bce", "tanh"):
        policy = build(folder, contract, gripper=gripper)
        with torch.no_grad():
            context = policy.encode(task, window, valid)
            chunk = policy.sample_actions(context, None, steps=1)
            raw = policy.predict(context)
        assert chunk.shape == (2, 8, 7)
        torch.testing.assert_close(chunk[..., :6], raw[..., :6])
        column = chunk[..., 6]
        if gripper == "bce":
            assert torch.equal(column, torch.where(raw[..., 6] > 0, 1.0, -1.0))
        else:
            torch.testing.assert_close(column, raw[..., 6].tanh())


class Calls:
    """Counts passes of the encoder and the clips in them."""

    def __init__(self, policy: VJEPA2Head) -> None:
        self.shapes: list[tuple[int, ...]] = []
        encoder: Any = policy.clips
        encoder.encoder.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        self.shapes.append(tuple(kwargs["pixel_values_videos"].shape[:2]))

    def take(self) -> list[tuple[int, ...]]:
        taken, self.shapes = self.shapes, []
        return taken


def statistics(contract: PolicyContract) -> NormalizationStatistics:
    rng = np.random.default_rng(0)
    return NormalizationStatistics(
        state=FeatureStatistics.from_rows(rng.normal(size=(50, 15)), contract.state.names),
        action=FeatureStatistics.from_rows(rng.uniform(-1, 1, (50, 7)), contract.action.names),
        dataset_fingerprint="random numbers",
    )


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    contract = tiny_contract()
    saved = tmp_path_factory.mktemp("checkpoints") / "head"
    return save_checkpoint(saved, build(folder, contract), statistics(contract), {})


def observations(contract: PolicyContract, episode: int = 0) -> Iterator[Observation]:
    """One at every fourth step, with what came since the one before."""
    rng = np.random.default_rng(episode)

    def images() -> dict[str, np.ndarray]:
        return {
            name: rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for name in contract.camera_names
        }

    rows: list[HistoryRow] = []
    goal = images()
    for step in range(40):
        seen, state = images(), rng.normal(size=15)
        if step % 4 == 0:
            yield Observation(
                seen, state, session_id=f"episode {episode}", seed=step, step_index=step,
                history=tuple(rows), goal_image=goal if step == 0 else None,
            )  # fmt: skip
            rows = []
        else:
            rows.append(HistoryRow(step, state, seen))


def test_the_encoder_sees_a_clip_a_request_and_the_goal_once_an_episode(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    assert isinstance(loaded.policy, VJEPA2Head)
    calls, runtime = Calls(loaded.policy), PolicyRuntime(loaded)
    for observation in observations(loaded.policy.contract):
        runtime.infer([observation])
        expected = [(1, 16)] if observation.step_index else [(1, 2), (1, 16)]
        assert calls.take() == expected
    both = zip(*(observations(loaded.policy.contract, number) for number in (1, 2)), strict=True)
    for pair in both:
        runtime.infer(list(pair))  # a batch is one pass
        assert calls.take()[-1] == (2, 16)


def test_an_episodes_first_frames_are_padded_with_the_oldest(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    policy, runtime = loaded.policy, PolicyRuntime(loaded)
    first = next(observations(policy.contract))
    chunk = runtime.infer([first])[0].actions
    pixels = torch.from_numpy(first.images["agentview"])[None, None, None]
    state = loaded.processor.normalize_state(first.state)[None, None]
    assert first.goal_image is not None
    goal = {n: torch.from_numpy(i) for n, i in first.goal_image.items()}
    from reflexarc.policy.interface import Task

    with torch.no_grad():
        clips = policy.embed_clips({"frames": pixels.expand(1, 16, -1, -1, -1, -1)},
                                   torch.ones(1, 16, dtype=torch.bool))  # fmt: skip
        window = {"clip": clips["clip"][:, None], "state": state.expand(1, 5, -1)}
        task = policy.embed_task([Task(goal_image=goal)])
        context = policy.encode(task, window, torch.ones(1, 16, dtype=torch.bool))
        expected = loaded.processor.actions_to_robot(policy.sample_actions(context, None, steps=1))
    np.testing.assert_allclose(chunk, expected[0], atol=1e-5)


def test_a_goal_that_is_missing_or_of_another_size_is_named(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    runtime = PolicyRuntime(loaded)
    first, later, *_ = observations(loaded.policy.contract)
    with pytest.raises(ContractViolationError, match="goal_image: this policy needs one"):
        runtime.infer([replace(first, goal_image=None)])
    small = {"agentview": np.zeros((32, 32, 3), np.uint8)}
    with pytest.raises(ContractViolationError, match=r"goal_image\.agentview: .*\(64, 64, 3\)"):
        runtime.infer([replace(first, goal_image=small)])
    with pytest.raises(HistoryMissingError, match="the goal image"):
        runtime.infer([replace(later, session_id="unknown")])


def test_a_goal_that_is_not_wanted_is_named(folder: Path, tmp_path: Path) -> None:
    contract = tiny_contract(goal=False, language=True)
    save_checkpoint(tmp_path / "c", build(folder, contract), statistics(contract), {})
    runtime = PolicyRuntime(load_checkpoint(tmp_path / "c"))
    first = replace(next(observations(contract)), instruction=INSTRUCTIONS[0])
    with pytest.raises(ContractViolationError, match="goal_image: this policy takes none"):
        runtime.infer([first])
    assert runtime.infer([replace(first, goal_image=None)])[0].actions.shape == (8, 7)


def test_a_checkpoint_names_its_encoder_and_refuses_another(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    import shutil

    contract = tiny_contract()
    own = Path(shutil.copytree(folder, tmp_path / "encoder"))
    save_checkpoint(tmp_path / "c", build(own, contract), statistics(contract), {})
    from safetensors.torch import load_file, save_file

    weights = load_file(own / "model.safetensors")
    weights["encoder.layernorm.bias"] += 1
    save_file(weights, own / "model.safetensors")
    with pytest.raises(CheckpointError, match="frozen clips vjepa2"):
        load_checkpoint(tmp_path / "c")
    shutil.rmtree(own)
    with pytest.raises(CheckpointError, match=r"clips\.path: there is no folder"):
        load_checkpoint(tmp_path / "c")


def test_a_checkpoint_that_carries_its_encoder_needs_no_folder(
    folder: Path, tmp_path: Path
) -> None:
    import shutil

    contract = tiny_contract()
    own = Path(shutil.copytree(folder, tmp_path / "encoder"))
    policy = build(own, contract)
    save_checkpoint(tmp_path / "c", policy, statistics(contract), {}, merge_frozen=True)
    shutil.rmtree(own)
    loaded = load_checkpoint(tmp_path / "c")
    first = next(observations(contract))
    chunk = PolicyRuntime(loaded).infer([first])[0].actions
    assert np.isfinite(chunk).all()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor), name


def test_contracts_and_configs_that_do_not_fit_are_named(folder: Path) -> None:
    assert policy_class("vjepa2_head") is VJEPA2Head
    with pytest.raises(ConfigError, match="nothing tells vjepa2_head its task"):
        build(folder, tiny_contract(goal=False))
    with pytest.raises(ConfigError, match="images of 64x64"):
        camera = tiny_contract().cameras[0].model_copy(update={"height": 32, "width": 32})
        build(folder, tiny_contract().model_copy(update={"cameras": (camera,)}))
    with pytest.raises(ConfigError, match="language_dimension is 13"):
        build(folder, tiny_contract(language=True), language_dimension=13)
    with pytest.raises(ValueError, match="no multiple of num_heads"):
        published(hidden_dim=500)
