"""The recipes of the published sizes say what their documents say, or why they do not.

Every setting of a document is equal in our recipe or stands in a list of deviations with its
reason; every key that our recipe writes comes from the document or stands in a list of our own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from reflexarc.contract import FeatureStatistics, NormalizationStatistics, PolicyContract
from reflexarc.contract.policy_contract import LIBERO_STATES, libero_action, libero_cameras
from reflexarc.policy.backbones.conv2d import RawPixels
from reflexarc.policy.processing import Processor
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.encoder import Encoder
from reflexarc.training.config_objectives import MaskedJEPAConfig
from reflexarc.training.objectives.masked_jepa import MaskedJEPAObjective
from reflexarc.training.objectives.temporal_predictor import TemporalPredictor
from reflexarc.training.recipe_files import load_recipe, recipe_stages

from .tiny_statevla import HORIZON, random_source, tiny_statevla

DOCUMENTS = yaml.safe_load(Path(__file__).with_name("statevla_documents.yaml").read_text())
RECIPES = {
    "masked": "statevla_masked_libero_object",
    "temporal": "statevla_temporal_libero_object",
}


def itself(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Same:
    """A setting that is equal. ``read`` puts the recipe's value into the document's words."""

    path: str
    read: Callable[[Any], Any] = itself


@dataclass(frozen=True)
class Differs:
    """A setting that we chose otherwise: what it is with us, and why."""

    path: str
    ours: Any
    reason: str
    read: Callable[[Any], Any] = itself


@dataclass(frozen=True)
class Inherent:
    """A setting that no recipe has, because the code has no other: what the code says of it."""

    says: Callable[[], Any]


Rule = Same | Differs | Inherent


def patches(side: int, patch: int = 16) -> int:
    return (side // patch) ** 2


def named(names: Mapping[Any, str]) -> Callable[[Any], Any]:
    """The document's word for a value; the value itself where it has none, which then differs."""
    return lambda value: names.get(tuple(value) if isinstance(value, list) else value, value)


def residual() -> bool:
    """Whether the predictor adds to z: with its last layer at zero, as it begins, it gives z."""
    z = torch.randn(2, 8)
    predictor = TemporalPredictor(8, 3, hidden=4)
    return torch.equal(predictor(z, torch.randn(2, 3)), z)


def state_projection() -> str:
    """What makes z of the encoder's last token."""
    encoder = Encoder(StateVLAConfig(d_model=8, encoder_layers=1))
    parts = [m for name, m in encoder.named_children() if name != "stack"]
    return " + ".join(type(part).__name__ for part in parts)


def lengths_of_sequences() -> tuple[int, int, int, int]:
    """Of one masked step: all tokens, visible ones of the row that hides least, and how many the
    context encoder and the target encoder read."""
    policy = tiny_statevla()
    layout = policy.token_layout
    config = MaskedJEPAConfig(predictor_layers=1, predictor_width=16, predictor_d_state=4)
    objective = MaskedJEPAObjective(config, layout=layout, gripper_index=6)
    objective.attach(policy)
    assert objective.target is not None
    read: dict[str, list[int]] = {"trained": [], "target": []}
    for name, whose in (("trained", policy.representation), ("target", objective.target)):
        whose.encoder.stack.register_forward_pre_hook(
            lambda _, inputs, name=name: read[name].append(inputs[0].shape[1])
        )
    batch = random_source(policy, seed=0, real_steps=torch.full((6,), HORIZON),
                          future_is_real=torch.ones(6, dtype=torch.bool), ahead=1).batch(
        torch.arange(6))  # fmt: skip
    draws = objective.draw(batch, torch.Generator().manual_seed(2))
    objective(policy, batch, draws)
    latents = layout.latent_tokens
    visible = int((~draws["hidden"]).sum(1).max()) + latents
    (target,) = read["target"]
    return layout.inputs + latents, visible, min(read["trained"]), target


def context_sees() -> str:
    every, visible, context, _ = lengths_of_sequences()
    return "visible tokens" if context == visible < every else "something else"


def target_sees() -> str:
    every, _, _, target = lengths_of_sequences()
    return "all tokens" if target == every else "something else"


def action_dimensions() -> int:
    return libero_action(1).dimension


def gripper_normalization() -> str:
    """Whether a normalised gripper column is the robot's own."""
    actions = np.full((1, 2, 7), 0.5)
    actions[..., 6] = [[-1.0, 1.0]]
    contract = PolicyContract(
        family="statevla",
        cameras=libero_cameras(),
        state=LIBERO_STATES["joint7+fingers2"],
        action=libero_action(2),
    )
    names, random = contract.state.names, np.random.default_rng(0)
    processor = Processor(
        contract,
        NormalizationStatistics(
            state=FeatureStatistics.from_rows(random.normal(size=(9, len(names))), names),
            action=FeatureStatistics.from_rows(random.normal(size=(9, 7)), contract.action.names),
            dataset_fingerprint="",
        ),
    )
    normalized = processor.normalize_actions(actions)[0, :, 6].tolist()
    return "none" if normalized == [-1.0, 1.0] else "some"


def sequence(cameras: list[str]) -> list[str]:
    """Names in the order of the tokenizer: language, state, cameras, latent tokens."""
    return ["language", "robot_state", *cameras, "CLS"]


CLASSIFIER = {1.0: "classifier"}
STATE_PARTS = {"joint7+fingers2": "joint(7) + gripper_fingers(2)"}
MEAN_STD = {"mean_std": "zero mean and unit deviation"}

SETTINGS: dict[str, dict[str, Rule]] = {
    "masked": {
        "training.batch_size": Same("training.batch_size"),
        "training.num_epochs": Same("training.epochs"),
        "training.learning_rate": Same("optimizer.learning_rate"),
        "training.weight_decay": Same("optimizer.weight_decay"),
        "training.gradient_clip": Same("optimizer.gradient_clip"),
        "training.jepa_loss_weight": Same("objective.jepa_weight"),
        "training.action_loss_weight": Same("objective.action_weight"),
        "training.variance_weight": Same("objective.variance_weight"),
        "training.covariance_weight": Same("objective.covariance_weight"),
        "training.ema_momentum": Same("objective.ema_start"),
        "training.ema_momentum_schedule": Same("objective.ema_schedule"),
        "training.sampling_steps": Same("policy.denoising_steps"),
        "model.action_dim": Inherent(action_dimensions),
        "model.action_seq_len": Same("contract.horizon"),
        "model.mask_ratio": Same("objective.mask_ratio"),
        "model.masking_strategy": Same("objective.masking_strategy"),
        "vision_encoder": Same("policy.vision.path"),
        "width": Same("policy.d_model"),
        "language_vectors": Same("language.encoder", named({"table": "Qwen"})),
        "language_dimension": Same("policy.language_dimension"),
        "language_table": Differs(
            "language.table",
            "language_embeddings/libero_object",
            "a folder of safetensors and JSON that says which encoder made it; opening a pickle "
            "can run code, and a .pkl is refused with the command that makes the table",
        ),
        "encoder_layers": Same("policy.encoder_layers"),
        "d_state": Same("policy.d_state"),
        "d_conv": Same("policy.d_conv"),
        "predictor_layers": Same("objective.predictor_layers"),
        "predictor_width": Same("objective.predictor_width"),
        "policy_width": Same("policy.d_model"),
        "gripper": Same("objective.gripper_weight", named(CLASSIFIER)),
        "motion": Same("objective.flow_weight", named({1.0: "flow matching"})),
        "action_normalization": Same(
            "contract.action_normalization", named({"mean_std": "position and rotation only"})
        ),
        "suite": Same("data.suite"),
        "cameras": Same("contract.cameras"),
        "image_size": Same("contract.image_size"),
        "token_order": Differs(
            "contract.cameras",
            ["language", "robot_state", "agentview", "eye_in_hand", "CLS"],
            "a causal Mamba reads images knowing the instruction, and CLS last has seen "
            "everything; with CLS first, as the published code has it, z is a constant",
            sequence,
        ),
        "camera_tokens": Same("contract.image_size", patches),
        "context_encoder_sees": Inherent(context_sees),
        "target_encoder_sees": Inherent(target_sees),
        "target_is": Differs(
            "objective.name",
            "masked_jepa",
            "the target is a copy of the whole representation: tokenizer, encoder and projection "
            "to z; with the encoder alone it would read tokens that the trained branch moves",
        ),
        "policy_sees": Differs(
            "objective.action_gradient_into_encoder",
            True,
            "the action policy sees z of the unmasked pass, as it does when it is served; the "
            "published code conditions it on zeros",
        ),
        "best_checkpoint_by": Differs(
            "training.best_metric",
            "action_mae",
            "the training loss has terms against a moving target; held-out episodes choose",
        ),
    },
    "temporal": {
        "model.embed_dim": Same("policy.d_model"),
        "model.encoder_depth": Same("policy.encoder_layers"),
        "model.state_dim": Same("policy.d_model"),
        "model.action_dim": Inherent(action_dimensions),
        "model.action_seq_len": Same("contract.horizon"),
        "model.robot_state_dim": Same(
            "contract.state_layout", lambda layout: LIBERO_STATES[layout].dimension
        ),
        "training.phase1.num_epochs": Same("stages[0].training.epochs"),
        "training.phase1.learning_rate": Same("stages[0].optimizer.learning_rate"),
        "training.phase1.temporal_predictor_hidden_dim": Same(
            "stages[0].objective.predictor_hidden"
        ),
        "training.phase2.num_epochs": Same("stages[1].training.epochs"),
        "training.phase2.learning_rate": Same("stages[1].optimizer.learning_rate"),
        "vision_tokens_by": Same("policy.vision.name", named({"conv2d": "convolved patches"})),
        "token_order": Same("contract.cameras", sequence),
        "camera_tokens": Same(
            "contract.image_size",
            lambda side: RawPixels(channels=256, pool=1).grid(side, side)[0] ** 2,
        ),
        "tokens": Same("contract.image_size", lambda side: 1 + 1 + 2 * patches(side) + 1),
        "cls_position": Same("policy.latent_tokens", named({1: "last"})),
        "predicts": Same("stages[0].objective.horizon", named({1: "one step ahead"})),
        "residual": Inherent(residual),
        "loss": Same("stages[0].objective.variance_weight", named({1.0: "MSE and VICReg"})),
        "target_is": Differs(
            "stages[0].objective.name",
            "temporal_jepa",
            "the target is a copy of the whole representation: tokenizer, encoder and projection "
            "to z; with the encoder alone it would read tokens that the trained branch moves",
        ),
        "ema_schedule": Same("stages[0].objective.ema_end", named({1.0: "cosine"})),
        "policy_layers": Same("policy.policy_layers"),
        "motion_dimensions": Inherent(lambda: action_dimensions() - 1),
        "gripper": Same("stages[1].objective.gripper_weight", named(CLASSIFIER)),
        "frozen_in_phase_2": Same("stages[1].freeze", named({("representation",): "encoder"})),
        "denoising_steps": Same("policy.denoising_steps"),
        "image_size": Same("contract.image_size"),
        "robot_state": Same("contract.state_layout", named(STATE_PARTS)),
        "action_normalization": Same("contract.action_normalization", named(MEAN_STD)),
        "gripper_normalization": Inherent(gripper_normalization),
        "state_projection": Inherent(state_projection),
        "suite": Same("data.suite"),
    },
}

THE_RECIPES_OWN = {
    "name": "the recipe's",
    "description": "the recipe's",
    "family": "the one that both documents describe",
}
# What our recipe writes and the document does not state.
OURS: dict[str, dict[str, str]] = {
    "masked": {
        **THE_RECIPES_OWN,
        "policy.expand": "mamba_ssm's default",
        "policy.latent_tokens": "1, the document's CLS",
        "policy.vision.name": "what vision.path is a folder or hub id of",
        "policy.vision.pool": "1: every patch",
        "policy.state_hidden": "the tokens' width",
        "policy.policy_layers": "as the temporal document states it",
        "policy.policy_d_state": "the published code's",
        "policy.policy_mlp_hidden": "the published code's",
        "policy.gripper_hidden": "the published code's",
        "contract.orientation": "what LIBERO's evaluation shows, in training as well",
        "contract.state_layout": "as the temporal document states it",
        "contract.state_normalization": "the state's parts differ a hundredfold in size",
        "data.validation_fraction": "the published code's train_split of 0.9, by episodes",
        "objective.max_masked_modalities": "the published code's",
        "objective.mask_probabilities.agentview": "the published code's",
        "objective.mask_probabilities.eye_in_hand": "the published code's",
        "objective.mask_probabilities.language": "the published code's",
        "objective.mask_probabilities.state": "the published code's",
        "objective.blocks": "the published code's, for the strategy block",
        "objective.block_scale": "the published code's, for the strategy block",
        "objective.block_aspect": "the published code's, for the strategy block",
        "objective.ema_end": "1: the end of the cosine",
        "objective.predictor_d_state": "the encoder's",
        "objective.time_density": "the published code's",
        "objective.state_noise": "0: none is stated",
        "schedule.name": "a constant rate ends noisier",
        "schedule.warmup_steps": "AdamW's first steps are its wildest",
        "training.seed": "a run says its seed",
        "training.log_every": "how often to report",
        "training.validate_every": "how often to validate",
        "training.checkpoint_every": "how often to save",
    },
    "temporal": {
        **THE_RECIPES_OWN,
        "policy.d_state": "as the masked document states it",
        "policy.d_conv": "as the masked document states it",
        "policy.expand": "mamba_ssm's default",
        "policy.vision.channels": "the tokens' width, as a patch convolution has it",
        "policy.vision.pool": "1: every patch",
        "policy.state_hidden": "the tokens' width",
        "policy.policy_d_state": "the published code's",
        "policy.policy_mlp_hidden": "the published code's",
        "policy.gripper_hidden": "the published code's",
        "language.encoder": "minilm needs no download; any model by a table",
        "contract.orientation": "what LIBERO's evaluation shows, in training as well",
        "contract.state_normalization": "the state's parts differ a hundredfold in size",
        "data.validation_fraction": "the published code's train_split of 0.9, by episodes",
        "stages[0].name": "the stage's",
        "stages[1].name": "the stage's",
        "stages[0].objective.covariance_weight": "as the masked document states it",
        "stages[0].objective.ema_start": "as the masked document states it",
        "stages[0].freeze": "the action heads are not trained in the first stage",
        "stages[1].objective.name": "the stage's objective",
        "stages[1].objective.flow_weight": "1, beside a gripper of 1",
        "stages[1].objective.time_density": "the published code's",
        "stages[1].objective.state_noise": "0: none is stated",
        **{
            f"stages[{stage}].{key}": reason
            for stage in (0, 1)
            for key, reason in {
                "optimizer.weight_decay": "as the masked document states it",
                "optimizer.gradient_clip": "as the masked document states it",
                "schedule.name": "a constant rate ends noisier",
                "schedule.warmup_steps": "AdamW's first steps are its wildest",
                "training.batch_size": "none is stated that fits one GPU for pixels",
                "training.seed": "a run says its seed",
                "training.log_every": "how often to report",
                "training.validate_every": "how often to validate",
                "training.checkpoint_every": "how often to save",
                "training.best_metric": "held-out episodes choose, not the training loss",
            }.items()
        },
    },
}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for place, one in enumerate(value):
                flat.update(flatten(one, f"{prefix}{key}[{place}]."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def written_keys(recipe: str) -> set[str]:
    """The dotted keys that stand in a packaged recipe's file."""
    file = resources.files("reflexarc.training") / "recipes" / f"{recipe}.yaml"
    return set(flatten(yaml.safe_load(file.read_text())))


def settings_of(recipe: str) -> dict[str, Any]:
    """All settings with defaults filled in; those of stages under ``stages[0].`` and so on."""
    stages = recipe_stages(recipe)
    if not stages:
        return flatten(load_recipe(recipe).model_dump(mode="json"))
    settings: dict[str, Any] = {}
    for place in range(len(stages)):
        values = load_recipe(recipe, stage=place + 1).model_dump(mode="json")
        flat = flatten(values)
        settings |= flat | {f"stages[{place}].{key}": value for key, value in flat.items()}
    return settings


def stated(family: str) -> dict[str, Any]:
    """Every setting of a document."""
    document = DOCUMENTS[family]
    return document["configuration"] | {k: v["value"] for k, v in document["stated"].items()}


def differences(family: str, settings: Mapping[str, Any]) -> list[str]:
    """What of a document our settings neither equal nor are excused for, in words."""
    wrong = []
    for key, value in stated(family).items():
        rule = SETTINGS[family].get(key)
        if rule is None:
            wrong.append(f"{key}: {value!r} has no counterpart")
            continue
        if isinstance(rule, Differs):
            ours, expected, place = rule.read(settings[rule.path]), rule.ours, rule.path
        elif isinstance(rule, Same):
            ours, expected, place = rule.read(settings[rule.path]), value, rule.path
        else:
            ours, expected, place = rule.says(), value, "the code"
        if ours != expected:
            wrong.append(f"{key}: {value!r} in the document, {ours!r} by {place}")
    unknown = SETTINGS[family].keys() - stated(family).keys()
    return wrong + [f"{key}: not in the document" for key in sorted(unknown)]


def path_of(rule: Rule) -> str | None:
    return None if isinstance(rule, Inherent) else rule.path


families = pytest.mark.parametrize("family", sorted(SETTINGS))


@families
def test_every_setting_of_the_document_is_ours_or_has_a_reason(family: str) -> None:
    assert differences(family, settings_of(RECIPES[family])) == []
    for rule in SETTINGS[family].values():
        if isinstance(rule, Differs):
            assert len(rule.reason) > 20


@families
def test_every_key_that_our_recipe_writes_is_accounted_for(family: str) -> None:
    written = written_keys(RECIPES[family])
    compared = {path for rule in SETTINGS[family].values() if (path := path_of(rule))}
    unknown = written - compared - OURS[family].keys()
    assert not unknown, f"neither the document's nor listed as ours: {sorted(unknown)}"
    gone = OURS[family].keys() - written
    assert not gone, f"listed as ours, but not in the recipe: {sorted(gone)}"
    both = compared & OURS[family].keys()
    assert not both, f"the document states it: {sorted(both)}"


@families
def test_a_difference_that_is_not_listed_is_found(family: str) -> None:
    """Each compared setting, changed: the comparison names it."""
    settings = settings_of(RECIPES[family])
    for key, rule in SETTINGS[family].items():
        path = path_of(rule)
        if path is None:
            continue
        before = settings[path]
        other = 2 * before + 1 if isinstance(before, int | float) else "another"
        if isinstance(before, list):
            other = ["another"]
        try:
            found = differences(family, settings | {path: other})
        except (KeyError, ValueError, TypeError):
            continue  # a layout or size that nothing has
        assert any(line.startswith(f"{key}:") for line in found), key


@pytest.fixture
def documents() -> Path:
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("REFLEXARC_SHARED_DATA", beside)).parent / "seeds"
    if not folder.is_dir():
        pytest.skip("the documents are not here")
    return folder


@families
def test_the_transcription_is_the_documents(family: str, documents: Path) -> None:
    (path,) = documents.glob(f"{DOCUMENTS[family]['document']}_*.txt")
    text = path.read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```yaml\n")[1:]]
    configuration: dict[str, Any] = {}
    for block in blocks:
        configuration |= flatten(yaml.safe_load(block))
    assert DOCUMENTS[family]["configuration"] == configuration
    for key, fact in DOCUMENTS[family]["stated"].items():
        assert fact["says"] in text, key
