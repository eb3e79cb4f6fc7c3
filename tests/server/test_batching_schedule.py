"""What the batcher decides, in simulated time: whole batches for closed loops, goodput for late
ones, no wait where it cannot pay."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest

from reflexarc.contract import Observation
from reflexarc.server.batching.arrivals import Arrivals
from reflexarc.server.batching.cost import BatchCost
from reflexarc.server.batching.pending import Pending
from reflexarc.server.batching.schedule import choose, hold_until, hopeless

T = 0.025
_IMAGE = np.zeros((1, 1, 3), np.uint8)


def pending(
    received: float = 0.0,
    *,
    peer: str | None = None,
    deadline_ms: float | None = None,
    session: str | None = None,
) -> Pending:
    observation = Observation(
        {"c": _IMAGE}, np.zeros(1), session_id=session, deadline_ms=deadline_ms
    )
    return Pending(observation, received, lambda outcome: None, peer=peer)


def known_cost(duration: Callable[[int], float], sizes: range = range(1, 33)) -> BatchCost:
    cost = BatchCost()
    for rows in sizes:
        cost.observe(rows, duration(rows))
    return cost


class Simulation:
    """One policy; closed loops that ask ``pause()`` seconds after each reply."""

    def __init__(
        self, clients: int, pause: Callable[[], float], duration: Callable[[int], float]
    ) -> None:
        self.pause, self.duration = pause, duration
        self.arrivals, self.cost = Arrivals(), BatchCost()
        self.order = itertools.count()
        self.events: list[tuple[float, int, str, object]] = []
        self.waiting: list[Pending] = []
        self.gone: set[str] = set()
        self.running = False
        self.since: float | None = None
        self.batches: list[int] = []
        self.waits: list[float] = []
        for client in range(clients):
            self.push(random.random() * T, "ask", f"client {client}")

    def push(self, time: float, kind: str, what: object) -> None:
        heapq.heappush(self.events, (time, next(self.order), kind, what))

    def run(self, seconds: float, max_batch: int = 32) -> None:
        while self.events and self.events[0][0] < seconds:
            now, _, kind, what = heapq.heappop(self.events)
            if kind == "ask":
                assert isinstance(what, str)
                if what in self.gone:
                    continue
                self.arrivals.asked(what, now)
                self.waiting.append(pending(now, peer=what))
            elif kind == "done":
                batch, started = what  # type: ignore[misc]
                self.running = False
                self.cost.observe(len(batch), now - started)
                for row in batch:
                    self.arrivals.replied(row.peer, now)
                    self.push(now + self.pause(), "ask", row.peer)
            self.decide(now, max_batch)

    def decide(self, now: float, max_batch: int) -> None:
        if self.running or not self.waiting:
            return
        self.since = now if self.since is None else self.since
        batch = choose(self.waiting, now, max_batch, self.cost)
        until = hold_until(batch, now, self.since, max_batch, self.cost, self.arrivals)
        if until is not None and until > now:
            self.push(until, "look", None)
            return
        self.waits += [now - max(row.received, self.since) for row in batch]
        self.since, self.running = None, True
        self.waiting = [row for row in self.waiting if row not in batch]
        self.batches.append(len(batch))
        self.push(now + self.duration(len(batch)), "done", (batch, now))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(3)


@pytest.mark.parametrize("clients", [2, 4, 16])
def test_closed_loops_do_not_alternate_in_half_batches(clients: int) -> None:
    simulation = Simulation(clients, lambda: random.uniform(0.001, 0.004), lambda rows: T)
    simulation.run(4.0)
    settled = simulation.batches[10:]
    assert sum(settled) / len(settled) >= 0.95 * clients


def test_no_wait_for_whom_nobody_else_asks() -> None:
    simulation = Simulation(1, lambda: random.uniform(0.001, 0.004), lambda rows: T)
    simulation.run(2.0)
    assert max(simulation.waits) == 0.0


def test_no_wait_where_a_batch_costs_as_much_as_its_rows() -> None:
    simulation = Simulation(4, lambda: random.uniform(0.001, 0.004), lambda rows: T * rows)
    simulation.run(4.0)
    assert max(simulation.waits[40:]) == 0.0


def test_clients_without_a_rhythm_are_hardly_waited_for() -> None:
    simulation = Simulation(6, lambda: random.expovariate(1 / 0.4), lambda rows: T)
    simulation.run(30.0)
    assert sum(simulation.waits) / len(simulation.waits) < 0.05 * T


def test_a_client_that_stays_away_is_waited_for_at_most_a_batch() -> None:
    simulation = Simulation(4, lambda: 0.002, lambda rows: T)
    simulation.run(1.0)
    simulation.gone.add("client 3")
    before = len(simulation.batches)
    simulation.run(3.0)
    assert max(simulation.waits) <= T
    assert set(simulation.batches[before + 3 :]) == {3}, "and then no more"


def goodput(serve: Callable[..., tuple[list[Pending], list[Pending]]], load: float) -> float:
    """Share of Poisson requests answered in time; 3 batches of time each, 4 rows a batch."""
    random.seed(5)
    cost, capacity = known_cost(lambda rows: T), 4 / T
    arrivals, now = [], 0.0
    while len(arrivals) < 20_000:
        now += random.expovariate(load * capacity)
        arrivals.append(pending(now, deadline_ms=1.3 * T * 1000))
    waiting: list[Pending] = []
    clock, place, good = 0.0, 0, 0
    while place < len(arrivals) or waiting:
        if not waiting:
            clock = max(clock, arrivals[place].received)
        while place < len(arrivals) and arrivals[place].received <= clock:
            waiting.append(arrivals[place])
            place += 1
        batch, waiting = serve(waiting, clock, cost)
        if batch:
            clock += T
            good += sum(clock <= row.deadline for row in batch if row.deadline is not None)
    return good / len(arrivals)


def test_goodput_is_half_as_much_again_as_a_greedy_batcher_s() -> None:
    def greedy(
        waiting: list[Pending], now: float, cost: BatchCost
    ) -> tuple[list[Pending], list[Pending]]:
        return waiting[:4], waiting[4:]

    def ours(
        waiting: list[Pending], now: float, cost: BatchCost
    ) -> tuple[list[Pending], list[Pending]]:
        refused = hopeless(waiting, now, cost)
        left = [row for row in waiting if row not in refused]
        batch = choose(left, now, 4, cost)
        return batch, [row for row in left if row not in batch]

    assert goodput(ours, 0.9) >= 1.5 * goodput(greedy, 0.9)


def test_most_urgent_rows_run_first_and_a_session_keeps_its_order() -> None:
    rows = [
        pending(0.0),
        pending(0.1, deadline_ms=800),
        pending(0.2, deadline_ms=100, session="s"),
        pending(0.1, deadline_ms=5000, session="s"),
    ]
    cost = known_cost(lambda rows: T)
    assert choose(rows, 0.2, 2, cost) == [rows[1], rows[0]]
    chosen = choose(rows, 0.2, 4, cost)
    assert rows[2] not in chosen, "its session's earlier row has to be answered first"
    assert rows[3] in chosen


def test_a_batch_shrinks_for_a_deadline_only_where_that_answers_more() -> None:
    cost = known_cost(lambda rows: 0.01 * rows)
    urgent, other = pending(0.0, deadline_ms=15), pending(0.0, deadline_ms=500)
    assert choose([other, urgent], 0.0, 4, cost) == [urgent]
    steep = known_cost(lambda rows: 0.010 + 0.001 * rows)
    many = [pending(0.0, deadline_ms=500) for _ in range(4)]
    assert len(choose([*many, pending(0.0, deadline_ms=11.5)], 0.0, 8, steep)) == 4


def test_hopeless_requests_are_told_by_what_a_batch_takes() -> None:
    cost = known_cost(lambda rows: T)
    late, in_time = pending(0.0, deadline_ms=24), pending(0.0, deadline_ms=26)
    assert hopeless([late, in_time, pending(0.0)], 0.0, cost) == [late]
    assert hopeless([in_time], 0.002, cost) == [in_time], "a running batch has to end first"


def test_cost_of_sizes_that_never_ran() -> None:
    cost = BatchCost()
    assert cost.expect(4) == 0.0
    cost.observe(1, 0.010)
    assert cost.expect(8) == 0.010
    cost.observe(4, 0.016)
    assert cost.expect(2) == pytest.approx(0.012)
    assert cost.expect(6) == pytest.approx(0.020)
