"""Files that are regular and complete, or refused; messages for full and read-only disks; one run per folder."""

import contextlib
import csv
import errno
import fcntl
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

TEMPORARY = re.compile(r"\.(.+)\.([1-9][0-9]{0,8})\.[0-9]+\.part")  # host, process id, time in ns
MAX_TEXT, MAX_JSON = 2**27, 2**24  # bytes
OTHER_FOLDER = "choose another folder (opt.checkpoint_dir, opt.result_dir, opt.cache_dir or opt.sample_dir)"


def open_regular(path: str | Path, largest: float = math.inf) -> BinaryIO:
    """Open a regular file of at most `largest` bytes to read it; never waits for a pipe. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if status.st_size > largest:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {largest:,}")
        return open(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read_text(path: str | Path, largest: int = MAX_TEXT, errors: str = "strict") -> str:
    """The content of a text file in UTF-8. errors: as of bytes.decode. Raises OSError, UnicodeError."""
    with open_regular(path, largest) as file:
        return file.read(largest).decode("utf-8-sig", errors)


def read_json(path: str | Path) -> object:
    """The content of a JSON file. Raises OSError, ValueError."""
    try:
        return json.loads(read_text(path, MAX_JSON))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def expanded(path: str, folder: str | Path = ".") -> str:
    """A path, relative to `folder`, in which ~ and $VARIABLES are replaced, unless there is a file of just this name.

    Raises ValueError where one of them has no value, or the path cannot be written here.
    """
    found = path
    if ("$" in path or path.startswith("~")) and not os.path.lexists(os.path.join(folder, path)):
        found = os.path.expanduser(os.path.expandvars(path))
        if found.startswith("~") or re.search(r"\$(\w|\{)", found):
            raise ValueError("it has a ~ or $ that stands for nothing here: write the path out, or ./~ if it is a name")
    try:
        if b"\0" in os.fsencode(found):
            raise ValueError("it contains a NUL character")
    except UnicodeEncodeError:
        raise ValueError("its letters cannot be written in the encoding of this locale: set PYTHONUTF8=1") from None
    return found


def replace_file(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`, which is never incomplete. Raises UserError."""
    temporary = path.with_name(f".{socket.gethostname()}.{os.getpid()}.{time.time_ns()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # before the new name: a power failure leaves the old content or the new
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(cause, OSError):
            raise
        raise cannot_write(path, cause) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 with `replace_file`."""
    replace_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))  # file names can be any bytes


def write_table(path: Path, columns: tuple[str, ...], rows: Iterable[dict], digits: str = ".6g") -> None:
    """Write rows as CSV with `replace_file`: floats in the format `digits`, only the given columns."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:{digits}}" if isinstance(value, float) else value for key, value in row.items()}
                     for row in rows)
    write_text(path, table.getvalue())


def cannot_write(path: Path, error: OSError) -> UserError:
    """The message for a failed write: the cause, the free space, and what to do."""
    folder = next(parent for parent in path.absolute().parents if os.path.isdir(parent))
    cause = f"{error.strerror or error}; {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free on its disk"
    return UserError(f"{path}: cannot be written ({cause}). Free some space, check its permissions and what is in its "
                     f"place, or {OTHER_FOLDER}. Files saved earlier are intact")


def make_writable(*folders: str | Path) -> None:
    """Create these folders where they are missing. Raises UserError where one cannot be written."""
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # no name, so no other process can remove it
        except OSError as error:
            raise cannot_write(folder, error) from error


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left below a folder; those of other hosts after a day."""
    for path in folder.rglob(".*.part"):
        if found := TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                dead = found[1] == socket.gethostname() and not _is_running(int(found[2]))
                if dead or time.time() - path.lstat().st_mtime > 86_400:
                    path.unlink()


def _is_running(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(process) > 0 and process != os.getpid()  # restarted containers give the same number again
    return False


@contextlib.contextmanager
def lock_folders(*folders: str | Path) -> Iterator[None]:
    """Keep other runs out of these folders until the block ends or the process dies. Raises UserError."""
    with contextlib.ExitStack() as stack:
        for path in dict.fromkeys(Path(folder).resolve() / ".lock" for folder in folders):
            try:
                stack.callback(os.close, directory := os.open(path.parent, os.O_RDONLY))
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
                file = stack.enter_context(open(descriptor, "r+", errors="replace"))  # refuses pipes
                if os.fstat(descriptor).st_nlink > 1:
                    raise OSError(errno.EMLINK, "a hard link to another file")
            except OSError as error:
                raise cannot_write(path, error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the file may be deleted while the run lives
            except BlockingIOError:
                holder = ascii(file.read(100))[1:-1] or "unknown process"
                raise UserError(f"{path.parent}: another run is writing there ({holder}). Wait until it ends, or "
                                f"{OTHER_FOLDER}") from None
            except OSError as error:
                print(f"note: {path.parent}: cannot be locked ({error}): do not start a second run there")
            stack.callback(path.unlink, missing_ok=True)
            with contextlib.suppress(OSError):  # the lock holds on a full disk, too
                file.truncate(0)
                holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}"
                os.pwrite(descriptor, holder.encode(), 0)  # unbuffered: nothing is left to fail when the file is closed
        yield
