"""What a policy expects and returns, its bytes on the wire, and its statistics."""

from reflexarc.contract.codec import EncodedImage, pack, unpack
from reflexarc.contract.errors import ReflexarcError
from reflexarc.contract.messages import ActionChunk, HistoryRow, Observation
from reflexarc.contract.observation_check import check_observation
from reflexarc.contract.policy_contract import PROTOCOL_VERSION, Camera, PolicyContract
from reflexarc.contract.statistics import FeatureStatistics, NormalizationStatistics

__all__ = [
    "PROTOCOL_VERSION",
    "ActionChunk",
    "Camera",
    "EncodedImage",
    "FeatureStatistics",
    "HistoryRow",
    "NormalizationStatistics",
    "Observation",
    "PolicyContract",
    "ReflexarcError",
    "check_observation",
    "pack",
    "unpack",
]
