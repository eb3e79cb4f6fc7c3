"""Finished offline episodes on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from reflexarc.eval.durable_log import DurableLog
from reflexarc.eval.offline_errors import OfflineEpisode
from reflexarc.eval.offline_settings import OfflineIdentity


class OfflineLog(DurableLog[OfflineEpisode]):
    """The finished episodes of an output folder; refuses those of another run.

    Args:
        identity: of this run.
        data: name of every asked episode to the sha256 of its data.
    """

    def __init__(
        self,
        folder: Path,
        identity: OfflineIdentity,
        data: Mapping[str, str],
        notify: Callable[[str], None],
    ) -> None:
        def differences(episode: OfflineEpisode) -> list[str]:
            found = episode.identity.differences(identity)
            # What is compared follows from the settings too: it says more where they are equal.
            if not found and data.get(episode.name, episode.data_sha256) != episode.data_sha256:
                found.append(f"data_sha256: {episode.name} holds other actions than it did then")
            return found

        super().__init__(folder, OfflineEpisode, "an offline episode", differences, notify)

    @property
    def episodes(self) -> dict[str, OfflineEpisode]:
        """The finished episodes by name."""
        return {episode.name: episode for episode in self.results}
