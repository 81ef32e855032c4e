"""The memory that workers share, and how their counts add up."""

from __future__ import annotations

import math
import os
import signal
import time

import pytest

from lucid_compute.gateway.request_metrics import MAX_MODELS, OTHER
from lucid_compute.server.metrics.shared_memory import SLOT_BYTES, SharedSlots
from lucid_compute.server.metrics.worker_counts import LIVE_SECONDS, MODELS, WorkerCounts, merge


def test_every_worker_reads_what_was_written_last() -> None:
    slots = SharedSlots(2)
    first, second = slots.of_worker(0), slots.of_worker(1)
    assert [slot.read() for slot in first.all] == [None, None]
    for text in (b"one", b"", b"three" * 1000):
        second.own.write(text)
        assert [slot.read() for slot in first.all] == [None, text]
    with pytest.raises(ValueError, match="do not fit"):
        first.own.write(bytes(SLOT_BYTES // 2))
    assert first.own.read() is None


def test_a_worker_that_is_killed_while_it_writes_leaves_a_whole_text() -> None:
    """Fifty times, at any instant; what is read is one of its complete texts."""
    worker = SharedSlots(1).of_worker(0)
    for _ in range(50):
        pid = os.fork()
        if pid == 0:
            while True:
                for letter in b"ab":
                    worker.own.write(bytes([letter]) * 200_000)
        while worker.own.read() is None:
            pass
        time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert worker.own.read() in {b"a" * 200_000, b"b" * 200_000}


def test_a_slot_is_never_empty_while_it_is_written() -> None:
    """Otherwise a response would lack a worker's counts, and Prometheus would see a reset."""
    worker = SharedSlots(1).of_worker(0)
    worker.own.write(b"a")
    if (pid := os.fork()) == 0:
        while True:
            worker.own.write(b"a")
    try:
        assert all(worker.own.read() == b"a" for _ in range(200_000))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_counts_come_back_as_they_were_written() -> None:
    counts = WorkerCounts(1.5, {"x": {("a", 'é"\n'): [1, 2.5]}, "y": {(): [3]}}, {"g": 4.0}, {"m": 5.0})
    assert WorkerCounts.from_bytes(counts.to_bytes()) == counts


def test_counts_are_added_up_and_gauges_are_of_those_that_live() -> None:
    """A worker that ended long ago still counts, and measures nothing."""
    now = 100.0
    lives = WorkerCounts(now, {"x": {("a",): [1, 2]}}, {"lucid_jobs_waiting": 3, "lucid_feed_age_seconds": math.nan})
    also = WorkerCounts(now - 1, {"x": {("b",): [5, 6]}}, {"lucid_jobs_waiting": 4, "lucid_feed_age_seconds": 0.5})
    ended = WorkerCounts(now - LIVE_SECONDS, {"x": {("a",): [10, 20]}}, {"lucid_jobs_waiting": 1000})
    merged = merge([lives, also, ended], now)
    assert merged.counts == {"x": {("a",): [11, 22], ("b",): [5, 6]}}
    assert merged.gauges == {"lucid_jobs_waiting": 7, "lucid_feed_age_seconds": 0.5}
    assert lives.counts == {"x": {("a",): [1, 2]}}


def test_models_of_all_workers_are_as_few_as_those_of_one() -> None:
    """The first that were named keep their names, however the workers are merged; nothing is lost."""
    parts: list[WorkerCounts] = [
        WorkerCounts(
            1.0,
            {MODELS: {**{(f"{place}-{number}",): [1.0] for number in range(MAX_MODELS)}, (OTHER,): [100.0]}},
            {},
            {f"{place}-{number}": float(number * 10 + place) for number in range(MAX_MODELS)},
        )
        for place in range(4)
    ]
    merged = merge(parts, 1.0)
    assert set(merged.named_at) == {f"{place}-{number}" for place in range(4) for number in range(MAX_MODELS // 4)}
    models = merged.counts[MODELS]
    assert models[OTHER,] == [400.0 + 3 * MAX_MODELS]
    assert len(models) == MAX_MODELS + 1
    assert merge([merge(parts[:2], 1.0), merge(parts[2:], 1.0)], 1.0) == merged
