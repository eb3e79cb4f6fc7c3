"""Frames of a file by time: every way to ask gives the same pixels, with few decoding steps."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from reflexarc.contract.errors import DatasetError
from reflexarc.data.frames import read_frames
from reflexarc.data.lerobot import open_lerobot
from reflexarc.data.lerobot.video import DecoderCache
from reflexarc.data.lerobot.video_decoder import VideoDecoder

sys.path.insert(0, str(Path(__file__).parent))
from lerobot_samples import write_v2, write_v3

FPS, FRAMES = 20, 60
CODECS = {
    "h264, groups of 2": ("libx264", {"g": "2"}),
    "h264, B-frames": ("libx264", {"g": "24", "bf": "3", "b-pyramid": "normal"}),
    "h264, open groups": ("libx264", {"g": "12", "bf": "2", "x264-params": "open-gop=1"}),
    "h264, one group": ("libx264", {"g": "1000", "bf": "0"}),
    "av1": ("libsvtav1", {"g": "10", "preset": "10"}),
    "mpeg4": ("mpeg4", {"g": "12", "bf": "2"}),
}


@pytest.fixture(scope="module", params=CODECS)
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "file.mp4"
    name, options = CODECS[request.param]
    random = np.random.default_rng(0)
    texture = random.integers(0, 256, (64 + FRAMES, 96, 3), dtype=np.uint8).repeat(1, 0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=Fraction(FPS), options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for step in range(FRAMES):
            image = np.ascontiguousarray(texture[step : step + 64])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def plain(video: Path) -> np.ndarray:
    """Every frame, as a plain loop over the file decodes it."""
    with av.open(str(video)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_every_order_gives_the_frames_of_a_plain_loop(video: Path, plain: np.ndarray) -> None:
    random = np.random.default_rng(1)
    assert len(plain) == FRAMES
    requests = [
        [list(range(FRAMES))],
        [[i] for i in range(FRAMES)],
        [[i] for i in reversed(range(FRAMES))],
        [[int(i)] for i in random.permutation(FRAMES)],
        [[i] for i in range(0, FRAMES, 7)],
        [list(range(0, FRAMES, 9)), list(range(1, FRAMES, 9))],
        [random.integers(0, FRAMES, 11).tolist() for _ in range(20)],
        [list(range(start, min(start + 8, FRAMES))) for start in range(0, FRAMES, 8)],
    ]
    for order in requests:
        decoder = VideoDecoder(video)
        for asked in order:
            found = decoder.frames([i / FPS for i in asked])
            np.testing.assert_array_equal(found, plain[asked])
    decoder = VideoDecoder(video)  # all of them one after another on one decoder
    for asked in (request for order in requests for request in order):
        np.testing.assert_array_equal(decoder.frames([i / FPS for i in asked]), plain[asked])


def test_a_time_without_a_frame_is_named_and_harms_no_later_request(
    video: Path, plain: np.ndarray
) -> None:
    decoder = VideoDecoder(video)
    decoder.frames([0.1])
    for time in (0.51, FRAMES / FPS + 1):
        with pytest.raises(DatasetError, match=rf"within 1 ms of {time:.4f} s: the nearest is at"):
            decoder.frames([time])
        np.testing.assert_array_equal(decoder.frames([0.5])[0], plain[10])
    # A wide tolerance takes the nearest frame, not the first that is near enough.
    near = decoder.frames([10.4 / FPS, 12.6 / FPS], tolerance=0.9 / FPS)
    np.testing.assert_array_equal(near, plain[[10, 13]])


def test_a_frame_elsewhere_costs_no_more_steps_than_its_group(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = VideoDecoder(video)
    with av.open(str(video)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    by_time = {round(p.pts * p.time_base * FPS): i for i, p in enumerate(packets)}
    first = min(by_time)
    fed: list[object] = []
    feed = decoder._feed

    def counted(packets: list[tuple[float, object]], *others: object) -> None:
        fed.extend(packets)
        feed(packets, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "_feed", counted)
    # From the end to the beginning, or nobody could know that the next frame is not asked next.
    for frame in sorted(np.random.default_rng(2).permutation(FRAMES)[:25].tolist(), reverse=True):
        decoder._recent.clear()
        before = len(fed)
        decoder.frames([frame / FPS])
        place = by_time[frame + first]
        usable = [k for k in keys if packets[k].pts <= packets[place].pts]
        assert len(fed) - before <= place - usable[-1] + 1


def test_threads_share_decoders_and_evicted_ones_finish(video: Path, plain: np.ndarray) -> None:
    others = []
    for number in range(3):
        others.append(video.with_name(f"copy_{number}.mp4"))
        others[-1].write_bytes(video.read_bytes())
    cache = DecoderCache(kept=1)

    def read(seed: int) -> bool:
        random = np.random.default_rng(seed)
        asked = [random.integers(0, FRAMES, 3).tolist() for _ in range(10)]
        return all(
            (cache.frames(others[seed % 3], [i / FPS for i in ids]) == plain[ids]).all()
            for ids in asked
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(8)))


def test_frames_of_many_episodes_come_in_the_order_asked_for(tmp_path: Path) -> None:
    dataset = open_lerobot(write_v3(tmp_path / "three"))
    places = [(e, i) for e in dataset.episodes for i in range(len(e.image_steps))]
    one_by_one = [e.images("front", [i])[0] for e, i in places]
    order = np.random.default_rng(0).integers(0, len(places), 40).tolist()
    found = read_frames([places[i] for i in order], "front")
    np.testing.assert_array_equal(found, np.stack([one_by_one[i] for i in order]))
    np.testing.assert_array_equal(read_frames(places[:5], "front"), np.stack(one_by_one[:5]))
    with pytest.raises(DatasetError, match="no frames"):
        read_frames([], "front")
    with pytest.raises(DatasetError, match="no camera 'side'"):
        read_frames(places, "side")


def test_turned_images_stay_turned(tmp_path: Path) -> None:
    from dataclasses import replace

    dataset = open_lerobot(write_v2(tmp_path / "two"))
    turned = [replace(episode, turned=True) for episode in dataset.episodes]
    plain_, found = (
        read_frames([(e, 1) for e in episodes], "front") for episodes in (dataset.episodes, turned)
    )
    np.testing.assert_array_equal(found, plain_[:, ::-1, ::-1])
