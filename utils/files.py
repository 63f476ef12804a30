"""Writing so that nothing is lost: files that are whole or not there, room on the disk, and one run in a folder."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.part")  # what a file is called while it is written
LOCK = ".lock"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FileError(ValueError):
    """A file that cannot be written, or a folder that is in use; the message says which, why, and what to do."""


def replace_file(path: Path, write: Callable[[BinaryIO], object], size: int) -> None:
    """Write a file under another name, flush it to the disk, and rename it: `path` is never half of one.

    write: gets the open file; size: bytes that it will need (about). Several processes may do so at once. Raises
    FileError where there is no room, or the file cannot be written: then nothing is left of it, and `path` is as it
    was.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_room(path.parent, size)
        with _open_locked(temporary, "wb", wait=True)[0] as file:  # locked: `remove_strays` sees that we live
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(cause, OSError):
            raise
        raise cannot_write(path, cause) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def make_writable(*folders: str | Path) -> None:
    """Create these folders. Raises FileError where one cannot be written to."""
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = _temporary(folder / "probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise cannot_write(folder, error) from error


def write_text(path: Path, text: str) -> None:
    """`replace_file` with a text, in UTF-8."""
    content = text.encode(errors="backslashreplace")  # a file's name need not be text
    replace_file(path, lambda file: file.write(content), len(content))


def write_table(path: Path, columns: tuple[str, ...], rows: Iterable[dict], digits: str = ".6g") -> None:
    """`write_text` with a table as CSV; floats in the format `digits`, other columns of a row are left out."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:{digits}}" if isinstance(value, float) else value for key, value in row.items()}
                     for row in rows)
    write_text(path, table.getvalue())


def cannot_write(path: Path, error: OSError) -> FileError:
    """What to tell where writing `path` failed."""
    free = "" if (space := _free(path.parent)) is None else f"; {_megabytes(space)} are free on its disk"
    remedy = "Make room" if error.errno in FULL else "See to it that it can be"
    return FileError(f"{path}: cannot be written ({error.strerror or error}{free}). {remedy}, or choose another "
                     "folder (opt.checkpoint_dir, opt.result_dir, opt.cache_dir, opt.sample_dir). What was saved "
                     "before is whole")


def require_room(folder: Path, size: int) -> None:
    """Raise FileError where the disk of `folder` does not have `size` bytes left."""
    free = _free(folder)
    if free is not None and free < size:
        raise FileError(f"{folder}: {_megabytes(size)} are needed, {_megabytes(free)} are free on its disk. Make room, "
                        "or choose another folder (opt.checkpoint_dir, opt.result_dir, opt.cache_dir, opt.sample_dir)")


def _free(folder: Path) -> int | None:
    """Bytes left for us on the disk of a folder; None where the system does not tell."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(folder)
        return usage.free if usage.total else None
    return None


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, too, before the power may fail."""
    with contextlib.suppress(OSError):  # some file systems have no such thing
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _open_locked(path: Path, mode: str, wait: bool) -> tuple[IO, bool | None]:
    """Open a file and lock it until it is closed, or this process ends, however it ends: no lock is ever stale.

    With False where another process has it (and we do not wait), None where the file system has no locks.
    """
    for attempt in range(100):
        file = open(path, mode)  # noqa: SIM115 the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except BlockingIOError:
            locked = False
        except OSError:
            locked = None
        if os.fstat(file.fileno()).st_nlink or attempt == 99:  # some file systems count no links
            return file, locked
        file.close()  # who had it has removed it meanwhile


def remove_strays(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left below a folder."""
    for path in folder.rglob(".*.part"):
        if TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                file, locked = _open_locked(path, "rb+", wait=False)
                with file:
                    if locked:  # else its writer lives
                        path.unlink()


@contextlib.contextmanager
def sole_writer(*folders: str) -> Iterator[None]:
    """Keep other runs out of these folders until the block, or this process, ends. Raises FileError where one is in.
    """
    with contextlib.ExitStack() as held:
        for folder in dict.fromkeys(Path(name).resolve() for name in folders):
            held.enter_context(_locked_folder(folder))
        yield


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    try:
        file, locked = _open_locked(folder / LOCK, "ab+", wait=False)
    except OSError as error:
        raise cannot_write(folder / LOCK, error) from error
    with file:
        if locked is False:
            file.seek(0)
            owner = file.read().decode(errors="replace")
            raise FileError(f"{folder}: another run writes there ({owner}). Wait for its end, or choose another "
                            "folder (opt.checkpoint_dir and opt.result_dir; in sample.py opt.sample_dir)")
        if locked is None:
            print(f"note: {folder}: its file system has no locks, so that a second run in it would not be refused")
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}"
        with contextlib.suppress(OSError):  # the lock holds without it, on a full disk, too
            file.truncate(0)
            os.write(file.fileno(), owner.encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
