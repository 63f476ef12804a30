"""From file to volume and back: reading, geometry, intensities. The D rows of the list of faults bear their ids."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to
from nibabel.testing import data_path

from data.cache import Reading
from data.grids import onto_grid, pad_crop, resample
from data.intensity import INTENSITY, brain_region, normalise, scale, to_units
from data.problems import VolumeError
from data.volumes import REDUCTIONS, read_volume, write_volume
from opt import small
from tests.conftest import AFFINE, LGG, ROOT, TRACTOR, ball, decoded, needs_shared, save, turned

REAL = Path(data_path)


def with_header(path: Path, offset: int, content: bytes) -> Path:
    """Overwrite bytes of the header of an unpacked NIfTI file."""
    whole = bytearray(path.read_bytes())
    whole[offset:offset + len(content)] = content
    path.write_bytes(whole)
    return path


# ---- D1 to D6: what is in the file

@pytest.fixture
def good(tmp_path) -> bytes:
    return save(tmp_path / "good.nii.gz", ball(20, 20, 20)).read_bytes()


@pytest.mark.parametrize("fault, words", [
    ("cut", "cut|end-of-stream"), ("flipped", "cannot be read to its end"), ("empty", "is empty"),
    ("page", "is a web page"), ("lfs", "git lfs pull"), ("text", "not packed by gzip"), ("link", "datalad get"),
    ("folder", "is no file"), ("absent", "no such file"), ("tail", "cannot be read to its end|end-of-stream")])
def test_D1_files_that_are_no_whole_image(tmp_path, good, fault, words):
    path = tmp_path / f"{fault}.nii.gz"
    flipped = bytearray(good)
    flipped[-6] ^= 1  # in the checksum: all of the image can be unpacked
    contents = {"cut": good[:len(good) // 2], "flipped": bytes(flipped), "empty": b"", "text": b"hello" * 100,
                "page": b"<!DOCTYPE html><html>404</html>", "tail": good[:-3],
                "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"}
    if fault in contents:
        path.write_bytes(contents[fault])
    elif fault == "link":
        path.symlink_to(tmp_path / "annex/key")
    elif fault == "folder":
        path.mkdir()
    with pytest.raises(VolumeError, match=words) as refusal:
        read_volume(path)
    assert f"{fault}.nii.gz" in str(refusal.value)


def test_D1_a_cut_file_opens_well_and_only_its_end_tells(tmp_path, good):
    path = tmp_path / "cut.nii.gz"
    path.write_bytes(good[:-40])
    assert nib.load(path).shape == (20, 20, 20)
    with pytest.raises(VolumeError):
        read_volume(path)
    plain = save(tmp_path / "plain.nii", ball(20, 20, 20))
    plain.write_bytes(plain.read_bytes()[:-1])
    with pytest.raises(VolumeError, match="cut off: its header asks for 32352 bytes, the file has 32351"):
        read_volume(plain)


@pytest.mark.parametrize("damage", range(40))
def test_D1_one_flipped_bit_anywhere_is_found_or_harmless(tmp_path, good, damage):
    place = np.random.default_rng(damage).integers(18, len(good))  # behind the header of gzip, which has no checksum
    content = bytearray(good)
    content[place] ^= 1 << (damage % 8)
    path = tmp_path / "x.nii.gz"
    path.write_bytes(content)
    with pytest.raises(VolumeError, match="x.nii.gz"):
        read_volume(path)


@pytest.mark.parametrize("dim, words", [
    ((3, 30000, 30000, 30000), "30000x30000x30000"), ((3, 20, 0, 20), "size 20x0x20"), ((3, -20, 20, 20), "-20"),
    ((3, 800, 800, 800), "too large"), ((0, 20, 20, 20), "size unknown"), ((9, 20, 20, 20), "size unknown|cannot"),
    ((4, 500, 500, 500, 20000), "cut off"), ((3, 400, 400, 400), "cut off")])
def test_D2_a_wrong_header_is_refused_before_voxels_are_read(tmp_path, dim, words):
    path = save(tmp_path / "x.nii", ball(20, 20, 20))
    with_header(path, 40, struct.pack(f"<{len(dim)}h", *dim))
    for each in (path, tmp_path / "packed.nii.gz"):
        if each != path:
            each.write_bytes(gzip.compress(path.read_bytes()))
        with pytest.raises(VolumeError, match=words):
            read_volume(each)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_D2_a_gzip_bomb_takes_less_than_a_gigabyte(tmp_path):
    """Header and 3 GB of zeros in 3 MB: once announced by the header, once hidden behind a small image."""
    bombs = []
    for name, size in (("announced", (1500, 1000, 1000)), ("hidden", (20, 20, 20))):
        plain = save(tmp_path / "x.nii", np.zeros((20, 20, 20), np.int16))
        with_header(plain, 42, struct.pack("<3h", *size))
        block = gzip.compress(bytes(2**26), compresslevel=1)
        bombs.append(tmp_path / f"{name}.nii.gz")
        bombs[-1].write_bytes(gzip.compress(plain.read_bytes()) + block * 46)
    told = subprocess.run(
        [sys.executable, "-c", "import sys, pathlib\nfrom data.volumes import read_volume, VolumeError\n"
         "for name in sys.argv[1:]:\n    try:\n        read_volume(pathlib.Path(name))\n"
         "    except VolumeError as error:\n        print(error)\n"
         "status = pathlib.Path('/proc/self/status')\n"
         "print(*[line for line in status.read_text().splitlines() if line.startswith('VmHWM')])", *map(str, bombs)],
        cwd=ROOT, capture_output=True, text=True, timeout=60)
    announced, hidden, peak = told.stdout.splitlines()  # VmHWM: the largest size in memory, kB
    assert "too large" in announced and "goes on after" in hidden and "fetch or convert" in hidden
    assert int(peak.split()[1]) < 1e6


def test_D2_no_header_extension_fills_the_memory(tmp_path):
    path = save(tmp_path / "x.nii", ball(20, 20, 20))
    with_header(path, 108, struct.pack("<f", 3e9))  # vox_offset
    with pytest.raises(VolumeError, match="its voxels start at byte 3000000000"):
        read_volume(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_D3_voxels_that_are_no_numbers(tmp_path, bad):
    voxels = ball(12, 13, 14)
    for count in (1, voxels.size // 100):
        voxels.ravel()[:count] = bad
        path = save(tmp_path / f"{count}.nii", voxels)
        scan = read_volume(path)
        assert scan.repaired == count and np.isfinite(scan.voxels).all()
        assert scan.voxels[0, 0, 0] == scan.voxels.min() == np.nanmin(voxels[np.isfinite(voxels)])
        trained, facts = decoded(path, Reading("fmri", (12, 13, 14)), tmp_path / "cache")
        assert np.isfinite(trained).all() and np.abs(trained).max() <= 1 and facts["repaired"] == count
    with pytest.raises(VolumeError, match="no finite voxel"):
        read_volume(save(tmp_path / "all.nii", np.full_like(voxels, bad)))


@pytest.mark.parametrize("how", INTENSITY)
def test_D4_a_constant_volume(tmp_path, how):
    constant = save(tmp_path / "constant.nii", np.full((5, 5, 5), 7.0))
    with pytest.raises(VolumeError, match="constant.nii: every voxel is 7"):
        normalise(read_volume(constant).voxels, constant, how)
    nearly = np.zeros((20, 20, 20), np.float32)
    nearly[0, 0, 0] = 5
    volume, low, high = normalise(nearly, constant, how)
    assert (low, high) == (0, 5) and np.isfinite(volume).all()


def test_D5_a_series_is_reduced_by_name(tmp_path):
    voxels = ball(5, 4, 3, 6)
    path = save(tmp_path / "x_dwi.nii.gz", voxels)
    (tmp_path / "x_dwi.bval").write_text("0 1000 1000 5 2000 1000\n")
    expected = {"mean": voxels.mean(-1), "std": voxels.std(-1), "first": voxels[..., 0],
                "b0": voxels[..., [0, 3]].mean(-1), "shell": voxels[..., [1, 2, 4, 5]].mean(-1)}
    assert set(expected) == set(REDUCTIONS)
    for name, volume in expected.items():
        scan = read_volume(path, name)
        np.testing.assert_allclose(scan.voxels, volume, rtol=1e-5)
        assert scan.time_points == 6
    (tmp_path / "x_dwi.bval").write_text("0 1000")
    with pytest.raises(VolumeError, match="2 b-values, the image 6"):
        read_volume(path, "b0")
    (tmp_path / "x_dwi.bval").write_text("zero")
    with pytest.raises(VolumeError, match="is not a list of b-values"):
        read_volume(path, "b0")
    (tmp_path / "x_dwi.bval").write_text("0 0 0 0 0 0")
    with pytest.raises(VolumeError, match="has no shell volume"):
        read_volume(path, "shell")
    (tmp_path / "x_dwi.bval").unlink()
    with pytest.raises(VolumeError, match="x_dwi.bval is not beside"):
        read_volume(path, "b0")
    assert read_volume(save(tmp_path / "one.nii", voxels[..., :1]), "b0").time_points == 1


def test_D5_real_series_of_nibabel():
    path = REAL / "example4d.nii.gz"
    raw = turned(nib.load(path), "RAS").get_fdata()
    np.testing.assert_allclose(read_volume(path, "mean").voxels, raw.mean(-1), rtol=1e-4)
    np.testing.assert_allclose(read_volume(path, "first").voxels, raw[..., 0], rtol=1e-4)
    np.testing.assert_allclose(read_volume(path, "std").voxels, raw.std(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(5, 5), (4, 4, 4, 2, 3), (7,)])
def test_D6_neither_3d_nor_4d(tmp_path, size):
    path = save(tmp_path / "x.nii", ball(*size))
    with pytest.raises(VolumeError, match=f"has size {'x'.join(map(str, size))}; a 3-D or 4-D image is needed"):
        read_volume(path)


def test_D6_another_size_is_refused_or_brought_to_the_one_asked_for(tmp_path):
    path = save(tmp_path / "x.nii", ball(20, 12, 13))
    with pytest.raises(VolumeError, match=r"size 20x12x13, but opt.image_size asks 14x14x14 of t1.*--image_size "
                                          r't1=20x12x13.*opt.resize = "resample" or "pad_crop"'):
        decoded(path, Reading("t1", (14, 14, 14)), tmp_path)
    for how in ("resample", "pad_crop"):
        volume, facts = decoded(path, Reading("t1", (14, 14, 14), resize=how), tmp_path)
        assert volume.shape == (14, 14, 14)
        assert not np.allclose(facts["affine"], AFFINE)


def test_unusable_kinds_of_voxels(tmp_path):
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name, voxels in (("complex", ball(4, 4, 4).astype(np.complex64)), ("colours", colours)):
        with pytest.raises(VolumeError, match=f"its voxels are {name}"):
            read_volume(save(tmp_path / f"{name}.nii", voxels))
    nib.save(nib.MGHImage(ball(4, 4, 4), AFFINE), tmp_path / "x.mgz")
    with pytest.raises(VolumeError, match="x.mgz: .*convert"):
        read_volume(tmp_path / "x.mgz")
    nib.save(nib.Nifti2Image(ball(4, 4, 4), AFFINE), tmp_path / "two.nii")
    assert read_volume(tmp_path / "two.nii").voxels.shape == (4, 4, 4)
    nib.save(nib.Nifti1Pair(ball(4, 4, 4), AFFINE), tmp_path / "pair.img")
    with pytest.raises(VolumeError, match="pair.hdr: is half of a pair"):
        read_volume(tmp_path / "pair.hdr")
    (tmp_path / "UPPER.NII.GZ").write_bytes(gzip.compress((tmp_path / "two.nii").read_bytes()))
    assert read_volume(tmp_path / "UPPER.NII.GZ").voxels.shape == (4, 4, 4)
    (tmp_path / "packed.nii").write_bytes((tmp_path / "UPPER.NII.GZ").read_bytes())
    with pytest.raises(VolumeError, match="packed.nii: is packed by gzip, against its name"):
        read_volume(tmp_path / "packed.nii")


@pytest.mark.parametrize("offset, content, words", [
    (108, struct.pack("<f", 0), "inside its header"), (80, bytes(12), "voxel size is 0"),
    (123, b"\x03", "counts in microns"), (70, struct.pack("<h", 4321), "cannot be read as NIfTI")])
def test_headers_that_would_be_read_wrongly(tmp_path, offset, content, words):
    path = save(tmp_path / "x.nii", ball(4, 4, 4))
    with_header(path, 252, struct.pack("<2h", 1, 0))
    with_header(path, offset, content)
    with pytest.raises(VolumeError, match=words):
        read_volume(path)


def test_an_affine_far_away_is_refused(tmp_path):
    for far in (1e9, 1e200):
        affine = AFFINE.copy()
        affine[0, 3] = far
        nib.save(nib.Nifti2Image(ball(4, 4, 4), affine), tmp_path / "x.nii")
        with pytest.raises(VolumeError, match="x.nii: "):
            read_volume(tmp_path / "x.nii")


def test_paths_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(VolumeError, match="too long"):
        read_volume(tmp_path / ("x" * 400))
    path = save(tmp_path / "x.nii", ball(4, 4, 4))

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data.volumes._opened", denied)  # the tests may run as root, whom nothing is denied
    with pytest.raises(VolumeError, match="x.nii: may not be read"):
        read_volume(path)


# ---- D9 to D11: geometry

@pytest.mark.parametrize("codes", ["LAS", "LPS", "PSR", "RAS"])
def test_D9_orientations_give_the_same_volume_and_go_back(tmp_path, codes):
    original = nib.Nifti1Image(ball(5, 6, 7), AFFINE)
    path = tmp_path / f"{codes}.nii.gz"
    nib.save(turned(original, codes), path)
    scan = read_volume(path)
    np.testing.assert_allclose(scan.voxels, original.get_fdata(), atol=1e-5)
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-5)
    assert scan.orientation == codes
    write_volume(tmp_path / "out.nii.gz", scan.voxels, scan.affine, path)
    written, reference = nib.load(tmp_path / "out.nii.gz"), nib.load(path)
    assert nib.aff2axcodes(written.affine) == tuple(codes)
    np.testing.assert_allclose(written.get_fdata(), reference.get_fdata(), atol=1e-5)


@pytest.mark.parametrize("codes", ["LAS", "PSR"])
def test_D9_real_anatomy_of_nibabel(tmp_path, codes):
    first = read_volume(REAL / "anatomical.nii")
    nib.save(turned(nib.load(REAL / "anatomical.nii"), codes), tmp_path / "turned.nii")
    second = read_volume(tmp_path / "turned.nii")
    np.testing.assert_allclose(second.voxels, first.voxels, atol=1e-5)
    np.testing.assert_allclose(second.affine, first.affine, atol=1e-4)


def test_D10_an_affine_that_is_none(tmp_path):
    for name, row in (("zero", bytes(48)), ("nan", struct.pack("<12f", *[float("nan")] * 12))):
        path = with_header(save(tmp_path / f"{name}.nii", ball(4, 4, 4)), 280, row)  # srow_x, srow_y, srow_z
        with_header(path, 252, struct.pack("<2h", 0, 2))  # qform_code, sform_code
        with pytest.raises(VolumeError, match=f"{name}.nii: its affine is no invertible matrix"):
            read_volume(path)
    path = with_header(save(tmp_path / "none.nii", ball(4, 4, 4)), 252, struct.pack("<2h", 0, 0))
    assert read_volume(path).orientation == "?"


@pytest.mark.parametrize("how", ["none", "resample", "pad_crop"])
@pytest.mark.parametrize("real", [False, True])
def test_D11_what_is_written_has_the_frame_of_its_reference(tmp_path, how, real):
    path = REAL / "anatomical.nii"
    if not real:
        image = turned(nib.Nifti1Image(ball(20, 22, 24), AFFINE), "PSR")
        image.set_sform(image.affine, 4)
        turn = image.affine.copy()
        turn[:3, 3] += 7  # the two forms of a header need not agree: each is kept
        image.set_qform(turn, 1)
        image.header.set_xyzt_units("mm", "sec")
        path = tmp_path / "x.nii.gz"
        nib.save(image, path)
    scan = read_volume(path)
    size = scan.voxels.shape if how == "none" else (24, 20, 22)
    volume, facts = decoded(path, Reading("t1", size, resize=how), tmp_path / "cache")
    write_volume(tmp_path / "out.nii.gz", np.asarray(volume), np.array(facts["affine"]), path)
    written, reference = nib.load(tmp_path / "out.nii.gz"), nib.load(path)
    assert written.shape == reference.shape
    np.testing.assert_allclose(written.affine, reference.affine, atol=1e-5)
    np.testing.assert_allclose(written.header.get_zooms(), reference.header.get_zooms()[:3], rtol=1e-6)
    for form in ("sform", "qform"):
        (mine, code), (theirs, its_code) = (getattr(each.header, f"get_{form}")(coded=True)
                                            for each in (written, reference))
        assert code == its_code and (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert written.header.get_xyzt_units() == reference.header.get_xyzt_units()
    # it overlays its source: the same voxels are bright, where it was not cut away
    expected, there = scale(reference.get_fdata(), facts["low"], facts["high"]), written.get_fdata()
    kept = there > there.min()
    assert np.corrcoef(expected[kept], there[kept])[0, 1] > (0.6 if how == "resample" else 0.999)
    assert kept.sum() > 0.9 * np.prod(np.minimum(size, scan.voxels.shape)) * (1 if real else 0.9)


def test_resampling_keeps_the_field_of_view(tmp_path):
    x = np.linspace(-1, 1, 24)
    smooth = np.exp(-(x[:, None, None] ** 2 + x[None, :20, None] ** 2 + x[None, None, :16] ** 2)).astype(np.float32)
    path = save(tmp_path / "native.nii", smooth)
    small_one, affine = resample(smooth, AFFINE, (12, 13, 11))
    assert small_one.shape == (12, 13, 11)
    corner = np.array([-0.5, -0.5, -0.5, 1])
    np.testing.assert_allclose(affine @ corner, AFFINE @ corner)
    np.testing.assert_allclose((affine @ [11.5, 12.5, 10.5, 1]), AFFINE @ [23.5, 19.5, 15.5, 1])
    write_volume(tmp_path / "back.nii", small_one, affine, path)
    assert np.abs(nib.load(tmp_path / "back.nii").get_fdata() - smooth).max() < 0.1  # up to its edges


@pytest.mark.parametrize("size", [(11, 9, 8), (4, 5, 5), (7, 6, 5), (4, 9, 5)])
def test_padding_and_cutting_keep_every_voxel_in_its_place(size):
    volume = ball(7, 6, 5)
    made, affine = pad_crop(volume, AFFINE, size)
    assert made.shape == size
    theirs = resample_from_to(nib.Nifti1Image(volume, AFFINE), (size, affine), order=0, cval=volume.min())
    np.testing.assert_array_equal(made, theirs.get_fdata().astype(np.float32))
    there = onto_grid(made, affine, volume.shape, AFFINE)
    kept = onto_grid(np.ones(size, np.float32), affine, volume.shape, AFFINE)
    assert kept.min() == 1  # the minimum of ones
    inside = np.isin(there, volume)
    assert inside.sum() >= np.prod(np.minimum(size, volume.shape))
    np.testing.assert_allclose(there[inside & (there != made.min())], volume[inside & (there != made.min())])


# ---- intensities

def test_intensities_there_and_back():
    volume, low, high = normalise(np.linspace(-5, 20, 5001).reshape(3, 1667, 1), Path("x"))
    assert volume.min() == -1 and volume.max() == 1
    assert (low, high) == pytest.approx((-4.975, 19.975))
    np.testing.assert_allclose(to_units(scale(np.array([3.0]), low, high), low, high), [3.0], rtol=1e-5)


def test_which_intensities_become_the_ends():
    head = np.zeros((20, 20, 20))
    head[5:15, 5:15, 5:15] = np.linspace(100, 200, 1000).reshape(10, 10, 10)
    head[0, 0, 0] = 5000  # an outlier
    ends = {how: normalise(head, Path("x"), how)[1:] for how in INTENSITY}
    assert ends["minmax"] == (0, 5000)
    assert ends["percentile"][0] == 0 and 190 < ends["percentile"][1] < 201
    brain = head.copy()
    brain[0, 0, 0] = 0
    ends = {how: normalise(brain, Path("x"), how)[1:] for how in INTENSITY}
    assert ends["brain_minmax"] == (100, 200) and ends["brain_percentile"] == pytest.approx((100.1, 199.9))


def test_brain_region_is_one_part_without_holes():
    volume = np.full((20, 20, 20), -1.0)
    volume[4:16, 4:16, 4:16], volume[9:11, 9:11, 9:11], volume[0, 0, 0] = 0.5, -1, 1
    region = brain_region(volume)
    assert region.sum() == 12**3 and not region[0, 0, 0]


def test_the_choices_of_opt_are_those_of_the_reader():
    for name, choices in (("reduce", REDUCTIONS), ("intensity", INTENSITY)):
        for choice in choices:
            settings = small()
            setattr(settings, name, choice)
            settings.validate()


@needs_shared
def test_real_volumes():
    assert read_volume(LGG.parent / "sub-001_flair.nii.gz").voxels.shape == (64, 64, 32)
    series = read_volume(TRACTOR / "sub-01/func/sub-01_task-rest_bold.nii.gz", "std")
    assert series.time_points == 15 and series.orientation == "LAS" and series.voxels.min() >= 0
