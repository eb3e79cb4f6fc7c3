"""The two calls of a decision that compute: embed new frames, and turn a window into actions.

Eagerly, or on CUDA as graphs (:mod:`reflexarc.policy.cuda_graphs`).
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

from torch import Tensor

from reflexarc.contract.errors import ConfigError, InferenceError
from reflexarc.policy.interface import Policy, Tensors
from reflexarc.policy.layers.selective_scan.errors import ScanInputError
from reflexarc.policy.windows import with_clips

CompileMode = Literal["auto", "off", "graph"]
"""``graph``: CUDA graphs. ``auto``: those, for a policy whose family says that it can, on CUDA."""


class Decisions(Protocol):
    """Called in inference mode, by one thread at a time."""

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        """``Policy.kept_frames`` of what ``Policy.embed_frames`` gives."""

    def sample(
        self, task: Tensors, window: Tensors, valid: Tensor, steps: int, given: Tensors
    ) -> Tensor:
        """Normalised actions ``(B, H, D)``.

        Args:
            task, window, valid: as ``Policy.encode`` has them, but clips not embedded yet.
            steps: of denoising.
            given: what there is of ``noise``, ``prefix`` and ``guide``.

        Raises InferenceError where the policy's own values are not finite on the way, if it looks.
        """


class EagerDecisions:
    """Operation by operation."""

    def __init__(self, policy: Policy):
        self._policy = policy

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        return self._policy.kept_frames(self._policy.embed_frames(frames, task), task)

    def sample(
        self, task: Tensors, window: Tensors, valid: Tensor, steps: int, given: Tensors
    ) -> Tensor:
        # A policy that supports a prefix or guide alone need not know the other argument.
        known = {name: rows for name, rows in given.items() if name != "noise"}
        try:
            context = self._policy.encode(task, with_clips(self._policy, window, valid), valid)
            return self._policy.sample_actions(context, given.get("noise"), steps=steps, **known)
        except ScanInputError as error:  # the observation was checked: it is the weights
            raise InferenceError(
                f"the policy's tokens are not finite; its weights are damaged ({error.message})"
            ) from error


def check_mode(mode: str, device: str) -> CompileMode:
    """The mode, if a device such as ``cuda:0`` has it. Raises ConfigError."""
    for known in get_args(CompileMode):
        if mode == known and (mode != "graph" or device.startswith("cuda")):
            checked: CompileMode = known
            return checked
    if mode == "graph":
        raise ConfigError(
            f"--compile graph needs a CUDA device, the policy is on {device}; use --compile auto",
            field="compile",
        )
    raise ConfigError(
        f"--compile must be one of {', '.join(get_args(CompileMode))}, got {mode!r}",
        field="compile",
    )


def make_decisions(policy: Policy, mode: CompileMode = "auto") -> Decisions:
    """How a policy computes on its device.

    Raises ConfigError for another mode, and for graphs on a device that has none.
    """
    check_mode(mode, str(policy.device))
    if policy.serving_dtype is not None:
        from reflexarc.policy.half_precision import AutocastDecisions

        return AutocastDecisions(_decisions(policy, mode), policy, policy.serving_dtype)
    return _decisions(policy, mode)


def _decisions(policy: Policy, mode: CompileMode) -> Decisions:
    wanted = mode == "graph" or (mode == "auto" and policy.graph_safe)
    if not wanted or policy.device.type != "cuda":
        return EagerDecisions(policy)
    from reflexarc.policy.cuda_graphs import graphed_decisions

    return graphed_decisions(policy)
