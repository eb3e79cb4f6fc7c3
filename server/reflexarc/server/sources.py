"""What the command line's options ask to serve: a checkpoint, a user's class, or no weights.

Everything that can be refused is refused here, before a port opens; the policy itself is built by
``load``, in the thread that will run it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError, MissingExtraError
from reflexarc.policy.entry_points import import_entry_point, import_object, installed_policies
from reflexarc.server.inference import Inference
from reflexarc.server.null_policy import BRING_UP_POLICIES, bring_up_contract
from reflexarc.server.user_policy import UserPolicy, check_policy_class

if TYPE_CHECKING:
    from reflexarc.policy.interface import Policy


@dataclass(frozen=True)
class PolicySource:
    """Something to serve.

    Attributes:
        title: what it is, for people.
        contract: where it is known before the policy is built.
        load: builds the policy; to be called once.
        device: where it runs, if that is known here.
    """

    title: str
    contract: PolicyContract | None
    load: Callable[[], Inference]
    device: str | None = None


def checkpoint_source(
    directory: Path,
    *,
    policy: str | None = None,
    search: Path | None = None,
    device: str = "auto",
    denoising_steps: int | None = None,
    max_batch: int | None = None,
    compile_mode: str = "auto",
    precision: str = "fp32",
) -> PolicySource:
    """A checkpoint's folder, verified.

    Args:
        compile_mode: how it computes; see ``reflexarc.policy.decisions``.
        precision: in what; see ``reflexarc.policy.half_precision``.
        policy: the class of the checkpoint's family, as ``module:Class`` or an entry point's
            name, for a family that this process does not know by itself.
        search: a directory whose modules ``policy`` may name, beside installed ones.

    Raises CheckpointError, DoesNotFitError where memory is short, or ConfigError where class and
    checkpoint do not belong together.
    """
    from reflexarc.policy.checkpoint_files import resolve_checkpoint
    from reflexarc.policy.decisions import check_mode
    from reflexarc.policy.devices import resolve_device
    from reflexarc.policy.half_precision import check_precision
    from reflexarc.policy.registry import policy_class
    from reflexarc.server.loading import CheckpointPolicy, verify_checkpoint
    from reflexarc.server.memory import check_fits

    family = None if policy is None else _register_family(policy, search)
    folder = resolve_checkpoint(directory)
    resolved = str(resolve_device(device))
    check_fits(folder, resolved)  # before its files are read to compare their hashes
    contract = verify_checkpoint(directory, family)
    mode = check_mode(compile_mode, resolved)
    family = policy_class(contract.family) if precision == "bf16" else None
    checked = check_precision(precision, family)
    return PolicySource(
        str(directory),
        contract,
        partial(
            CheckpointPolicy.load,
            directory,
            resolved,
            denoising_steps=denoising_steps,
            max_batch=max_batch,
            compile_mode=mode,
            precision=checked,
        ),
        resolved,
    )


def policy_source(
    policy: str,
    *,
    config: Path | None = None,
    contract: Path | None = None,
    search: Path | None = None,
) -> PolicySource:
    """A policy without a checkpoint: ``random``, ``zero``, a plain class or an entry point.

    Args:
        config: JSON or YAML file with keyword arguments of a plain class.
        contract: JSON file with the contract of ``random`` and ``zero``.
        search: a directory whose modules ``policy`` may name, beside installed ones.

    Raises ConfigError naming what is wrong and the mend.
    """
    if policy in BRING_UP_POLICIES:
        if config is not None:
            raise ConfigError(f"--policy {policy} takes no --policy-config", field="policy_config")
        given = None if contract is None else read_contract_file(contract)
        served = bring_up_contract(policy, given)
        inference = BRING_UP_POLICIES[policy](served)
        return PolicySource(f"the policy {policy!r}, no weights", served, lambda: inference)
    if contract is not None:
        raise ConfigError(
            "--contract goes with --policy random or zero; a class brings its own contract",
            field="contract",
        )
    found = find_policy(policy, search)
    if _is_family(found):
        raise ConfigError(
            f"{policy} is a Policy family, whose weights come from a checkpoint: add --ckpt DIR",
            field="policy",
        )
    policy_class = check_policy_class(policy, found)
    keywords = {} if config is None else read_policy_config(config)
    stated = getattr(policy_class, "contract", None)
    return PolicySource(
        policy,
        stated if isinstance(stated, PolicyContract) else None,
        partial(UserPolicy, policy_class, policy, keywords),
    )


def find_policy(policy: str, search: Path | None) -> object:
    """What ``module:Class`` or an entry point's name leads to. Raises ConfigError."""
    if ":" in policy:
        return import_object(policy, search=search)
    if policy in installed_policies():
        return import_entry_point(policy)
    installed = ", ".join(sorted(installed_policies())) or "none"
    raise ConfigError(
        f"--policy {policy!r} is unknown; write {', '.join(BRING_UP_POLICIES)}, module:Class, or "
        f"the name of an installed package's policy (installed: {installed})",
        field="policy",
    )


def read_contract_file(path: Path) -> PolicyContract:
    """The contract in a JSON file: alone, or under "contract" as in policy.json and /v1/contract.

    Raises ConfigError naming file and field.
    """
    value = _read_json(path, "contract")
    if isinstance(value, Mapping) and isinstance(value.get("contract"), Mapping):
        value = value["contract"]
    try:
        return PolicyContract.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "contract"
        raise ConfigError(
            f"{path} holds no contract: {where}: {first['msg']}; take the one in a checkpoint's "
            "policy.json, or what GET /v1/contract answers",
            field=where,
        ) from error


def read_policy_config(path: Path) -> dict[str, Any]:
    """Keyword arguments from a JSON or YAML file. Raises ConfigError, MissingExtraError."""
    if path.suffix in (".yaml", ".yml"):
        value = _read_yaml(path)
    elif path.suffix == ".json":
        value = _read_json(path, "policy_config")
    else:
        raise ConfigError(
            f"--policy-config {path}: name a .json, .yaml or .yml file", field="policy_config"
        )
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(
            f"{path} must hold names and values, the keyword arguments of the class; it holds a "
            f"{type(value).__name__}",
            field="policy_config",
        )
    return value


def _read_json(path: Path, field: str) -> object:
    try:
        return json.loads(_read_text(path, field))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}", field=field) from error


def _read_yaml(path: Path) -> object:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("a YAML --policy-config", "train", "yaml") from error
    try:
        return yaml.safe_load(_read_text(path, "policy_config"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", field="policy_config") from error


def _read_text(path: Path, field: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field=field) from error


def _is_family(found: object) -> bool:
    """Whether it derives from Policy; the interface, and torch, are not imported for that."""
    interface = sys.modules.get("reflexarc.policy.interface")
    return interface is not None and isinstance(found, type) and issubclass(found, interface.Policy)


def _register_family(policy: str, search: Path | None) -> type[Policy]:
    from reflexarc.policy.registry import register

    if policy in BRING_UP_POLICIES:
        raise ConfigError(
            f"--policy {policy} has no weights: give --contract CHECKPOINT/policy.json in the "
            "place of --ckpt",
            field="policy",
        )
    found = find_policy(policy, search)
    if not _is_family(found):
        raise ConfigError(
            f"{policy} does not derive from reflexarc.policy.interface.Policy and reads no "
            "checkpoint; leave out --ckpt, and give its arguments with --policy-config",
            field="policy",
        )
    return register(found)  # type: ignore[arg-type]
