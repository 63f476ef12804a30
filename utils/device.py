"""Keep a GPU busy: data of the next step in a thread, numbers of the last one read later, no wait in between.

On a CPU, which computes everything itself, the same calls do their work at once.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting; on the CPU, return the tensor itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def one_ahead(items: Iterable, in_thread: bool, device: torch.device) -> Iterator:
    """The same items; in a thread, each is made while the one before is in use. Raises what making them raises."""
    if not in_thread:
        yield from items
        return
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device if device.type == "cuda" else None,
                            initargs=(device,) if device.type == "cuda" else ()) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item


class Numbers:
    """Numbers on their way from the device, so that a GPU need not stop for them: `read` them a step later."""

    def __init__(self, values: Tensor):
        self._values, self._sent = values.to("cpu", non_blocking=True), None  # into pinned memory
        if values.is_cuda:
            self._sent = torch.cuda.Event()
            self._sent.record()

    def read(self) -> list[float]:
        if self._sent:
            self._sent.synchronize()
        return self._values.tolist()
