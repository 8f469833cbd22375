"""Work done ahead of time in background threads, its results handed over in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def mapped_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int
) -> Iterator[Iterator[Result]]:
    """The function's results in the order of the items, `depth` of them under way while the consumer works.

    What the function raises is raised where its result is asked for. Leaving the context drops what has not begun.
    """
    with ThreadPoolExecutor(workers) as threads:

        def results() -> Iterator[Result]:
            coming = iter(items)
            under_way: deque[Future[Result]] = deque(threads.submit(function, item) for item in islice(coming, depth))
            while under_way:
                result = under_way.popleft().result()
                under_way.extend(threads.submit(function, item) for item in islice(coming, 1))
                yield result

        try:
            yield results()
        finally:
            threads.shutdown(cancel_futures=True)


def prefetched(
    batch: Callable[[int], Result], start: int, stop: int, depth: int = 2
) -> AbstractContextManager[Iterator[Result]]:
    """The batches of steps `start` to `stop`, made by one thread up to `depth` steps ahead of the consumer.

    `with prefetched(batch, 0, steps) as batches: ...`
    """
    return mapped_ahead(batch, range(start, stop), workers=1, depth=depth)
