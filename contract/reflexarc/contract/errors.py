"""Errors that every part of Reflexarc raises, each with a code that travels on the wire.

A message says what was wrong, the value that came, and the mend. The code is stable and meant
for programs; the message is meant for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class ReflexarcError(Exception):
    """Base of all named errors.

    Attributes:
        code: stable identifier of the kind of error, the same in Python and on the wire.
        message: what was wrong, which value, and the mend.
        field: the field of an observation, config or file that was wrong, where there is one.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def to_wire(self) -> dict[str, Any]:
        """The map that a server sends: ``{"code", "message", "field"}``."""
        return {"code": self.code, "message": self.message, "field": self.field}


class CodecError(ReflexarcError):
    """Bytes that are not a message, or a value that no message can hold."""

    code = "codec"


class FrameTooLargeError(CodecError):
    """A frame above the cap. Websockets close with 1009, HTTP answers 413."""

    code = "frame_too_large"


class ContractViolationError(ReflexarcError):
    """An observation or action that differs from the policy's contract."""

    code = "contract_violation"


class CheckpointError(ReflexarcError):
    """A checkpoint folder that is missing, altered, of another format, or not a folder."""

    code = "checkpoint"


class DatasetError(ReflexarcError):
    """An episode file that cannot be read as it claims; file, demo and key are named."""

    code = "dataset"


class ConfigError(ReflexarcError):
    """A recipe or option that is unknown or out of range."""

    code = "config"


class UnknownInstructionError(ReflexarcError):
    """An instruction without a stored embedding, and no language encoder to compute one."""

    code = "unknown_instruction"


class SimulatorError(ReflexarcError):
    """A simulator that is missing, of an unsupported version, or asked for what it has not."""

    code = "simulator"


class ServerUnavailableError(ReflexarcError):
    """No server answered within the stated time."""

    code = "server_unavailable"


class ClusterUnavailableError(ReflexarcError):
    """No Ray cluster answers at the stated address, or it lacks what was asked of it."""

    code = "cluster_unavailable"


class ReplicaLostError(ReflexarcError):
    """The replica that computed the answer died, and so did the one that was asked in its place."""

    code = "replica_lost"


class DoesNotFitError(ReflexarcError):
    """A checkpoint that needs more memory than the device has left; it was not loaded."""

    code = "does_not_fit"


class AuthenticationError(ReflexarcError):
    """The server asks for an API key, and got none or a wrong one. HTTP answers 401."""

    code = "unauthorized"


class NotReadyError(ReflexarcError):
    """The server is loading, warming or draining."""

    code = "not_ready"


class TooManyRequestsError(ReflexarcError):
    """A connection sent more requests than may wait on it, or left its replies unread."""

    code = "too_many_requests"


class DeadlineExceededError(ReflexarcError):
    """The answer would come after the request's ``deadline_ms``; none was computed."""

    code = "deadline_exceeded"


class StaleReplyError(ReflexarcError):
    """The episode was reset while the request was in flight; its answer was withheld."""

    code = "stale_reply"


class UnknownSessionError(ReflexarcError):
    """Nothing is kept under the session's name: it never asked, was ended, or was idle too long."""

    code = "unknown_session"


class HistoryMissingError(ReflexarcError):
    """The server does not hold what a request leaves out; send the whole window again.

    Raised where a session is new to the server: it restarted, another replica answered, the
    session was idle for too long, or its episode began before this client connected.
    """

    code = "history_missing"


class InferenceError(ReflexarcError):
    """The policy failed on a valid observation; details stay in the server's log."""

    code = "inference_failed"


class MissingExtraError(ReflexarcError):
    """A package that an optional extra brings is not installed."""

    code = "missing_extra"

    def __init__(self, command: str, extra: str, module: str) -> None:
        super().__init__(
            f"{command} needs the package {module!r}, which is not installed. "
            f"Install it with: {install_line(extra)}"
        )
        self._arguments = (command, extra, module)

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        # Exceptions are rebuilt from their arguments when a worker process hands them over.
        return type(self), self._arguments


def install_line(extra: str) -> str:
    """The command that brings an extra, from the registry or in a clone."""
    return f"pip install 'reflexarc[{extra}]' (in a clone: pip install -e '.[{extra}]')"


def _all_subclasses(cls: type[ReflexarcError]) -> list[type[ReflexarcError]]:
    return [s for sub in cls.__subclasses__() for s in (sub, *_all_subclasses(sub))]


def error_from_wire(payload: Mapping[str, Any]) -> ReflexarcError:
    """Rebuild the error that a server sent; an unknown code becomes a plain ReflexarcError."""
    code = payload.get("code")
    message = str(payload.get("message", "the server sent an error without a message"))
    field = payload.get("field")
    for cls in _all_subclasses(ReflexarcError):
        if cls.code == code and cls is not MissingExtraError:
            return cls(message, field=field)
    return ReflexarcError(f"{code}: {message}", field=field)
