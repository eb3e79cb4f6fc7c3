"""The interface that every policy family serves through.

A policy is a pure function of its inputs: it keeps no queue, no history, no device string, and
its noise comes from outside. Episode state (the task's embedding, past frames) belongs to the
session in the server; execution of chunks belongs to the executor in the client.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from reflexarc.contract import PolicyContract

Tensors: TypeAlias = dict[str, Tensor]
"""Named tensors with rows first, so that a session can keep rows and a batcher can stack them."""


class PolicyConfig(BaseModel):
    """Strict base of a family's architecture config; written into ``policy.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class SamplingSpec:
    """How actions are sampled.

    Attributes:
        noise_shape: shape of one row's noise, or None for a policy without noise.
        default_steps: Euler steps of the sampler when the request names none.
        supports_prefix: whether ``sample_actions`` accepts the start of a chunk as given.
        supports_guide: whether it accepts actions after that start to stay near.
    """

    noise_shape: tuple[int, ...] | None
    default_steps: int = 1
    supports_prefix: bool = False
    supports_guide: bool = False


@dataclass(frozen=True)
class FrozenBackbone:
    """Names pretrained weights that a policy uses but does not train.

    Attributes:
        name: of the backbone.
        sha256: of its weights as they were loaded.
        revision: of its files, where they have one: a hub's commit, a package's version.
    """

    name: str
    sha256: str
    revision: str = ""


@dataclass(frozen=True)
class Task:
    """What one episode is about, before any embedding.

    Attributes:
        instruction: what to do, in words.
        goal_image: camera name to ``uint8 (H, W, 3)`` RGB as the contract's cameras state: what
            the scene shall look like. None for a policy that needs none.
    """

    instruction: str | None = None
    goal_image: Mapping[str, Tensor] | None = None


class Policy(nn.Module, ABC):
    """What is served. Rows of a batch are independent of each other.

    Shapes: N rows of any sessions, B decisions, F frames, P states and T = max(F, P) rows of a
    decision's window (``contract.history``), S state dimensions, H horizon, D action dimensions.

    Rows of an ``embed_`` method have one shape whatever they were made of, because sessions stack
    them: a policy that reads instructions as tokens pads them to a fixed length and returns the
    mask as another row.
    """

    family: ClassVar[str]
    config_class: ClassVar[type[PolicyConfig]]
    config: PolicyConfig
    contract: PolicyContract
    sampling: SamplingSpec
    graph_safe: ClassVar[bool] = False
    """Whether ``embed_frames``, ``encode`` and ``sample_actions`` run the same kernels whatever the
    values of their arguments, and never wait for the device: then CUDA graphs may hold them."""
    bf16_safe: ClassVar[bool] = False
    """Whether decisions may compute in bfloat16 autocast (``serve-policy --precision bf16``)."""
    serving_dtype: torch.dtype | None = None
    """What decisions compute in, where it is not the weights' own precision."""
    embeds_clips: ClassVar[bool] = False
    """Whether the frozen part sees the frames of a window together (video). Then the feature store
    holds a row of :meth:`stored_clips` for every frame, of the clip that ends with it, and
    ``encode`` sees one such row in the place of F frames."""

    @abstractmethod
    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        """Embed N tasks once an episode; rows ``(N, ...)`` are kept by the session.

        Here belongs whatever stays the same over an episode: instruction and goal image.
        Raises UnknownInstructionError for an instruction that has no embedding.
        """

    @abstractmethod
    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        """Embed N new frames; rows ``(N, ...)`` are kept by the session, and cached in training.

        A frame is embedded once, and its row is part of every window that it falls into. An
        encoder that mixes frames (video) keeps pixels as rows, and runs in :meth:`embed_clips`
        where it is frozen, else in ``encode``.

        Args:
            frames: camera name to ``uint8 (N, H, W, 3)`` RGB as the contract states.
            task: rows of ``embed_task``, ``(N, ...)``.
        """

    def kept_frames(self, rows: Tensors, task: Tensors) -> Tensors:
        """What a session keeps of N new frames, rows ``(N, ...)``: as a rule ``embed_frames``'s.

        A policy whose trained part reads each frame by itself reads it here, once a frame, and
        its ``encode`` takes either kind of rows: the feature store holds those of frozen weights.

        Args:
            rows: of ``embed_frames``, ``(N, ...)``.
            task: rows of ``embed_task``, ``(N, ...)``.
        """
        return rows

    def embed_clips(self, clips: Tensors, valid: Tensor) -> Tensors:
        """Where ``embeds_clips``: what the frozen part makes of N clips, rows ``(N, ...)``.

        Args:
            clips: rows of ``embed_frames`` ``(N, F, ...)``, oldest first, the oldest repeated
                before an episode's first frame.
            valid: ``bool (N, F)``, False where a frame is padding.
        """
        raise NotImplementedError(f"{type(self).__name__} embeds frames one by one")

    def stored_clips(self, clips: Tensors, valid: Tensor) -> Tensors:
        """What training stores of clips: :meth:`embed_clips`, and what else an objective wants."""
        return self.embed_clips(clips, valid)

    @abstractmethod
    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        """Context of one decision.

        Args:
            task: rows ``(B, ...)`` of ``embed_task``.
            window: rows of ``embed_frames`` ``(B, F, ...)`` and ``"state" (B, P, S)`` normalised
                float32, ``contract.history.stride`` steps apart, oldest first. Before an
                episode's first row its oldest is repeated. Where ``embeds_clips``, rows of
                ``embed_clips`` ``(B, 1, ...)`` in the place of the frames'.
            valid: ``bool (B, T)``, False where a row is padding. Its last F columns are those of
                the frames, its last P those of the states.
        """

    @abstractmethod
    def sample_actions(
        self,
        context: Tensors,
        noise: Tensor | None,
        *,
        steps: int,
        prefix: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:
        """Normalised action chunks ``float32 (B, H, D)``.

        Args:
            context: of ``encode``.
            noise: ``(B, *sampling.noise_shape)`` float32, or None where the policy needs none.
            steps: Euler steps.
            prefix: normalised actions ``(B, C, D)``, C < H, that are already committed; the
                chunk begins with them. Only where ``sampling.supports_prefix``.
            guide: normalised actions ``(B, G, D)``, C + G <= H, that would follow them in the
                chunk being executed; the new one stays near them, less and less. Passed only
                where ``sampling.supports_guide``; other policies need not know the argument.
        """

    @classmethod
    @abstractmethod
    def build(
        cls, config: PolicyConfig, contract: PolicyContract, extra_files: Mapping[str, bytes]
    ) -> Policy:
        """Build the policy, its trained weights still random; the inverse of ``extra_files``."""

    @classmethod
    def reads_instructions(cls, config: PolicyConfig) -> bool:
        """Whether such a policy reads instructions itself, so that it needs no table of them."""
        return False

    def extra_files(self) -> Mapping[str, bytes]:
        """Files beside the weights that the checkpoint must carry (language embeddings)."""
        return {}

    def frozen_backbones(self) -> Mapping[str, FrozenBackbone]:
        """Module path to the identity of pretrained weights that checkpoints name, not copy."""
        return {}

    def stored_backbones(self) -> Mapping[str, FrozenBackbone]:
        """Those among them that rows of ``embed_frames`` depend on."""
        return self.frozen_backbones()

    def is_trained(self, name: str) -> bool:
        """Whether a tensor of the state is the policy's own, so that checkpoints carry it.

        Frozen backbones' are not, but what was put inside them to be trained (adapters) is.
        """
        return not name.startswith(tuple(f"{path}." for path in self.frozen_backbones()))

    def blocks(self) -> Sequence[nn.Module]:
        """Repeated blocks that hold most weights and activations; none of them inside another.

        Training may compute one anew in the backward pass, and divides the weights by them.
        """
        return ()

    def component_parameters(self) -> Mapping[str, int]:
        """Number of trained parameters by component, for reports and for tests that pin them."""
        return {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in self.named_children()
            if name not in self.frozen_backbones()
        }

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
