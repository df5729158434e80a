"""A study in chunks: how it is cut, and how the chunks are worked through.

The cases of a study are its points and seeds, numbered with the seed running fastest, and cut once into contiguous ranges,

    case = point * num_seeds + seed,      chunk = [first case, last case],

each either some points with all their seeds or some seeds of one point. The draws of a case depend on its seed alone (see
`vgrad.sweep`), so a chunk may be measured anywhere, in any order, and more than once.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Chunk", "Memory", "Plan", "carry_out", "chunks_of", "make_plan", "num_cases"]


class Chunk(NamedTuple):
    """A rectangle of cases: points and seeds, each as (first, past the last)."""

    points: tuple[int, int]
    seeds: tuple[int, int]


class Plan(NamedTuple):
    """How the cases are cut: every chunk is measured with the same shape, so that one compiled program serves all.

    Attributes:
      num_points, num_seeds: of the study.
      points_at_once, seeds_at_once: of a chunk; those at the end may hold fewer.
    """

    num_points: int
    num_seeds: int
    points_at_once: int
    seeds_at_once: int


def make_plan(num_points: int, num_seeds: int, most: int) -> Plan:
    """Cuts points x seeds into chunks of at most `most` cases, no smaller than need be, with the fewest places left empty.

    >>> make_plan(16, 32, 230)
    Plan(num_points=16, num_seeds=32, points_at_once=4, seeds_at_once=32)
    >>> make_plan(2, 1000, 300)
    Plan(num_points=2, num_seeds=1000, points_at_once=1, seeds_at_once=250)
    """
    if most < 1:
        raise ValueError(f"a chunk of {most} cases, expected at least 1.")

    def cut(n, most):
        most = min(n, most)
        return min(range(-(-most // 2), most + 1), key=lambda size: (-(-n // size) * size, -size))

    return Plan(num_points, num_seeds, cut(num_points, max(1, most // num_seeds)), cut(num_seeds, most))


def chunks_of(plan: Plan) -> list[Chunk]:
    """The chunks of a plan, in the order of their cases."""
    cut = lambda n, step: [(i, min(i + step, n)) for i in range(0, n, step)]  # noqa: E731
    return [Chunk(p, s) for p in cut(plan.num_points, plan.points_at_once) for s in cut(plan.num_seeds, plan.seeds_at_once)]


def num_cases(chunks: Iterable[Chunk]) -> int:
    """How many cases they hold together."""
    return sum(math.prod(last - first for first, last in chunk) for chunk in chunks)


class Memory:
    """Chunks kept in this process alone: what `Store` is, without a folder."""

    def __init__(self):
        self._chunks: dict[Chunk, dict[str, np.ndarray]] = {}

    def begin(self, identity: Mapping[str, Any], plan: Plan, *, resume: bool, fixed: bool) -> Plan:
        """The plan as it is given: nothing is there to agree with."""
        return plan

    def missing(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """Those that are not finished."""
        return [c for c in chunks if c not in self._chunks]

    def discard_damaged(self, chunks: Iterable[Chunk]) -> list[str]:
        """None: memory is trusted."""
        return []

    def commit(self, chunk: Chunk, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps the arrays of a chunk."""
        self._chunks[chunk] = dict(arrays)

    def read(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """The arrays of a finished chunk."""
        return self._chunks[chunk]

    def empty(self, shape, dtype) -> np.ndarray:
        """An array to gather chunks in."""
        return np.empty(shape, dtype)


def carry_out(
    chunks: Iterable[Chunk],
    measure: Callable[[Chunk], Any],
    commit: Callable[[Chunk, Any], None],
    *,
    executor: Any = None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Measures chunks and commits each as soon as it is finished, here or wherever `executor` runs functions.

    A chunk is a task without side effects, so an engine may repeat one or run it twice. Only this process commits, so that workers
    need no folder in common with it.

    Args:
      chunks: what to do, in this order.
      measure: chunk -> result. With an executor that leaves the process it must be picklable, as its result.
      commit: called here, with a chunk and its result.
      executor: anything with the `submit` of `concurrent.futures.Executor`, whose futures have `result`, `done` and `cancel`. None:
        here, one by one.
      stopping: asked between chunks. Once true, those in flight are finished and committed, and the others left.
    Raises:
      Whatever `measure` and `commit` raise, once those in flight have been committed or have failed too.
    """
    if executor is None:
        for chunk in chunks:
            if stopping():
                return
            commit(chunk, measure(chunk))
        return
    pending = {executor.submit(measure, chunk): chunk for chunk in chunks}
    finished, stopped, failed = _as_finished(list(pending)), False, None
    try:
        while pending:
            done = next(finished)
            try:
                commit(pending.pop(done), done.result())
            except Exception as error:
                failed = failed or error
            if not stopped and (failed or stopping()):
                stopped = True
                pending = {other: chunk for other, chunk in pending.items() if other.cancel() is False}  # those in flight
                finished = _as_finished(list(pending))
    finally:
        for other in pending:  # a second Ctrl-C drops what is in flight
            other.cancel()
    if failed:
        raise failed


def _as_finished(pending):
    """Yields each when it is finished: `futures.as_completed`, or asking now and then where an engine has futures of its own."""
    if all(isinstance(future, futures.Future) for future in pending):
        yield from futures.as_completed(pending)
        return
    while pending:
        for future in [future for future in pending if future.done()]:
            pending.remove(future)
            yield future
        time.sleep(0.05)
