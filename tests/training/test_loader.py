"""How long a training waits for its data is counted, and only that."""

import pytest

from mige.training import loader
from mige.training.metrics import Metrics


def test_waiting_for_data_is_counted_between_two_lines(monkeypatch):
    """A clock that a batch advances by 3 seconds, and a step by 10."""
    now = [0.0]
    monkeypatch.setattr(loader.time, "perf_counter", lambda: now[0])  # the metrics' too

    def slow():
        for number in range(4):
            now[0] += 3
            yield number

    metrics, seen = Metrics(1), []
    metrics.counts["loss"] = 1
    for batch in loader.timed(slow(), metrics):
        now[0] += 10
        seen.append(batch)
        if batch == 2:
            assert metrics.pop_means()["data_wait_seconds"] == pytest.approx(9)
    assert seen == [0, 1, 2, 3] and metrics.data_wait == pytest.approx(3)
