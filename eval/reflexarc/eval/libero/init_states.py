"""Read LIBERO's initial simulator states without torch.

The registry's package keeps them as numpy archives; an official clone as ``torch.save`` zips,
whose pickle is read here by an unpickler that can build numeric numpy arrays and nothing else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import SimulatorError


def read_init_states(path: Path) -> npt.NDArray[np.float64]:
    """The states of a ``.npz``, ``.npy`` or ``.pruned_init`` file, ``(N, S)`` float64.

    Raises:
        SimulatorError: the file is missing, damaged, or holds something else.
    """
    try:
        read = _read_numpy if path.suffix in (".npz", ".npy") else _read_torch_zip
        states = read(path)
    except SimulatorError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise almost anything
        raise SimulatorError(f"{path}: cannot be read as initial states: {error}") from error
    if not isinstance(states, np.ndarray) or states.ndim != 2 or states.dtype.kind != "f":
        raise SimulatorError(f"{path}: initial states must be a 2-dimensional array of floats")
    return np.asarray(states, dtype=np.float64)


def _read_numpy(path: Path) -> Any:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        return loaded["states"]


def _read_torch_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise SimulatorError(f"{path}: not a torch archive: it holds no data.pkl")
        return _ArrayUnpickler(io.BytesIO(archive.read(names[0]))).load()


def _empty_array(*_arguments: object) -> npt.NDArray[np.uint8]:
    """What numpy's ``_reconstruct`` returns: empty, to be filled by ``__setstate__``."""
    return np.empty(0, dtype=np.uint8)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Old pickle protocols write bytes as text; no other codec may be asked for."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is refused")
    return text.encode("latin1")


class _NumericDtype:
    """Stands for ``numpy.dtype`` in a pickle; refuses everything but floats."""

    def __new__(cls, name: str, *_flags: object) -> Any:
        dtype = np.dtype(str(name))
        if dtype.kind != "f":
            raise pickle.UnpicklingError(f"dtype {name!r} is refused")
        return dtype


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _NumericDtype,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numeric arrays; every other global, and every torch storage, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is refused in initial states") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a torch tensor is refused; initial states are numpy arrays")
