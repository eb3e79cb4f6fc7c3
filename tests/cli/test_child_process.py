"""A command that another one started ends with it, also when that one is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

CHILD = """
import os, signal, sys, time
from reflexarc.cli.child_process import end_with

def told(number, frame):
    open(sys.argv[1], "w").write("told to end")
    sys.exit(0)

signal.signal(signal.SIGTERM, told)
end_with(os.getppid())
print("started", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]).wait()
"""


def test_a_child_is_told_to_end_when_its_parent_was_killed(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(witness)], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        time.sleep(1.2)  # longer than it takes to look
        assert not witness.exists()
        parent.send_signal(signal.SIGKILL)
        end = time.monotonic() + 20
        while not witness.exists() and time.monotonic() < end:
            time.sleep(0.1)
    assert witness.read_text() == "told to end"
