"""A batch through the policy: in the worker thread, or on the event loop where that is cheap."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from reflexarc.contract import ActionChunk, Observation, ReflexarcError
from reflexarc.contract.errors import InferenceError
from reflexarc.server.batching.pending import Outcome, Pending
from reflexarc.server.inference import Inference, internal_error

logger = logging.getLogger(__name__)
Emit = Callable[[Sequence[tuple[Pending, Outcome]]], None]


def run_batch(inference: Inference, batch: Sequence[Pending], emit: Emit) -> None:
    """Give every row exactly one outcome, some of them as soon as they are known.

    A batch that fails is tried again row by row, so that only the guilty one is refused.
    """
    started = time.perf_counter()
    open_rows = dict(enumerate(batch))

    def settle(outcomes: Iterable[tuple[int, Outcome]]) -> None:
        emit(
            [
                (pending, _finished(inference, pending, outcome, started, len(batch)))
                for index, outcome in outcomes
                if (pending := open_rows.pop(index, None)) is not None
            ]
        )

    observations = [pending.observation for pending in batch]
    try:
        for part in _infer(inference, observations):
            settle(part)
    except Exception as error:
        if len(batch) == 1:
            settle([(0, _named(error))])
        else:
            logger.warning("a batch of %d failed (%s): trying row by row", len(batch), error)
    for index in tuple(open_rows):
        settle([(index, _infer_one(inference, observations[index]))])


def _infer(
    inference: Inference, observations: Sequence[Observation]
) -> Iterable[list[tuple[int, Outcome]]]:
    """Outcomes by row, in parts as they become known."""
    in_parts = getattr(inference, "infer_in_parts", None)
    if in_parts is not None:
        yield from in_parts(observations)
        return
    chunks = inference.infer(observations)
    if len(chunks) != len(observations):
        raise InferenceError(
            f"the policy gave {len(chunks)} chunks for {len(observations)} observations"
        )
    yield list(enumerate(chunks))


def _infer_one(inference: Inference, observation: Observation) -> Outcome:
    try:
        for part in _infer(inference, [observation]):
            for _, outcome in part:
                return outcome
    except Exception as error:
        return _named(error)
    return InferenceError("the policy gave no chunk for an observation")


def _named(error: Exception) -> ReflexarcError:
    if isinstance(error, ReflexarcError):
        return error
    return internal_error("the policy failed on a valid observation")


def _finished(
    inference: Inference, pending: Pending, outcome: Outcome, started: float, rows: int
) -> Outcome:
    """The outcome with its timing and the client's own ids, or why it cannot be sent."""
    if isinstance(outcome, ReflexarcError):
        return outcome
    action = inference.contract.action
    expected = (action.horizon, action.dimension)
    if outcome.actions.shape != expected or not np.isfinite(outcome.actions).all():
        logger.error("refused chunk %s: %s", outcome.actions.shape, outcome.actions)
        return InferenceError(
            f"the policy gave a chunk of shape {outcome.actions.shape} for {expected}, "
            "or one that is not finite; it was not sent"
        )
    return _with_timing(outcome, pending, started, rows)


def _with_timing(chunk: ActionChunk, pending: Pending, started: float, rows: int) -> ActionChunk:
    return replace(
        chunk,
        request_id=pending.observation.request_id,
        session_id=pending.named_session,
        timing={
            **chunk.timing,
            "queue_ms": max(0.0, (started - pending.received) * 1000 - pending.decode_ms),
            "decode_ms": pending.decode_ms,
            "infer_ms": (time.perf_counter() - started) * 1000,
            "batch_size": float(rows),
        },
    )
