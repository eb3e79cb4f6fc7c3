"""What the thin test policies share: words as tokens, frozen weights with an identity, a flow."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.policy.interface import FrozenBackbone, Policy, PolicyConfig
from reflexarc.policy.layers.flow_matching import interpolate, sample_times, target_velocity

VOCABULARY, MAX_TOKENS = 64, 8
WIDTH = 32
Module = TypeVar("Module", bound=nn.Module)


class TinyConfig(PolicyConfig):
    """Everything else of a test policy stands in its contract."""

    seed: int = 0


def tokens(texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    """Words as ids ``int64 (N, L)``, padded at the end, and ``bool (N, L)``, False on padding."""
    ids = torch.ones(len(texts), MAX_TOKENS, dtype=torch.int64)
    mask = torch.zeros(len(texts), MAX_TOKENS, dtype=torch.bool)
    for row, text in enumerate(texts):
        words = (text or "").split()[:MAX_TOKENS]
        numbers = [zlib.crc32(word.encode()) % (VOCABULARY - 8) + 8 for word in words]
        ids[row, : len(words)] = torch.tensor(numbers)
        mask[row, : len(words)] = True
    return ids, mask


def seeded(seed: int, make: Callable[[], Module]) -> Module:
    """A module with the same random weights for the same seed, as if loaded from a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def frozen(module: Module) -> Module:
    return module.requires_grad_(False).eval()


def identity(name: str, module: nn.Module) -> FrozenBackbone:
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return FrozenBackbone(name=name, sha256=digest.hexdigest())


class TinyPolicy(Policy):
    """Builds from config and contract alone."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig, contract: PolicyContract) -> None:
        super().__init__()
        self.config, self.contract = config, contract

    @classmethod
    def build(
        cls, config: PolicyConfig, contract: PolicyContract, extra_files: Mapping[str, bytes]
    ) -> TinyPolicy:
        return cls(config, contract)  # type: ignore[arg-type]

    def pixels(self, frames: Mapping[str, Tensor]) -> Tensor:
        """``uint8 (N, V, H, W, 3)`` of the contract's cameras to ``float32 (N, V, 3, H, W)``."""
        images = torch.stack([frames[name] for name in self.contract.camera_names], dim=1)
        return images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0


class ActionDecoder(nn.Module):
    """Learned or noisy queries ``(B, H, D)`` attend to each other and to ``(B, L, WIDTH)``."""

    def __init__(self, horizon: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(horizon, WIDTH) * 0.1)
        self.time = nn.Linear(1, WIDTH)
        self.action = nn.Linear(inputs, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)

    def forward(
        self, context: Tensor, x: Tensor, t: Tensor, ignore: Tensor | None = None
    ) -> Tensor:
        """``ignore (B, L)`` is True on tokens that are padding.

        Actions attend to each other too: else a prefix could not move what follows it.
        """
        queries = self.action(x) + self.position + self.time(t[:, None])[:, None]
        keys = torch.cat([context, queries], dim=1)
        if ignore is not None:
            ignore = torch.cat([ignore, ignore.new_zeros(queries.shape[:2])], dim=1)
        attended, _ = self.attention(
            queries, keys, keys, key_padding_mask=ignore, need_weights=False
        )
        outputs: Tensor = self.out(torch.nn.functional.gelu(self.norm(queries + attended)))
        return outputs


def flow_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], motion: Tensor, mask: Tensor, seed: int
) -> Tensor:
    """Mean squared error of the velocity over actions that are not padding."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(motion.shape, generator=generator)
    t = sample_times(len(motion), generator=generator)
    error = velocity(interpolate(motion, noise, t), t) - target_velocity(motion, noise)
    return (error.square().mean(-1) * mask).sum() / mask.sum()
