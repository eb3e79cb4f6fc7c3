"""Several datasets that one policy learns from, mapped to one contract."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import ActionSpec, Orientation, StateSpec
from reflexarc.data.dataset import DatasetEpisode, EpisodeDataset


@dataclass(frozen=True)
class Mixture:
    """The episodes of several datasets, in their order.

    Each episode's ``weight`` says how often an epoch sees its samples. Built by :func:`mix`, which
    checks that the datasets fit each other.
    """

    parts: tuple[EpisodeDataset, ...]

    @property
    def episodes(self) -> Sequence[DatasetEpisode]:
        return [episode for part in self.parts for episode in part.episodes]

    @property
    def orientations(self) -> tuple[Orientation, ...]:
        return self.parts[0].orientations

    @property
    def cameras(self) -> tuple[str, ...]:
        """Those that every part has."""
        common = set.intersection(*(set(part.cameras) for part in self.parts))
        return tuple(name for name in self.parts[0].cameras if name in common)

    def layout(self, wanted: str) -> str:
        return self.parts[0].layout(wanted)

    def subset(self, episodes: Sequence[DatasetEpisode]) -> Mixture:
        parts = tuple(part.subset(episodes) for part in self.parts)
        return Mixture(tuple(part for part in parts if part.episodes))

    def state_spec(self, layout: str) -> StateSpec:
        return self.parts[0].state_spec(layout)

    def action_spec(self, horizon: int) -> ActionSpec:
        return self.parts[0].action_spec(horizon)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(b"reflexarc-mixture-1\n")
        for part in self.parts:
            weights = sorted({episode.weight for episode in part.episodes})
            digest.update(f"{part.fingerprint()} {weights}\n".encode())
        return digest.hexdigest()

    def check_images(self) -> None:
        for part in self.parts:
            part.check_images()


def mix(parts: Sequence[EpisodeDataset], names: Sequence[str], layout: str) -> EpisodeDataset:
    """One dataset of several, or the only one itself.

    Args:
        names: of the parts, for errors.
        layout: of LIBERO's state, where the parts are LIBERO's.

    Raises DatasetError naming two datasets whose state, action or orientation differ, with both.
    """
    first = parts[0]
    for part, name in zip(parts[1:], names[1:], strict=True):
        for what, one, two in (
            ("state", _state(first, layout), _state(part, layout)),
            ("action", _action(first), _action(part)),
            ("kind of images", first.orientations, part.orientations),
        ):
            if one != two:
                raise DatasetError(
                    f"datasets of incompatible shapes cannot be mixed: {what} of {names[0]} is "
                    f"{_shown(one)}, of {name} {_shown(two)}; map both to one contract with "
                    "state, action and cameras of data.sources",
                    field="data.sources",
                )
    for part, name in zip(parts, names, strict=True):
        if not part.cameras:
            absent = ", ".join(getattr(part, "absent_cameras", ()))
            declared = (
                f": info.json declares {absent}, but there is no file of it" if absent else ""
            )
            raise DatasetError(
                f"{name} has no camera{declared}; copy the dataset again, whole",
                field="cameras",
            )
    mixture = Mixture(tuple(parts))
    if not mixture.cameras:
        raise DatasetError(
            f"{', '.join(names)} have no camera in common; map theirs to one name with cameras of "
            "data.sources",
            field="data.sources",
        )
    return mixture if len(parts) > 1 else first


def _state(part: EpisodeDataset, layout: str) -> tuple[str, ...]:
    return part.state_spec(part.layout(layout)).names


def _action(part: EpisodeDataset) -> tuple[object, ...]:
    spec = part.action_spec(1)
    return (spec.kind, f"{spec.control_hz:g} Hz", spec.gripper, *spec.names)


def _shown(values: tuple[object, ...]) -> str:
    listed = ", ".join(map(str, values[:12])) + (", …" if len(values) > 12 else "")
    return f"({len(values)}) {listed}"
