"""The plan holds every case once, and chunks are worked through in any engine."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgrad.chunks import Chunk, carry_out, chunks_of, make_plan, num_cases

COUNT = st.integers(1, 60)


@given(COUNT, COUNT, COUNT)
def test_every_case_is_in_one_chunk_and_a_chunk_is_a_contiguous_range(num_points, num_seeds, most):
    plan = make_plan(num_points, num_seeds, most)
    seen = []
    for points, seeds in chunks_of(plan):
        cases = [p * num_seeds + s for p in range(*points) for s in range(*seeds)]
        assert cases == list(range(cases[0], cases[-1] + 1))
        assert 1 <= len(cases) <= most
        assert points[1] - points[0] <= plan.points_at_once
        assert seeds[1] - seeds[0] <= plan.seeds_at_once
        seen += cases
    assert seen == list(range(num_points * num_seeds))
    assert num_cases(chunks_of(plan)) == num_points * num_seeds


@given(COUNT, COUNT, COUNT)
def test_chunks_are_as_large_as_half_of_what_is_allowed_or_as_one_point(num_points, num_seeds, most):
    plan = make_plan(num_points, num_seeds, most)
    size = plan.points_at_once * plan.seeds_at_once
    assert 4 * size >= min(most, num_points * num_seeds)  # half of the points, and half of what the seeds leave of `most`


class Jobs:
    """An engine with futures of its own, as submitit's; the last submitted is done first."""

    def __init__(self):
        self.waiting = []

    def submit(self, fn, *args):
        self.waiting.append(Job(self, fn, args))
        return self.waiting[-1]


class Job:
    def __init__(self, engine, fn, args):
        self.engine, self.call = engine, (fn, args)

    def done(self):
        return self.engine.waiting[-1] is self

    def result(self):
        assert self.engine.waiting.pop() is self
        fn, args = self.call
        return fn(*args)

    def cancel(self):
        self.engine.waiting.remove(self)


def test_an_engine_with_futures_of_its_own():
    done, error = collect(Jobs(), lambda chunk: chunk.points[0])
    assert error is None
    assert list(done) == CHUNKS[::-1]
    done, _ = collect(Jobs(), lambda chunk: chunk, stopping=lambda: True)
    assert list(done) == CHUNKS[-1:]


def test_a_chunk_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="a chunk of 0 cases, expected at least 1"):
        make_plan(3, 4, 0)


CHUNKS = chunks_of(make_plan(6, 1, 1))


def collect(executor, measure, stopping=lambda: False):
    done = {}
    try:
        carry_out(CHUNKS, measure, lambda chunk, result: done.update({chunk: result}), executor=executor, stopping=stopping)
    except RuntimeError as error:
        return done, error
    return done, None


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_all_chunks_are_done_wherever_they_run(threads):
    executor = threads and ThreadPoolExecutor(threads)
    done, error = collect(executor, lambda chunk: chunk.points[0] ** 2)
    assert error is None
    assert done == {c: c.points[0] ** 2 for c in CHUNKS}


@pytest.mark.parametrize("threads", [None, 1])
def test_stopping_finishes_what_is_in_flight_and_leaves_the_rest(threads):
    begun, stop = [], []

    def measure(chunk):
        begun.append(chunk)
        if len(begun) == 3:
            stop.append(True)
        time.sleep(0.05 if threads else 0)  # else a thread is through with all before the first is committed
        return chunk

    done, _ = collect(threads and ThreadPoolExecutor(threads), measure, lambda: bool(stop))
    assert set(done) == set(begun)  # nothing that was begun is thrown away
    assert CHUNKS[:3] == begun[:3]
    assert len(begun) <= 3 + bool(threads)


@pytest.mark.parametrize("threads", [None, 2])
def test_a_failure_is_raised_and_what_was_done_before_it_is_kept(threads):
    def measure(chunk: Chunk):
        if chunk == CHUNKS[2]:
            raise RuntimeError("no luck")
        return chunk

    done, error = collect(threads and ThreadPoolExecutor(threads), measure)
    assert str(error) == "no luck"
    assert set(done) >= set(CHUNKS[:2])
    assert CHUNKS[2] not in done
