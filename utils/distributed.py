"""How a process is set up, and how several of them, started by torchrun, train as one.

Every rank computes its share of each step's pairs, with noise that is keyed by the pair's place in the whole batch, so
that a run has the same loss curve on any number of ranks (but for what dropout drops). The first rank alone writes
files and speaks.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LONGEST_WAIT = timedelta(hours=2)  # while the first rank draws pictures or reads a study; a rank that dies ends the job
GRACE = 5.0  # seconds in which torchrun notices that a rank has ended
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


class LaunchError(ValueError):
    """Processes that cannot work together; the message says how to start them."""


def launched() -> bool:
    """Whether torchrun started this process as one of several. Raises LaunchError where something else did."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not dist.is_torchelastic_launched():
        raise LaunchError(f"WORLD_SIZE = {os.environ['WORLD_SIZE']} is set, but not by torchrun: start several ranks "
                          "as torchrun --nproc-per-node N main.py, or unset it for one process")
    return several


def place_on_machine() -> int:
    """Number of this rank on its machine, 0, 1, ...: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_here() -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def writes() -> bool:
    """Whether this rank is the one that writes files."""
    return rank() == 0


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Work together with the other ranks, if there are any: over NCCL on GPUs, Gloo on CPUs. Only the first speaks."""
    keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # the sizes are few
    if not launched():
        yield
        return
    if device.type == "cpu":  # torchrun would give each rank one thread
        torch.set_num_threads(max(1, len(cores()) // ranks_here()))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as muted:
        if not writes():
            muted.enter_context(contextlib.redirect_stdout(nowhere))
            muted.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    dist.destroy_process_group()  # not after an error: the other ranks would only see that a connection broke


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: features of hundreds of MB would else go back to the system after every layer.

    Getting them again, page by page, took a third of a step of the published network at its size (measured).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library: it does as it likes
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def ended_by_another_rank(error: Exception, stop: object) -> bool:
    """Whether an error only says that another rank ended first, which then tells why.

    stop: counts the signals, of which torchrun sends one in that case.
    """
    if not dist.is_torchelastic_launched():
        return False
    if isinstance(error, dist.DistError) or "gloo" in str(error):  # its connection broke
        return True
    if os.environ.get("RANK", "0") == "0":
        return False
    before, end = stop.signals, time.monotonic() + GRACE
    while stop.signals == before and time.monotonic() < end:
        time.sleep(0.1)
    return stop.signals > before


def share(items: Sequence) -> list:
    """This rank's part of a list: every N-th item, so that parts differ by one item at most."""
    return list(items[rank()::world()])


def summed(*values: float) -> list[float]:
    """Each value summed over all ranks."""
    if world() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def any_rank(flag: object) -> bool:
    """Whether it is true on at least one rank: what all of them then act on."""
    return summed(float(bool(flag)))[0] > 0


def same_everywhere(*values: object) -> bool:
    """Whether all ranks have the same plain values."""
    number = int(hashlib.sha256(repr(values).encode()).hexdigest()[:10], 16)  # sums of such are exact in float64
    return not any_rank(summed(number)[0] != number * world())


def wait() -> None:
    """Until all ranks are here."""
    summed(0.0)


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[None]:
    """The block runs on one rank of every machine, then on the others, who find what the first left on the disk."""
    if place_on_machine():
        wait()
    yield
    if not place_on_machine():
        wait()


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network to train with: on several ranks DistributedDataParallel, which averages gradients over them.

    A rank whose pairs do not need one of the directions does not compute it: its parameters are then unused there.
    """
    if world() == 1:
        return network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name in newer versions
        return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None,
                                       find_unused_parameters=True, broadcast_buffers=False,
                                       gradient_as_bucket_view=True)


def unsynchronised(network: nn.Module) -> contextlib.AbstractContextManager:
    """While gradients are added up that more are to be added to before the ranks exchange them."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the step does not wait for; on the CPU the tensor itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
