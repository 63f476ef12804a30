"""Reading and writing NIfTI files: damaged files, wrong headers, series, orientations, frames."""

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from nibabel.orientations import inv_ornt_aff
from nibabel.testing import data_path

from data.cache import Reading
from data.intensity import scale
from data.problems import VolumeError
from data.volumes import read_volume, write_volume
from opt import Options
from tests.conftest import AFFINE, ROOT, ball, decoded, save, turned

# ---- Damaged files and wrong headers, also for the tests of --check


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def with_header(content: bytes, *fields: tuple[int, bytes]) -> bytes:
    """The content of a .nii.gz file with other bytes at these offsets of its image."""
    plain = bytearray(gzip.decompress(content))
    for offset, value in fields:
        plain[offset:offset + len(value)] = value
    return gzip.compress(plain)


AXES, FORMS, SROW, VOXELS = 40, 252, 280, 352  # offsets of dim, (qform_code, sform_code), srow_x and the first voxel
HEADERS = {  # fault: (offset, bytes) in the header, and what the message says
    **{f"{dim}": ([(AXES, struct.pack(f"<{len(dim)}h", *dim))], words) for dim, words in (
        ((3, 30000, 30000, 30000), "30000x30000x30000"), ((3, 20, 0, 20), "size 20x0x20"), ((3, -20, 20, 20), "-20"),
        ((3, 800, 800, 800), "too large"), ((0, 20, 20, 20), "size unknown"), ((9, 20, 20, 20), ""),
        ((4, 500, 500, 500, 20000), "truncated"), ((3, 400, 400, 400), "truncated"), ((3, 20, 20, 21), ""),
        ((2, 20, 20), "has size 20x20"), ((5, 4, 4, 4, 2, 3), "has size 4x4x4x2x3"))},
    "offset 0": ([(108, struct.pack("<f", 0))], "voxels at byte 0"),
    "offset": ([(108, struct.pack("<f", 3e9))], "voxels at byte 3000000000"),
    "voxel size": ([(FORMS, struct.pack("<2h", 1, 0)), (80, bytes(12))], "its header has pixdim = "),
    "micron": ([(123, b"\x03")], "xyzt_units = 3, micrometres"),
    **{f"data type {code}": ([(70, struct.pack("<h", code))], words) for code, words in (
        (4321, "datatype = 4321"), (32, "its voxels are complex"), (128, "its voxels are colours"))},
    "zeros": ([(SROW, bytes(48))], "affine is not invertible"),
    "nan": ([(SROW, struct.pack("<12f", *[np.nan] * 12))], "affine is not invertible"),
    "voxels": ([(VOXELS, np.full(8000, np.nan, "<f4").tobytes())], "no voxel that is finite"),
    "rotation": ([(FORMS, struct.pack("<2h", 1, 0)), (256, struct.pack("<3f", 0.9, 0.9, 0))], "is no rotation"),
    "far": ([(SROW + 12, struct.pack("<f", 1e9))], "not in mm")}
DAMAGED = {  # fault: content of a .nii.gz file -> damaged content, and what the message says
    "cut": (lambda good: good[:-40], "end-of-stream"),
    "tail": (lambda good: good[:-3], "cannot be read"),
    "crc": (lambda good: flipped(good, -6), "CRC check failed"),  # the whole image can still be decompressed
    "empty": (lambda _: b"", "is empty"),
    "page": (lambda _: b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    "text": (lambda _: b"hello" * 99, "not compressed by gzip"),
    "packed": (lambda _: gzip.compress(b"hello" * 200), "is not NIfTI"),
    **{f"bit {n}": (lambda good, n=n: flipped(good, np.random.default_rng(n).integers(60, len(good)), n % 8), "")
       for n in range(40)},  # only the gzip header before them has no checksum
    **{fault: (lambda good, fields=fields: with_header(good, *fields), words)
       for fault, (fields, words) in HEADERS.items()}}


def refused(path: Path, words: str = "", reduce: str = "mean") -> None:
    with pytest.raises(VolumeError, match=f"{path.name[-20:]}: .*{words}"):
        read_volume(path, reduce)


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_files_and_wrong_headers_are_refused_by_name(tmp_path, fault):
    damage, words = DAMAGED[fault]
    path = save(tmp_path / "x.nii.gz", ball(20, 20, 20))
    path.write_bytes(damage(path.read_bytes()))
    refused(path, words)
    if fault in HEADERS:
        (tmp_path / "x.nii").write_bytes(gzip.decompress(path.read_bytes()))
        refused(tmp_path / "x.nii", words)
    assert fault != "cut" or nib.load(path).shape == (20, 20, 20)  # it opens, and shows its shape


def test_paths_that_cannot_be_opened_are_refused(tmp_path, monkeypatch):
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "annex/key")
    (tmp_path / "folder.nii.gz").mkdir()
    os.mkfifo(tmp_path / "fifo.nii.gz")
    refused(tmp_path / "link.nii.gz", "is a link to .*annex/key, which is not there; fetch the image with datalad get")
    for name, what in (("folder", "not a regular file"), ("fifo", "not a regular file"), ("absent", "no such file")):
        refused(tmp_path / f"{name}.nii.gz", what)
    refused(tmp_path / ("x" * 400), "too long|no such file")
    path = save(tmp_path / "x.nii", ball(4, 4, 4))
    denied = Mock(side_effect=PermissionError(13, "Permission denied"))  # the tests may run as root
    monkeypatch.setattr("data.volumes.open_regular", denied)
    refused(path, r"cannot be read \(.*Permission denied\); check its permissions")


@pytest.mark.parametrize("reduce", ["first", "mean"])
def test_series_is_read_to_its_end_even_if_only_its_start_is_needed(tmp_path, reduce):
    content = save(tmp_path / "x.nii.gz", ball(9, 9, 9, 5)).read_bytes()
    for damaged in (flipped(content, -6), content[:-9], gzip.compress(gzip.decompress(content)[:-100])):
        (tmp_path / "x.nii.gz").write_bytes(damaged)
        refused(tmp_path / "x.nii.gz", "", reduce)


def test_formats_other_than_nifti_are_refused_and_nifti_2_and_upper_case_names_are_read(tmp_path):
    nib.save(nib.MGHImage(ball(4, 4, 4), AFFINE), tmp_path / "x.mgz")
    nib.save(nib.Nifti1Pair(ball(4, 4, 4), AFFINE), tmp_path / "pair.img")
    nib.save(nib.Nifti2Image(ball(4, 4, 4), AFFINE), tmp_path / "two.nii")
    for name in ("UPPER.NII.GZ", "packed.nii"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "two.nii").read_bytes()))
    for name in ("x.mgz", "pair.hdr"):
        refused(tmp_path / name, "convert it to .nii.gz")
    refused(tmp_path / "packed.nii", "is compressed by gzip, unlike its name says")
    for name in ("two.nii", "UPPER.NII.GZ"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).voxels, ball(4, 4, 4))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_gzip_bomb_takes_less_than_a_gigabyte(tmp_path):
    """A header and 3 GB of zeros in 3 MB: announced by the header, or hidden behind a small image."""
    small, bombs = save(tmp_path / "x.nii.gz", np.zeros((20, 20, 20), np.int16)).read_bytes(), []
    for name, size in (("announced", (1500, 1000, 1000)), ("hidden", (20, 20, 20))):
        bombs.append(tmp_path / f"{name}.nii.gz")
        bombs[-1].write_bytes(with_header(small, (AXES + 2, struct.pack("<3h", *size)))
                              + gzip.compress(bytes(2**26), compresslevel=1) * 46)
    code = ("import sys, pathlib\nfrom data.volumes import read_volume, VolumeError\n"
            "for name in sys.argv[1:]:\n    try:\n        read_volume(pathlib.Path(name))\n"
            "    except VolumeError as error:\n        print(error)\n"
            "print(pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2])")  # largest size in memory, kB
    child = subprocess.run([sys.executable, "-c", code, *bombs], cwd=ROOT, capture_output=True, text=True, timeout=60)
    announced, hidden, peak = child.stdout.splitlines()[:3]
    assert "too large" in announced and "continues after" in hidden and "download or convert" in hidden
    assert int(peak.split()[0]) < 1e6


# ---- Voxels and series


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_repaired_and_counted(tmp_path, bad):
    voxels = ball(12, 13, 14)
    for count in (1, voxels.size // 100):
        voxels.ravel()[:count] = bad
        path = save(tmp_path / f"{count}.nii", voxels)
        scan = read_volume(path)
        assert scan.doubts[0][0].startswith(f"{count} voxels were NaN") and np.isfinite(scan.voxels).all()
        assert scan.voxels[0, 0, 0] == scan.voxels.min() == voxels[np.isfinite(voxels)].min()
        trained, metadata = decoded(path, Reading("fmri", (12, 13, 14)), tmp_path / "cache")
        assert np.isfinite(trained).all() and np.abs(trained).max() <= 1 and len(metadata["doubts"]) == 1


def test_series_is_reduced_as_asked(tmp_path):
    voxels = ball(5, 4, 3, 6)
    path, b_values = save(tmp_path / "x_dwi.nii.gz", voxels), tmp_path / "x_dwi.bval"
    b_values.write_text("0 1000 1000 5 2000 1000\n")
    expected = {"mean": voxels.mean(-1), "std": voxels.std(-1), "first": voxels[..., 0],
                "b0": voxels[..., [0, 3]].mean(-1), "shell": voxels[..., [1, 2, 4, 5]].mean(-1)}
    assert set(expected) == set(Options.__dataclass_fields__["reduce"].metadata["choices"])
    for reduce, volume in expected.items():
        scan = read_volume(path, reduce)
        np.testing.assert_allclose(scan.voxels, volume, rtol=1e-5)
        assert scan.time_points == 6
    for content, words in (("0 1000", "has 2 b-values for 6 time points"), ("0 1 2 3 4 nan", "has 5 b-values"),
                           ("zero", "cannot be read as"), ("0 0 0 0 0 0", "has no shell time point"), (None, "cannot")):
        b_values.write_text(content) if content else b_values.unlink()
        with pytest.raises(VolumeError, match=f"x_dwi.bval: {words}.*set opt.reduce to mean, std or first"):
            read_volume(path, "shell")
    assert read_volume(save(tmp_path / "one.nii", voxels[..., :1]), "b0").time_points == 1


# ---- Orientations and frames


@pytest.mark.parametrize("how", ["none", "resample", "pad_crop"])
@pytest.mark.parametrize("codes", ["LAS", "LPS", "PSR", "RAS"])
@pytest.mark.parametrize("real", [False, True])
def test_orientations_give_the_same_volume_and_outputs_have_the_frame_of_their_reference(tmp_path, real, codes, how):
    path = tmp_path / f"{codes}.nii.gz"
    native = nib.load(f"{data_path}/anatomical.nii") if real else nib.Nifti1Image(ball(20, 22, 24), AFFINE)
    original = turned(native, "RAS")
    reference = turned(original, codes)
    if not real:
        reference.set_sform(reference.affine, 4)
        reference.set_qform(reference.affine @ from_matvec(np.eye(3), [7, 7, 7]), 1)  # it may differ: both are kept
        reference.header.set_xyzt_units("mm", "sec")
    nib.save(reference, path)
    scan = read_volume(path)
    np.testing.assert_allclose(scan.voxels, original.get_fdata(), atol=1e-5)
    np.testing.assert_allclose(scan.affine, original.affine, atol=1e-4)
    assert scan.orientation == codes
    size = scan.voxels.shape if how == "none" else (24, 20, 22)
    volume, metadata = decoded(path, Reading("t1", size, resize=how), tmp_path / "cache")
    write_volume(tmp_path / "out.nii.gz", volume, np.array(metadata["affine"]), path)
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.shape == reference.shape and nib.aff2axcodes(written.affine) == tuple(codes)
    for field in ("pixdim", "sform_code", "qform_code", "xyzt_units"):
        np.testing.assert_allclose(written.header[field].ravel()[:4], reference.header[field].ravel()[:4], rtol=1e-6)
    for ours, theirs in ((written.get_sform(), reference.get_sform()), (written.get_qform(), reference.get_qform())):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # the volumes overlay each other: the same voxels are bright, except where they were cropped
    expected, result = scale(reference.get_fdata(), metadata["low"], metadata["high"]), written.get_fdata()
    if how == "none":
        np.testing.assert_allclose(result, expected, atol=1e-5)
    kept = result > result.min()
    assert np.corrcoef(expected[kept], result[kept])[0, 1] > (0.6 if how == "resample" else 0.999)
    assert kept.sum() > 0.9 * np.prod(np.minimum(size, scan.voxels.shape)) * (1 if real else 0.9)


def rounded_quaternion(header: nib.Nifti1Header, excess: float) -> None:
    """A rotation of half a turn: w = 0, and the rest is longer than 1."""
    header["quatern_b"], header["quatern_c"], header["quatern_d"] = np.array((0.6, 0.8, 0)) * (1 + excess)


ODD = {  # legal enough for other programs: what is done to the header of a file with sform and qform
    "quaternion 2e-7": lambda header: (rounded_quaternion(header, 2e-7), header.__setitem__("sform_code", 0)),
    "quaternion 5e-6": lambda header: (rounded_quaternion(header, 5e-6), header.__setitem__("sform_code", 0)),
    "nonsense in the other form": lambda header: rounded_quaternion(header, 3.0),
    "empty sform": lambda header: [header.__setitem__(f"srow_{axis}", 0) for axis in "xyz"],
    "sform of NaN": lambda header: [header.__setitem__(f"srow_{axis}", np.nan) for axis in "xyz"],
    "offset 416": lambda header: header.__setitem__("vox_offset", 416),
    "no slope": lambda header: (header.__setitem__("scl_slope", 0), header.__setitem__("scl_inter", np.nan)),
    "slope of NaN": lambda header: header.__setitem__("scl_slope", np.nan),
    "text": lambda header: [header.__setitem__(name, b"\xff\xfe") for name in ("descrip", "aux_file", "intent_name")],
    "more axes of length 1": lambda header: header.__setitem__("dim", [7, 12, 13, 14, 1, 1, 1, 1]),
    "one axis too many": lambda header: header.__setitem__("dim", [4, 12, 13, 14, 1, 0, 0, 0]),
    "sizes behind the last axis": lambda header: header.__setitem__("dim", [3, 12, 13, 14, 0, -1, 99, 0]),
    **{f"{name} {value}": lambda header, name=name, value=value: header.__setitem__(name, value) for name, value in (
        *(("xyzt_units", code) for code in (0, 4, 5, 10, 18, 26, 34, 255)),
        *((form, code) for form in ("sform_code", "qform_code") for code in (2, 3, 4, 5, 77)),
        *(("intent_code", code) for code in (0, 3, 1001, 1011, 9999)), ("slice_code", 99), ("slice_end", -5),
        ("dim_info", 255), ("cal_max", np.inf), ("cal_min", np.nan), ("toffset", -1e9), ("slice_duration", np.nan),
        ("glmax", 2**31 - 1), ("extents", 16384), ("session_error", -1), ("regular", b"x"), ("data_type", b"JaneDoe"),
        ("bitpix", 0), ("intent_p1", np.nan), ("pixdim", [1, 2, 3, 4, np.nan, -1, 0, 9]), ("slice_start", 999))}}


@pytest.mark.parametrize("oddity", ODD)
def test_what_other_programs_read_is_read_and_written(tmp_path, oddity):
    path, voxels, affine = tmp_path / "x.nii", ball(12, 13, 14), from_matvec(np.diag([-2.0, -3, 4]), [9, 8, -7])
    image = nib.Nifti1Image(voxels, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    header = image.header.copy()
    header["vox_offset"] = 352
    if "quaternion" in oddity:
        affine = from_matvec(np.array([[-.28, .96, 0], [.96, .28, 0], [0, 0, -1]]) * [2, 3, 4], [9, 8, -7])
    ODD[oddity](header)
    path.write_bytes(header.binaryblock + bytes(int(header["vox_offset"]) - 348) + voxels.tobytes("F"))
    scan = read_volume(path)
    flip = inv_ornt_aff(nib.io_orientation(affine), voxels.shape)
    np.testing.assert_allclose(scan.affine, affine @ flip, atol=1e-3)
    write_volume(tmp_path / "out.nii", scan.voxels, scan.affine, path)
    written = nib.load(tmp_path / "out.nii")
    np.testing.assert_allclose(written.affine, affine, atol=1e-3)
    np.testing.assert_allclose(written.get_fdata(), voxels, rtol=1e-6)


@pytest.mark.parametrize("kind", ["<u1", "<i1", "<i2", ">i2", "<u2", "<i4", ">i4", "<u4", "<f4", ">f4", "<f8", ">f8",
                                  "<i8", "<u8"])
@pytest.mark.parametrize("make", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_type_of_voxel_and_order_of_bytes(tmp_path, make, kind):
    voxels = np.arange(12 * 13 * 14).reshape(12, 13, 14).astype(kind)
    header = make.header_class(endianness=">" if kind.startswith(">") else "<")
    header.set_data_dtype(np.dtype(kind))
    header.set_slope_inter(2, -3)
    image = make(voxels, AFFINE, header)
    image.header.set_slope_inter(1, 0)
    image.to_filename(tmp_path / "x.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "x.nii").voxels, voxels.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(path.name for path in Path(data_path).glob("*.nii*")))
def test_nibabels_own_files(name):
    path = Path(data_path, name)
    if "dconn" in name:  # a matrix
        refused(path, "has size 1x1x1x1x10x10; use a 3-D or 4-D image")
        return
    scan, expected = read_volume(path, "first"), nib.load(path)
    first = nib.as_closest_canonical(expected.slicer[..., 0] if expected.ndim == 4 else expected)
    voxels = first.get_fdata()
    np.testing.assert_allclose(scan.voxels, np.nan_to_num(voxels, nan=np.nanmin(voxels)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scan.affine, first.affine, atol=1e-4)


@pytest.mark.parametrize("codes", ["LAS", "RPS", "RAI", "SAR"])
def test_two_forms_that_mirror_each_other(tmp_path, codes):
    image = turned(nib.Nifti1Image(ball(12, 12, 12), AFFINE), codes)
    said = f"its header gives two orientations: sform RAS and qform {codes}"
    for form, conflict in ((image.affine, []), (AFFINE, [said])):
        image.set_qform(image.affine, 1)
        image.set_sform(form, 2)
        nib.save(image, tmp_path / "x.nii")
        assert [what for what, _ in read_volume(tmp_path / "x.nii").doubts] == conflict


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_free_text_of_a_header_never_reaches_an_output(tmp_path, kind):
    image = kind(ball(12, 12, 12), AFFINE)
    for field in ("descrip", "aux_file", "intent_name", *(["db_name"] if kind is nib.Nifti1Image else [])):
        image.header[field] = b"Jane Doe 1956"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, tmp_path / "x.nii")
    write_volume(tmp_path / "out.nii", ball(12, 12, 12), AFFINE, tmp_path / "x.nii")
    assert b"Jane" in (tmp_path / "x.nii").read_bytes() and b"Jane" not in (tmp_path / "out.nii").read_bytes()
