"""``reflexarc eval offline``: recorded observations through a server, chunks beside recorded ones.

No simulator. It says how well a policy imitates; whether it succeeds, only an episode says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from reflexarc.client import PolicyClient
from reflexarc.contract.errors import CodecError
from reflexarc.eval.offline_data import RecordedEpisode, select_episodes
from reflexarc.eval.offline_errors import compare_episode
from reflexarc.eval.offline_log import OfflineLog
from reflexarc.eval.offline_settings import OfflineSettings
from reflexarc.eval.offline_summary import OfflineSummary, summarize_offline, write_offline_summary

Notify = Callable[[str], None]


def evaluate_offline(settings: OfflineSettings, notify: Notify = print) -> OfflineSummary:
    """Ask the server about every chosen frame and write what came of it to ``settings.output``.

    Finished episodes in that folder are skipped.

    Raises:
        ContractViolationError, DatasetError, ConfigError: data and policy do not fit, by name.
        ResultsError: the output folder holds results of another checkpoint, data or setting.
        ServerUnavailableError: no server; what is finished is kept.
    """
    with PolicyClient(settings.server, retry_for=settings.retry_for) as policy:
        recorded = select_episodes(settings, policy.contract)
        identity = settings.identity(policy.contract)
        data = {one.name: one.sha256() for one in recorded}
        with OfflineLog(settings.output, identity, data, notify) as log:
            try:
                _run(policy, recorded, log, settings, notify)
            finally:
                finished = log.episodes
                asked = [finished[one.name] for one in recorded if one.name in finished]
                if asked:
                    summary = summarize_offline(
                        asked,
                        policy.contract,
                        action_std=_action_std(policy),
                        complete=len(asked) == len(recorded),
                    )
                    write_offline_summary(summary, settings.output)
    return summary


def _run(
    policy: PolicyClient,
    recorded: Sequence[RecordedEpisode],
    log: OfflineLog,
    settings: OfflineSettings,
    notify: Notify,
) -> None:
    identity = settings.identity(policy.contract)
    finished = log.episodes
    todo = [one for one in recorded if one.name not in finished]
    if len(todo) < len(recorded):
        notify(
            f"{len(recorded) - len(todo)} of {len(recorded)} episodes are finished in {log.path}; "
            "skipped"
        )
    with (
        logging_redirect_tqdm(),  # what the client says while it waits for the server
        tqdm(total=sum(len(one.steps) for one in todo), unit="chunk") as progress,
    ):
        for one in todo:
            progress.set_postfix_str(one.name[-40:])
            log.append(
                compare_episode(one, policy.contract, policy, identity, on_answer=progress.update)
            )


def _action_std(policy: PolicyClient) -> tuple[float, ...] | None:
    """The standard deviations that the server states, or None. CodecError if they are no such."""
    stated = policy.metadata.get("action_std")
    if stated is None:
        return None
    dimension = policy.contract.action.dimension
    if not (
        isinstance(stated, list | tuple)
        and len(stated) == dimension
        and all(isinstance(value, int | float) and value >= 0 for value in stated)
    ):
        raise CodecError(
            f"the server states action_std {stated!r}; expected {dimension} numbers from 0 up",
            field="action_std",
        )
    return tuple(map(float, stated))
