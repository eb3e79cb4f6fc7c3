"""Log lines about requests: what is in them, what is not, and what hostile strings do to them."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from reflexarc.client import PolicyClient
from reflexarc.contract import ActionChunk, Observation, ReflexarcError
from reflexarc.contract.errors import CodecError, ConfigError, InferenceError
from reflexarc.server import BackgroundServer
from reflexarc.server.exchange import Exchange
from reflexarc.server.logs import (
    MAX_CHARACTERS,
    JsonLines,
    RequestLog,
    TextLines,
    configure_logging,
)

MakeObservation = Callable[..., Observation]
HOSTILE = "a\nlevel=error \r\x1b[2J\u202e\u2028\x00 \ud800 ] [ok] \x85end"


@pytest.fixture
def written() -> Iterator[Callable[[str], io.StringIO]]:
    """Log to a string in a format, and put everything back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("reflexarc")
    before = root.handlers[:], root.level, ours.level

    def begin(log_format: Any) -> io.StringIO:
        stream = io.StringIO()
        configure_logging(log_format, stream)
        return stream

    yield begin
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def lines(stream: io.StringIO, having: str) -> list[dict[str, Any]]:
    """The JSON lines with a word, once there are some: a request is heard of after its reply."""
    until = time.monotonic() + 10
    while not (found := [line for line in stream.getvalue().splitlines() if having in line]):
        assert time.monotonic() < until, stream.getvalue()
        time.sleep(0.02)
    return [json.loads(line) for line in found]


def test_a_refused_request_of_a_real_client_is_one_line_with_its_ids(
    null_server: BackgroundServer, make_observation: MakeObservation, written: Any
) -> None:
    stream = written("json")
    wrong = make_observation(size=10, request_id="r-1", session_id="kitchen-7", step_index=3)
    with PolicyClient(null_server.url) as client, pytest.raises(ReflexarcError):
        client.infer(wrong)
    (line,) = lines(stream, "r-1")
    assert (line["level"], line["dialect"], line["code"]) == (
        "warning",
        "native",
        "contract_violation",
    )
    assert line["field"] == "images.agentview"
    assert line["bytes_in"] > 600 and line["total_ms"] >= 0
    assert "kitchen-7" not in stream.getvalue(), "a session's id is not for the log"
    assert len(line["session"]) == 10 and int(line["session"], 16) >= 0
    assert wrong.instruction is not None and wrong.instruction not in stream.getvalue()


def test_what_cannot_be_read_is_logged_too(null_server: BackgroundServer, written: Any) -> None:
    stream = written("json")
    httpx.post(f"{null_server.http_url}/v1/actions", content=b'{"images": 1', timeout=20)
    (line,) = lines(stream, "codec")
    assert (line["dialect"], line["code"]) == ("http", "codec")


def test_what_never_was_a_request_is_one_line_too(
    null_server: BackgroundServer, written: Any
) -> None:
    stream = written("json")
    for path, dialect in (("v1/policy", "native"), ("", "openpi")):
        with connect(f"{null_server.url}/{path}", compression=None) as connection:
            connection.recv(timeout=10)
            connection.send("text")
            connection.recv(timeout=10)
            (line,) = lines(stream, f'"dialect": "{dialect}"')
            assert (line["code"], line["level"]) == ("codec", "warning")


def exchange(error: ReflexarcError | None = None, **fields: Any) -> Exchange:
    return Exchange("native", time.time(), error=error, **fields)


def answered(total_ms: float) -> Exchange:
    chunk = ActionChunk(actions=[[0.0]], seed=1)  # type: ignore[arg-type]
    timing = {"total_ms": total_ms, "device_ms": 5.0, "batch_size": 4.0}
    return exchange(chunk=chunk, session="s", request_id="last", timing=timing)


def test_answered_requests_are_summed_up(written: Any) -> None:
    stream, now = written("json"), [0.0]
    log = RequestLog(summary_seconds=10, clock=lambda: now[0])
    for total in range(1, 102):
        log(answered(float(total)))
    assert stream.getvalue() == ""
    now[0] = 11.0
    log(answered(51.0))
    (line,) = lines(stream, "answered")
    assert line["message"] == "102 requests answered in 11 s (native:102), the last one:"
    assert (line["median_ms"], line["request_id"], line["batch_size"]) == (51.0, "last", 4.0)
    assert 95 < line["p95_ms"] < 97
    log.summarise()
    assert stream.getvalue().count("\n") == 1, "nothing since, so nothing to say"


def test_a_client_in_a_loop_does_not_fill_the_disk(written: Any) -> None:
    stream, now = written("json"), [100.2]
    log = RequestLog(refusals_a_second=5, clock=lambda: now[0])
    for _ in range(1000):
        log(exchange(CodecError("no")))
    assert stream.getvalue().count("\n") == 5
    now[0] = 101.0
    log(exchange(InferenceError("it broke")))
    assert "995 more failed requests" in stream.getvalue()
    assert lines(stream, "it broke")[0]["level"] == "error"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_hostile_strings_stay_in_their_line(log_format: str, written: Any) -> None:
    stream = written(log_format)
    RequestLog()(
        exchange(CodecError(HOSTILE, field=HOSTILE), request_id=HOSTILE * 1000, session=HOSTILE)
    )
    text = stream.getvalue()
    assert len(text.splitlines()) == 1 and text.endswith("\n")
    assert text[:-1].isprintable()
    assert len(text) < 4 * 6 * MAX_CHARACTERS
    text.encode("utf-8")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=600))
def test_no_text_breaks_a_line(text: str) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (text,), None)
    record.fields = {"request_id": text}
    for formatter in (TextLines(), JsonLines()):
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        line.encode("utf-8")
    assert len(json.loads(JsonLines().format(record))["request_id"]) <= MAX_CHARACTERS


def test_lines_of_a_traceback_cannot_pass_for_lines_of_the_log(written: Any) -> None:
    stream = written("text")
    try:
        raise ValueError("\n2026-01-01T00:00:00.000Z error   forged")
    except ValueError:
        logging.getLogger("reflexarc.test").exception("caught")
    head, *rest = stream.getvalue().splitlines()
    assert head.endswith("error   caught")
    assert rest and all(line.startswith("  | ") for line in rest)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ConfigError, match="'xml' is unknown; choose text or json"):
        configure_logging("xml")  # type: ignore[arg-type]
