"""Rendering, memory, disk and ports."""

from __future__ import annotations

import os
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

from reflexarc.cli.diagnosis.finding import Finding, ask_python

_RENDER_TIMEOUT = 90.0
_GIB = 2**30
_LIBRARIES = (
    "make system, or: apt-get install libegl1 libgles2 libgl1 libgl1-mesa-dri libosmesa6 "
    "libglib2.0-0"
)
_RENDER = """
import json, os
from reflexarc.contract.errors import ReflexarcError
try:
    from reflexarc.eval.libero.package import check_mujoco_version, choose_renderer
    check_mujoco_version()
    choose_renderer()
    import mujoco
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><light pos='0 0 3'/><geom size='.2' rgba='1 0 0 1'/>"
        "</worldbody></mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, 48, 64) as renderer:
        renderer.update_scene(data)
        brightest = int(renderer.render().max())
    print(json.dumps({"gl": os.environ.get("MUJOCO_GL", "the system's"), "brightest": brightest}))
except ReflexarcError as error:
    print(json.dumps({"error": error.message}))
"""


def check_rendering() -> Finding:
    """Whether MuJoCo renders a frame, in a process of its own: drivers crash and hang."""
    if find_spec("mujoco") is None:
        return Finding("rendering", "note", "not checked: mujoco is not installed")
    chosen = os.environ.get("MUJOCO_GL")
    found = ask_python(_RENDER, _RENDER_TIMEOUT)
    if "error" in found:
        mend = _LIBRARIES
        if chosen:
            mend = f"MUJOCO_GL={chosen} was set by you: unset it, or set egl or osmesa; {mend}"
        return Finding("rendering", "broken", str(found["error"])[:400], mend, ("sim",))
    if not found["brightest"]:
        return Finding("rendering", "broken", f"{found['gl']} renders black frames",
                       "set MUJOCO_GL=osmesa", ("sim",))  # fmt: skip
    return Finding("rendering", "ok", f"one frame with MUJOCO_GL={found['gl']}")


def check_memory() -> Finding:
    """Memory that a new process may take; a container's own limit counts."""
    free = available_memory()
    if free is None:
        return Finding("memory", "ok", "cannot be told on this system")
    said = f"{free / _GIB:.1f} GiB available"
    if free < _GIB // 2:
        return Finding("memory", "broken", said, "end other programs; 0.5 GiB is the least")
    if free < 3 * _GIB:
        mend = "enough to serve; a simulator needs 2.1 GiB a worker (--workers)"
        return Finding("memory", "note", said, mend)
    return Finding("memory", "ok", said)


def available_memory() -> int | None:
    """Bytes, the least of what the system and the control group leave; None where unknown."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    if not free and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free)) if free else None


def check_disk(folder: Path) -> Finding:
    """Space where runs and data will be written."""
    free = shutil.disk_usage(folder).free
    said = f"{free / _GIB:.1f} GiB free at {folder}"
    if free < _GIB // 2:
        mend = "make room: a checkpoint that cannot be written ends a run"
        return Finding("disk", "broken", said, mend, ("train", "sim"))
    if free < 5 * _GIB:
        return Finding("disk", "note", said, "reflexarc train --dry-run says what a run needs")
    return Finding("disk", "ok", said)


def check_port(port: int) -> Finding:
    """Whether the server can listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            mend = "end the program that listens there, or serve with --port 0 for a free one"
            said = f"{port} cannot be listened on: {error.strerror}"
            return Finding("port", "broken", said, mend, ("serve",))
    return Finding("port", "ok", f"{port} is free")
