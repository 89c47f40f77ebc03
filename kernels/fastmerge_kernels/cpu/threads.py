"""How loops run: over fixed chunks, on as many threads as torch uses.

Every loop has the signature `f(start, stop, ...)` over entries start..stop-1 and releases the GIL. Threads take spans of
whole chunks from one queue. A reduction writes one float64 row per chunk and the rows are added in order, so results do not
depend on the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

CHUNK = 1 << 16  # entries per partial sum
_SPANS = 8  # spans per thread, so that a thread that lost its core does not hold up the others

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            _pool, _pool_size = ThreadPoolExecutor(count, "fastmerge"), count
        return _pool


def _forget_pool() -> None:  # threads do not survive a fork
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run(function: Callable, length: int, *args, grain: int = CHUNK) -> int:
    """Call `function(start, stop, *args)` over 0..length in spans of whole chunks; returns the sum of the results."""
    chunks = -(-length // grain)
    threads = min(torch.get_num_threads(), chunks)
    if threads <= 1:
        return (function(0, length, *args) or 0) if length else 0
    span = -(-chunks // (threads * _SPANS)) * grain
    starts = iter(range(0, length, span))
    total = [0] * threads

    def work(slot: int) -> None:
        for start in starts:  # next() of a range iterator is atomic under the GIL
            total[slot] += function(start, min(start + span, length), *args) or 0

    others = [_workers(threads - 1).submit(work, slot) for slot in range(1, threads)]
    try:
        work(0)
    finally:
        for other in others:
            other.result()
    return sum(total)


def reduce(function: Callable, length: int, columns: int, *args) -> np.ndarray:
    """`run` for a reduction `function(start, stop, rows, *args)`: float64 [columns], the sum of one row per chunk."""
    rows = np.zeros((-(-length // CHUNK), columns))
    run(function, length, rows, *args)
    return rows.sum(0)
