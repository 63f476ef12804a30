"""Folders, temporary files, and one run per folder. Killed runs and full disks: test_recovery.py."""

import fcntl
import os
import socket
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.files import lock_folders, make_writable, remove_temporary_files, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("write", [lambda folder: write_text(folder / "new/b", ""), make_writable])
def test_folders_are_created_or_refused(tmp_path, write):
    write(tmp_path / "folder")
    write_text(tmp_path / "file", "caf\u00e9 \udcff")
    assert (tmp_path / "file").read_bytes() == "caf\u00e9 \\udcff".encode()
    for place in (tmp_path / "file", Path("/proc/self/folder")):  # where root cannot write either
        with pytest.raises(UserError, match=f"{place}.*: cannot be written"):
            write(place)


def test_only_abandoned_temporary_files_are_removed(tmp_path):
    host = socket.gethostname()
    kept = sorted([f".{host}.{os.getppid()}.1.part", ".other.1.1.part", ".a.part", "b.1.2.part"])
    for name in (*kept, f".{host}.{os.getpid()}.123.part", ".another.host.1.123.part"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".another.host.1.123.part", (0, 0))
    remove_temporary_files(tmp_path.parent)
    assert names(tmp_path) == kept


def test_a_folder_stays_locked_where_the_lock_file_is_deleted_and_until_its_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folders(tmp_path / ".", str(tmp_path)):  # one folder under two names
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        (tmp_path / ".lock").unlink()  # somebody tidies up
        with pytest.raises(UserError, match="another run is writing there"), lock_folders(tmp_path):
            pass
        raise ZeroDivisionError
    assert not names(tmp_path)
    with lock_folders(tmp_path):  # it is free again
        pass


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("target"), lambda path: path.hardlink_to("target"),
                                  os.mkfifo, os.mkdir])
def test_a_lock_file_of_another_kind_is_refused_and_left_alone(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    Path("target").write_text("precious")
    make(Path(".lock"))
    with pytest.raises(UserError, match=".lock: cannot be written"), lock_folders(tmp_path):
        pass
    assert Path("target").read_text() == "precious" and names(tmp_path) == [".lock", "target"]


def test_a_file_system_without_locks_is_noted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.stat("missing"))
    with lock_folders(tmp_path):
        assert capsys.readouterr().out.startswith(f"note: {tmp_path}: cannot be locked")
