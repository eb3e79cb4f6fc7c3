"""Small made-up demonstrations: a hand goes to a coloured block, closes on it and lifts it.

For debug recipes and tests: no simulator, no download, a second to write, and something in them to
be learnt: the block stands elsewhere in every episode and only the images show where. Files are
LIBERO's HDF5 in Reflexarc's own kind. Only sums, products and comparisons make the numbers, so that
actions, and with them the fingerprint, are the same bytes on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import ConfigError
from reflexarc.data.libero_writer import Demonstration, TaskFileWriter, TaskHeader

_Floats: TypeAlias = npt.NDArray[np.float64]
_Pixels: TypeAlias = npt.NDArray[np.uint8]
_Color: TypeAlias = tuple[int, int, int]

_COLORS = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (40, 200, 60),
           "yellow": (230, 210, 40)}  # fmt: skip
_METRES_AN_ACTION = 0.03
_REACH = 0.2  # the table is a square of twice this side, in metres
_NEAR = 0.012
_LIFTED = 0.12


@dataclass(frozen=True)
class GeneratedSettings:
    """How many demonstrations, and of what size.

    Attributes:
        tasks: 1 to 4, one a colour.
        episodes: of each task.
        steps: of each episode.
        render_every: steps between two images.
        image_size: side of an image in pixels.
        noise: bound of the uniform noise on executed actions.
    """

    tasks: int = 2
    episodes: int = 10
    steps: int = 24
    render_every: int = 2
    image_size: int = 64
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("tasks", 1, len(_COLORS)), ("episodes", 1, 10_000),
                                ("steps", 8, 10_000), ("render_every", 1, self.steps),
                                ("image_size", 16, 1024)):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} {value} must be {low} to {high}", field=name)


def write_generated(folder: Path, settings: GeneratedSettings) -> list[Path]:
    """Write one file a task into ``folder``; files that stand there are not touched.

    Raises ConfigError when one of the files is there already.
    """
    colors = list(_COLORS)[: settings.tasks]
    names = [f"pick_up_the_{color}_block" for color in colors]
    writers = [TaskFileWriter(folder, name) for name in names]
    for writer in writers:
        if writer.path.exists():
            raise ConfigError(
                f"{writer.path} exists; name another folder, or use what is there", field="output"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _write_task(writer, task, name, color, settings)
        for task, (writer, name, color) in enumerate(zip(writers, names, colors, strict=True))
    ]


def _write_task(
    writer: TaskFileWriter, task: int, name: str, color: str, settings: GeneratedSettings
) -> Path:
    for episode in range(settings.episodes):
        random = np.random.default_rng([settings.seed, task, episode])
        writer.add(_demonstration(episode, random, _COLORS[color], settings))
    header = TaskHeader(
        instruction=name.replace("_", " "),
        problem_name="Generated_Tabletop",
        domain_name="generated",
        bddl_file_name=f"{name}.bddl",
        bddl_file_content="",
        image_size=settings.image_size,
        render_stride=settings.render_every,
        action_noise=settings.noise,
        seed=settings.seed,
    )
    return writer.assemble(header)


def _demonstration(
    episode: int,
    random: np.random.Generator,
    color: _Color,
    settings: GeneratedSettings,
) -> Demonstration:
    hand = np.array([*random.uniform(-_REACH, _REACH, 2), 0.1])
    block = np.array([*random.uniform(-_REACH, _REACH, 2), 0.0])
    fingers, grasped = 0.04, False
    rows: dict[str, list[_Floats]] = {
        name: [] for name in ("actions", "experts", "hands", "fingers", "blocks")
    }
    for _ in range(settings.steps):
        expert = _expert_action(hand, block, grasped)
        noise = random.uniform(-settings.noise, settings.noise, 3)
        action = expert.copy()
        action[:3] = np.clip(action[:3] + noise, -1.0, 1.0)
        now = {"actions": action, "experts": expert, "hands": hand, "blocks": block,
               "fingers": np.array([fingers, -fingers])}  # fmt: skip
        for name, value in now.items():
            rows[name].append(value.copy())
        hand = hand + _METRES_AN_ACTION * action[:3]
        grasped = grasped or (action[6] > 0 and _near(hand, block))
        fingers = 0.01 if action[6] > 0 else 0.04
        if grasped:
            block = hand.copy()
    table = {name: np.stack(values) for name, values in rows.items()}
    return _as_demonstration(episode, table, color, settings)


def _expert_action(hand: _Floats, block: _Floats, grasped: bool) -> _Floats:
    """``(7,)``: towards the block, then up; the gripper closes where it is near."""
    goal = np.array([block[0], block[1], _LIFTED]) if grasped else block
    action = np.zeros(7)
    action[:3] = np.clip((goal - hand) / _METRES_AN_ACTION, -1.0, 1.0)
    action[6] = 1.0 if grasped or _near(hand, block) else -1.0
    return action


def _near(hand: _Floats, block: _Floats) -> bool:
    return bool((np.abs(hand - block) < _NEAR).all())


def _as_demonstration(
    episode: int,
    table: dict[str, _Floats],
    color: _Color,
    settings: GeneratedSettings,
) -> Demonstration:
    steps, hands, blocks = settings.steps, table["hands"], table["blocks"]
    rendered = np.arange(0, steps, settings.render_every, dtype=np.int64)
    scene = [_table_from_above(hands[t], blocks[t], color, settings.image_size) for t in rendered]
    wrist = [_seen_from_hand(hands[t], blocks[t], color, settings.image_size) for t in rendered]
    quaternions = np.tile([0.0, 0.0, 0.0, 1.0], (steps, 1))
    return Demonstration(
        attempt=episode,
        seed=episode,
        actions=table["actions"],
        expert_actions=table["experts"],
        states=np.concatenate([hands, blocks], axis=1),
        eef_positions=hands,
        eef_quaternions=quaternions,
        eef_axis_angles=np.zeros((steps, 3)),
        finger_positions=table["fingers"],
        joint_positions=np.concatenate([hands, np.zeros((steps, 4))], axis=1),
        image_steps=rendered,
        images={"agentview": np.stack(scene), "eye_in_hand": np.stack(wrist)},
        object_poses={
            "block": {"position": blocks[0].tolist(), "quaternion": [0.0, 0.0, 0.0, 1.0]}
        },
        object_positions=blocks[:, None],
        object_names=("block",),
        model_file="",
    )


def _table_from_above(hand: _Floats, block: _Floats, color: _Color, size: int) -> _Pixels:
    """``uint8 (size, size, 3)``: a square in the block's colour, the hand a smaller white one."""
    image = np.full((size, size, 3), 30, dtype=np.uint8)
    _square(image, block[:2] / (1.25 * _REACH), size // 8, color)
    _square(image, hand[:2] / (1.25 * _REACH), size // 16, (240, 240, 240))
    return image


def _seen_from_hand(hand: _Floats, block: _Floats, color: _Color, size: int) -> _Pixels:
    """``uint8 (size, size, 3)``: the block where it stands relative to the hand."""
    image = np.full((size, size, 3), 60, dtype=np.uint8)
    _square(image, (block - hand)[:2] / _REACH, size // 6, color)
    return image


def _square(image: _Pixels, center: _Floats, half: int, color: _Color) -> None:
    """Paint a square whose centre is given from -1 to 1; what lies outside is cut off."""
    size = len(image)
    column, row = (int(np.floor((value + 1) * size / 2)) for value in center)
    rows, columns = (slice(max(0, at - half), max(0, at + half)) for at in (row, column))
    image[rows, columns] = color
