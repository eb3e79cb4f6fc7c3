"""serve-policy: a checkpoint behind websocket and HTTP."""

from reflexarc.server.app import create_app
from reflexarc.server.background import BackgroundServer
from reflexarc.server.inference import Inference
from reflexarc.server.lifecycle import PolicyServer
from reflexarc.server.null_policy import NullPolicy, libero_contract
from reflexarc.server.service import Phase, PolicyService

__all__ = [
    "BackgroundServer",
    "Inference",
    "NullPolicy",
    "Phase",
    "PolicyServer",
    "PolicyService",
    "create_app",
    "libero_contract",
]
