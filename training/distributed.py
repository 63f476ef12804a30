"""Several processes, started by torchrun, that train as one.

Every rank computes its share of each step's pairs, with noise keyed by the pair's place in the global batch, so the
loss curve is the same on any number of ranks (except for dropout). Only the main rank writes files and prints.
"""

import contextlib
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

from utils.errors import UserError
from utils.stop import stop

TIMEOUT = timedelta(days=1)  # the main rank may read a large study, draw or score meanwhile; torchrun notices deaths
GRACE_SECONDS = 5.0  # within which torchrun notices that a rank has ended


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of several. Raises UserError where something else did."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not dist.is_torchelastic_launched():
        raise UserError(f"WORLD_SIZE = {os.environ['WORLD_SIZE']} is set, but not by torchrun: start several ranks "
                        "with torchrun --nproc-per-node N main.py, or unset WORLD_SIZE for a single process")
    return several


def local_rank() -> int:
    """Number of this rank on its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_rank() -> bool:
    return rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks, if there are any: tensors on GPUs over NCCL, others over Gloo. Only the main rank prints
    inside."""
    if not under_torchrun():
        yield
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))  # torchrun gives a rank one
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    with open(os.devnull, "w") as null, contextlib.ExitStack() as muted:
        if not is_main_rank():
            muted.enter_context(contextlib.redirect_stdout(null))
            muted.enter_context(contextlib.redirect_stderr(null))
        yield
        barrier()  # torchrun ends all ranks once one leaves: not while the main rank is writing
    dist.destroy_process_group()  # not after an error: the other ranks would only report a broken connection


def ended_by_another_rank(error: Exception) -> bool:
    """Whether an error only shows that another rank ended first; that rank reports the cause."""
    if not dist.is_torchelastic_launched():
        return False
    if isinstance(error, dist.DistError) or "gloo" in str(error):  # the connection broke
        return True
    if os.environ.get("RANK", "0") == "0":
        return False
    before, end = stop.signals, time.monotonic() + GRACE_SECONDS
    while stop.signals == before and time.monotonic() < end:  # torchrun then sends SIGTERM
        time.sleep(0.1)
    return stop.signals > before


def shard(items: Sequence) -> list:
    """This rank's part of a list: every N-th item."""
    return list(items[rank()::world_size()])


def all_reduce_sum(*values: float) -> list[float]:
    """Each value summed over all ranks."""
    return sum_over_ranks(torch.tensor(values, dtype=torch.float64)).tolist()


def sum_over_ranks(values: Tensor) -> Tensor:
    """A tensor summed over all ranks, in place and on its device: no host waits for a GPU."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def barrier() -> None:
    all_reduce_sum(0.0)


def any_rank(flag: object) -> bool:
    """Whether the flag is true on at least one rank."""
    return all_reduce_sum(float(bool(flag)))[0] > 0


def stop_requested_on_any_rank() -> bool:
    """All ranks call this at the same step and then leave at the same step."""
    requested = any_rank(stop)  # not this rank's flag, which a signal may set while the ranks agree
    if requested and not stop.reason:
        stop.reason = "another rank received a signal"
    return requested


def same_on_all_ranks(*values: object) -> bool:
    """Whether all ranks hold the same plain values."""
    digest = int(hashlib.sha256(repr(values).encode()).hexdigest()[:10], 16)  # float64 adds such numbers exactly
    return not any_rank(all_reduce_sum(digest)[0] != digest * world_size())


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Run the block on one rank of every machine first, then on the others, which find its files on disk."""
    if local_rank():
        barrier()
    yield
    if not local_rank():
        barrier()


def wrap_ddp(network: nn.Module, device: torch.device) -> nn.Module:
    """The network in DistributedDataParallel, which averages gradients over the ranks; itself for a single process."""
    if world_size() == 1:
        return network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers is renamed in newer versions
        return DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
            gradient_as_bucket_view=True, find_unused_parameters=True)  # a rank may compute one direction only
