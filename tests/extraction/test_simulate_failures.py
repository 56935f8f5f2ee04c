"""The simulation of failures against closed forms, and against cases worked by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from simulate_failures import ATTEMPTS, Simulation, expected_waste


def test_without_failures_by_hand():
    """The first worker takes 0 and queues 2; the second takes 1, 3 and 4: 30 + 10 beside 10 + 10 + 20 seconds."""
    found = Simulation([30, 10, 10, 10, 20], workers=2)
    assert (found.wall, found.idle_from, found.finished) == (40.0, 40.0, 5)
    assert (found.lost, found.away, found.given_up, max(found.begun.values())) == (0.0, 0.0, 0, 1)


def test_a_queued_shard_waits_behind_a_slow_one():
    """The third shard is queued behind 30 seconds of another, while the second worker is idle from the 20th on."""
    found = Simulation([30, 10, 10, 10], workers=2)
    assert (found.wall, found.idle_from) == (40.0, 20.0)


@pytest.mark.parametrize("shard", [60, 300, 600])
def test_waste_is_that_of_the_closed_form(shard):
    mtbf, restart, runs = 7200, 300, 4000
    found = Simulation(np.full(mtbf * runs // shard, shard), 1, mtbf, restart, node_size=1, seed=1)
    assert found.wall == pytest.approx(shard * found.finished + found.lost + found.away)
    assert (found.lost + found.away) / found.wall == pytest.approx(expected_waste(shard, mtbf, restart), rel=0.05)


def test_a_failure_loses_half_a_shard_and_the_restart_of_every_worker_of_its_node():
    mtbf, restart, shard = 36_000, 180, 600
    found = Simulation(np.full(64 * 8000, shard), 64, mtbf, restart, seed=2)
    failures = found.away / restart
    assert failures / 8 > 1000
    assert found.lost / failures == pytest.approx(shard / 2, rel=0.05)
    assert failures == pytest.approx(64 * found.wall / (mtbf + restart), rel=0.08)


def test_every_shard_is_finished_or_given_up_at_its_third_failure():
    found = Simulation(np.full(20_000, 600), 96, mtbf=3600, seed=3)
    assert found.finished + found.given_up == 20_000
    assert found.given_up == sum(times == ATTEMPTS for times in found.failed.values()) > 0
    assert max(found.failed.values()) == ATTEMPTS
