"""Which columns and cameras of a LeRobot dataset are what in a contract."""

from __future__ import annotations

import re
from collections.abc import Mapping as AnyMapping
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import ActionKind, ActionSpec, Gripper, StateSpec
from reflexarc.data.lerobot.info import DatasetInfo, Slice, parse_slice

_PREFIXES = ("observation.images.", "observation.image.", "observation.")
STATE_KEY, ACTION_KEY = "observation.state", "action"
UNLIMITED = 1e6
"""What bounds an action where nothing else does; training puts the demonstrated range here."""


@dataclass(frozen=True)
class Part:
    """Some columns of one feature, under the name that the contract gives them.

    ``names`` are those of its dimensions.
    """

    name: str
    columns: Slice
    names: tuple[str, ...]


@dataclass(frozen=True)
class ActionMeaning:
    """What numbers do not say of actions.

    Attributes:
        kind: whether they are targets or changes.
        gripper: name of the part of one dimension that a classifier commands, None without.
        gripper_open, gripper_closed: its commands.
    """

    kind: ActionKind = "position"
    gripper: str | None = None
    gripper_open: float = 0.0
    gripper_closed: float = 1.0


@dataclass(frozen=True)
class Mapping:
    """A dataset as a contract sees it.

    Attributes:
        state, action: parts in the order of the contract's vectors.
        cameras: the contract's name to the feature.
        fps: rows a second.
        widths: declared columns of each feature that is used.
    """

    state: tuple[Part, ...]
    action: tuple[Part, ...]
    cameras: AnyMapping[str, str]
    fps: float
    meaning: ActionMeaning = field(default_factory=ActionMeaning)
    widths: AnyMapping[str, int] = field(default_factory=dict)

    @cached_property
    def state_spec(self) -> StateSpec:
        layout = "+".join(f"{part.name}{part.columns.width}" for part in self.state)
        return StateSpec(layout=layout, names=_joined(self.state))

    def action_spec(self, horizon: int) -> ActionSpec:
        names = _joined(self.action)
        return ActionSpec(
            names=names,
            horizon=horizon,
            kind=self.meaning.kind,
            control_hz=self.fps,
            low=(-UNLIMITED,) * len(names),
            high=(UNLIMITED,) * len(names),
            gripper=self._gripper(),
        )

    def _gripper(self) -> Gripper | None:
        wanted = self.meaning.gripper
        if wanted is None:
            return None
        column = 0
        for part in self.action:
            for name in part.names:
                if wanted == name or (wanted == part.name and len(part.names) == 1):
                    return Gripper(
                        index=column,
                        open=self.meaning.gripper_open,
                        closed=self.meaning.gripper_closed,
                    )
                column += 1
        raise DatasetError(
            f"the gripper {wanted!r} is none of the action's dimensions: "
            f"{', '.join(_joined(self.action))}",
            field="gripper",
        )


def make_mapping(
    info: DatasetInfo,
    absent_cameras: Sequence[str],
    *,
    state: AnyMapping[str, str] | Sequence[str] | None = None,
    action: AnyMapping[str, str] | Sequence[str] | None = None,
    cameras: AnyMapping[str, str] | Sequence[str] | None = None,
    meaning: ActionMeaning | None = None,
) -> Mapping:
    """Resolve names against what the dataset has.

    A part is a name of ``modality.json`` (``left_arm``), a feature (``observation.state``) or
    columns of one (``observation.state[0:7]``). A map gives parts and cameras the names that the
    contract uses for them; a list takes them under their own.

    Args:
        info: the dataset's ``info.json``.
        absent_cameras: declared, but without files.
        state, action: by default all of ``observation.state`` and ``action``.
        cameras: by default every camera that is there, under its short name.

    Raises:
        DatasetError: naming what the dataset does not have, and what it has.
    """
    state_parts = _parts(info, state, info.modality.state, STATE_KEY)
    action_parts = _parts(info, action, info.modality.action, ACTION_KEY)
    used = {part.columns.key for part in (*state_parts, *action_parts)}
    return Mapping(
        state=state_parts,
        action=action_parts,
        cameras=_cameras(info, absent_cameras, cameras),
        fps=info.fps,
        meaning=meaning or ActionMeaning(),
        widths={key: info.features[key].shape[0] for key in used},
    )


def camera_names(info: DatasetInfo, absent: Sequence[str]) -> dict[str, str]:
    """Short name to feature of every camera that is there; GR00T's names where it gives them."""
    by_feature = {feature: name for name, feature in info.modality.cameras.items()}
    present = [key for key in info.image_features if key not in absent]
    return {by_feature.get(key) or _short(key): key for key in present}


def parts_from_layout(layout: str, known: AnyMapping[str, int]) -> list[str] | None:
    """``left_arm7+hand6`` to its parts' names, where ``known`` has them with that width."""
    names = []
    for text in layout.split("+"):
        fitting = [n for n, width in known.items() if text == f"{n}{width}"]
        if not fitting:
            return None
        names.append(fitting[0])
    return names


def known_parts(info: DatasetInfo, parts: AnyMapping[str, Slice]) -> dict[str, int]:
    """Widths of everything that may be named as a part, by the name that a layout gives it."""
    vectors = {
        key: feature.shape[0]
        for key, feature in info.features.items()
        if not feature.is_image and len(feature.shape) == 1
    }
    return {
        **{_short(key): width for key, width in vectors.items()},
        **{name: columns.width for name, columns in parts.items()},
    }


def _parts(
    info: DatasetInfo,
    wanted: AnyMapping[str, str] | Sequence[str] | None,
    known: AnyMapping[str, Slice],
    default: str,
) -> tuple[Part, ...]:
    if wanted is None:
        wanted = [default]
    pairs: list[tuple[str | None, str]] = (
        list(wanted.items()) if isinstance(wanted, AnyMapping) else [(None, n) for n in wanted]
    )
    if not pairs:
        raise DatasetError(f"{info.root}: no parts of {default} are named", field=default)
    return tuple(_part(info, name, text, known, default) for name, text in pairs)


def _part(
    info: DatasetInfo, name: str | None, text: str, known: AnyMapping[str, Slice], default: str
) -> Part:
    key, start, end = parse_slice(text)
    if key in known:
        inside = known[key]
        base, width = inside.start, inside.width
        feature, own = info.vector(inside.key), key
    else:
        # The name that a layout gives to a whole feature is its short one.
        key = next((k for k in info.features if key in (k, _short(k))), key)
        if key not in info.features:
            there = ", ".join((*known, *(k for k, f in info.features.items() if not f.is_image)))
            raise DatasetError(
                f"{info.root} has no {text!r} for {default}; it has: {there}", field=default
            )
        feature = info.vector(key)
        base, width, own = 0, feature.shape[0], _short(key)
    first, last = (0, width) if start is None or end is None else (start, end)
    if not 0 <= first < last <= width:
        raise DatasetError(
            f"{info.root}: {text!r} lies outside the {width} columns of {key}", field=default
        )
    columns = Slice(feature.key, base + first, base + last)
    own_names = name is None
    if name is None:
        name = own if start is None else f"{own}_{first}_{last}"
    whole = own_names and (columns.start, columns.end) == (0, feature.shape[0])
    if columns.width == 1:
        names: tuple[str, ...] = (name,)
    elif whole and feature.names and len(set(feature.names)) == len(feature.names):
        names = feature.names
    else:
        names = tuple(f"{name}_{i}" for i in range(columns.width))
    return Part(name, columns, names)


def _cameras(
    info: DatasetInfo,
    absent: Sequence[str],
    wanted: AnyMapping[str, str] | Sequence[str] | None,
) -> dict[str, str]:
    present = camera_names(info, absent)
    if wanted is None:
        return present
    pairs = wanted.items() if isinstance(wanted, AnyMapping) else [(n, n) for n in wanted]
    found = {}
    for name, text in pairs:
        feature = present.get(text) or info.modality.cameras.get(text) or text
        if feature not in present.values():
            candidates = [key for key in absent if feature == key or _short(key) == text]
            why = (
                f"info.json declares {candidates[0]!r}, but there is no file of it"
                if candidates
                else f"there is no camera {text!r}"
            )
            raise DatasetError(
                f"{info.root}: {why}; cameras that are there: {', '.join(present) or 'none'}",
                field=name,
            )
        found[name] = feature
    return found


def _short(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return re.sub(r"\W+", "_", key.removeprefix(prefix))
    return re.sub(r"\W+", "_", key)


def _joined(parts: Sequence[Part]) -> tuple[str, ...]:
    """Names of all dimensions; a name that comes twice is told apart by its part."""
    flat = [(part.name, name) for part in parts for name in part.names]
    names = [name for _, name in flat]
    return tuple(name if names.count(name) == 1 else f"{part}.{name}" for part, name in flat)
