"""Runs an iterator in a thread of its own, a bounded number of items ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")

_PATIENCE = 0.1  # seconds between two looks at whether anybody still wants the items


class ReadAhead(Generic[Item]):
    """An iterator over `items`, which are made in another thread; an error there comes out of `next` here.

    As a context manager it stops the thread when left.
    """

    def __init__(self, items: Iterator[Item], ahead: int) -> None:
        self._items = items
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=max(1, ahead))
        self._stopped = threading.Event()
        self._exhausted = False
        self._thread = threading.Thread(target=self._work, name="flexbatch-reader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._exhausted:
            raise StopIteration
        item, error = self._ready.get()
        if error is not None:
            self._exhausted = True
            raise error
        assert item is not None
        return item

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - it is raised again where the items are used
            self._put((None, error))

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(entry, timeout=_PATIENCE)
            except queue.Full:
                continue
            return True
        return False

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> ReadAhead[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
