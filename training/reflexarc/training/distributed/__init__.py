"""Training on one process or several: what differs between them stands behind :class:`Engine`."""

from reflexarc.training.distributed.engine import Engine, TrainedModules

__all__ = ["Engine", "TrainedModules"]
