"""One forward pass for many clients.

The event loop collects what waits, :mod:`schedule` says what to run and when, and
:mod:`execution` runs it in the worker thread. All times are ``time.perf_counter()`` seconds.
"""

from reflexarc.server.batching.batcher import Batcher
from reflexarc.server.batching.pending import Pending, RequestQueue

__all__ = ["Batcher", "Pending", "RequestQueue"]
