"""The temporal JEPA objective: what it predicts, what it leaves out, and how its target moves."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reflexarc.contract.errors import ConfigError
from reflexarc.contract.statistics import FeatureStatistics, NormalizationStatistics
from reflexarc.policy.interface import Tensors
from reflexarc.policy.layers.vicreg import vicreg_terms
from reflexarc.policy.processing import Processor
from reflexarc.policy.statevla.model import StateVLA
from reflexarc.training.config_objectives import TemporalJEPAConfig
from reflexarc.training.distributed import TrainedModules
from reflexarc.training.objective import Batch
from reflexarc.training.objectives.target_network import ema_momentum
from reflexarc.training.objectives.temporal_jepa import TemporalJEPAObjective
from reflexarc.training.objectives.temporal_predictor import TemporalPredictor
from reflexarc.training.samples import BatchSource
from reflexarc.training.validation import validate

from .tiny_statevla import HORIZON, Z_DIMENSION, random_source, tiny_statevla

ROWS, TOKENS, WIDTH, STATE, ACTION = 12, 2, 8, 5, 7


class SmallRepresentation(nn.Module):
    """State to z; with dropout and running statistics, which a target must not use or train."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(STATE, 16)
        self.batch_norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)
        self.projection = nn.Linear(16, TOKENS * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensor:
        hidden = self.dropout(self.batch_norm(self.inner(window["state"][:, -1]).tanh()))
        z: Tensor = self.norm(self.projection(hidden).unflatten(1, (TOKENS, WIDTH)))
        return z


class SmallPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.representation = SmallRepresentation()


def make_batch(horizon: int = 1, rows: int = ROWS, seed: int = 0) -> Batch:
    """States whose change is the sum of the actions, and a last third without a future."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(rows, 1, STATE, generator=generator)
    actions = torch.randn(rows, horizon, ACTION, generator=generator)
    valid = torch.ones(rows, 1, dtype=torch.bool)
    return Batch(
        window={"state": state},
        task={"language": torch.zeros(rows, 1)},
        valid=valid,
        actions=actions,
        action_mask=torch.ones(rows, horizon, dtype=torch.bool),
        future={"state": state + 0.3 * actions.sum(1, keepdim=True)[..., :STATE]},
        future_valid=valid,
        future_mask=torch.arange(rows) < rows * 2 // 3,
        future_actions=actions,
    )


def make_objective(
    policy: nn.Module, config: TemporalJEPAConfig | None = None
) -> TemporalJEPAObjective:
    objective = TemporalJEPAObjective(
        config or TemporalJEPAConfig(), z_dimension=TOKENS * WIDTH, action_dimension=ACTION
    )
    objective.attach(policy)  # type: ignore[arg-type]
    return objective


def run(policy: nn.Module, objective: TemporalJEPAObjective, batch: Batch) -> dict[str, Tensor]:
    draws = objective.draw(batch, torch.Generator().manual_seed(1))
    return objective(policy, batch, draws)  # type: ignore[no-any-return]


@pytest.fixture
def policy() -> SmallPolicy:
    torch.manual_seed(0)
    return SmallPolicy()


def test_the_predictor_is_the_identity_at_initialisation_and_uses_its_actions_afterwards() -> None:
    predictor = TemporalPredictor(12, 14, hidden=32)
    z, actions = torch.randn(5, 12), torch.randn(5, 14)
    assert torch.equal(predictor(z, actions), z)
    nn.init.normal_(predictor.delta.weight)
    assert not torch.allclose(predictor(z, actions), predictor(z, actions.flip(0)))


def test_an_untrained_predictor_is_as_good_as_no_change(policy: SmallPolicy) -> None:
    objective = make_objective(policy).eval()
    losses = run(policy.eval(), objective, make_batch())
    torch.testing.assert_close(losses["prediction"], losses["identity"])
    assert losses["identity"] > 0.01


def test_the_loss_is_the_error_against_the_target_plus_weighted_vicreg(
    policy: SmallPolicy,
) -> None:
    """Written out once more, plainly, with a predictor and a target that have moved apart."""
    config = TemporalJEPAConfig(
        horizon=3, prediction_weight=2.0, variance_weight=0.7, covariance_weight=0.3
    )
    objective = make_objective(policy, config)
    nn.init.normal_(objective.predictor.delta.weight, std=0.1)
    nn.init.normal_(policy.representation.norm.weight)
    policy.eval(), objective.eval()
    batch = make_batch(horizon=3)
    losses = run(policy, objective, batch)

    assert batch.future is not None and batch.future_mask is not None
    assert batch.future_actions is not None and objective.target is not None
    real = batch.future_mask
    z = policy.representation(batch.task, batch.window, batch.valid)[real]
    predicted = objective.predictor(z.flatten(1), batch.future_actions[real].flatten(1))
    target = objective.target(batch.task, batch.future, batch.valid)[real]

    def normed(tokens: Tensor) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        return centred / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    prediction = (normed(predicted.unflatten(1, (TOKENS, WIDTH))) - normed(target)).square().mean()
    variance, covariance = vicreg_terms(predicted)
    torch.testing.assert_close(losses["prediction"], prediction)
    torch.testing.assert_close(losses["variance"], variance)
    torch.testing.assert_close(losses["covariance"], covariance)
    torch.testing.assert_close(
        losses["total"], 2.0 * prediction + 0.7 * variance + 0.3 * covariance
    )


def test_rows_past_the_end_of_an_episode_carry_no_loss(policy: SmallPolicy) -> None:
    objective = make_objective(policy).eval()
    policy.eval()
    batch = make_batch()
    assert batch.future is not None and batch.future_mask is not None
    assert batch.future_actions is not None
    before = run(policy, objective, batch)
    padding = ~batch.future_mask
    future, actions = batch.future["state"].clone(), batch.future_actions.clone()
    future[padding], actions[padding] = 9.0, -9.0
    changed = dataclasses.replace(batch, future={"state": future}, future_actions=actions)
    torch.testing.assert_close(run(policy, objective, changed), before)
    everything = dataclasses.replace(changed, future_mask=torch.ones_like(batch.future_mask))
    assert run(policy, objective, everything)["prediction"] > 1.2 * before["prediction"]
    assert objective.weight(batch) == 8

    nothing = dataclasses.replace(batch, future_mask=torch.zeros_like(batch.future_mask))
    losses = run(policy, objective, nothing)
    assert losses["total"].item() == 0
    assert losses["identity"].item() == 0
    assert objective.summarize({n: v.item() for n, v in losses.items()})["mse_over_identity"] == 1
    losses["total"].backward()


def test_no_gradient_reaches_the_target_and_all_of_it_reaches_the_online_branch(
    policy: SmallPolicy,
) -> None:
    objective = make_objective(policy)
    policy.train(), objective.train()
    assert objective.target is not None and not objective.target.training
    before = copy.deepcopy(objective.target.state_dict())
    nn.init.normal_(objective.predictor.delta.weight, std=0.1)
    run(policy, objective, make_batch())["total"].backward()
    for name, parameter in objective.target.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, name
    online = [*policy.named_parameters(), *objective.predictor.named_parameters()]
    for name, parameter in online:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    # Running statistics of the target must not see the batch either.
    torch.testing.assert_close(objective.target.state_dict(), before, rtol=0, atol=0)


@settings(deadline=None)
@given(
    steps=st.integers(2, 500),
    start=st.floats(0.0, 1.0),
    end=st.floats(0.0, 1.0),
    data=st.data(),
)
def test_momentum_runs_from_start_to_end_and_stays_between(
    steps: int, start: float, end: float, data: st.DataObject
) -> None:
    config = TemporalJEPAConfig(ema_start=start, ema_end=end)
    step = data.draw(st.integers(0, steps - 2))
    values = [ema_momentum(config, at, steps) for at in (0, step, step + 1, steps - 1)]
    assert values[0] == pytest.approx(start, abs=1e-12)
    assert values[-1] == pytest.approx(end, abs=1e-12)
    rising = sorted(values) if start <= end else sorted(values, reverse=True)
    assert values == pytest.approx(rising, abs=1e-12)


def test_momentum_is_a_cosine() -> None:
    config = TemporalJEPAConfig()
    assert ema_momentum(config, 50, 101) == pytest.approx(0.998)
    assert ema_momentum(config, 25, 101) == pytest.approx(1 - 0.004 * (1 + math.sqrt(0.5)) / 2)
    assert ema_momentum(config, 0, 1) == pytest.approx(0.996)


def test_the_target_moves_by_the_momentum_and_takes_running_statistics(
    policy: SmallPolicy,
) -> None:
    config = TemporalJEPAConfig(ema_start=0.9, ema_end=1.0)
    objective = make_objective(policy, config)
    assert objective.target is not None
    before = copy.deepcopy(objective.target.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
        policy.representation.batch_norm.running_mean.fill_(3.0)  # type: ignore[union-attr]
    objective.after_optimizer_step(policy, 0, 11)  # type: ignore[arg-type]
    after = objective.target.state_dict()
    torch.testing.assert_close(after["inner.weight"], before["inner.weight"] + 0.1)
    assert (after["batch_norm.running_mean"] == 3.0).all()
    objective.after_optimizer_step(policy, 10, 11)  # type: ignore[arg-type]
    torch.testing.assert_close(objective.target.state_dict(), after)


def test_state_noise_reaches_the_online_branch_only_and_follows_the_generator(
    policy: SmallPolicy,
) -> None:
    batch = make_batch()
    policy.eval()
    quiet = make_objective(policy).eval()
    noisy = make_objective(policy, TemporalJEPAConfig(state_noise=0.5)).eval()
    draws = noisy.draw(batch, torch.Generator().manual_seed(3))
    again = noisy.draw(batch, torch.Generator().manual_seed(3))
    torch.testing.assert_close(draws, again, rtol=0, atol=0)
    assert not quiet.draw(batch, torch.Generator()).get("state_noise", torch.ones(1)).any()
    with_noise = noisy(policy, batch, draws)
    without = run(policy, quiet, batch)
    assert not torch.allclose(with_noise["prediction"], without["prediction"])
    torch.testing.assert_close(with_noise["identity"], without["identity"])


def test_training_beats_the_identity_and_keeps_the_representation_from_collapsing() -> None:
    """On states that the actions alone move, what is left of the identity's error is small."""
    torch.manual_seed(0)
    policy = SmallPolicy()
    policy.representation.dropout.p = 0.0
    objective = make_objective(policy, TemporalJEPAConfig(predictor_hidden=32))
    parameters = [p for m in (policy, objective) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    steps = 200
    for step in range(steps):
        losses = run(policy.train(), objective.train(), make_batch(rows=48, seed=step))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        objective.after_optimizer_step(policy, step, steps)  # type: ignore[arg-type]
    batch = make_batch(rows=256, seed=10_000)
    assert batch.future_actions is not None
    misled = dataclasses.replace(batch, future_actions=batch.future_actions.roll(1, 0))
    policy.eval(), objective.eval()
    with torch.no_grad():
        losses, without = run(policy, objective, batch), run(policy, objective, misled)
    assert losses["prediction"] < 0.7 * losses["identity"]
    assert without["prediction"] > without["identity"]  # it was the actions that told
    assert losses["z_std"] > 0.5


def test_a_collapsed_representation_has_no_spread(policy: SmallPolicy) -> None:
    objective = make_objective(policy).eval()
    policy.eval()
    healthy = run(policy, objective, make_batch())["z_std"]
    nn.init.zeros_(policy.representation.projection.weight)
    collapsed = run(policy, objective, make_batch())
    assert collapsed["z_std"] < 1e-3 < 0.3 < healthy
    assert collapsed["variance"] > 0.95


def test_state_dict_carries_predictor_and_target(policy: SmallPolicy) -> None:
    trained = make_objective(policy)
    assert trained.target is not None
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    resumed = make_objective(SmallPolicy())
    resumed.load_state_dict(trained.state_dict())
    batch = make_batch()
    policy.eval()
    wanted, found = (run(policy, o.eval(), batch) for o in (trained, resumed))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_what_cannot_be_trained_is_refused_by_name(policy: SmallPolicy) -> None:
    objective = make_objective(policy)
    with pytest.raises(ConfigError, match="1 steps ahead"):
        run(policy, objective, dataclasses.replace(make_batch(), future=None))
    with pytest.raises(ConfigError, match="`representation`, which Linear has not"):
        objective.attach(nn.Linear(1, 1))  # type: ignore[arg-type]


def tiny_samples(policy: StateVLA, ahead: int) -> BatchSource:
    """Twelve samples; 6 of the first 7 and 1 of the last 5 have a future."""
    real = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0], dtype=torch.bool)
    whole = torch.full((ROWS,), HORIZON)
    return random_source(policy, seed=0, real_steps=whole, future_is_real=real, ahead=ahead)


def test_a_real_policy_trains_its_whole_representation_and_nothing_else() -> None:
    policy = tiny_statevla()
    objective = TemporalJEPAObjective(
        TemporalJEPAConfig(horizon=2), z_dimension=Z_DIMENSION, action_dimension=7
    )
    objective.attach(policy)
    nn.init.normal_(objective.predictor.delta.weight, std=0.1)
    batch = tiny_samples(policy, ahead=2).batch(torch.arange(ROWS))
    losses = run(policy, objective, batch)
    losses["total"].backward()
    for name, parameter in policy.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == name.startswith("representation."), name
    assert objective.target is not None
    assert {n for n, _ in objective.target.named_parameters()} == {
        n for n, _ in policy.representation.named_parameters()
    }


def test_validation_does_not_depend_on_how_held_out_samples_fall_into_batches() -> None:
    """Batches of 7 and 5 samples, of which 6 and 1 have a future, beside one batch of all."""
    policy = tiny_statevla()
    objective = TemporalJEPAObjective(
        TemporalJEPAConfig(horizon=2), z_dimension=Z_DIMENSION, action_dimension=7
    )
    objective.attach(policy)
    nn.init.normal_(objective.predictor.delta.weight, std=0.1)
    source = tiny_samples(policy, ahead=2)
    samples, still = source.samples, 9
    assert samples.future is not None and samples.future.exists[7:].nonzero().tolist() == [[2]]
    # The only future in the second batch brings almost no change, so that its own ratio is large.
    samples.future.frame_row[still] = samples.frame_row[still]
    samples.future.state[still] = samples.state[still] + 0.1
    contract, random = policy.contract, np.random.default_rng(0)
    statistics = NormalizationStatistics(
        state=FeatureStatistics.from_rows(random.normal(size=(9, 8)), contract.state.names),
        action=FeatureStatistics.from_rows(random.normal(size=(9, 7)), contract.action.names),
        dataset_fingerprint="",
    )
    processor = Processor(contract, statistics)

    def validated(batch_size: int) -> dict[str, float]:
        modules = TrainedModules(policy, objective)
        return validate(modules, source, processor, batch_size=batch_size, seed=0)

    split, whole = validated(7), validated(ROWS)
    for name in ("prediction", "identity", "mse_over_identity"):
        assert split[name] == pytest.approx(whole[name], rel=1e-5), name
    assert split["mse_over_identity"] == pytest.approx(split["prediction"] / split["identity"])
    ratios = [
        (losses["prediction"] / losses["identity"]).item()
        for rows in (torch.arange(7), torch.arange(7, ROWS))
        for losses in [run(policy, objective, source.batch(rows))]
    ]
    mean_of_ratios = (6 * ratios[0] + ratios[1]) / 7
    assert mean_of_ratios > 2 * split["mse_over_identity"]
