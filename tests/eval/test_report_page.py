"""``report.html``: what it shows, that it stands alone, and that foreign text stays text."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reflexarc.contract import PolicyContract
from reflexarc.eval.durable_log import ResultsError
from reflexarc.eval.report_html import write_report_if_possible
from reflexarc.eval.report_html.figures import Curve, share_plot
from reflexarc.eval.report_html.films import FilmLibrary, filmstrip
from reflexarc.eval.report_html.palette import DARK, LIGHT
from reflexarc.eval.report_html.run_page import write_report
from reflexarc.eval.run import evaluate
from reflexarc.eval.run_settings import RunSettings

from .conftest import NullServer
from .results_folders import IDENTITY, episode, every_arm, filmed, write_folder

TEMPLATES = Path(write_report.__code__.co_filename).parent / "templates"


class Page(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self._silent = False
        self.feed(text)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._silent = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        self.words += "" if self._silent else f" {data}"

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.tags if attribute in attrs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = every_arm(tmp_path_factory.mktemp("results"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_every_arm_is_shown_with_its_interval_and_lead(page: Page) -> None:
    for words in (
        "libero_goal, 2 tasks, states 40-41",
        "3 of 4 episodes",
        "lead over blind replay",
        "lead over swapped images",
        "other instruction: the goal it was told",
        "3/4 30 to 95 %",  # Wilson
        "open the drawer; told: put the bowl on the stove",
        "--baselines replay,blank,swap_images,other_instruction",
        "--demonstrations DEMONSTRATIONS",
        "f" * 64,
    ):
        assert words in page.words, words
    marks = page.words.count("success after"), page.words.count("reached the goal it was told")
    assert marks == (5 + 1, 2 + 1)  # what is filmed is named once more


def test_the_policys_failures_stand_first(page: Page) -> None:
    articles = [attrs["id"] for tag, attrs in page.tags if tag == "article"]
    assert articles[0] == "task9-state41-policy"
    assert articles[-1] == "task9-state40-policy"
    assert len(articles) == 7
    linked = {value[1:] for value in page.values("href") if value.startswith("#task")}
    assert linked - {"tasks"} == set(articles)


def test_the_page_stands_alone(page: Page) -> None:
    sources = page.values("src") + page.values("srcset")
    assert len(sources) > 30
    assert all(source.startswith("data:") for source in sources)
    assert {value[0] for value in page.values("href")} == {"#", "d"}  # anchors, and an empty icon
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "form")]
    (policy,) = [attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'")
    assert "url(" not in (TEMPLATES / "style.css").read_text()


def test_pictures_have_words_and_ids_are_unique(page: Page) -> None:
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert all(attrs["alt"] for attrs in images)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in page.tags if tag in ("h1", "main")] == ["main", "h1"]
    scrolling = [attrs for _, attrs in page.tags if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert len(scrolling) == tables == 4


def test_an_embedded_video_is_the_file(folder: Path, page: Page) -> None:
    videos = [attrs["src"] for tag, attrs in page.tags if tag == "video"]
    assert len(videos) == 7
    content = base64.b64decode(videos[0].partition(",")[2])
    assert content == (folder / "videos" / "task09_state41_policy.mp4").read_bytes()


def test_a_filmstrip_runs_from_the_first_step_to_the_last(folder: Path) -> None:
    result = episode(9, 41, success=False)
    frames = list(filmstrip(folder / "videos" / "task09_state41_policy.mp4", result))
    assert [frame.step for frame in frames] == [0, 24, 40, 64, 88, 112, 128, 300]
    assert len({frame.uri for frame in frames}) == 8
    assert (frames[0].width, frames[0].height) == (160, 320)


def test_videos_beyond_the_budget_are_links(folder: Path) -> None:
    results = [
        episode(9, state, success=False, video=f"task09_state{state}_policy.mp4")
        for state in (40, 41)
    ]
    size = (folder / "videos" / "task09_state40_policy.mp4").stat().st_size
    library = FilmLibrary(folder, video_budget=size, strip_budget=1)
    first, second = (library.film(result) for result in results)
    assert first is not None and second is not None
    assert first.video_uri and first.frames
    assert (second.video_uri, second.frames) == (None, ())
    assert second.href == "videos/task09_state41_policy.mp4"


HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(1)> $\\frac{$ {{ 7*7 }}"


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    identity = IDENTITY.model_copy(update={"checkpoint_fingerprint": HOSTILE, "suite": HOSTILE})
    result = episode(0, 40, success=False, identity=identity, instruction=HOSTILE)
    write_folder(tmp_path, [filmed(tmp_path, result)], identity)
    page = Page(write_report(tmp_path).read_text())
    assert not [tag for tag, attrs in page.tags if tag == "script" or "onerror" in attrs]
    assert page.words.count(HOSTILE) >= 4  # title, task, film, provenance; {{ }} is not evaluated


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "secret.txt", "link.mp4"])
def test_a_video_outside_the_folder_is_left_out(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "results"
    (folder / "videos").mkdir(parents=True)
    for secret in (folder / "secret.mp4", folder / "videos" / "secret.txt"):
        secret.write_bytes(b"a secret")
    (folder / "videos" / "link.mp4").symlink_to(folder / "secret.mp4")
    write_folder(folder, [episode(0, 40, success=False, video=name)])
    page = Page(write_report(folder).read_text())
    assert "a video outside the folder; left out" in page.words
    assert not [tag for tag, _ in page.tags if tag == "video"]
    assert base64.b64encode(b"a secret").decode() not in (folder / "report.html").read_text()


def test_a_damaged_or_missing_video_is_said(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    broken = episode(0, 40, success=False, video="broken.mp4")
    write_folder(tmp_path, [broken, episode(0, 41, success=False, video="gone.mp4")])
    words = Page(write_report(tmp_path).read_text()).words
    assert "videos/broken.mp4 cannot be read" in words
    assert "videos/gone.mp4 is missing" in words


def test_the_smallest_run_has_a_page(tmp_path: Path) -> None:
    write_folder(tmp_path, [episode(0, 40, False, latency_median_ms=None, latency_max_ms=None)])
    page = Page(write_report(tmp_path).read_text())
    assert "0 of 1 episodes" in page.words
    assert "films" not in page.values("id")


def test_a_page_that_cannot_be_written_costs_no_results(tmp_path: Path) -> None:
    write_folder(tmp_path, [episode(0, 40, success=True)])
    (tmp_path / "report.html").mkdir()
    said: list[str] = []
    write_report_if_possible(tmp_path, said.append)
    assert "report.html was not written" in said[0] and "eval report" in said[0]
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 1
    assert not list(tmp_path.glob(".report*"))


@pytest.mark.simulator
def test_a_finished_run_writes_its_page(
    tmp_path: Path, null_server: NullServer, null_contract: PolicyContract
) -> None:
    settings = RunSettings(
        server=null_server.url, suite="libero_goal", tasks=(0,), states=(40,), output=tmp_path / "o"
    )
    identity = settings.identity(null_contract, {})
    write_folder(settings.output, [episode(0, 40, success=True, identity=identity)], identity)
    null_server.start()
    said: list[str] = []
    evaluate(settings, said.append)  # nothing is left to run: it summarises and writes the page
    page = settings.output / "report.html"
    assert f"Report:  {page}" in said
    assert "1 of 1 episodes" in Page(page.read_text()).words


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"holds no summary\.json"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text('{"states": []}')
    with pytest.raises(ResultsError, match=r"not a summary of this version: identity"):
        write_report(tmp_path)


def test_the_command_regenerates_the_page(tmp_path: Path) -> None:
    from reflexarc.cli.main import app

    write_folder(tmp_path, [episode(0, 40, success=True), episode(0, 41, success=False)])
    outcome = CliRunner().invoke(app, ["eval", "report", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first  # the same results, the same page


def test_dark_plots_use_no_colour_of_paper() -> None:
    curves = [Curve(str(n), [1.0, 2.0], 3) for n in range(6)]
    picture = share_plot(curves, alt="x", x_label="steps", y_label="%")
    light, dark = (
        base64.b64decode(uri.partition(",")[2]).decode()
        for uri in (picture.wide_light, picture.wide_dark)
    )
    for paper, screen in zip(LIGHT.series, DARK.series, strict=True):
        assert paper in light and paper not in dark
        assert screen in dark and screen not in light
    assert LIGHT.ink not in dark


def luminance(colour: str) -> float:
    """Relative luminance after WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_plots_stand_out(theme: object) -> None:
    for colour in (theme.ink, *theme.series):  # type: ignore[attr-defined]
        assert contrast(colour, theme.paper) >= 4.5, colour  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out(scheme: int) -> None:
    style = (TEMPLATES / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    tokens = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    pairs = [(ink, "card") for ink in ("ink", "soft", "link")] + [
        *((ink, "paper") for ink in ("ink", "soft", "link")),
        *((name, f"{name}-paper") for name in ("good", "bad", "other", "note")),
    ]
    for ink, paper in pairs:
        assert contrast(tokens[ink], tokens[paper]) >= 4.5, (ink, paper)
