"""Whether a policy is so cheap that handing it to a thread and back would cost more."""

from __future__ import annotations

_CHEAP_SECONDS = 0.0005
_DEAR_SECONDS = 0.005
_TRIALS = 8
_TRIALS_AGAIN = 64
# A run can take long because the machine did something else meanwhile; this many in a short time
# are the policy's own.
_DEAR_RUNS = 2.0
_FORGIVEN = 0.05  # of a dear run, by each cheap one


class Thrift:
    """Learns from the runs of a policy that calls itself cheap; of others nothing is believed."""

    def __init__(self, says_it_is_cheap: bool) -> None:
        self._eligible = says_it_is_cheap
        self._trials_left = _TRIALS
        self._dear_runs = 0.0

    @property
    def is_cheap(self) -> bool:
        """Whether it may run on the event loop."""
        return self._eligible and self._trials_left == 0

    def note(self, seconds: float) -> None:
        """A single row or batch took so long."""
        if seconds > _DEAR_SECONDS:
            self._dear_runs += 1
            if self._dear_runs >= _DEAR_RUNS:
                self._trials_left, self._dear_runs = _TRIALS_AGAIN, 0.0
            return
        self._dear_runs = max(0.0, self._dear_runs - _FORGIVEN)
        if seconds <= _CHEAP_SECONDS and self._trials_left:
            self._trials_left -= 1
