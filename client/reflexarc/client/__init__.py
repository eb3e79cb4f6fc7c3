"""Ask a served policy for action chunks and execute them. No torch, no simulator."""

from reflexarc.client.executor import ChunkPolicy, RecedingHorizonExecutor
from reflexarc.client.http_client import HttpPolicyClient
from reflexarc.client.websocket_client import PolicyClient

__all__ = ["ChunkPolicy", "HttpPolicyClient", "PolicyClient", "RecedingHorizonExecutor"]
