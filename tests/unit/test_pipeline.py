"""The pipeline: order, bounds, and that it ends, whole, however a stage fails."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.pipeline import Buffer, BufferPool, run_pipeline

JOBS = 12


class PlannedError(Exception):
    """Raised by a stage that the test made fail."""


@pytest.fixture(autouse=True)
def _no_thread_remains() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - before


def run(
    jobs: Iterator[int],
    work: Callable[[int], int],
    deliver: Callable[[int], None],
    *,
    workers: int = 2,
    depth: int = 4,
) -> None:
    run_pipeline(jobs, work, deliver, workers=workers, depth=depth)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 8), st.integers())
def test_results_come_in_order(count: int, workers: int, depth: int, seed: int) -> None:
    pauses = random.Random(seed)

    def work(job: int) -> int:
        time.sleep(pauses.random() / 2000)
        return job * job

    results: list[int] = []
    run(iter(range(count)), work, results.append, workers=workers, depth=depth)
    assert results == [job * job for job in range(count)]


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_no_more_than_depth_jobs_are_under_way(depth: int) -> None:
    drawn = delivered = most = 0

    def jobs() -> Iterator[int]:
        nonlocal drawn, most
        for job in range(40):
            drawn += 1
            most = max(most, drawn - delivered)
            yield job

    def deliver(_: int) -> None:
        nonlocal delivered
        time.sleep(0.0005)
        delivered += 1

    run(jobs(), lambda job: job, deliver, workers=3, depth=depth)
    assert delivered == 40
    assert most <= depth


def test_stages_run_where_they_are_said_to() -> None:
    names: dict[str, set[str]] = {"feeder": set(), "worker": set(), "end": set()}

    def note(stage: str) -> None:
        names[stage].add(threading.current_thread().name)

    def jobs() -> Iterator[int]:
        for job in range(JOBS):
            note("feeder")
            yield job

    def work(job: int) -> int:
        note("worker")
        return job

    run(jobs(), work, lambda _: note("end"))
    assert names["feeder"] == {"feeder"}
    assert names["worker"] <= {"worker-0", "worker-1"}
    assert names["end"] == {threading.current_thread().name}


# --- failing stages ---------------------------------------------------------------------------

stages = pytest.mark.parametrize("stage", ["feeder", "worker", "deliver"])


def run_failing(stage: str, at: int, error: BaseException, delivered: list[int]) -> None:
    def fail(here: str, job: int) -> int:
        if here == stage and job == at:
            raise error
        return job

    def deliver(job: int) -> None:
        delivered.append(fail("deliver", job))

    jobs = (fail("feeder", job) for job in range(JOBS))
    run(jobs, lambda job: fail("worker", job), deliver)


@stages
@pytest.mark.parametrize("at", range(JOBS))
def test_an_error_of_any_stage_at_any_job_is_raised(stage: str, at: int) -> None:
    error, delivered = PlannedError(), list[int]()
    with pytest.raises(PlannedError) as raised:
        run_failing(stage, at, error, delivered)
    assert raised.value is error
    assert delivered == list(range(len(delivered)))
    assert len(delivered) <= at


@stages
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
def test_errors_that_are_no_exceptions_are_raised_too(
    stage: str, kind: type[BaseException]
) -> None:
    with pytest.raises(kind):
        run_failing(stage, 3, kind(), [])


def test_the_first_error_wins() -> None:
    second_may_fail = threading.Event()

    def work(job: int) -> int:
        if job == 0:
            second_may_fail.wait()
            raise PlannedError("second")
        raise PlannedError("first")

    def jobs() -> Iterator[int]:
        yield from (0, 1)
        time.sleep(0.02)
        second_may_fail.set()

    with pytest.raises(PlannedError, match="first"):
        run(jobs(), work, lambda _: None)


def test_an_error_stops_the_feeder() -> None:
    drawn = 0

    def endless() -> Iterator[int]:
        nonlocal drawn
        while True:
            yield drawn
            drawn += 1

    def work(job: int) -> int:
        if job == 5:
            raise PlannedError
        return job

    with pytest.raises(PlannedError):
        run(endless(), work, lambda _: None)
    assert drawn <= 5 + 4


@stages
def test_buffers_of_a_failed_run_are_bounded(stage: str) -> None:
    """Whatever fails, no more buffers are made than the pipeline is deep."""
    with BufferPool(4, 4096) as pool:

        def jobs() -> Iterator[tuple[int, Buffer]]:
            for job in range(JOBS):
                if (stage, job) == ("feeder", 7):
                    raise PlannedError
                yield job, pool.take()

        def work(job: tuple[int, Buffer]) -> int:
            number, buffer = job
            try:
                if (stage, number) == ("worker", 7):
                    raise PlannedError
                return number
            finally:
                pool.give(buffer)

        def deliver(number: int) -> None:
            if (stage, number) == ("deliver", 7):
                raise PlannedError

        with pytest.raises(PlannedError):
            run_pipeline(jobs(), work, deliver, workers=2, depth=4)


# --- interrupts -------------------------------------------------------------------------------


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def handlers() -> tuple[object, object]:
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_between_two_results(number: int) -> None:
    before, finished = handlers(), list[int]()

    def deliver(job: int) -> None:
        if job == 3:
            send(number)
            time.sleep(0.02)  # the handler has run; this delivery must end in peace
        finished.append(job)

    def work(job: int) -> int:
        time.sleep(0.001)
        return job

    with pytest.raises(KeyboardInterrupt):
        run(iter(range(1000)), work, deliver)
    assert finished == list(range(len(finished)))
    assert 4 <= len(finished) < 1000
    assert handlers() == before


def test_a_signal_while_all_stages_wait() -> None:
    """The caller sleeps in a queue, the feeder in a read: the interrupt wakes both."""
    timer = threading.Timer(0.05, send, [signal.SIGINT])

    def jobs() -> Iterator[int]:
        yield 0
        timer.start()
        timer.join()
        time.sleep(0.02)
        yield 1

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(jobs(), lambda job: job, lambda _: None)
    assert not timer.is_alive()
    print(f"interrupted after {time.monotonic() - started:.3f} s")


def test_a_signal_during_the_last_delivery_is_not_lost() -> None:
    def deliver(job: int) -> None:
        time.sleep(0.02)  # long enough for the other stages to end
        if job == JOBS - 1:
            send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(iter(range(JOBS)), lambda job: job, deliver, depth=2 * JOBS)


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    before, results = handlers(), list[int]()
    thread = threading.Thread(target=run, args=(iter(range(JOBS)), abs, results.append))
    thread.start()
    thread.join()
    assert results == list(range(JOBS))
    assert handlers() == before


# --- buffers ----------------------------------------------------------------------------------


def test_pool_makes_as_many_buffers_as_it_was_told() -> None:
    with BufferPool(3, 4096) as pool:
        taken = [pool.take() for _ in range(3)]
        with pytest.raises(RuntimeError, match="pool is empty"):
            pool.take()
        pool.give(taken[0])
        assert pool.take() is taken[0]


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 4999))
def test_is_zero(start: int, end: int, mark: int) -> None:
    buffer = Buffer(5000)
    buffer.view[mark] = 1
    assert buffer.is_zero(start, end) == (not start <= mark < end)
    buffer.clear(mark, mark + 1)
    assert buffer.is_zero(0, 5000)


def test_is_zero_of_more_than_a_megabyte() -> None:
    size = (2 << 20) + 4096
    buffer = Buffer(size)
    assert buffer.is_zero(0, size)
    for mark in (0, (1 << 20) - 1, 1 << 20, size - 1):
        buffer.view[mark] = 1
        assert not buffer.is_zero(0, size)
        assert buffer.is_zero(mark + 1, size)
        buffer.clear(mark, mark + 1)
