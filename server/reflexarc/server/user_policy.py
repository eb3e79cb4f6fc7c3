"""A user's plain class behind the server: found, built, and never trusted with a robot unchecked.

Such a class has ``contract`` (a PolicyContract) and ``infer(observation)``, which gives
``actions (horizon, dimension)`` in the robot's units or an ActionChunk; ``reset(session_id)`` and
``warm_up()`` are optional. What it raises or returns wrongly becomes a named error in the reply;
an action outside the contract is never sent. A class with ``infer_batch(observations)``, which
gives a list with what ``infer`` would give for each, answers several clients in one call.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract import ActionChunk, Observation, PolicyContract, ReflexarcError
from reflexarc.contract.errors import ConfigError, InferenceError
from reflexarc.server.loading import blank_observation

logger = logging.getLogger(__name__)
_SESSIONS = 1024  # remembered, to tell a new session from one that goes on
_MAX_BATCH = 32
_ROUNDING = 1e-6  # of a limit's magnitude: float32 of a clipped float64 may lie just outside


def check_policy_class(name: str, found: object) -> type[Any]:
    """``found`` as a class that can be built and asked; ConfigError naming what it lacks."""
    if not isinstance(found, type):
        raise ConfigError(f"{name} is a {type(found).__name__}, not a class", field="policy")
    infer = getattr(found, "infer", None)
    if not callable(infer):
        raise ConfigError(
            f"{name} has no method infer(observation); give it one that returns the actions "
            "(horizon, dimension)",
            field="policy",
        )
    if inspect.iscoroutinefunction(infer):
        raise ConfigError(
            f"{name}.infer is async; make it a plain function: it runs in a thread of its own",
            field="policy",
        )
    return found


class UserPolicy:
    """The :class:`~reflexarc.server.inference.Inference` protocol over a user's object.

    Args:
        policy_class: of :func:`check_policy_class`.
        name: as the user wrote it, for messages.
        config: keyword arguments of the constructor.

    Raises ConfigError: the constructor refuses the config or raises, or there is no contract.
    """

    def __init__(
        self, policy_class: type[Any], name: str, config: Mapping[str, Any] | None = None
    ) -> None:
        self._name = name
        self._policy = _build(policy_class, name, dict(config or {}))
        self._batches = callable(getattr(self._policy, "infer_batch", None))
        self.max_batch = _MAX_BATCH if self._batches else 1
        self._contract = _contract(self._policy, name, config)
        self._sessions: OrderedDict[str | None, None] = OrderedDict()

    @property
    def contract(self) -> PolicyContract:
        return self._contract

    @property
    def sampling(self) -> Mapping[str, Any]:
        return {"noise_shape": None, "denoising_steps": 1, "policy": self._name}

    @property
    def action_std(self) -> None:
        """A plain class states no statistics."""

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """One checked chunk an observation.

        Raises InferenceError: what the class returned is no chunk of the contract.
        """
        if not self._batches or len(observations) == 1:
            return [self._infer(observation) for observation in observations]
        results = self._ask_batch(observations)
        return [
            self._checked(result, observation)
            for result, observation in zip(results, observations, strict=True)
        ]

    def end_session(self, session_id: str) -> bool:
        """Its next request begins it anew."""
        known = session_id in self._sessions
        self._sessions.pop(session_id, None)
        return known

    def warm_up(self) -> None:
        """The class's own ``warm_up()``, or one inference on black images.

        Raises InferenceError when that gives actions that could not be sent. An exception is only
        logged: black images and a state of zeros may be nothing that this policy understands.
        """
        own = getattr(self._policy, "warm_up", None)
        if callable(own):
            own()
            return
        trial = blank_observation(self._contract, None)
        try:
            result = self._ask(trial)
        except Exception:
            logger.warning(
                "%s raised on black images and a state of zeros; it is served nevertheless. "
                "Give it a method warm_up() to try something else",
                self._name,
                exc_info=True,
            )
        else:
            self._checked(result, trial)
        finally:
            self._sessions.clear()

    def _infer(self, observation: Observation) -> ActionChunk:
        return self._checked(self._ask(observation), observation)

    def _ask(self, observation: Observation) -> object:
        try:
            self._begin_session(observation)
            return self._policy.infer(observation)
        except Exception:
            raise
        except BaseException as error:
            # SystemExit or CancelledError would travel on and end the server.
            logger.error("%s.infer failed", self._name, exc_info=True)
            raise InferenceError(f"{self._name}.infer raised {type(error).__name__}") from error

    def _ask_batch(self, observations: Sequence[Observation]) -> Sequence[object]:
        for observation in observations:
            self._begin_session(observation)
        try:
            results = self._policy.infer_batch(list(observations))
        except Exception:
            raise
        except BaseException as error:
            logger.error("%s.infer_batch failed", self._name, exc_info=True)
            raise InferenceError(
                f"{self._name}.infer_batch raised {type(error).__name__}"
            ) from error
        if not isinstance(results, list | tuple) or len(results) != len(observations):
            came = (
                f"{len(results)} results"
                if isinstance(results, list | tuple)
                else f"a {type(results).__name__}"
            )
            raise InferenceError(
                f"{self._name}.infer_batch returned {came} for {len(observations)} observations; "
                "return a list with the actions of each, in their order",
                field="actions",
            )
        return results

    def _begin_session(self, observation: Observation) -> None:
        """Tell the policy of a session that it has not seen, or that starts over."""
        session = observation.session_id
        begins = observation.step_index == 0 or session not in self._sessions
        self._sessions[session] = None
        self._sessions.move_to_end(session)
        if len(self._sessions) > _SESSIONS:
            self._sessions.popitem(last=False)
        reset = getattr(self._policy, "reset", None)
        if begins and callable(reset):
            reset(session)

    def _checked(self, result: Any, observation: Observation) -> ActionChunk:
        is_chunk = isinstance(result, ActionChunk)
        return ActionChunk(
            actions=self._executable(result.actions if is_chunk else result),
            seed=observation.seed or 0,
            timing=_finite(result.timing) if is_chunk else {},
        )

    def _executable(self, actions: object) -> npt.NDArray[np.float32]:
        action = self._contract.action
        expected = (action.horizon, action.dimension)
        if not isinstance(actions, np.ndarray):
            raise self._refused(
                f"a {type(actions).__name__}",
                f"return a numpy array {expected}, for example np.asarray(actions, np.float32)",
            )
        if actions.dtype.kind != "f":
            raise self._refused(
                f"{actions.dtype} {actions.shape}", "return actions.astype(np.float32)"
            )
        if actions.shape != expected:
            raise self._refused(
                f"an array {actions.shape}",
                f"the contract says (horizon, dimension) = {expected}; return that many rows",
            )
        if not np.isfinite(actions).all():
            step, column = (int(i) for i in np.argwhere(~np.isfinite(actions))[0])
            raise self._refused(
                f"{actions[step, column]} for {action.names[column]} in row {step}",
                "return finite numbers",
            )
        low, high = np.array(action.low), np.array(action.high)
        outside = (actions < low - _ROUNDING * np.abs(low)) | (
            actions > high + _ROUNDING * np.abs(high)
        )
        if outside.any():
            step, column = (int(i) for i in np.argwhere(outside)[0])
            raise self._refused(
                f"{actions[step, column]:g} for {action.names[column]} in row {step}, outside "
                f"{action.low[column]:g} to {action.high[column]:g}",
                "clip it: np.clip(actions, contract.action.low, contract.action.high)",
            )
        return np.ascontiguousarray(np.clip(actions, low, high), dtype=np.float32)

    def _refused(self, what: str, mend: str) -> InferenceError:
        message = f"{self._name}.infer returned {what}; nothing was sent; {mend}"
        logger.error(message)
        return InferenceError(message, field="actions")


def _finite(timing: Mapping[str, Any]) -> dict[str, float]:
    """What of a user's timings can be sent as JSON."""
    return {
        str(key): float(value)
        for key, value in timing.items()
        if isinstance(value, int | float) and np.isfinite(value)
    }


def _build(policy_class: type[Any], name: str, config: dict[str, Any]) -> Any:
    try:
        inspect.signature(policy_class).bind(**config)
    except TypeError as error:
        raise ConfigError(
            f"{name}{inspect.signature(policy_class)} cannot be built with "
            f"{config or 'no arguments'}: {error}; --policy-config FILE gives keyword arguments",
            field="policy_config",
        ) from error
    except ValueError:
        pass  # a class written in C has no signature: its constructor will speak
    try:
        return policy_class(**config)
    except ReflexarcError:
        raise
    except Exception as error:
        logger.error("%s could not be built", name, exc_info=True)
        raise ConfigError(
            f"the constructor of {name} raised {type(error).__name__}: {error}", field="policy"
        ) from error
    except BaseException as error:
        raise ConfigError(
            f"the constructor of {name} raised {type(error).__name__}", field="policy"
        ) from error


def _contract(policy: Any, name: str, config: Mapping[str, Any] | None) -> PolicyContract:
    contract = getattr(policy, "contract", None)
    if not isinstance(contract, PolicyContract):
        came = "none" if contract is None else f"a {type(contract).__name__}"
        raise ConfigError(
            f"{name} needs an attribute 'contract' that is a reflexarc.contract.PolicyContract, "
            f"found {came}; examples/my_policy.py shows one",
            field="contract",
        )
    if contract.checkpoint_fingerprint:
        return contract
    # Results name the policy they belong to, so that one folder never mixes two versions of it.
    return contract.model_copy(update={"checkpoint_fingerprint": _fingerprint(policy, config)})


def _fingerprint(policy: Any, config: Mapping[str, Any] | None) -> str:
    """sha256 of the class's name, its module's source and its configuration."""
    module = sys.modules.get(type(policy).__module__)
    source = getattr(module, "__file__", None)
    digest = hashlib.sha256(f"{type(policy).__module__}:{type(policy).__qualname__}\n".encode())
    if source is not None and Path(source).is_file():
        digest.update(Path(source).read_bytes())
    digest.update(json.dumps(config or {}, sort_keys=True, default=str).encode())
    return digest.hexdigest()
