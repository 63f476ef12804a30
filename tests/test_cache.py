"""The cache of decoded volumes: never stale, repaired, filled by several processes at once."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.cache import Reading, load_volume
from data.problems import VolumeError
from tests.conftest import ROOT, ball, decoded, save, write_pairs

READING = Reading("fmri", (11, 12, 13))


def test_entry_is_used_and_never_stale_nor_memory_mapped(tmp_path):
    path = save(tmp_path / "x.nii", ball(11, 12, 13))
    first, metadata = decoded(path, READING, tmp_path / "cache")
    assert metadata["low"] < metadata["high"] and first.dtype == np.float32
    if (maps := Path("/proc/self/maps")).exists():  # a map kills the process (SIGBUS) if its file shrinks
        assert str(tmp_path) not in maps.read_text()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    decoded(path, READING, tmp_path / "cache")
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    before = path.stat()
    save(path, ball(11, 12, 13)[::-1].copy())
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))  # same size, same time, other content
    assert path.stat().st_size == before.st_size
    assert not np.allclose(first, decoded(path, READING, tmp_path / "cache")[0])


def test_every_setting_file_and_b_value_has_its_own_entry(tmp_path):
    path, b_values = save(tmp_path / "x_dwi.nii.gz", ball(11, 12, 13, 3)), tmp_path / "x_dwi.bval"
    changes = [{}, {"size": (12, 12, 12), "resize": "resample"}, {"intensity": "minmax"}, {"reduce": "std"}]
    ends = [decoded(path, dataclasses.replace(READING, **change), tmp_path / "cache")[0].std() for change in changes]
    b0 = dataclasses.replace(READING, reduce="b0")
    for content in ("0 1000 1000", "1000 0 1000"):
        b_values.write_text(content)
        ends.append(decoded(path, b0, tmp_path / "cache")[0].std())
    for seed in (1, 2):  # without .bval, which a single volume does not need
        other = save(tmp_path / f"{seed}.nii", ball(11, 12, 13, seed=seed))
        ends.append(decoded(other, b0, tmp_path / "cache")[0].std())
    assert len(set(ends)) == 8


def test_damaged_entry_is_made_again(tmp_path):
    path = save(tmp_path / "x.nii.gz", ball(11, 12, 13))
    expected, _ = decoded(path, READING, tmp_path / "cache")
    for entry in (tmp_path / "cache").iterdir():
        for content in (entry.read_bytes()[:20], entry.read_bytes()[:-400] + bytes(400), b"{}", b"[]", b""):
            entry.write_bytes(content)
            np.testing.assert_array_equal(decoded(path, READING, tmp_path / "cache")[0], expected)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(VolumeError, match="cut.npy: has become unreadable .*run the same command"):
        load_volume(tmp_path / "cut.npy")
    assert not (tmp_path / "cut.npy").exists()


def test_several_processes_fill_one_cache_at_once(tmp_path):
    write_pairs(tmp_path / "s", subjects=4)
    code = ("import sys, pathlib\nfrom data.cache import Reading, cached_volume, load_volume\n"
            "for path in sorted(pathlib.Path(sys.argv[1]).glob('*.nii.gz')):\n"
            "    reading = Reading('fmri', (12, 13, 11), resize='resample')\n"
            "    file, metadata = cached_volume(path, reading, pathlib.Path(sys.argv[2]))\n"
            "    print(path, metadata['content'], load_volume(file).sum())\n")
    children = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "s", tmp_path / "cache"], cwd=ROOT, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)]
    results = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * 6, results[0][1]
    assert len({out for out, _ in results}) == 1 and len(results[0][0].splitlines()) == 8
    assert len(list((tmp_path / "cache").iterdir())) == 16  # two files per volume, nothing temporary left
