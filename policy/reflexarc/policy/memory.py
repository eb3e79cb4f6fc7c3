"""Keep freed memory in the process, so that large CPU tensors do not pay for page faults.

glibc hands blocks above 128 KiB back to the kernel at once, and every new tensor of that size
then faults in page by page. On a small virtual machine frozen EfficientNet-Lite0 features came at
16 frames a CPU-second with that, and at 33 without.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h; the values are part of glibc's ABI.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP_BYTES = 2**31 - 1
_GROW_BYTES = 64 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse freed blocks; True where that was possible.

    For a whole process: called by a command, never by a library. The process then holds on to
    its peak memory. Without glibc (macOS, musl, Windows) nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, _KEEP_BYTES),
            (_M_TOP_PAD, _GROW_BYTES),
        )
    )
