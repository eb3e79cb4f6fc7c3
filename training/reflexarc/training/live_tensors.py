"""How many bytes of tensors are alive while something runs, allocation by allocation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, every storage that an operation makes is followed until it is freed.

    What existed before, weights above all, is not counted, and neither is what an operation
    needs for itself while it runs. It works on every device, the backward pass included.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._events: list[tuple[int, int]] = []  # number of the storage, bytes more or less
        self._numbers: dict[int, int] = {}  # storages that are alive, by their address
        self._before: dict[int, Any] = {}  # held, so that no new one takes their address
        self._count = 0

    def peak(self, *, without: Iterable[Tensor] = ()) -> int:
        """The most bytes that were alive at once, but for the storages of ``without``."""
        left_out = {self._numbers.get(tensor.untyped_storage()._cdata) for tensor in without}
        live = highest = 0
        for number, change in self._events:
            if number not in left_out:
                live += change
                highest = max(highest, live)
        return highest

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._numbers:
                    self._before.setdefault(storage._cdata, storage)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._numbers or address in self._before or not size:
            return
        self._count += 1
        self._numbers[address] = self._count
        self._events.append((self._count, size))
        weakref.finalize(storage, self._freed, address, size).atexit = False

    def _freed(self, address: int, size: int) -> None:
        self._events.append((self._numbers.pop(address), -size))
