"""What a recipe calls the parts and cameras of a LeRobot folder, from its ``data`` section.

Recipes belong to training; here they are maps as YAML or JSON gives them, so that whatever was
trained by one can be evaluated and probed through the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import ActionKind
from reflexarc.data.lerobot.dataset import LeRobotDataset, open_lerobot
from reflexarc.data.lerobot.mapping import ActionMeaning
from reflexarc.data.lerobot.video_decoder import TOLERANCE

Names = Mapping[str, str] | Sequence[str] | None
"""See :func:`reflexarc.data.lerobot.mapping.make_mapping`."""

_KINDS = get_args(ActionKind)


@dataclass(frozen=True)
class RecipeNames:
    """How a folder is opened. ``tolerance``: seconds between a frame and its row's timestamp."""

    state: Names = None
    action: Names = None
    cameras: Names = None
    meaning: ActionMeaning = field(default_factory=ActionMeaning)
    tolerance: float = TOLERANCE

    def open(
        self,
        root: Path,
        cameras: Sequence[str],
        *,
        frame_stride: int = 1,
        weight: float = 1.0,
    ) -> LeRobotDataset:
        """The folder by these names, with ``cameras`` alone where it has all of them."""
        dataset = open_lerobot(
            root,
            state=self.state,
            action=self.action,
            cameras=self.cameras,
            meaning=self.meaning,
            frame_stride=frame_stride,
            tolerance=self.tolerance,
            weight=weight,
        )
        wanted = {n: f for n, f in dataset.mapping.cameras.items() if n in cameras}
        # A broken video of another camera need not stop anyone.
        return dataset.with_cameras(wanted) if set(cameras) <= wanted.keys() else dataset


def names_in_recipe(data: Mapping[str, Any], folder: Path) -> RecipeNames:
    """The names that apply to ``folder``.

    Of a mixture they are those of the source with this path, or else with a folder of this name.

    Raises ConfigError naming the key that is wrong, or the sources of which none is this folder.
    """
    source = _source_of(data, folder)
    gripper = data.get("gripper")
    if gripper is not None and not isinstance(gripper, Mapping):
        raise _wrong("gripper", gripper, "a map with name, open and closed")
    gripper = gripper or {}
    kind = data.get("action_kind") or "position"
    if kind not in _KINDS:
        raise _wrong("action_kind", kind, " or ".join(_KINDS))
    try:
        meaning = ActionMeaning(
            kind=cast("ActionKind", kind),
            gripper=None if not gripper else str(gripper["name"]),
            gripper_open=float(gripper.get("open", 0.0)),
            gripper_closed=float(gripper.get("closed", 1.0)),
        )
        tolerance = float(data.get("timestamp_tolerance") or TOLERANCE)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the recipe's data section is wrong: {type(error).__name__} {error}", field="data"
        ) from error
    state, action, cameras = (
        _names(source.get(key) or data.get(key), key) for key in ("state", "action", "cameras")
    )
    return RecipeNames(state, action, cameras, meaning, tolerance)


def _source_of(data: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    sources = [s for s in data.get("sources") or () if isinstance(s, Mapping) and s.get("path")]
    if not sources:
        return {}
    paths = [Path(str(source["path"])) for source in sources]
    found = [s for s, p in zip(sources, paths, strict=True) if p.resolve() == folder.resolve()]
    found = found or [s for s, p in zip(sources, paths, strict=True) if p.name == folder.name]
    if len(found) != 1:
        raise ConfigError(
            f"{folder} is none of the recipe's sources, whose parts differ: "
            f"{', '.join(map(str, paths))}; name one of them",
            field="data.sources",
        )
    return found[0]


def _names(value: Any, key: str) -> Names:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(name): str(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [str(part) for part in value]
    raise _wrong(key, value, "a list of names or a map of names")


def _wrong(key: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(
        f"the recipe's data.{key} is {value!r}, expected {wanted}", field=f"data.{key}"
    )
