"""The one shape of a threaded pipeline: a feeder, workers, and an ordered end.

The feeder thread draws jobs from an iterator (reading happens there); worker threads turn each
into a result; the calling thread receives the results in the order of their jobs. No more than
``depth`` jobs are between the draw and the end, so a pool of ``depth`` buffers never runs dry and
memory is bounded. The first error of any thread stops all of it, every thread is joined, and the
error is raised in the caller. An interrupt (SIGINT, SIGTERM) counts as such an error: it is raised
between two results, never within ``deliver``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

# Buffers of one pipeline; as much again may be in compressed results.
_BUFFER_BUDGET = 16 << 20
_LARGEST_SPAN = 4 << 20

Job = TypeVar("Job")
Result = TypeVar("Result")
Thing = TypeVar("Thing")


def worker_count() -> int:
    """One worker a core that this process may use."""
    return len(os.sched_getaffinity(0))


def span_size(depth: int, block_size: int) -> int:
    """Bytes of work that a job should have, in whole blocks: large enough to stream, and with
    ``depth`` of them under way within the memory budget, however many cores there are."""
    fitting = _BUFFER_BUDGET // depth // block_size * block_size
    return max(min(fitting, _LARGEST_SPAN // block_size * block_size), block_size)


def run_pipeline(
    jobs: Iterable[Job],
    work: Callable[[Job], Result],
    deliver: Callable[[Result], None],
    *,
    workers: int,
    depth: int,
) -> None:
    """Run every job through ``work`` in threads and hand its result to ``deliver`` in order."""
    keep_freed_memory()
    _Pipeline(jobs, work, workers, depth).run(deliver)


@cache
def keep_freed_memory() -> None:
    """Have glibc keep what results free for the next ones, instead of giving pages back to the
    kernel and faulting them in again: a tenth of a capture's time. mallopt(3)."""
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 16 << 20)


def share_freed_memory() -> None:
    """The same for a server with many threads: have them share what is free, instead of each
    keeping its own, which was a third of the memory. To be called before they are started."""
    keep_freed_memory()
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


class _Pipeline(Generic[Job, Result]):
    def __init__(
        self, jobs: Iterable[Job], work: Callable[[Job], Result], workers: int, depth: int
    ) -> None:
        self._jobs = jobs
        self._work = work
        self._workers = workers
        self._tokens = threading.Semaphore(depth)
        self._stopped = False
        self._todo: SimpleQueue[tuple[int, Job] | None] = SimpleQueue()
        self._done: SimpleQueue[_Outcome[Result]] = SimpleQueue()

    def run(self, deliver: Callable[[Result], None]) -> None:
        threads = [threading.Thread(target=self._feed, name="feeder")]
        threads += [
            threading.Thread(target=self._labour, name=f"worker-{n}") for n in range(self._workers)
        ]
        try:
            for thread in threads:
                thread.start()
            with _interrupts_as(self._interrupt):
                self._collect(deliver)
            self._raise_late_interrupt()
        finally:
            self._stop()
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join()

    def _interrupt(self) -> None:
        # SimpleQueue.put is reentrant: made to be called in a signal handler
        self._done.put(_Outcome(error=KeyboardInterrupt()))

    def _collect(self, deliver: Callable[[Result], None]) -> None:
        waiting: dict[int, Result] = {}
        next_number, total = 0, None
        while total is None or next_number < total:
            outcome = self._done.get()
            if outcome.error is not None:
                raise outcome.error
            if outcome.total is not None:
                total = outcome.total
                continue
            waiting[outcome.number] = outcome.result()
            while next_number in waiting:
                deliver(waiting.pop(next_number))
                next_number += 1
                self._tokens.release()

    def _raise_late_interrupt(self) -> None:
        """One that came during the last ``deliver``."""
        while not self._done.empty():
            outcome = self._done.get()
            if outcome.error is not None:
                raise outcome.error

    def _feed(self) -> None:
        try:
            number = 0
            jobs = iter(self._jobs)
            while True:
                self._tokens.acquire()
                if self._stopped:
                    break
                try:
                    job = next(jobs)
                except StopIteration:
                    break
                self._todo.put((number, job))
                number += 1
            self._done.put(_Outcome(total=number))
        except BaseException as error:
            self._done.put(_Outcome(error=error))
        finally:
            for _ in range(self._workers):
                self._todo.put(None)

    def _labour(self) -> None:
        while (item := self._todo.get()) is not None and not self._stopped:
            number, job = item
            try:
                self._done.put(_Outcome(number, [self._work(job)]))
            except BaseException as error:
                self._done.put(_Outcome(error=error))
                return

    def _stop(self) -> None:
        self._stopped = True
        self._tokens.release()
        for _ in range(self._workers):  # in case that the feeder never started
            self._todo.put(None)


@contextmanager
def _interrupts_as(action: Callable[[], None]) -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM call ``action``; only the main thread gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: action()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


class _Outcome(Generic[Result]):
    """What a thread reports: a numbered result, the number of all jobs, or its error."""

    __slots__ = ("_results", "error", "number", "total")

    def __init__(
        self,
        number: int = -1,
        results: list[Result] | None = None,
        *,
        total: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        self.number = number
        self._results = results
        self.total = total
        self.error = error

    def result(self) -> Result:
        assert self._results is not None
        return self._results[0]


class PerThread(Generic[Thing]):
    """One object a thread, made when the thread first asks: for what threads can't share."""

    def __init__(self, make: Callable[[], Thing]) -> None:
        self._make = make
        self._things = threading.local()

    def get(self) -> Thing:
        try:
            thing: Thing = self._things.thing
        except AttributeError:
            thing = self._things.thing = self._make()
        return thing


class Buffer:
    """A reusable, page-aligned buffer, fit for O_DIRECT."""

    __slots__ = ("_address", "_map", "view")

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size)
        anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(anchor)
        self.view = memoryview(self._map)

    def is_zero(self, start: int, end: int) -> bool:
        """Whether bytes ``start`` to ``end`` are zero, at the speed of memcmp(3)."""
        while start < end:
            length = min(end - start, len(_ZEROS))
            if _memcmp(self._address + start, _ZEROS, length):
                return False
            start += length
        return True

    def clear(self, start: int, end: int) -> None:
        """Set bytes ``start`` to ``end`` to zero."""
        _memset(self._address + start, 0, end - start)


class BufferPool:
    """A fixed set of buffers, made as they are first needed. Usable from any thread."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._left = count
        self._free: deque[Buffer] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._free.clear()

    def take(self) -> Buffer:
        """A free buffer. The pipeline's depth guarantees one; none left is a programming error."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if not self._left:
                raise RuntimeError("buffer pool is empty: it is smaller than the pipeline's depth")
            self._left -= 1
        return Buffer(self.size)

    def give(self, buffer: Buffer) -> None:
        self._free.append(buffer)


# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_ZEROS = bytes(1 << 20)
_libc = ctypes.CDLL(None)  # calls through CDLL release the GIL
_memcmp = _libc.memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
_memset = _libc.memset
_memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
