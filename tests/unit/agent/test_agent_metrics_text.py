"""Prometheus's text, read by exact names; what is not there, or is no number, is unknown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.agent.runtimes.metrics_text import read_metrics

WAITING = "vllm:num_requests_waiting"


def test_names_are_matched_whole() -> None:
    text = f'{WAITING}{{engine="0"}} 5\n{WAITING}_by_reason{{reason="capacity"}} 3\n{WAITING}_total 9\nx{WAITING} 7\n'
    assert read_metrics(text, {WAITING}).count(WAITING) == 5


def test_label_sets_are_summed_and_ranks_counted_once() -> None:
    text = 'a{dp="0",tp="0"} 4\na{dp="0",tp="1"} 3\na{dp="1",tp="0"} 2\n'
    metrics = read_metrics(text, {"a"})
    assert (metrics.count("a"), metrics.count("a", per={"tp"}), metrics.largest("a")) == (9, 6, 4)


def test_what_is_missing_is_none_and_zero_is_zero() -> None:
    metrics = read_metrics("a 0\n# HELP b is not here\n", {"a", "b"})
    assert (metrics.count("a"), metrics.count("b"), metrics.share("b", "a")) == (0, None, 0)
    assert (metrics.values(["b"]), metrics.values(["b", "a"])) == (None, (0.0,))


def test_values_that_count_nothing_are_unknown() -> None:
    text = "a NaN\nb +Inf\nc -1\nd 1e400\ne zero\nf 1e30\ng 1.5\nh 12 1712345678\n"
    metrics = read_metrics(text, set("abcdefgh"))
    assert [metrics.count(name) for name in "abcdefgh"] == [None] * 6 + [1, 12]
    assert metrics.share("g") is None


def test_labels_may_hold_anything() -> None:
    text = 'a{name="x \\"y} {z, q=\\"1\\"", kind="k"} 2\n'
    metrics = read_metrics(text, {"a"}, lambda labels: labels["kind"] == "k")
    assert metrics.count("a") == 2
    assert read_metrics(text, {"a"}, lambda labels: "q" in labels).count("a") is None


@given(st.text())
def test_no_text_breaks_it(text: str) -> None:
    metrics = read_metrics(f"a {text}\na{{{text}}} 1\n{text}", {"a"})
    assert metrics.count("a") is None or metrics.count("a", per={"b"}) is not None


def test_the_fullest_of_several_ranks_is_measured_by_its_part_of_the_limit() -> None:
    """Each data-parallel rank counts once, by the largest of its own ranks, and no rank is more than full."""
    lines = [("0", "0", 5), ("0", "1", 3), ("1", "0", 2)]
    text = "\n".join(f'running{{dp_rank="{data}",tp_rank="{part}"}} {value}' for data, part, value in lines)
    metrics = read_metrics(text, {"running"})
    assert metrics.has_several("running", "dp_rank")
    assert not metrics.has_several("running", "engine")
    assert metrics.largest_share("running", "dp_rank", 20) == 0.5
    assert metrics.largest_share("running", "dp_rank", 4) == 1.0
    assert metrics.largest_share("running", "dp_rank", None) is None
    assert metrics.largest_share("waiting", "dp_rank", 20) is None
