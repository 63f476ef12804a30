"""Files of tensors that nobody vouches for: nothing in them is executed, unpacked, or used where it lies."""

import errno
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from utils.errors import UserError
from utils.files import open_regular

DIRECTORY = 0x10  # a bit of a zip record's attributes
TRANSIENT = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT,
             errno.EIO}
UNREADABLE = (MemoryError, OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError,
              LookupError, AttributeError, TypeError, AssertionError, NotImplementedError, struct.error, RecursionError)
UNFIT = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, NotImplementedError)  # of a wrong state dict


class DamagedError(UserError):
    """A file that is not, or no longer, a complete file of tensors."""


def read_tensors(path: Path, what: str) -> object:
    """The content of a file of torch.save, on the CPU. what: it should be, for the message.

    Raises DamagedError where the file is not complete, UserError where it cannot be read right now.
    """
    try:
        with open_regular(path) as file:
            if file.read(4) == b"PK\x03\x04":  # torch does not check the CRCs; files of before 2020 are no archives
                with zipfile.ZipFile(file) as archive:
                    if any(record.compress_type != zipfile.ZIP_STORED or record.external_attr & DIRECTORY
                           for record in archive.infolist()):  # torch reads a record marked as a folder as garbage
                        raise ValueError("its records are not as torch writes them")
                    if damaged := archive.testzip():
                        raise ValueError(f"the checksum of {damaged} is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) in TRANSIENT or "allocate memory" in str(error):
            raise UserError(f"{path}: cannot be read right now ({one_line(error)}); the file may be fine: fix the "
                            "cause and try again") from error
        pickled = isinstance(error, pickle.UnpicklingError)  # PyTorch's message says how to load it unsafely
        why = "no file of tensors alone" if pickled else one_line(error)
        raise DamagedError(f"{path}: is not {what}, or is damaged ({why})") from error


def load_weights(model: nn.Module, weights: dict) -> None:
    """Copy a state dict into a model. Raises one of UNFIT where names or shapes differ, or a value is not finite."""
    model.load_state_dict(weights)
    if bad := next((name for name, value in model.state_dict().items() if not value.isfinite().all()), None):
        raise ValueError(f"{bad} is not finite")


def build(make: Callable[[], nn.Module], weights: dict) -> nn.Module:
    """The model that `make` makes, with these weights; it takes no memory before their shapes are known to fit."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "is a no-op"
        make().load_state_dict(weights)
    model = make()
    load_weights(model, weights)
    return model


def copied(value: object, like: torch.Tensor) -> torch.Tensor:
    """A tensor from a file in a new one of the shape and dtype of `like`. Raises ValueError where it has others."""
    if not isinstance(value, torch.Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{found} instead of {like.dtype} {tuple(like.shape)}")
    new = torch.empty_like(like).copy_(value)
    if not new.isfinite().all():
        raise ValueError("a value is not finite")
    return new


def mapped(change: Callable[[torch.Tensor], object], value: object) -> object:
    """The same tuples, lists and dicts, with change(tensor) in the place of each tensor."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(change, each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(change, each) for each in value)
    return value


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors in tuples, lists and dicts, in their order."""
    found = []
    mapped(found.append, value)
    return found


def one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
