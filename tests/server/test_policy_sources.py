"""What serve-policy's options lead to: checkpoints, users' classes, entry points, no weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reflexarc.client import PolicyClient
from reflexarc.contract import Observation, PolicyContract, ReflexarcError
from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.contract.policy_contract import LIBERO_STATE_JOINT
from reflexarc.server import BackgroundServer, libero_contract
from reflexarc.server.loading import blank_observation
from reflexarc.server.sources import (
    PolicySource,
    checkpoint_source,
    policy_source,
    read_contract_file,
    read_policy_config,
)

PLAIN = """
import numpy as np
from reflexarc.server import libero_contract

class Plain:
    def __init__(self, value=0.5):
        self.contract = libero_contract(horizon=3)
        self.value = value

    def infer(self, observation):
        return np.full((3, 7), self.value)

plain = Plain()

class NoInfer:
    contract = libero_contract()
"""
FAMILY = """
from reflexarc.policy.statevla.model import StateVLA

class Mine(StateVLA):
    family = "mine"
"""
MODULES = {
    "plain": PLAIN,
    "family": FAMILY,
    "broken": "value = 1 / 0\n",
    "misspelt": "import nnumpy\n",
    "syntax": "def f(:\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules that only ``search`` finds."""
    package = tmp_path / "users_code"
    package.mkdir()
    for name, text in MODULES.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "users_code"]:
        del sys.modules[name]


def ask(source: PolicySource, **fields: object) -> np.ndarray:  # type: ignore[type-arg]
    with BackgroundServer(source.load) as server, PolicyClient(server.url) as client:
        observation = blank_observation(client.contract, "x")
        return client.infer(Observation(**{**vars(observation), **fields})).actions  # type: ignore[arg-type]


def test_module_and_class_from_a_folder(folder: Path) -> None:
    source = policy_source("users_code.plain:Plain", search=folder)
    assert source.contract is None, "an instance's contract is known when it is built"
    np.testing.assert_array_equal(ask(source), np.full((3, 7), 0.5))


@pytest.mark.parametrize(
    ("name", "text"), [("c.json", '{"value": 0.25}'), ("c.yaml", "value: 0.25\n")]
)
def test_policy_config_gives_keyword_arguments(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    source = policy_source("users_code.plain:Plain", config=folder / name, search=folder)
    np.testing.assert_array_equal(ask(source), np.full((3, 7), 0.25))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("users_code.nothing:Plain", "no module 'users_code.nothing'"),
        ("nowhere.plain:Plain", "no module 'nowhere'"),
        ("users_code.plain:Plane", "has no 'Plane'; classes there: NoInfer, Plain"),
        ("users_code.plain:plain", "not a class"),
        ("users_code.plain:NoInfer", "no method infer"),
        ("users_code.broken:X", r"ZeroDivisionError: division by zero \(.*broken.py, line 1\)"),
        ("users_code.misspelt:X", "imports 'nnumpy', which is not installed"),
        ("users_code.syntax:X", "SyntaxError"),
        ("users_code/plain.py:Plain", "write module:Class"),
        (":Plain", "write module:Class"),
        ("users_code.family:Mine", "add --ckpt"),
        ("nobody", "is unknown; write random, zero, module:Class"),
        ("", "is unknown"),
    ],
)
def test_a_class_that_is_not_there_is_named(folder: Path, policy: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        policy_source(policy, search=folder)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("none.json", None, "cannot be read"),
        ("bad.json", "{", "is not JSON"),
        ("bad.yaml", "a: [", "is not YAML"),
        ("list.json", "[1]", "it holds a list"),
        ("numbers.yaml", "1: 2", "names and values"),
        ("other.toml", "a = 1", ".json, .yaml or .yml"),
    ],
)
def test_wrong_config_files_are_named(
    tmp_path: Path, name: str, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=expected) as refused:
        read_policy_config(tmp_path / name)
    assert name in refused.value.message


def test_yaml_config_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_policy_config(path)
    assert not (tmp_path / "made").exists()


def save_as(family: str, checkpoint: Path, target: Path) -> Path:
    """A copy of a checkpoint under another family's name, as that family would have saved it."""
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((target / "policy.json").read_text())
    (target / "policy.json").write_text(json.dumps({**manifest, "family": family}))
    return target


def test_family_outside_the_registry(folder: Path, tiny_checkpoint: Path) -> None:
    mine = save_as("mine", tiny_checkpoint, folder / "mine")
    with pytest.raises(CheckpointError, match="unknown policy family 'mine'"):
        checkpoint_source(mine, device="cpu").load()
    source = checkpoint_source(mine, policy="users_code.family:Mine", search=folder, device="cpu")
    from reflexarc.policy import registry

    try:
        inference = source.load()
        assert "Mine" in repr(registry.policy_class("mine"))
        observation = blank_observation(
            inference.contract, "pick up the alphabet soup and place it in the basket"
        )
        (chunk,) = inference.infer([observation])
        (same,) = checkpoint_source(tiny_checkpoint, device="cpu").load().infer([observation])
        np.testing.assert_array_equal(chunk.actions, same.actions)
    finally:
        registry._registered.pop("mine")


def test_class_and_checkpoint_must_belong_together(folder: Path, tiny_checkpoint: Path) -> None:
    from reflexarc.policy import registry

    try:
        with pytest.raises(CheckpointError, match="family 'statevla', the class Mine is 'mine'"):
            checkpoint_source(
                tiny_checkpoint, policy="users_code.family:Mine", search=folder, device="cpu"
            )
    finally:
        registry._registered.pop("mine")
    for policy, expected in (
        ("users_code.plain:Plain", "leave out --ckpt"),
        ("zero", "has no weights"),
    ):
        with pytest.raises(ConfigError, match=expected):
            checkpoint_source(tiny_checkpoint, policy=policy, search=folder, device="cpu")


def test_contract_files_in_each_form(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with BackgroundServer(policy_source("zero").load) as server, PolicyClient(server.url) as client:
        answered = {key: client.metadata[key] for key in ("protocol", "contract")}
        served = client.contract
    (tmp_path / "answered.json").write_text(json.dumps(answered))
    (tmp_path / "alone.json").write_text(served.model_dump_json())
    assert read_contract_file(tmp_path / "answered.json") == served
    assert read_contract_file(tmp_path / "alone.json") == served
    of_checkpoint = read_contract_file(tiny_checkpoint / "policy.json")
    assert of_checkpoint.family == "statevla"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "family: Field required"),
        ("[]", "holds no contract"),
        ('{"contract": {"family": "x", "colour": 1}}', "policy.json"),
        ("nonsense", "is not JSON"),
    ],
)
def test_wrong_contract_files_are_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "contract.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as refused:
        policy_source("random", contract=path)
    assert str(path) in refused.value.message


def written(contract: PolicyContract, path: Path) -> Path:
    path.write_text(contract.model_dump_json())
    return path


def test_zero_stands_still_with_an_open_gripper(tmp_path: Path) -> None:
    expected = np.zeros((10, 7), np.float32)
    expected[:, 6] = -1
    np.testing.assert_array_equal(ask(policy_source("zero")), expected)
    velocity = libero_contract().action.model_copy(
        update={"kind": "velocity", "gripper": None, "horizon": 2}
    )
    contract = libero_contract().model_copy(update={"action": velocity})
    file = written(contract, tmp_path / "velocity.json")
    np.testing.assert_array_equal(ask(policy_source("zero", contract=file)), np.zeros((2, 7)))


def test_random_fills_the_contracts_limits_by_the_seed(tmp_path: Path) -> None:
    base = libero_contract(horizon=500).model_copy(update={"state": LIBERO_STATE_JOINT})
    action = base.action.model_copy(update={"low": (-2.0, *(0.0,) * 6), "high": (3.0,) * 7})
    file = written(base.model_copy(update={"action": action}), tmp_path / "c.json")
    source = policy_source("random", contract=file)
    assert source.contract is not None and source.contract.state == LIBERO_STATE_JOINT
    first, again, other = (ask(source, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert first[:, 0].min() == pytest.approx(-2, abs=0.1)
    assert first[:, 1:].min() >= 0 and first.max() == pytest.approx(3, abs=0.1)


def test_noise_does_not_pass_for_the_checkpoint(tiny_checkpoint: Path) -> None:
    contract = policy_source("random", contract=tiny_checkpoint / "policy.json").contract
    assert contract is not None
    assert (contract.family, contract.checkpoint_fingerprint, contract.statistics_sha256) == (
        "random", "", "",
    )  # fmt: skip


def test_limits_that_allow_no_action_are_refused(tmp_path: Path) -> None:
    base = libero_contract()
    for policy, low, expected in (("random", 2.0, "are no range"), ("zero", 0.5, "leave out 0")):
        action = base.action.model_copy(update={"low": (low, *(-1.0,) * 6)})
        contract = base.model_copy(update={"action": action})
        with pytest.raises(ConfigError, match=f"delta_x.*{expected}"):
            policy_source(policy, contract=written(contract, tmp_path / f"{policy}.json"))


def test_options_that_do_not_belong_together(tmp_path: Path) -> None:
    file = written(libero_contract(), tmp_path / "c.json")
    cases = [({"policy": "zero", "config": file}, "takes no --policy-config"),
             ({"policy": "m:C", "contract": file}, "brings its own contract")]  # fmt: skip
    for arguments, expected in cases:
        with pytest.raises(ReflexarcError, match=expected):
            policy_source(**arguments)  # type: ignore[arg-type]
