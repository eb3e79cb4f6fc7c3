"""AdamW with the usual exceptions from weight decay, and a running average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reflexarc.training.config import OptimizerConfig

_NEVER_DECAYED = ("A_log", "D", "bias")
_EMBEDDING_WORDS = ("embed", "position", "modality", "token", "latent", "query", "queries")


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name, in the module's order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def decays(name: str, parameter: Tensor, owner: nn.Module) -> bool:
    """Whether weight decay applies: only to matrices and kernels of layers.

    ``A_log`` and ``D`` set a state space's time scales, and norms, biases and embeddings have no
    scale to keep small: none of them decays.
    """
    leaf = name.rsplit(".", 1)[-1]
    if getattr(parameter, "_no_weight_decay", False):
        return False
    if parameter.ndim < 2 or leaf in _NEVER_DECAYED:
        return False
    if isinstance(owner, nn.Embedding) or "norm" in type(owner).__name__.lower():
        return False
    return leaf == "weight" or not any(word in leaf.lower() for word in _EMBEDDING_WORDS)


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters in two groups, with and without decay."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    owners = dict(module.named_modules())
    for name, parameter in trained_parameters(module).items():
        owner = owners[name.rpartition(".")[0]]
        groups[0 if decays(name, parameter, owner) else 1].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[0], "weight_decay": config.weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
    )


class AveragedWeights:
    """Exponential moving average of a module's trained parameters.

    The decay rises with the step as ``min(decay, (1 + step) / (10 + step))``, so that a short
    run does not serve its initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._module = module
        self.values = {n: p.detach().clone() for n, p in trained_parameters(module).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the module's weights after optimiser step ``step`` (from 1)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        parameters = trained_parameters(self._module)
        torch._foreach_lerp_(
            list(self.values.values()), [p.detach() for p in parameters.values()], weight
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the averaged weights."""
        parameters = trained_parameters(self._module)
        trained = {name: p.detach().clone() for name, p in parameters.items()}
        self._assign(self.values)
        try:
            yield
        finally:
            self._assign(trained)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, parameter in trained_parameters(self._module).items():
            parameter.copy_(values[name])
