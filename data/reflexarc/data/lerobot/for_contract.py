"""Open a LeRobot folder for a policy that exists: its contract says what it wants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import PolicyContract
from reflexarc.data.lerobot.dataset import LeRobotDataset, open_lerobot
from reflexarc.data.lerobot.info import DatasetInfo, Slice, read_info
from reflexarc.data.lerobot.mapping import ActionMeaning, known_parts, parts_from_layout
from reflexarc.data.lerobot.recipe_names import RecipeNames

_RENAMED = (
    "Where the policy's recipe renamed or sliced parts, name it: --recipe RUN, its folder or its "
    "recipe.yaml"
)


def open_for_contract(
    root: Path, contract: PolicyContract, names: RecipeNames | None = None
) -> LeRobotDataset:
    """The folder with state, action and cameras as ``contract`` names them.

    Args:
        root: the folder.
        contract: of the policy.
        names: what its recipe called the folder's parts. Without them parts are found by the
            names that the contract's layout and its dimensions carry; what a recipe renamed or
            sliced is then found only in a dataset that uses the contract's names.

    Raises DatasetError naming what the folder does not have.
    """
    if names is not None:
        dataset = names.open(root, contract.camera_names)
    else:
        dataset = _open_by_contract(root, contract)
    layout = dataset.layout(contract.state.layout)
    for what, wanted, given in (
        ("state", contract.state.names, dataset.state_spec(layout).names),
        ("action", contract.action.names, dataset.action_spec(1).names),
    ):
        if wanted != given:
            raise DatasetError(
                f"{root}: its {what} is {', '.join(given)}; the policy's is {', '.join(wanted)}",
                field=what,
            )
    for camera in contract.cameras:
        if camera.name not in dataset.cameras or camera.orientation not in dataset.orientations:
            raise DatasetError(
                f"{root}: the policy sees camera {camera.name!r}, {camera.orientation}; the "
                f"dataset has {', '.join(dataset.cameras)}, {' or '.join(dataset.orientations)}",
                field=f"images.{camera.name}",
            )
    return dataset


def _open_by_contract(root: Path, contract: PolicyContract) -> LeRobotDataset:
    info = read_info(root)
    dataset = open_lerobot(root)
    if dataset.libero is not None:
        return dataset
    gripper = contract.action.gripper
    return open_lerobot(
        root,
        state=_state(info, contract),
        action=_action(info, contract),
        cameras=contract.camera_names,
        meaning=ActionMeaning(
            kind=contract.action.kind,
            gripper=None if gripper is None else contract.action.names[gripper.index],
            gripper_open=0.0 if gripper is None else gripper.open,
            gripper_closed=1.0 if gripper is None else gripper.closed,
        ),
    )


def _state(info: DatasetInfo, contract: PolicyContract) -> list[str]:
    known = known_parts(info, info.modality.state)
    parts = parts_from_layout(contract.state.layout, known)
    if parts is None:
        raise DatasetError(
            f"{info.root} does not have the policy's state {contract.state.layout!r}; it has: "
            f"{_listed(known)}. {_RENAMED}",
            field="state",
        )
    return parts


def _action(info: DatasetInfo, contract: PolicyContract) -> list[str]:
    """The parts whose dimensions' names follow one another in the contract."""
    known = _named_parts(info, info.modality.action)
    wanted, parts = contract.action.names, []
    while wanted:
        fitting = [n for n, names in known.items() if names == wanted[: len(names)]]
        if not fitting:
            raise DatasetError(
                f"{info.root} does not have the policy's action {wanted[0]!r}; it has: "
                f"{_listed({name: len(names) for name, names in known.items()})}. {_RENAMED}",
                field="action",
            )
        best = max(fitting, key=lambda name: len(known[name]))
        parts.append(best)
        wanted = wanted[len(known[best]) :]
    return parts


def _named_parts(info: DatasetInfo, parts: Mapping[str, Slice]) -> dict[str, tuple[str, ...]]:
    """Part to the names that :func:`make_mapping` gives its dimensions."""
    named = {
        name: (name,) if width == 1 else tuple(f"{name}_{i}" for i in range(width))
        for name, width in known_parts(info, parts).items()
    }
    for feature in info.features.values():
        if feature.names:
            named[feature.key] = feature.names
    return named


def _listed(known: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({width})" for name, width in known.items())
