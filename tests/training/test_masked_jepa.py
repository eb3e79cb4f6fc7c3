"""The masked JEPA: what it predicts, what cannot leak into the context, what carries no loss."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from reflexarc.policy.layers.keypoints import KeypointsConfig
from reflexarc.policy.layers.vicreg import vicreg_terms
from reflexarc.policy.statevla.model import StateVLA
from reflexarc.training.config_objectives import FlowMatchingConfig, MaskedJEPAConfig
from reflexarc.training.objective import Batch, Draws, Losses
from reflexarc.training.objectives import packing
from reflexarc.training.objectives.flow_matching import FlowMatchingObjective
from reflexarc.training.objectives.masked_jepa import MaskedJEPAObjective
from reflexarc.training.objectives.target_network import ema_momentum, normed

from .tiny_statevla import HORIZON, random_source, tiny_statevla

ROWS = 10
SMALL = {"predictor_layers": 2, "predictor_width": 16, "predictor_d_state": 4}
KEYPOINTS = KeypointsConfig(number=4, hidden=8, tokens=2)


def config(**values: object) -> MaskedJEPAConfig:
    return MaskedJEPAConfig.model_validate({**SMALL, **values})


def make_policy(keypoints: bool = False, bidirectional: bool = False) -> StateVLA:
    """With every weight away from where it starts, so that everything is listened to."""
    policy = tiny_statevla(KEYPOINTS if keypoints else None, bidirectional=bidirectional)
    if keypoints:
        nn.init.normal_(policy.representation.tokenizer.vision.film.weight, std=0.3)
    return policy


def make_objective(policy: StateVLA, chosen: MaskedJEPAConfig | None = None) -> MaskedJEPAObjective:
    torch.manual_seed(1)
    objective = MaskedJEPAObjective(chosen or config(), layout=policy.token_layout, gripper_index=6)
    objective.attach(policy)
    assert objective.target is not None
    with torch.no_grad():  # a target that has stayed behind
        for parameter in objective.target.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return objective


def make_batch(policy: StateVLA, *, unreal: int = 0) -> Batch:
    """``unreal`` rows at the end carry no loss."""
    steps = torch.full((ROWS,), HORIZON)
    steps[3] = 2
    if unreal:
        steps[-unreal:] = 0
    real = torch.ones(ROWS, dtype=torch.bool)
    source = random_source(policy, seed=0, real_steps=steps, future_is_real=real, ahead=1)
    return source.batch(torch.arange(ROWS))


def draw(objective: MaskedJEPAObjective, batch: Batch, seed: int = 2) -> Draws:
    return objective.draw(batch, torch.Generator().manual_seed(seed))


def losses_of(policy: StateVLA, objective: MaskedJEPAObjective, batch: Batch) -> Losses:
    losses: Losses = objective(policy, batch, draw(objective, batch))
    return losses


@pytest.fixture(params=["patches", "keypoints", "bidirectional"])
def policy(request: pytest.FixtureRequest) -> StateVLA:
    return make_policy(**{request.param: True} if request.param != "patches" else {})


@pytest.mark.parametrize("strategy", ["modality_aware", "random"])
def test_the_losses_are_those_of_each_row_computed_alone_without_any_padding(
    policy: StateVLA, strategy: str
) -> None:
    chosen = config(
        masking_strategy=strategy, jepa_weight=0.7, action_weight=1.3, variance_weight=0.9,
        covariance_weight=0.2, gripper_weight=0.5, state_noise=0.1,
    )  # fmt: skip
    objective = make_objective(policy, chosen).eval()
    policy.eval()
    batch = make_batch(policy, unreal=2)
    draws = draw(objective, batch)
    losses = objective(policy, batch, draws)

    layout, target = policy.token_layout, objective.target
    assert target is not None
    latents = torch.arange(layout.inputs, layout.inputs + layout.latent_tokens)
    rows: list[Tensor] = []
    errors: list[Tensor] = []
    of_targets = torch.zeros(ROWS, layout.inputs, layout.d_model)
    for row in range(ROWS - 2):
        window = {name: values[row : row + 1] for name, values in batch.window.items()}
        noisy = {**window, "state": window["state"] + draws["state_noise"][row : row + 1]}
        task = {name: values[row : row + 1] for name, values in batch.task.items()}
        hidden = draws["hidden"][row]
        tokens = policy.representation.tokens(task, noisy, without_language=bool(hidden[0]))[0]
        visible = torch.cat([(~hidden).nonzero()[:, 0], latents])
        places = hidden.nonzero()[:, 0]
        context = policy.representation.encoder.of_every_token(tokens[visible][None])[0]

        predictor = objective.predictor
        where = predictor.positions + predictor.modality[predictor.modality_of]
        known = predictor.token_in(context) + where[visible]
        asked = predictor.mask_token + where[places]
        outputs = predictor.stack(torch.cat([known, asked])[None])[0]
        predicted = predictor.token_out(outputs[len(visible) :])

        of_all = target.encoder.of_every_token(target.tokens(task, window))[0]
        of_targets[row] = normed(of_all)[: layout.inputs]
        errors.append((normed(predicted) - normed(of_all)[places]).square().mean(-1))
        rows.append(predicted)
    prediction = torch.cat(errors).mean()
    variance, covariance = vicreg_terms(torch.cat(rows))
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(losses["prediction"], prediction, **close)
    torch.testing.assert_close(losses["variance"], variance, **close)
    torch.testing.assert_close(losses["covariance"], covariance, **close)

    plain = FlowMatchingConfig(gripper_weight=0.5, state_noise=0.1)
    actions = FlowMatchingObjective(plain, gripper_index=6)(policy, batch, draws)
    torch.testing.assert_close(losses["flow"], actions["flow"], **close)
    torch.testing.assert_close(losses["gripper"], actions["gripper"], **close)
    jepa = prediction + 0.9 * variance + 0.2 * covariance
    torch.testing.assert_close(losses["total"], 0.7 * jepa + 1.3 * actions["total"], **close)

    real = of_targets[: ROWS - 2]
    away = (real - real.mean(0)).square().mean(-1)
    torch.testing.assert_close(
        losses["mean_target"], away[draws["hidden"][: ROWS - 2]].mean(), **close
    )


@pytest.mark.parametrize("strategy", ["modality_aware", "random"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_stands_in_padding_reaches_nothing(
    monkeypatch: pytest.MonkeyPatch, policy: StateVLA, strategy: str, value: float
) -> None:
    objective = make_objective(policy, config(masking_strategy=strategy)).eval()
    policy.eval()
    batch = make_batch(policy)
    lengths = packing.pack(draw(objective, batch)["hidden"], 1).lengths
    assert lengths.min() < lengths.max()  # there is padding
    with torch.no_grad():
        before = losses_of(policy, objective, batch)
        monkeypatch.setattr(packing, "PADDING", value)
        after = losses_of(policy, objective, batch)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_what_stands_in_padding_reaches_no_gradient(
    monkeypatch: pytest.MonkeyPatch, policy: StateVLA
) -> None:
    objective = make_objective(policy).train()
    batch = make_batch(policy)
    gradients = []
    for value in (0.0, 1e3):
        monkeypatch.setattr(packing, "PADDING", value)
        policy.zero_grad()
        losses_of(policy, objective, batch)["total"].backward()
        gradients.append(
            {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        )
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def perturbed(batch: Batch, modality: str) -> Batch:
    """The same decisions with other input of one modality."""
    window, task = dict(batch.window), dict(batch.task)
    if modality == "language":
        task["language"] = task["language"].roll(1, 0) + 1.0
    elif modality == "state":
        window["state"] = window["state"] + 2.0
    else:
        camera = {"agentview": 0, "eye_in_hand": 1}[modality]
        window["vision"] = window["vision"].clone()
        noise = torch.randn(
            window["vision"][:, :, camera].shape, generator=torch.Generator().manual_seed(9)
        )
        window["vision"][:, :, camera] += noise
    return dataclasses.replace(batch, window=window, task=task)


@pytest.mark.parametrize("modality", ["language", "state", "agentview", "eye_in_hand"])
def test_what_is_hidden_does_not_leak_into_the_context(policy: StateVLA, modality: str) -> None:
    """Bit for bit; the target, z and the policy see it all the same."""
    objective = make_objective(policy).eval()
    policy.eval()
    batch = make_batch(policy)
    draws = draw(objective, batch)
    own = policy.token_layout.span(modality)
    rows = draws["hidden"][:, own].any(1)
    assert rows.any() and not rows.all()
    seen: list[tuple[Tensor, Tensor]] = []
    objective.predictor.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0], output))
    )
    with torch.no_grad():
        before = objective(policy, batch, draws)
        after = objective(policy, perturbed(batch, modality), draws)
    (context, predicted), (context_after, predicted_after) = seen
    assert torch.equal(context[rows], context_after[rows])
    assert torch.equal(predicted[rows], predicted_after[rows])
    # Where it is visible it does matter, and to the others in any case.
    assert (context[~rows] != context_after[~rows]).flatten(1).any(1).all()
    assert not torch.equal(before["prediction"], after["prediction"])
    other = perturbed(batch, modality)
    with torch.no_grad():
        z, moved = (policy.encode(b.task, b.window, b.valid)["z"] for b in (batch, other))
    assert (z != moved).flatten(1).any(1).all()


def test_every_weight_is_reached_in_every_step_whatever_is_hidden(policy: StateVLA) -> None:
    """As processes that share a batch need it; the target is never reached."""
    objective = make_objective(policy).train()
    batch = make_batch(policy)
    draws = draw(objective, batch)
    for modality in policy.token_layout.modalities:
        hidden = torch.zeros_like(draws["hidden"])
        hidden[:, policy.token_layout.span(modality)] = True
        policy.zero_grad(), objective.zero_grad()
        objective(policy, batch, {**draws, "hidden": hidden})["total"].backward()
        frozen = tuple(policy.frozen_backbones())
        for name, parameter in [*policy.named_parameters(), *objective.named_parameters()]:
            if name.startswith(("target.", *frozen)):
                assert not parameter.requires_grad and parameter.grad is None, name
            else:
                assert parameter.grad is not None, name


def test_actions_train_the_encoder_unless_told_otherwise(policy: StateVLA) -> None:
    batch = make_batch(policy)

    def reached(**values: object) -> set[str]:
        objective = make_objective(policy, config(**values)).train()
        policy.zero_grad()
        losses_of(policy, objective, batch)["total"].backward()
        moved = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
        return {name.split(".")[0] for name in moved}

    assert reached(jepa_weight=0.0) == {"representation", "flow", "gripper"}
    stopped = {"jepa_weight": 0.0, "action_gradient_into_encoder": False}
    assert reached(**stopped) == {"flow", "gripper"}
    assert reached(action_weight=0.0) == {"representation"}


def test_rows_that_stand_in_for_none_carry_no_loss(policy: StateVLA) -> None:
    """VICReg and the baseline included: the statistics are those of real rows."""
    objective = make_objective(policy).eval()
    policy.eval()
    batch = make_batch(policy, unreal=3)
    before = losses_of(policy, objective, batch)
    window = {name: values.clone() for name, values in batch.window.items()}
    for values in window.values():
        values[-3:] = 7.0
    after = losses_of(policy, objective, dataclasses.replace(batch, window=window))
    torch.testing.assert_close(after, before)
    real = dataclasses.replace(batch, action_mask=torch.ones_like(batch.action_mask))
    assert not torch.allclose(losses_of(policy, objective, real)["variance"], before["variance"])
    none = dataclasses.replace(batch, action_mask=torch.zeros_like(batch.action_mask))
    nothing = losses_of(policy, objective, none)
    assert nothing["total"] == 0 and nothing["mean_target"] == 0
    assert objective.summarize({n: v.item() for n, v in nothing.items()})["mse_over_mean"] == 1


def test_z_of_the_policy_is_what_is_served(policy: StateVLA) -> None:
    tokens = policy.representation.tokens
    batch = make_batch(policy)
    policy.eval()
    with torch.no_grad():
        served = policy.encode(batch.task, batch.window, batch.valid)["z"]
        z = policy.representation.encoder(tokens(batch.task, batch.window))
        every = policy.representation.encoder.of_every_token(tokens(batch.task, batch.window))
    assert torch.equal(z, served)
    torch.testing.assert_close(every[:, -z.shape[1] :], z)


def test_the_target_follows_the_momentum() -> None:
    policy = make_policy()
    for schedule, momenta in (("cosine", (0.9, 1.0)), ("constant", (0.9, 0.9))):
        chosen = config(ema_start=0.9, ema_end=1.0, ema_schedule=schedule)
        objective = make_objective(policy, chosen)
        assert objective.target is not None
        for step, momentum in zip((0, 10), momenta, strict=True):
            slow = copy.deepcopy(objective.target.state_dict())
            objective.after_optimizer_step(policy, step, 11)
            for name, value in policy.representation.state_dict().items():
                wanted = slow[name].lerp(value, 1 - momentum)
                torch.testing.assert_close(objective.target.state_dict()[name], wanted)
    assert ema_momentum(config(), 0, 100) == pytest.approx(0.996)


def test_state_dict_carries_predictor_and_whole_target() -> None:
    policy = make_policy()
    trained = make_objective(policy)
    resumed = make_objective(make_policy())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    resumed.load_state_dict(trained.state_dict())
    batch = make_batch(policy)
    wanted, found = (losses_of(policy.eval(), o.eval(), batch) for o in (trained, resumed))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    names = {n.removeprefix("target.") for n in trained.state_dict() if n.startswith("target.")}
    assert names == set(policy.representation.state_dict())


def decided(policy: StateVLA) -> Batch:
    """Four situations, each with its own language, state and images: one modality tells all."""
    batch = make_batch(policy)
    which = torch.arange(ROWS) % 4

    def same(values: Tensor) -> Tensor:
        return values[which]

    return dataclasses.replace(
        batch,
        window={name: same(values) for name, values in batch.window.items()},
        task={name: same(values) for name, values in batch.task.items()},
    )


def test_what_the_visible_modalities_decide_is_learnt() -> None:
    """Against a target that stands still, the prediction beats the mean of each place by far."""
    policy = make_policy()
    still = config(
        ema_start=1.0,
        action_weight=0.0,
        variance_weight=0.0,
        covariance_weight=0.0,
        predictor_width=32,
    )
    objective = make_objective(policy, still)
    parameters = [p for m in (policy, objective) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    batch = decided(policy)

    def skill() -> float:
        with torch.no_grad():
            losses = losses_of(policy.eval(), objective.eval(), batch)
        return objective.summarize({n: v.item() for n, v in losses.items()})["mse_over_mean"]

    before = skill()
    for step in range(80):
        losses = objective.train()(policy.train(), batch, draw(objective, batch, step))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    assert skill() < 0.5 < 2 < before
