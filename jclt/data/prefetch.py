"""Work done ahead of time in background threads, with results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int
) -> Iterator[Iterator[Result]]:
    """A context that gives the function's results in the order of the items, and works up to `depth` items ahead.

    An error of the function is raised where its result is taken. Leaving the context cancels work that has not begun.
    """
    with ThreadPoolExecutor(workers) as threads:

        def take_results() -> Iterator[Result]:
            remaining = iter(items)
            pending: deque[Future[Result]] = deque(threads.submit(function, item) for item in islice(remaining, depth))
            while pending:
                result = pending.popleft().result()
                pending.extend(threads.submit(function, item) for item in islice(remaining, 1))
                yield result

        try:
            yield take_results()
        finally:
            threads.shutdown(cancel_futures=True)


def prefetch(
    batch: Callable[[int], Result], start: int, stop: int, depth: int = 2
) -> AbstractContextManager[Iterator[Result]]:
    """The batches of steps `start` to `stop`, which one thread makes up to `depth` steps ahead.

    `with prefetch(batch, 0, steps) as batches: ...`
    """
    return map_ahead(batch, range(start, stop), workers=1, depth=depth)
