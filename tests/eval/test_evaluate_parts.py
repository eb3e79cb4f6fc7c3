"""Parts of an evaluation that need no simulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from reflexarc.contract import check_observation
from reflexarc.contract.errors import ConfigError, ContractViolationError
from reflexarc.contract.images import prepare_image
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_JOINT,
    Camera,
    History,
    PolicyContract,
    StateSpec,
    libero_action,
)
from reflexarc.eval.baselines import request_seed
from reflexarc.eval.libero.observation import LiberoObserver
from reflexarc.eval.libero.simulator import RawObservation, RawState
from reflexarc.eval.run_settings import default_states, parse_baselines, parse_indices
from reflexarc.eval.videos import write_video


def raw_observation(size: int = 128) -> RawObservation:
    random = np.random.default_rng(3)
    images = {
        name: random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        for name in ("agentview", "eye_in_hand")
    }
    state = RawState(
        eef_position=np.array([0.1, 0.2, 0.3]),
        eef_quaternion=np.array([1.0, 0.0, 0.0, 0.0]),
        eef_axis_angle=np.array([3.1, 0.0, 0.0]),
        finger_positions=np.array([0.02, -0.02]),
        joint_positions=np.arange(7.0),
    )
    return RawObservation(images, state)


def test_an_observation_meets_the_contract(null_contract: PolicyContract) -> None:
    raw, observer = raw_observation(), LiberoObserver(null_contract)
    observation = observer.observation(observer.images(raw), raw.state, "pick it up", seed=5)
    check_observation(null_contract, observation)
    camera = null_contract.cameras[1]
    expected = prepare_image(camera, raw.images["eye_in_hand"])
    np.testing.assert_array_equal(observation.images["eye_in_hand"], expected)
    np.testing.assert_allclose(observation.state, [0.1, 0.2, 0.3, 3.1, 0, 0, 0.02, -0.02])
    assert (observation.instruction, observation.seed) == ("pick it up", 5)
    assert observer.image_size == 128


def test_a_contract_with_joint_state_gets_joints(null_contract: PolicyContract) -> None:
    raw = raw_observation()
    contract = null_contract.model_copy(update={"state": LIBERO_STATE_JOINT})
    observer = LiberoObserver(contract)
    observation = observer.observation(observer.black_images(), raw.state, "go")
    check_observation(contract, observation)
    np.testing.assert_allclose(observation.state, [*range(7), 0.02, -0.02])
    assert not any(image.any() for image in observation.images.values())


def test_every_mismatch_of_a_contract_is_listed(null_contract: PolicyContract) -> None:
    camera = null_contract.cameras[0].model_dump()
    contract = null_contract.model_copy(
        update={
            "cameras": (
                *null_contract.cameras,
                Camera.model_validate({**camera, "name": "left_wrist", "source_height": 96}),
            ),
            "state": StateSpec(layout="joint6", names=tuple("abcdef")),
            "history": History(frames=16),
            "action": libero_action(10).model_copy(update={"control_hz": 10.0, "kind": "velocity"}),
        }
    )
    with pytest.raises(ContractViolationError) as caught:
        LiberoObserver(contract)
    for mismatch in (
        "cameras.left_wrist: LIBERO has the cameras agentview, eye_in_hand",
        "cameras.left_wrist: LIBERO renders square images, the contract's source is 96x128",
        "cameras: one simulator renders at one size, asked for [96, 128]",
        "state.layout: LIBERO gives eef3+axisangle3+fingers2, joint7+fingers2, "
        "eef3+axisangle3+fingers2+joint7, asked for 'joint6'",
        "action.kind: LIBERO executes delta_osc, the policy gives velocity",
        "action.control_hz: LIBERO executes 20.0, the policy gives 10.0",
    ):
        assert mismatch in caught.value.message


def test_request_seeds_are_reproducible_and_distinct() -> None:
    seeds = {
        request_seed(run, task, state, chunk)
        for run in range(2) for task in range(3) for state in range(10) for chunk in range(40)
    }  # fmt: skip
    assert len(seeds) == 2 * 3 * 10 * 40
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 9, 45, 3) == 221052978134725004


def test_indices_are_parsed() -> None:
    assert parse_indices("0,9", "--tasks") == (0, 9)
    assert parse_indices("45-47, 40,45", "--states") == (40, 45, 46, 47)
    assert default_states(3) == (40, 41, 42)
    for wrong in ("", "a", "3-1", "1-", "-1", "0-999999999"):
        with pytest.raises(ConfigError, match="--states"):
            parse_indices(wrong, "--states")
    with pytest.raises(ConfigError, match="1 to 10 trials"):
        default_states(11)


def test_baselines_are_parsed() -> None:
    assert parse_baselines("blank,replay") == ("replay", "blank")
    assert parse_baselines("none") == ()
    with pytest.raises(ConfigError, match="'policy' is unknown"):
        parse_baselines("policy")


def test_a_video_is_upright_and_plays_in_a_browser(tmp_path: Path) -> None:
    upside_down = np.zeros((65, 65, 3), dtype=np.uint8)
    upside_down[-20:] = 255  # the sky, as OpenGL gives it
    frames = [(step, {"agentview": upside_down, "eye_in_hand": upside_down}) for step in (0, 8, 12)]
    path = tmp_path / "videos" / "episode.mp4"
    write_video(
        path, frames, "task 0, state 45, policy: " + "x" * 500, "success", good=True, replan_steps=8
    )
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 5  # 20 Hz / 8 steps, twice the real speed
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(pictures) == 2 + 5  # the last frame is held for a second
    height, width = pictures[0].shape[:2]
    assert height % 2 == width % 2 == 0
    views = pictures[0][-66:-1].astype(int)
    assert views[5:15].mean() > 200 > 50 > views[30:60].mean()
    caption = pictures[-1][21:36]
    assert caption[..., 1].max() > 150  # "SUCCESS" in green
    assert [p.name for p in path.parent.iterdir()] == ["episode.mp4"]
    assert b"moov" in path.read_bytes()[:64]  # the index comes first, so a browser can start


def test_an_unwritable_video_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = [(0, {"agentview": np.zeros((8, 8, 3), np.uint8)})]
    with pytest.raises(KeyError):
        write_video(tmp_path / "video.mp4", broken, "", "failure", good=False, replan_steps=8)
    assert list(tmp_path.iterdir()) == []


def test_the_evaluation_imports_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib\n"
        "import reflexarc.eval\n"
        "for module in pkgutil.walk_packages(reflexarc.eval.__path__, 'reflexarc.eval.'):\n"
        "    importlib.import_module(module.name)\n"
        "import reflexarc.cli.evaluate, reflexarc.cli.demo\n"
        "from reflexarc.eval.libero.suites import load_tasks\n"
        "assert len(load_tasks('libero_object')) == 10\n"
        "heavy = {'torch', 'transformers', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_film_that_nobody_wants_keeps_nothing() -> None:
    from reflexarc.eval.videos import Film

    simulator = SimpleNamespace(snapshot=lambda: pytest.fail("took a snapshot for nobody"))
    film = Film(wanted=False)
    film.add(0, {})
    film.snap(0, simulator)  # type: ignore[arg-type]
    assert film.develop(simulator) == []  # type: ignore[arg-type]
