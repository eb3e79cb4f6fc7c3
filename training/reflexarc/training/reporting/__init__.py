"""What a run tells while it trains: metrics.jsonl, train.log, TensorBoard, Weights & Biases."""

from reflexarc.training.reporting.opening import open_reporters
from reflexarc.training.reporting.reporter import Reporters, RunReporter, told_in_log

__all__ = ["Reporters", "RunReporter", "open_reporters", "told_in_log"]
