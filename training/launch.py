"""What main.py and sample.py share: exit statuses, device and precision, and errors and stops turned into messages."""

import sys
from collections.abc import Callable

import nibabel as nib
import torch

from training.distributed import ended_by_another_rank, is_main_rank, local_rank, under_torchrun
from training.log import robust_output
from utils.errors import UserError, visible
from utils.stop import Interrupted, stop

FINISHED, REFUSED, STOPPED = 0, 2, 3
RESUME = "run the same command to resume."
OUT_OF_MEMORY = ("out of memory. For the same result with less memory, raise opt.accumulate, set "
                 "opt.gradient_checkpointing = True, or use fewer ranks per machine. Otherwise lower opt.batch_size, "
                 "opt.base_channels or opt.image_size (with opt.resize), or raise opt.patch_size")


def run_program(run: Callable[[object], int], settings) -> int:
    """run(settings) with signal handlers installed; an error of the user's or a stop becomes a message and a status."""
    nib.imageglobals.logger.setLevel("CRITICAL")  # data/volumes.py reports header problems, and names the file
    try:
        with stop, robust_output():
            try:
                return run(settings)
            except Interrupted:
                if is_main_rank():
                    print(f"Stopped ({stop.reason}); {RESUME}", flush=True)
                return STOPPED
            except Exception as error:
                if ended_by_another_rank(error):
                    if is_main_rank():
                        print(f"\nPDS stopped because another rank ended; {RESUME}", file=sys.stderr)
                    return STOPPED
                if not isinstance(error, UserError) and not is_out_of_memory(error):
                    raise
                message = str(error) if isinstance(error, UserError) else OUT_OF_MEMORY
                print(f"\nPDS cannot run:\n{visible(message)}", file=sys.stderr)
                return REFUSED
    except KeyboardInterrupt:
        print(f"\nInterrupted; {RESUME}", file=sys.stderr)
        return STOPPED


def is_out_of_memory(error: Exception) -> bool:
    """Of the GPU, or of the system: on a CPU, PyTorch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def choose_device(name: str) -> torch.device:
    """The device that opt.device names; "auto": a GPU for each rank, or else the CPU. Raises UserError."""
    if name == "auto":
        name = f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
    elif under_torchrun() and name != "cpu":
        raise UserError(f'opt.device = {name!r}: with torchrun, set it to "auto" (one GPU per rank) or "cpu"')
    try:
        device = torch.device(f"{name}:0" if name == "cuda" else name)
    except RuntimeError:
        raise UserError(f"opt.device = {name!r}: no such device; choose auto, cpu or cuda[:N]") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"opt.device = {name!r}: PyTorch finds {torch.cuda.device_count()} GPUs on this machine; "
                        "choose auto or cpu, or start fewer ranks")
    return device


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of opt.precision; "auto": bfloat16 where the hardware multiplies matrices in it.

    A CPU that only converts to bfloat16 (AVX512-BF16 without AMX) is 1.5 times slower than in float32 (measured).
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32
