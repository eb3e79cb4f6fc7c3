"""What the batcher believes of batches that ran long ago."""

from __future__ import annotations

from reflexarc.server.batching.cost import BatchCost


def test_a_slow_single_row_of_long_ago_is_not_believed() -> None:
    cost = BatchCost()
    cost.observe(1, 0.080)  # while the policy was warmed on a busy machine
    cost.observe(1, 0.045)
    for _ in range(5):
        cost.observe(16, 0.025)
    assert cost.expect(1) == cost.expect(8) == 0.025
    assert cost.cautious(1) == 0.025


def test_a_larger_batch_may_take_longer() -> None:
    cost = BatchCost()
    assert cost.expect(4) == cost.cautious(4) == 0.0
    cost.observe(1, 0.010)
    cost.observe(4, 0.040)
    assert (cost.expect(1), cost.expect(2), cost.expect(4)) == (0.010, 0.020, 0.040)
    assert cost.expect(8) == 0.080
