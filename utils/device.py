"""Keep a GPU busy: data of the next step in a thread, a step as one graph, numbers of the last one read later.

On a CPU, which computes everything itself, the same calls do their work at once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from utils.tensors import mapped, tensors_in

CALLS_BEFORE_GRAPH = 2  # PyTorch then has made what a graph cannot: constants, moments, workspaces
MOST_GRAPHS = 32


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


def has_twice_the_memory() -> bool:
    """Whether the current GPU has twice as much as this process has used at most."""
    return 2 * torch.cuda.max_memory_allocated() <= torch.cuda.mem_get_info()[1]


class Graphed:
    """A function on a GPU that starts all of its kernels at once: as a CUDA graph, recorded for each shape of its data.

    To start them one by one from Python takes several times as long as to run them (docs/speed.md). The function must
    not wait for the GPU, and what it uses besides its data must stay where it is in memory. Results lie in memory that
    the next call overwrites. Graphs share the memory that they compute in, and keep it: everything else, validation for
    example, needs its own, so that nothing is recorded where the GPU has not twice the memory that was used so far.
    """

    def __init__(self, function: Callable):
        self.function, self.pool, self.most = function, torch.cuda.graph_pool_handle(), MOST_GRAPHS
        self.calls, self.recorded = Counter(), {}

    def __call__(self, data: object) -> object:
        shapes = repr(mapped(lambda tensor: (tensor.shape, tensor.dtype), data))
        if shapes not in self.recorded:
            self.calls[shapes] += 1
            if self.calls[shapes] <= CALLS_BEFORE_GRAPH or len(self.recorded) == self.most:
                return self.function(data)
            if not self.recorded and not has_twice_the_memory():
                tqdm.write("note: steps take more than half of the GPU's memory, so they are not recorded as CUDA "
                           "graphs, which are faster (docs/speed.md)")
                self.most = 0
                return self.function(data)
            self.recorded[shapes] = self.record(data)
        graph, inputs, results = self.recorded[shapes]
        torch._foreach_copy_(inputs, tensors_in(data))
        graph.replay()
        return results

    def record(self, data: object) -> tuple[torch.cuda.CUDAGraph, list[Tensor], object]:
        graph, own = torch.cuda.CUDAGraph(), mapped(Tensor.clone, data)
        # thread_local: the thread that makes the next step's data may go on
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
            results = self.function(own)
        return graph, tensors_in(own), results


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
