"""What the server writes about requests, as text for people or as JSON lines for programs.

Much of a line comes from clients: ids, field names, the values that an error quotes. Every string
is shortened, and what could end a line, move a cursor or turn the reading direction is escaped.
Actions, states, images, instructions and session ids are not written.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, Literal, TextIO

import numpy as np

from reflexarc.contract.errors import ConfigError, InferenceError
from reflexarc.server.exchange import Exchange
from reflexarc.server.metrics import STAGES, code_of, stage_ms, total_ms
from reflexarc.server.session_tags import session_tag

LogFormat = Literal["text", "json"]
MAX_CHARACTERS = 500
MAX_TRACE_CHARACTERS = 16_000
SUMMARY_SECONDS = 10.0
REFUSALS_A_SECOND = 50
_SAMPLES = 512

logger = logging.getLogger(__name__)
Fields = Mapping[str, str | float | None]


def configure_logging(log_format: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Write what this process logs to ``stream`` (stderr), in place of what was set before.

    Raises ConfigError for an unknown format.
    """
    formatters: dict[str, logging.Formatter] = {"text": TextLines(), "json": JsonLines()}
    if log_format not in formatters:
        raise ConfigError(
            f"--log-format {log_format!r} is unknown; choose text or json", field="log_format"
        )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatters[log_format])
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("reflexarc").setLevel(logging.INFO)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the record's fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": bounded(record.getMessage()),
            **{name: _json_value(value) for name, value in _fields(record).items()},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-MAX_TRACE_CHARACTERS:]
        return json.dumps(line)  # escapes all that is not ASCII


class TextLines(logging.Formatter):
    """``time level message  name=value ...``; lines of a traceback are set off by ``|``."""

    def format(self, record: logging.LogRecord) -> str:
        fields = [f"{name}={_text_value(value)}" for name, value in _fields(record).items()]
        head = f"{_time(record)} {record.levelname.lower():<7} {one_line(record.getMessage())}"
        lines = ["  ".join([head, *([" ".join(fields)] if fields else [])])]
        if record.exc_info:
            trace = self.formatException(record.exc_info)[-MAX_TRACE_CHARACTERS:]
            lines += [f"  | {_escaped(line)}" for line in trace.splitlines()]
        return "\n".join(lines)


class RequestLog:
    """A listener that writes a line for each request that failed, and a summary of the others.

    Args:
        summary_seconds: answered requests are summed up at most this often, when one ends.
        refusals_a_second: failed requests that get a line of their own; those beyond are counted
            in the next second's first line, so that a client in a loop cannot fill a disk.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        summary_seconds: float = SUMMARY_SECONDS,
        refusals_a_second: int = REFUSALS_A_SECOND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._summary_seconds, self._clock = summary_seconds, clock
        self._refusals_a_second = refusals_a_second
        self._second, self._written, self._left_out = -1, 0, 0
        self._since = clock()
        self._dialects: Counter[str] = Counter()
        self._totals: list[float] = []
        self._sample: Exchange | None = None

    def __call__(self, exchange: Exchange) -> None:
        if exchange.error is not None:
            self._refused(exchange)
            return
        if exchange.chunk is None:
            return  # a reset
        self._dialects[exchange.dialect] += 1
        if len(self._totals) < _SAMPLES:
            self._totals.append(total_ms(exchange))
        self._sample = exchange
        if self._clock() - self._since >= self._summary_seconds:
            self.summarise()

    def _refused(self, exchange: Exchange) -> None:
        second = math.floor(self._clock())
        if second != self._second:
            left_out, self._second, self._written, self._left_out = self._left_out, second, 0, 0
            if left_out:
                logger.warning("%d more failed requests were not written one by one", left_out)
        if self._written >= self._refusals_a_second:
            self._left_out += 1
            return
        self._written += 1
        failed = isinstance(exchange.error, InferenceError)
        message = "" if exchange.error is None else exchange.error.message
        logger.log(
            logging.ERROR if failed else logging.WARNING,
            "request %s: %s",
            "failed" if failed else "refused",
            bounded(message),
            extra={"fields": request_fields(exchange)},
        )

    def summarise(self) -> None:
        """Write what was answered since the last summary, where something was."""
        now = self._clock()
        if self._sample is not None:
            median, p95 = np.percentile(self._totals, (50, 95))
            dialects = " ".join(f"{name}:{count}" for name, count in self._dialects.items())
            logger.info(
                "%d requests answered in %.0f s (%s), the last one:",
                self._dialects.total(),
                now - self._since,
                dialects,
                extra={
                    "fields": {
                        "median_ms": float(median),
                        "p95_ms": float(p95),
                        **request_fields(self._sample),
                    }
                },
            )
        self._since, self._sample = now, None
        self._dialects.clear()
        self._totals.clear()


def request_fields(exchange: Exchange) -> Fields:
    """What a line says of a request: ids, dialect, code, sizes and times; no content."""
    observation, error = exchange.observation, exchange.error
    timing = {f"{stage}_ms": stage_ms(exchange.timing, stage) for stage in STAGES}
    fields: dict[str, str | float | None] = {
        "request_id": exchange.request_id,
        "session": None if exchange.session is None else session_tag(exchange.session),
        "dialect": exchange.dialect,
        "code": code_of(exchange),
        "field": None if error is None else error.field,
        "step": None if observation is None else observation.step_index,
        "total_ms": total_ms(exchange),
        **timing,
        "batch_size": exchange.timing.get("batch_size"),
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
    }
    return {name: value for name, value in fields.items() if value is not None}


def bounded(text: str) -> str:
    """At most ``MAX_CHARACTERS`` of a text, and a sign where more was."""
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"


def one_line(text: str) -> str:
    """A bounded text in which nothing ends the line, moves a cursor or turns the direction."""
    return _escaped(bounded(text))


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    # Control, format (bidirectional overrides, joiners), surrogate, line and paragraph separators.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


def _fields(record: logging.LogRecord) -> Fields:
    fields: Fields = getattr(record, "fields", {})
    return fields


def _json_value(value: str | float | None) -> str | float | None:
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else str(value)
    return bounded(value) if isinstance(value, str) else value


def _text_value(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    text = one_line(str(value))
    return text if text and not _needs_quotes(text) else json.dumps(text, ensure_ascii=False)


def _needs_quotes(text: Iterable[str]) -> bool:
    return any(character.isspace() or character in '="\\' for character in text)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, tz=timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
