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
                 "opt.base_channels or opt.image_size (with opt.resize), or raise opt.patch_size. In sample.py, lower "
                 "opt.batch_size")


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
                print(f"\nPDS cannot go on:\n{visible(message)}", file=sys.stderr)
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
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton and NCCL use this one
    return device


def set_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of opt.precision, for autocast; also says whether convolutions of float32 are TF32. Raises UserError.

    "auto" is bfloat16 where the hardware multiplies matrices in it: a CPU that only converts to it (AVX512-BF16 without
    AMX) is 1.5 times slower than in float32; on an H100, paper() takes 1.8 times as long in TF32. Both measured.
    """
    on_gpu = device.type == "cuda"
    if precision in ("auto", "tf32") and on_gpu:
        recent = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        recent = precision == "auto" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
    if precision == "tf32" and not recent:
        raise UserError(f'opt.precision = "tf32": {device} does not have it, only NVIDIA GPUs from Ampere on; use '
                        '"auto" or "fp32"')
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # never TF32: SSIM would lose its variances
    torch.backends.cudnn.conv.fp32_precision = "ieee" if precision == "fp32" else "tf32"
    if precision == "auto":
        return torch.bfloat16 if recent else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def precision_name(precision: str, dtype: torch.dtype) -> str:
    """For messages and sidecars."""
    return "float32, convolutions in TF32" if precision == "tf32" else str(dtype).removeprefix("torch.")
