"""What one offline comparison is asked to do, and what must be equal for its results to mix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from reflexarc.contract import PolicyContract
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.durable_log import unequal
from reflexarc.eval.run_settings import contract_sha256

Labels = Literal["executed", "expert"]


class OfflineIdentity(FrozenModel):
    """What must be equal for two episodes to belong to one table."""

    checkpoint_fingerprint: str
    contract_sha256: str
    labels: Labels
    every: int
    seed: int
    resize: bool

    def differences(self, other: OfflineIdentity) -> list[str]:
        """The fields in which a run that is ``other`` differs."""
        return unequal(
            (name, getattr(self, name), getattr(other, name))
            for name in OfflineIdentity.model_fields
        )


class OfflineSettings(FrozenModel):
    """One call of ``reflexarc eval offline``.

    Attributes:
        data: HDF5 file of LIBERO demonstrations, a folder of them, or a LeRobot folder.
        tasks: names of tasks, or parts of names that fit one task each; empty takes all.
        episodes: positions of a task's demonstrations in its file; None takes all.
        every: of the recorded frames every this many is a question.
        labels: compare with the actions that were executed, or with those that the demonstrator
            meant (``expert_actions``), where noise was injected.
        resize: also send images that were recorded at another size than the contract's source.
        recipe_data: the ``data`` section of the policy's recipe, which says what it called the
            parts and cameras of a LeRobot folder.
        retry_for: seconds during which an absent server is asked again.
    """

    server: str
    data: Path
    output: Path
    tasks: tuple[str, ...] = ()
    episodes: tuple[int, ...] | None = None
    every: Annotated[int, Field(ge=1)] = 1
    labels: Labels = "executed"
    resize: bool = False
    recipe_data: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    retry_for: Annotated[float, Field(ge=0)] = 60.0

    def identity(self, contract: PolicyContract) -> OfflineIdentity:
        return OfflineIdentity(
            checkpoint_fingerprint=contract.checkpoint_fingerprint,
            contract_sha256=contract_sha256(contract),
            labels=self.labels,
            every=self.every,
            seed=self.seed,
            resize=self.resize,
        )
