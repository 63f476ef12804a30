"""Read a NIfTI file as one volume, and write volumes as NIfTI. Volumes are float32 (X, Y, Z) in RAS order.

Headers are not trusted: each is checked against the size of its file before any voxel is read. Every file is read to
its end, because a truncated or damaged .nii.gz opens without an error and shows its shape.
"""

import contextlib
import gzip
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from data.grids import onto_grid
from data.problems import VolumeError
from utils.files import open_regular, read_text, replace_file
from utils.stop import interruptible

B0_LIMIT = 50.0  # s/mm^2: time points with b-values up to this are b0
MAX_VOXELS = 2**27  # of one time point (512 x 512 x 512): a larger one does not fit this method or the memory
MAX_OTHER_BYTES = 2**24  # before the voxels, header extensions included, or after them
CHUNK = 2**24  # bytes that are read between two looks at a stop request
MAX_GZIP_RATIO = 1100  # deflate reaches 1032
MAX_COORDINATE = 1e5  # mm
TINY = 1e-9  # mm^3: the volume of a voxel
LONG_QUATERNION = 1e-4  # by how much the length of a quaternion may be above 1
LARGEST = 1e15  # a larger voxel counts as infinite: sums of squares of such numbers do not fit into float32
LARGEST_IN_MS = 10  # b-values of up to this in a whole file are probably in ms/um^2
MAX_B_VALUES = 2**20  # bytes of a .bval file
FREE_TEXT = {"descrip", "aux_file", "intent_name", "db_name"}
NOT_MM = {1: "metres", 3: "micrometres"}
VOXEL_TYPES = {code for code in nib.nifti1.data_type_codes.value_set("code")
               if nib.nifti1.data_type_codes.dtype[code].itemsize}  # that can be read here
REPLACE = "download or convert the file again"
FETCH = "fetch the image with datalad get or git annex get"
CONVERT = "convert it to .nii.gz"
FORMATS = (  # first byte, bytes, what, remedy
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the image with git lfs pull"),
    (0, b"/annex/objects/", "a git-annex pointer", FETCH), (0, b"../.git/annex/", "a git-annex pointer", FETCH),
    (0, b".git/annex/", "a git-annex pointer", FETCH),
    (0, b"<", "a web page or XML", REPLACE), (0, b"{", "JSON", "give the image beside it"),
    (0, b"\x89PNG", "a PNG picture", REPLACE), (0, b"\xff\xd8\xff", "a JPEG picture", REPLACE),
    (0, b"%PDF", "a PDF", REPLACE), (128, b"DICM", "DICOM", "convert it to .nii.gz with dcm2niix"),
    (0, b"\x89HDF", "HDF5 (or MINC)", CONVERT), (0, b"CDF", "NetCDF (or MINC)", CONVERT), (0, b"NRRD", "NRRD", CONVERT),
    (0, b"MATLAB", "a MATLAB file", CONVERT), (0, b"PK\x03\x04", "a zip archive", "unpack it"),
    (0, b"BZh", "packed by bzip2", "unpack it, and pack it by gzip"),
    (0, b"\xfd7zXZ", "packed by xz", "unpack it, and pack it by gzip"),
    (0, b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it, and pack it by gzip"),
    (257, b"ustar", "a tar archive", "unpack it"))
UNREADABLE = (OSError, EOFError, ValueError, KeyError, OverflowError, zlib.error, nib.spatialimages.HeaderDataError,
              nib.orientations.OrientationError)


@dataclass(frozen=True)
class Scan:
    """The content of a file, in RAS order."""

    voxels: np.ndarray  # (X, Y, Z) float32
    affine: np.ndarray  # (4, 4), voxel -> mm
    orientation: str = "RAS"  # axis codes of the file; "?" if its header has neither sform nor qform
    time_points: int = 1
    doubts: tuple[tuple[str, str], ...] = ()  # what may be wrong with the file, and the remedy


def read_volume(path: Path, reduce: str = "mean") -> Scan:
    """Read a 3-D or 4-D NIfTI file, in one pass to its end.

    reduce: what a 4-D file becomes: "mean" or "std" over time, "first" time point, or the mean over the time points
    with b <= 50 s/mm^2 ("b0") or above ("shell") in the .bval file next to the image. Only one of them is in memory at
    a time. Voxels that are NaN, infinite or beyond LARGEST become the smallest finite value and are counted. Raises
    VolumeError, and Interrupted once a stop is requested.
    """
    with _opened(path) as (stream, image, end):
        orientation = nib.io_orientation(image.affine)
        times, doubts = _time_points(path, math.prod(image.shape[3:]), reduce)
        voxels = _read_voxels(image, times, reduce)
        for position in interruptible((*range(stream.tell(), end, CHUNK), end)):
            position = stream.seek(position)  # gzip reads up to there, and checks its CRC at the end
        trailing = stream.read(MAX_OTHER_BYTES + 1)
        _refuse(path, (position < end, f"is truncated: its header announces {end} bytes", REPLACE),
                (len(trailing) > MAX_OTHER_BYTES, f"continues after the {end} bytes of its image", REPLACE))
    invalid = ~(np.abs(voxels) < LARGEST)  # NaN, too
    _refuse(path, (invalid.all(), f"has no voxel that is finite and below {LARGEST:g}",
                   "repair the file, or exclude the subject (opt.exclude)"))
    if invalid.any():
        voxels = np.where(invalid, voxels[~invalid].min(), voxels)
        doubts.append((f"{invalid.sum()} voxels were NaN, infinite or beyond {LARGEST:g}",
                       "they became the smallest finite value; look at the volume"))
    codes = {}  # the first one holds; the other one may be nonsense
    for name in ("sform", "qform"):
        with contextlib.suppress(ValueError):
            if image.header[f"{name}_code"]:
                codes[name] = "".join(code or "?" for code in nib.aff2axcodes(getattr(image.header, f"get_{name}")()))
    if not codes:
        doubts.append(("its header gives no orientation",
                       "NIfTI's default is used; check that left and right are correct"))
    elif len({*codes.values()}) > 1:
        found = " and ".join(f"{name} {code}" for name, code in codes.items())
        doubts.append((f"its header gives two orientations: {found}",
                       "the sform is used; check that left and right are correct"))
    return Scan(np.ascontiguousarray(nib.apply_orientation(voxels, orientation)), ras_grid(image)[0],
                next(iter(codes.values()), "?"), math.prod(image.shape[3:]), tuple(doubts))


def read_header(path: Path) -> nib.Nifti1Header:
    """A file's header, mended as `_affine` says. Raises VolumeError."""
    with _opened(path) as (_, image, _):
        return image.header


def read_grid(path: Path) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine (4, 4) and size of a file's volumes in RAS order, from its header alone. Raises VolumeError."""
    with _opened(path) as (_, image, _):
        return ras_grid(image)


def ras_grid(image: nib.Nifti1Image) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine (4, 4) and size of an image's volumes in RAS order."""
    orientation = nib.io_orientation(image.affine)
    size = tuple(image.shape[axis] for axis in np.argsort(orientation[:, 0]))
    return image.affine @ inv_ornt_aff(orientation, image.shape[:3]), size


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, nib.Nifti1Image, int]]:
    """As `_open_image`; whatever goes wrong with a file is a VolumeError."""
    try:
        with open_regular(path) as file:
            yield _open_image(path, file)
    except VolumeError:
        raise
    except FileNotFoundError as error:
        if path.is_symlink():
            raise VolumeError(path, f"is a link to {os.readlink(path)}, which is not there", FETCH) from error
        raise VolumeError(path, "no such file", "correct its path") from error
    except UNREADABLE as error:
        remedy = "check its permissions" if isinstance(error, PermissionError) else REPLACE
        cause = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise VolumeError(path, f"cannot be read ({cause})", remedy) from error


def _refuse(path: Path, *checks: tuple[bool, str, str]) -> None:
    """Raise a VolumeError for the first of the checks (is it wrong, what, remedy) that is wrong."""
    for wrong, what, remedy in checks:
        if wrong:
            raise VolumeError(path, what, remedy)


def _open_image(path: Path, file: BinaryIO) -> tuple[BinaryIO, nib.Nifti1Image, int]:
    """Check name, first bytes and header; returns the uncompressed stream, its image, and the end of the voxels."""
    start, name = file.read(540), path.name.lower()
    gzipped, file_size = start.startswith(b"\x1f\x8b"), file.seek(0, 2)
    _refuse(path, (not start, "is empty", REPLACE), *_other_formats(start),
            (gzipped != name.endswith(".gz"), f"is {'' if gzipped else 'not '}compressed by gzip, unlike its name says",
             "rename it if it is NIfTI, otherwise convert it to .nii.gz"))
    file.seek(0)
    stream = gzip.GzipFile(fileobj=file) if gzipped else file
    start = stream.read(540)
    _refuse(path, *_other_formats(start))
    classes = [c for c in (nib.Nifti1Image, nib.Nifti2Image) if c.header_class.may_contain_header(start)]
    _refuse(path, (not (classes and name.endswith((".nii", ".nii.gz"))), "is not NIfTI", "convert it to .nii.gz"))
    image_class, = classes
    header_class = image_class.header_class
    header = header_class(start[:header_class.template_dtype.itemsize], check=False)
    code, offset, unit = int(header["datatype"]), float(header["vox_offset"]), int(header["xyzt_units"]) & 7
    _refuse(path, (code not in VOXEL_TYPES, f"its header has datatype = {code}, which is no type of voxels", REPLACE),
            (unit in NOT_MM, f"its header has xyzt_units = {int(header['xyzt_units'])}, {NOT_MM.get(unit)}, not mm",
             "correct xyzt_units, pixdim, sform and qform in its header"))
    voxel = header.get_data_dtype()
    shape = [int(n) for n in header["dim"][1:max(int(header["dim"][0]), 0) + 1]]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    found, end = "x".join(map(str, shape)) or "unknown", offset + math.prod(shape) * voxel.itemsize
    _refuse(path, (voxel.fields or voxel.kind == "c", f"its voxels are {'colours' if voxel.fields else 'complex'}",
                   "convert it to one real number per voxel"),
            (len(shape) not in (3, 4) or min(shape) < 1, f"has size {found}", "use a 3-D or 4-D image"),
            (math.prod(shape[:3]) > MAX_VOXELS, f"has size {found}, which is too large", "resample it first"),
            (not header.single_vox_offset <= offset <= MAX_OTHER_BYTES,
             f"its header places the voxels at byte {offset:.0f}, inside the header or too far behind it", REPLACE),
            (file_size * (MAX_GZIP_RATIO if gzipped else 1) < end,
             f"is truncated: its header announces {end:.0f} bytes, the file has {file_size}", REPLACE))
    affine = _affine(path, header)
    # not memory-mapped: the process would be killed (SIGBUS) if the file shrank meanwhile
    return stream, image_class(nib.arrayproxy.ArrayProxy(stream, header, mmap=False), affine, header), int(end)


def _other_formats(start: bytes) -> list[tuple[bool, str, str]]:
    """Whether a file that starts so is one of FORMATS, for `_refuse`."""
    return [((start if at else start.lstrip()).startswith(magic, at), f"is {what}, not NIfTI", remedy)
            for at, magic, what, remedy in FORMATS]


def _affine(path: Path, header: nib.Nifti1Header) -> np.ndarray:
    """The affine (4, 4) of a header, which is mended where other programs read it all the same. Raises VolumeError."""
    if header["qform_code"] and not is_affine(header.get_sform()):
        header["sform_code"] = 0  # an empty sform: the qform holds
    quaternion = np.array([header[f"quatern_{letter}"] for letter in "bcd"], dtype=np.float64)
    if 1 < (length := np.linalg.norm(quaternion)) < 1 + LONG_QUATERNION:  # rounded
        for letter, value in zip("bcd", quaternion / length):
            header[f"quatern_{letter}"] = value
    _refuse(path, (not (header["sform_code"] or (np.abs(header["pixdim"][1:4]) > 0).all()),  # nibabel would make it 1
                   f"its header has pixdim = {header['pixdim'][1:4].tolist()}", "correct pixdim in its header"),
            (not header["sform_code"] and header["qform_code"] and length >= 1 + LONG_QUATERNION,
             f"its header has quatern_b, c, d = {quaternion.tolist()}, which is no rotation", "correct its qform"))
    header.check_fix()
    affine = header.get_best_affine().astype(np.float64)
    _refuse(path, (not is_affine(affine), f"its affine is not invertible or not in mm: {affine[:3].tolist()}",
                   "correct its sform and qform"))
    return affine


def is_affine(affine: np.ndarray | list) -> bool:
    """Whether a matrix (4, 4) maps voxels to mm."""
    affine = np.array(affine, dtype=np.float64)
    return (bool((np.abs(affine) < MAX_COORDINATE).all()) and affine[3].tolist() == [0, 0, 0, 1]
            and abs(np.linalg.det(affine[:3, :3])) >= TINY)


def _time_points(path: Path, count: int, reduce: str) -> tuple[list[int], list[tuple[str, str]]]:
    """Which of `count` time points opt.reduce takes, and doubts as in Scan. Raises VolumeError."""
    if count == 1 or reduce not in ("b0", "shell"):
        return list(range(1 if reduce == "first" else count)), []
    file, remedy = b_values_file(path), "give one b-value per time point, or set opt.reduce to mean, std or first"
    try:
        values = np.array(read_text(file, MAX_B_VALUES).replace(",", " ").split(), dtype=np.float64)  # s/mm^2
    except (ValueError, OSError) as error:
        raise VolumeError(file, f"cannot be read as b-values ({error})", remedy) from error
    finite, largest = int(np.isfinite(values).sum()), values.max(initial=0)
    times = np.flatnonzero((values > B0_LIMIT) == (reduce == "shell")).tolist()
    _refuse(file, (not len(values) == finite == count, f"has {finite} b-values for {count} time points", remedy),
            (not times, f"has no {reduce} time point, its b-values go up to {largest:g}", "give them in s/mm^2, or set "
             "opt.reduce to mean, std or first"))
    in_ms = 0 < largest <= LARGEST_IN_MS and len({*values.tolist()}) > 1
    return times, int(in_ms) * [(f"the b-values beside it go up to {largest:g} only, so all time points count as b0",
                            "give them in s/mm^2: 1000, not 1")]


def _read_voxels(image: nib.Nifti1Image, times: list[int], reduce: str) -> np.ndarray:
    """Voxels (X, Y, Z), float32, in the order of the file; these time points are reduced to one."""
    points = (np.asarray(image.dataobj[(..., t, 0, 0, 0)[:image.ndim - 2]], dtype=np.float32)
              for t in interruptible(times))
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is counted
        if len(times) == 1:
            return next(points)
        mean = squares = 0.0  # running mean and sum of squared deviations, float64 (Welford 1962)
        for number, point in enumerate(points, start=1):
            deviation = point.astype(np.float64) - mean
            mean = mean + deviation / number
            if reduce == "std":
                squares = squares + deviation * (point - mean)
        return (np.sqrt(squares / len(times)) if reduce == "std" else mean).astype(np.float32)


def b_values_file(path: Path) -> Path:
    """The .bval file of an image."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".bval")


def on_grid(scan: Scan, size: tuple[int, int, int], affine: np.ndarray, outside: float = np.nan) -> np.ndarray:
    """The voxels of a scan on a grid: untouched if it is the scan's own, else interpolated, `outside` its view."""
    if scan.voxels.shape == tuple(size) and np.allclose(scan.affine, affine, atol=1e-4):
        return scan.voxels
    return onto_grid(scan.voxels, scan.affine, size, affine, outside)


def write_volume(path: Path, volume: np.ndarray, affine: np.ndarray, reference: Path) -> None:
    """Write a volume (X, Y, Z), whose RAS affine (4, 4) is given, as NIfTI in the frame of the file `reference`.

    Shape, affine, spacing and codes equal the reference's; a resized volume is interpolated. Raises UserError.
    """
    with _opened(reference) as (_, native, _):
        ras_affine, size = ras_grid(native)
    orientation = nib.io_orientation(native.affine)
    volume = on_grid(Scan(volume, affine), size, ras_affine, volume.min())
    voxels = nib.apply_orientation(np.asarray(volume, np.float32), ornt_transform(axcodes2ornt("RAS"), orientation))
    header = native.header.copy()  # keeps sform, qform, spacing and units
    header.extensions.clear()
    for text in FREE_TEXT & {*header.keys()}:  # may hold names or dates
        header[text] = b""
    header.set_data_dtype(np.float32)
    save_image(path, type(native)(voxels, native.affine, header))


def save_image(path: Path, image: nib.Nifti1Image) -> None:
    """Write a .nii or .nii.gz file; equal images give equal bytes. Raises UserError."""
    content = image.to_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=1, mtime=0)
    replace_file(path, lambda file: file.write(content))
