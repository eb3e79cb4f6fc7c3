"""Training of a Qwen + geometry policy: one store for all arms, no waiting, memory as foretold."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reflexarc.contract.errors import ConfigError
from reflexarc.data.generated import GeneratedSettings, write_generated
from reflexarc.policy.interface import Tensors
from reflexarc.training.distributed import Engine
from reflexarc.training.distributed.engine import TrainedModules
from reflexarc.training.estimate import _batch, _probe
from reflexarc.training.feature_store.holding import hold_features
from reflexarc.training.feature_store.row_cache import RowCache
from reflexarc.training.feature_store.store import find_features
from reflexarc.training.memory_estimate import _SmallStep, measure_step
from reflexarc.training.objective import Batch
from reflexarc.training.preparation import Preparation, prepare
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.samples import BatchSource
from reflexarc.training.training_step import TrainingStep

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from qwen_samples import SIZE, save_tiny_qwen, tiny_config

CPU = torch.device("cpu")
ARMS = ("none", "pool", "per_layer", "qformer", "control")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    write_generated(folder, GeneratedSettings(tasks=2, episodes=2, steps=8, image_size=64))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen(tmp_path_factory.mktemp("qwen"))


def prepared(data: Path, *overrides: str) -> Preparation:
    settings = [f"data.paths=['{data}']", "training.batch_size=4", *overrides]
    return prepare(load_recipe("debug_qwen_geometry", settings), CPU)


def with_qwen(data: Path, qwen: Path, *overrides: str) -> Preparation:
    recipe = load_recipe("debug_qwen_geometry", [f"data.paths=['{data}']", *overrides])
    policy = tiny_config(qwen, stored_geometry="own")
    policy["head"]["positions"] = 8
    contract = recipe.contract.model_copy(update={"image_size": SIZE})
    return prepare(
        load_recipe("debug_qwen_geometry", [f"data.paths=['{data}']", *overrides]).model_copy(
            update={"policy": policy, "contract": contract}
        ),
        CPU,
    )


def source(preparation: Preparation, cache: Path) -> BatchSource:
    features = preparation.features(cache, progress=False)
    return preparation.sources(features.arrays, features.first_rows)[0]


@pytest.fixture(scope="module")
def shared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that ``--ablation geometry`` computes before its first arm."""
    cache = tmp_path_factory.mktemp("stores")
    every = prepared(data, "policy.compressor=qformer", "policy.stored_geometry=every")
    every.features(cache, progress=False)
    return cache


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_read_one_store_and_lose_what_they_would_without(
    data: Path, shared: Path, arm: str
) -> None:
    preparation = prepared(data, f"policy.compressor={arm}")
    features = preparation.features(shared, progress=False)
    assert features.hit, features.remark
    read = {"none": set(), "qformer": {"geometry"}}.get(arm, {"cells"})
    assert features.arrays.keys() == {"semantic", *read}
    cached = preparation.sources(features.arrays, features.first_rows)[0].batch(torch.arange(4))
    assert loss(preparation, cached) == pytest.approx(
        loss(preparation, fresh(preparation, cached)), rel=1e-5
    )


def fresh(preparation: Preparation, batch: Batch) -> Batch:
    """The same samples, their frames embedded now."""
    episode = preparation.train_episodes[0]
    from reflexarc.training.feature_store.embedding import embed_episode

    rows = embed_episode(preparation.policy, episode, np.arange(batch.size))
    window: Tensors = {name: t[:, None].clone() for name, t in rows.items()}
    return Batch(window | {"state": batch.window["state"]}, batch.task, batch.valid,
                 batch.actions, batch.action_mask)  # fmt: skip


@torch.no_grad()
def loss(preparation: Preparation, batch: Batch) -> float:
    objective = preparation.objective
    draws = objective.draw(batch, torch.Generator().manual_seed(0))
    return float(objective(preparation.policy, batch, draws)["total"])


def test_a_store_of_another_encoder_is_refused_before_the_first_step(
    data: Path, shared: Path
) -> None:
    other = prepared(data, "policy.semantic.vision={name: efficientnet_lite0, pool: 1}")
    (store,) = (path.parent for path in shared.glob("*/index.json"))
    with pytest.raises(ConfigError, match=r"encoders.semantic.vision.id: tiny_random in the store"):
        find_features(store, other.feature_key)


def test_a_store_of_the_same_views_in_another_order_is_not_taken(data: Path, shared: Path) -> None:
    """A frame's tokens stand in the order of the contract's cameras."""
    turned = prepared(data, "contract.cameras=[eye_in_hand, agentview]")
    (store,) = (path.parent for path in shared.glob("*/index.json"))
    said = "cameras: agentview, eye_in_hand in the store, eye_in_hand, agentview wanted"
    with pytest.raises(ConfigError, match=said):
        find_features(store, turned.feature_key)


class NoSynchronisation(TorchDispatchMode):
    """Fails where a value of a tensor is asked for: on an accelerator the host would wait."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        assert not name.startswith(self.WAITING), f"{name} waits for the device"
        indexed = name in ("index", "index_put_") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in args[1]
        )
        assert not indexed, "an index of booleans waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["compact", "qwen"])
def test_a_step_never_waits_for_the_device(
    data: Path, qwen: Path, tmp_path: Path, what: str
) -> None:
    """From a batch on the device to the next weights; the second step, whose state is there."""
    preparation = (
        prepared(data, "policy.compressor=qformer") if what == "compact" else with_qwen(data, qwen)
    )
    modules = TrainedModules(preparation.policy, preparation.objective)
    made = source(preparation, tmp_path)
    step = TrainingStep(preparation.recipe, modules, made, Engine(CPU))
    step.run(0)
    batch, objective = made.batch(torch.arange(4)), preparation.objective
    draws = objective.draw(batch, torch.Generator().manual_seed(0))
    with NoSynchronisation():
        step.optimizer.zero_grad(set_to_none=True)
        losses = step._weights.losses(batch, draws)
        step._weights.backward(losses["total"])
        step._update(1)
    with pytest.raises(AssertionError, match="waits for the device"), NoSynchronisation():
        float(losses["total"].detach())


@pytest.mark.parametrize("what", ["compact", "qwen"])
def test_memory_is_foretold_within_ten_percent(data: Path, qwen: Path, what: str) -> None:
    """Two small steps against what a step of 24 samples holds at once."""
    preparation = (
        prepared(data, "policy.compressor=qformer") if what == "compact" else with_qwen(data, qwen)
    )
    recipe, policy, objective = preparation.recipe, preparation.policy, preparation.objective
    batch_of = partial(_batch, _probe(preparation)[1])
    foretold = measure_step(recipe, policy, objective, batch_of).activations(24)
    policy.train()
    measured = _SmallStep(recipe, policy, objective, batch_of).activations(24)
    assert foretold == pytest.approx(measured, rel=0.1)


def test_learning_rates_and_freezing_by_module(data: Path, qwen: Path, tmp_path: Path) -> None:
    preparation = with_qwen(
        data, qwen, "optimizer.learning_rate=1e-5", "freeze=[geometry, semantic.model.visual]",
        "learning_rate_scale={head: 10, compressor: 10, joining: 10}", "training.batch_size=4",
    )  # fmt: skip
    modules = TrainedModules(preparation.policy, preparation.objective)
    before = {n: p.clone() for n, p in preparation.policy.named_parameters()}
    step = TrainingStep(preparation.recipe, modules, source(preparation, tmp_path), Engine(CPU))
    step.run(0)
    rates = {
        id(p): group["lr"] * 1.0 for group in step.optimizer.param_groups for p in group["params"]
    }
    base = step.learning_rate(0)
    for name, parameter in preparation.policy.named_parameters():
        frozen = name.startswith(("geometry.", "semantic.model.visual."))
        assert (id(parameter) in rates) != frozen, name
        if not frozen:
            scale = 1 if name.startswith("semantic.") else 10
            assert rates[id(parameter)] == pytest.approx(base * scale), name
        else:
            assert torch.equal(parameter, before[name]), name


def test_rows_kept_in_memory_are_bounded_and_counted() -> None:
    rows = torch.arange(40, dtype=torch.float16).view(10, 4)
    cache = RowCache(rows, limit=3 * 8)
    assert torch.equal(cache.gather(torch.tensor([0, 1, 0, 2])), rows[[0, 1, 0, 2]])
    assert (cache.hits, cache.misses, len(cache)) == (1, 3, 3)
    cache.gather(torch.tensor([3]))  # the one read longest ago goes: 1
    cache.gather(torch.tensor([0, 1]))
    assert (cache.hits, cache.misses, len(cache)) == (2, 5, 3)
    assert cache.statistics() == "3 rows, 28.6 % of 7 reads from memory"


def test_a_bounded_memory_gives_the_same_batches(data: Path, shared: Path) -> None:
    preparation = prepared(data, "data.feature_memory_mib=1")
    features = preparation.features(shared, progress=False)
    held = hold_features(features.arrays, CPU, limit=100_000)
    some = torch.tensor([3, 0, 3, 5])
    plain = preparation.sources(features.arrays, features.first_rows)[0].batch(some)
    for _ in range(2):
        batch = preparation.sources(held.rows, features.first_rows)[0].batch(some)
        assert all(torch.equal(batch.window[n], plain.window[n]) for n in plain.window)
    assert all("from memory" in line for line in held.statistics())
    assert len(held.statistics()) == 2
