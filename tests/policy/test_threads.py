"""What a process does with freed memory: as little as possible, unless it was told otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from reflexarc.policy.threads import keep_freed_memory
kept = keep_freed_memory()
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    torch.ones(1 << 21), torch.ones(1 << 20)  # 8 and 4 MiB
before = faults()
for _ in range(20):
    torch.ones(1 << 21), torch.ones(1 << 20)
print(kept, faults() - before)
"""


def faults(**variables: str) -> tuple[str, int]:
    environment = {**os.environ, **variables}
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, env=environment
    ).stdout
    kept, count = output.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_freed_memory_is_kept_unless_the_environment_says_what_to_do() -> None:
    kept, few = faults()
    assert kept == "True" and few < 10_000  # each tensor anew once or twice, by the heap
    told, many = faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert told == "False" and many > 50_000  # 3,072 pages each time
