"""Named errors survive the wire and the way out of a worker process."""

from __future__ import annotations

import copy
import pickle

from reflexarc.contract.errors import (
    ContractViolationError,
    MissingExtraError,
    ReflexarcError,
    error_from_wire,
)


def test_missing_extra_leaves_a_worker_process_as_itself() -> None:
    raised = MissingExtraError("reflexarc train", "train", "torch")
    received = pickle.loads(pickle.dumps(raised))  # noqa: S301 - what multiprocessing does
    assert type(received) is MissingExtraError
    assert received.message == raised.message
    assert "reflexarc[train]" in received.message and "'torch'" in received.message


def test_round_trip_over_the_wire_keeps_class_message_and_field() -> None:
    sent = ContractViolationError("state: expected (8,), got (9,)", field="state")
    received = error_from_wire(copy.deepcopy(sent.to_wire()))
    assert type(received) is ContractViolationError
    assert (received.message, received.field) == (sent.message, "state")


def test_an_unknown_code_is_still_an_error_with_its_text() -> None:
    received = error_from_wire({"code": "of_the_future", "message": "what happened"})
    assert type(received) is ReflexarcError
    assert "of_the_future" in received.message and "what happened" in received.message
