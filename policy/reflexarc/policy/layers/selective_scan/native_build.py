"""Compile ``native.cpp`` for this machine's processor, and keep the result.

The compiler is called directly, not through torch's extension loader: the source includes no
header of torch, so that it needs neither ninja nor a lock file (which a killed process leaves
behind), and compiles in a second or two. A library is kept in the user's cache folder under a
name made of the source, the flags and the processor's features, because it is built for exactly
that processor. Each thread writes its own temporary file and renames it, so any number may build
at once; where the folder cannot be written, the library is built for this process alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from reflexarc.policy.layers.selective_scan.errors import ScanUnavailableError

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
CACHE_VARIABLE = "REFLEXARC_CACHE_DIR"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-fvisibility=hidden", "-fPIC", "-w",
)  # fmt: skip
_TIMEOUT = 120.0


def load_library() -> ctypes.CDLL:
    """The compiled library, built first where the cache does not hold it.

    Raises:
        ScanUnavailableError: no compiler, it failed, or the library cannot be loaded; with why.
    """
    kept = library_path()
    if kept.is_file():
        try:
            return ctypes.CDLL(str(kept))
        except OSError as error:  # cut short by a full disk, or of another C library
            logger.warning("the compiled scan in %s is built anew: %s", kept, error)
    return _build(kept)


def library_path() -> Path:
    """Where the library of this source and this processor is kept."""
    parts = (SOURCE.read_bytes(), " ".join(_FLAGS).encode(), _processor().encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return _cache_folder() / f"selective_scan_{key}.so"


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first of c++, g++ and clang++ on the path."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "reflexarc"
    except RuntimeError:  # a user without a home folder
        return Path(tempfile.gettempdir()) / f"reflexarc_{os.getuid()}"


def _processor() -> str:
    """What ``-march=native`` depends on: one home folder may serve machines of several kinds."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    # Of each kind the first line: the cores are alike.
    names = ("vendor_id", "model name", "flags", "Features", "CPU part")
    found = [next((line for line in lines if line.startswith(name)), "") for name in names]
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *found])


def _build(kept: Path) -> ctypes.CDLL:
    program = compiler()
    if program is None:
        wanted = os.environ.get("CXX") or ", ".join(_COMPILERS)
        raise ScanUnavailableError(f"there is no C++ compiler ({wanted}); install g++ or clang++")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reflexarc_scan_") as folder:
        built = Path(folder) / kept.name
        library = _compile(program, built)  # stays loaded when its file is unlinked
        place = _keep(built, kept)
    logger.info("compiled the CPU scan in %.1f s, kept %s", time.monotonic() - began, place)
    return library


def _compile(program: str, output: Path) -> ctypes.CDLL:
    """Compile and load, with threads if the compiler and the process have OpenMP, else without."""
    # Linked without an OpenMP library: its symbols are found in the one that torch has loaded for
    # the whole process, so that torch and the scan share one pool of threads.
    loose = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    objects = str(output.with_suffix(".o"))
    reasons = []
    for threads in (["-fopenmp"], []):
        try:
            _run([program, *_FLAGS, *threads, "-c", str(SOURCE), "-o", objects])
            _run([program, "-shared", objects, "-o", str(output), *loose])
            return ctypes.CDLL(str(output))
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            reasons.append(said.strip()[-300:])
    raise ScanUnavailableError(f"the C++ compiler {program} failed: {reasons[-1]}")


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)


def _keep(built: Path, kept: Path) -> str:
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, temporary)
        temporary.replace(kept)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        return f"for this process alone ({error})"
    return f"in {kept}"
