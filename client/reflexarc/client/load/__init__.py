"""Put load on a policy server, and measure what it and the load generator can take."""

from reflexarc.client.load.processes import run_load
from reflexarc.client.load.settings import LoadSettings
from reflexarc.client.load.summary import LoadSummary, jain_index

__all__ = ["LoadSettings", "LoadSummary", "jain_index", "run_load"]
