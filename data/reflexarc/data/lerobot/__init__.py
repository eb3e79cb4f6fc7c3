"""LeRobot datasets v2.0, v2.1 and v3.0: parquet, videos or images, and GR00T's modality.json."""

from reflexarc.data.lerobot.dataset import LeRobotDataset, is_lerobot, open_lerobot
from reflexarc.data.lerobot.mapping import ActionMeaning, Mapping

__all__ = ["ActionMeaning", "LeRobotDataset", "Mapping", "is_lerobot", "open_lerobot"]
