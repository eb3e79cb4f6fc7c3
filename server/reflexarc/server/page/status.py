"""What the status page asks for, as plain numbers and bounded strings."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from PIL import Image

from reflexarc.contract import PolicyContract, ReflexarcError
from reflexarc.server.logs import bounded
from reflexarc.server.metrics import OK, STAGES, stage_ms
from reflexarc.server.page.last_seen import LastSeen, Seen
from reflexarc.server.page.timeline import Timeline

MAX_IMAGE_SIDE = 512
MAX_CHUNK_ROWS = 256
_STARTED = time.time()


class WatchedService(Protocol):
    """What is read of the service."""

    @property
    def phase(self) -> Any: ...

    @property
    def load_error(self) -> ReflexarcError | None: ...

    @property
    def contract_tag(self) -> str: ...

    @property
    def waiting(self) -> int:
        """Requests that wait or run."""
        ...

    @property
    def contract(self) -> PolicyContract | None:
        """Of the policy, once it is loaded."""
        ...


def server_status(
    service: WatchedService, seen: LastSeen, timeline: Timeline, *, since: int, contract_tag: str
) -> dict[str, Any]:
    """The server now, with the seconds after ``since``.

    The contract is in it where it is not the one of ``contract_tag``, which the page has.
    """
    now = time.time()
    error = service.load_error
    status: dict[str, Any] = {
        "now": round(now, 3),
        "version": version("reflexarc"),
        "uptime_s": round(now - _STARTED),
        "phase": str(service.phase.value),
        "error": None if error is None else bounded(error.message),
        "contract_tag": service.contract_tag,
        "waiting": service.waiting,
        "active": seen.active(),
        "stages": STAGES,
        "timeline": timeline.since(since),
        "sessions": [_session_line(session, now) for session in seen],
    }
    contract = service.contract
    if contract is not None and service.contract_tag != contract_tag:
        status["contract"] = contract.model_dump(mode="json")
    return status


def _session_line(session: Seen, now: float) -> dict[str, Any]:
    return {
        "tag": session.tag,
        "dialect": session.dialect,
        "count": session.count,
        "refused": session.refused,
        "age_s": round(max(now - session.at, 0.0), 1),
        "total_ms": round(session.total_ms, 2),
        "code": OK if session.error is None else session.error.code,
    }


def session_status(contract: PolicyContract | None, session: Seen) -> dict[str, Any]:
    """A session's last request and answer, without state and image."""
    observation, chunk, error = session.observation, session.chunk, session.error
    return {
        **_session_line(session, time.time()),
        "instruction": _short(None if observation is None else observation.instruction),
        "step": None if observation is None else observation.step_index,
        "cameras": _cameras(contract, session),
        "actions": None if chunk is None else _numbers(chunk.actions),
        "timing": {} if chunk is None else _timing(chunk.timing),
        "error": None if error is None else bounded(error.message),
    }


def _short(text: str | None) -> str | None:
    return None if text is None else bounded(text)


def _cameras(contract: PolicyContract | None, session: Seen) -> list[str]:
    if contract is None or session.observation is None:
        return []
    return [name for name in contract.camera_names if name in session.observation.images]


def _numbers(actions: np.ndarray[Any, Any]) -> list[list[float]]:
    rows: list[list[float]] = np.round(actions[:MAX_CHUNK_ROWS].astype(np.float64), 4).tolist()
    return rows


def _timing(timing: Mapping[str, float]) -> dict[str, float]:
    spent = {stage: stage_ms(timing, stage) for stage in STAGES}
    return {stage: round(ms, 3) for stage, ms in spent.items() if ms is not None}


def shown_image(image: object) -> bytes | None:
    """``uint8 (H, W, 3)`` as a JPEG of at most 512 a side; None for anything else."""
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3):
        return None
    if image.shape[2] != 3 or image.size == 0:
        return None
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
