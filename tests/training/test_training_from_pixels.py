"""A policy that trains its own patches goes through the real trainer, feature store and server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from reflexarc.contract import Observation
from reflexarc.contract.images import prepare_image
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan

CONVOLUTION = "representation.tokenizer.patches.convolution.weight"


def test_the_convolution_is_trained_from_stored_pixels_and_served(
    demonstrations: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(
        "statevla_tiny",
        [
            f"data.paths=['{demonstrations}']",
            "policy.vision={name: conv2d, pool: 1, channels: 8}",
            "training.epochs=1",
        ],
    )
    planned = plan(
        recipe, tmp_path / "run", device=torch.device("cpu"), feature_cache=tmp_path / "cache"
    )
    before = planned.preparation.policy.state_dict()[CONVOLUTION].clone()
    folder = open_run_folder(recipe, tmp_path / "run", resume=False, fresh=False)
    outcome = execute(planned, folder, progress_bar=False)
    assert outcome.last is not None
    # The store holds pixels, byte for byte: two cameras of 32 x 32.
    [stored] = (tmp_path / "cache").glob("*/vision.npy")
    pixels = np.load(stored, mmap_mode="r")
    episodes = planned.preparation.episodes
    assert pixels.dtype == np.uint8
    assert pixels.shape == (sum(len(e.image_steps) for e in episodes), 2, 32, 32, 3)
    assert planned.estimate.features == pixels.nbytes
    after = load_file(outcome.last / "model.safetensors")[CONVOLUTION]
    assert (after - before).abs().max() > 1e-4

    loaded = load_checkpoint(outcome.last)
    policy, episode = loaded.policy, open_libero([demonstrations]).episodes[0]
    first = np.zeros(1, dtype=np.int64)
    images = {
        camera.name: prepare_image(camera, episode.images(camera.name, first)[0])
        for camera in policy.contract.cameras
    }
    state = episode.states(policy.contract.state.layout)[0]
    served = PolicyRuntime(loaded).infer(
        [Observation(images=images, state=state, instruction=episode.instruction, seed=3)]
    )[0]
    row = planned.preparation.episodes.index(
        next(e for e in episodes if (e.path, e.demo) == (episode.path, episode.demo))
    )
    first_row = sum(len(e.image_steps) for e in episodes[:row])
    task = {
        name: rows[[planned.preparation.task_rows[episode.instruction]]]
        for name, rows in planned.preparation.task.items()
    }
    window = {
        "vision": torch.from_numpy(pixels[[first_row]])[:, None],
        "state": loaded.processor.normalize_state(state)[None, None],
    }
    noise = torch.randn(policy.sampling.noise_shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        context = policy.encode(task, window, torch.ones(1, 1, dtype=torch.bool))
        steps = policy.sampling.default_steps
        chunk = policy.sample_actions(context, noise[None], steps=steps)[0]
    np.testing.assert_array_equal(served.actions, loaded.processor.actions_to_robot(chunk))
