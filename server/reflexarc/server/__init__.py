"""serve-policy: a checkpoint behind websocket and HTTP."""

from reflexarc.server.admission import Phase
from reflexarc.server.api_keys import ApiKeys
from reflexarc.server.app import create_app
from reflexarc.server.background import BackgroundServer
from reflexarc.server.inference import Inference
from reflexarc.server.lifecycle import PolicyServer
from reflexarc.server.null_policy import NullPolicy, libero_contract
from reflexarc.server.protection import Protection
from reflexarc.server.service import PolicyService

__all__ = [
    "ApiKeys",
    "BackgroundServer",
    "Inference",
    "NullPolicy",
    "Phase",
    "PolicyServer",
    "PolicyService",
    "Protection",
    "create_app",
    "libero_contract",
]
