"""Commands of our own that a command starts, and that end when it does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

_POLL_SECONDS = 0.5


def own_command() -> tuple[str, ...]:
    """What starts ``reflexarc`` as a child that does not outlive this process.

    Also when this process is killed: the child then gets SIGTERM, on which training saves its
    state and a server finishes what it computes.
    """
    source = (
        f"from {__name__} import end_with; end_with({os.getpid()}); "
        "from reflexarc.cli.main import main; main()"
    )
    return (sys.executable, "-c", source)


def end_with(parent: int) -> None:
    """Send this process SIGTERM once its parent is another than ``parent``."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
