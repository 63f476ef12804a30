"""One NIfTI file in, one volume out; and back. Volumes are float32 (X, Y, Z) in canonical RAS order.

Nothing in a file is trusted: the header is checked against the file's size before any voxel is read, and every file
is read to its end, because a cut or damaged .nii.gz opens well and shows its shape.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from data.grids import onto_grid
from data.problems import VolumeError
from utils.files import replace_file

SHELL_TOLERANCE = 50.0  # s/mm^2: b-values up to this count as b0
REDUCTIONS = ("mean", "std", "first", "b0", "shell")
MOST_VOXELS = 2**27  # of one time point (512 x 512 x 512): larger ones do not fit this method or the memory
MOST_HEADER = 2**24  # bytes before the voxels
MOST_BEHIND = 2**20  # bytes after the voxels
MOST_DEFLATE = 1100  # no gzip file holds more bytes than this per byte of its own (deflate reaches 1032)
FARTHEST = 1e5  # mm: no voxel of a scan is further from its origin
UNREADABLE = (OSError, EOFError, ValueError, KeyError, OverflowError, zlib.error, nib.filebasedimages.ImageFileError,
              nib.spatialimages.HeaderDataError, nib.orientations.OrientationError)
AGAIN = "fetch or convert the file again"
EXCLUDE = "repair the file, or leave the subject out (opt.exclude)"


@dataclass(frozen=True)
class Scan:
    """A file as it was read, in RAS order."""

    voxels: np.ndarray  # (X, Y, Z) float32
    affine: np.ndarray  # (4, 4), voxel -> mm
    repaired: int = 0  # voxels that were NaN or infinite
    orientation: str = "RAS"  # of the file, "?" where its header has none
    time_points: int = 1


def read_volume(path: Path, reduce: str = "mean") -> Scan:
    """Read a 3-D or 4-D NIfTI file to its end.

    4-D files are reduced by `reduce`: mean, std, first, b0 or shell (mean of the volumes with b <= 50 or b > 50 s/mm^2,
    from the .bval file beside the image), one time point in memory at a time. NaN and infinite voxels become the
    smallest finite value and are counted. Raises VolumeError.
    """
    _check_to_the_end(path, _check_header(path))
    try:
        # kept open: a compressed series is then unpacked once, not from its start for every time point
        image = nib.load(path, keep_file_open=True)
        affine = _affine(path, image)
        count = math.prod(image.shape[3:])
        voxels = reduce_series(_time_points(image), count, reduce, path) if count > 1 else next(_time_points(image))
        orientation, in_ras = nib.io_orientation(affine), nib.as_closest_canonical(_header_only(image)).affine
    except VolumeError:
        raise
    except UNREADABLE as error:
        raise VolumeError(path, f"cannot be read as NIfTI ({_one_line(error)})", AGAIN) from error
    bad = ~np.isfinite(voxels)
    if bad.all():
        raise VolumeError(path, "has no finite voxel", EXCLUDE)
    voxels = np.where(bad, voxels[~bad].min(), voxels).astype(np.float32) if bad.any() else voxels
    known = bool(image.header["sform_code"] or image.header["qform_code"])
    return Scan(np.ascontiguousarray(nib.apply_orientation(voxels, orientation)), in_ras, int(bad.sum()),
                "".join(nib.aff2axcodes(affine)) if known else "?", count)


def _affine(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    """The image's affine (4, 4), voxel -> mm, or a VolumeError where it can be none."""
    affine, units = np.asarray(image.affine, dtype=np.float64), image.header.get_xyzt_units()[0]
    if not np.abs(affine).max() < FARTHEST or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise VolumeError(path, "its affine is no invertible matrix of millimetres", "repair the header (sform, qform)")
    if units in ("meter", "micron"):
        raise VolumeError(path, f"its header counts in {units}s", "convert it to millimetres")
    return affine


def _packed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path) if _packed(path) else open(path, "rb")


def _not_an_image(path: Path) -> VolumeError | None:
    """What a file is instead of an image, as far as its name and first bytes tell."""
    if path.is_symlink() and not path.exists():
        return VolumeError(path, "is a link to a file that is not here", "fetch it (for example datalad get)")
    if not path.is_file():
        path.stat()  # a path that cannot be looked at says so
        return VolumeError(path, "is no file", "correct the path in the manifest")
    if path.suffix.lower() in (".hdr", ".img"):
        return VolumeError(path, "is half of a pair of header and voxels", "convert the pair to one .nii.gz")
    with open(path, "rb") as file:
        raw = file.read(64)
    if not raw:
        return VolumeError(path, "is empty", AGAIN)
    if raw.startswith(b"version https://git-lfs"):
        return VolumeError(path, "is a Git LFS pointer, not the image itself", "fetch it with git lfs pull")
    if raw.lstrip()[:1] == b"<":
        return VolumeError(path, "is a web page or XML, not an image", AGAIN)
    if raw.startswith(b"\x1f\x8b") != _packed(path):
        return VolumeError(path, f"is {'not ' * _packed(path)}packed by gzip, against its name",
                           "rename it if it is NIfTI, else convert it to .nii.gz")
    return None


def _check_header(path: Path) -> int:
    """Refuse, from its first bytes, a file that is no 3-D or 4-D NIfTI image; returns the bytes that it must hold."""
    try:
        if refusal := _not_an_image(path):
            raise refusal
        with _opened(path) as file:
            start = file.read(540)
        kind = next((each for each in (nib.Nifti1Header, nib.Nifti2Header) if each.may_contain_header(start)), None)
        if kind is None:
            raise VolumeError(path, "cannot be read as NIfTI (its first bytes are another format's)",
                              "convert it to .nii.gz")
        header = kind(start[:kind.template_dtype.itemsize], check=False)
        voxel, ahead = header.get_data_dtype(), float(header["vox_offset"])
    except FileNotFoundError:
        raise VolumeError(path, "there is no such file", "correct the path in the manifest") from None
    except PermissionError:
        raise VolumeError(path, "may not be read (permission denied)", "ask for permission") from None
    except UNREADABLE as error:
        if isinstance(error, VolumeError):
            raise
        raise VolumeError(path, f"cannot be read as NIfTI ({_one_line(error)})", AGAIN) from error
    if voxel.fields or voxel.kind == "c":
        raise VolumeError(path, f"its voxels are {'colours' if voxel.fields else 'complex'}, not one number each",
                          "give an image with one real number per voxel")
    axes = int(header["dim"][0])
    shape = [int(n) for n in header["dim"][1:axes + 1]] if 0 < axes < 8 else []
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise VolumeError(path, f"has size {'x'.join(map(str, shape)) or 'unknown'}", "a 3-D or 4-D image is needed")
    if math.prod(shape[:3]) > MOST_VOXELS:
        raise VolumeError(path, f"has size {'x'.join(map(str, shape))}: too large",
                          "its header may be damaged; otherwise resample it first")
    if not header.single_vox_offset <= ahead <= MOST_HEADER:
        raise VolumeError(path, f"its voxels start at byte {ahead:.0f}: inside its header, or too far", AGAIN)
    if not header["sform_code"] and (header["pixdim"][1:4] == 0).any():  # nibabel would make it 1
        raise VolumeError(path, "its voxel size is 0", "repair the header (pixdim)")
    return int(ahead) + math.prod(shape) * voxel.itemsize


def _check_to_the_end(path: Path, needed: int) -> None:
    """Unpack a file once, keeping nothing: it must hold all of its image, and the checksum of gzip must agree."""
    size, packed = path.stat().st_size, _packed(path)
    if size * (MOST_DEFLATE if packed else 1) < needed:
        raise VolumeError(path, f"is cut off: its header asks for {needed} bytes, the file has {size}", AGAIN)
    held = 0 if packed else size
    try:
        if packed:
            with gzip.open(path) as file:
                while held <= needed + MOST_BEHIND and (block := file.read(2**20)):
                    held += len(block)
    except UNREADABLE as error:
        raise VolumeError(path, f"cannot be read to its end ({_one_line(error)})", AGAIN) from error
    if held < needed:
        raise VolumeError(path, f"is cut off: its header asks for {needed} bytes, it holds {held}", AGAIN)
    if held > needed + MOST_BEHIND:
        raise VolumeError(path, f"goes on after the {needed} bytes that its header announces", AGAIN)


def _time_points(image: nib.Nifti1Image) -> Iterator[np.ndarray]:
    """The volumes (X, Y, Z), float32, of an image, one after the other."""
    for place in range(math.prod(image.shape[3:])):
        index = (slice(None),) * 3 + (place,) * (image.ndim > 3) + (0,) * (image.ndim - 4)
        yield np.asarray(image.dataobj[index], dtype=np.float32)


def reduce_series(points: Iterator[np.ndarray], count: int, reduce: str, path: Path) -> np.ndarray:
    """`count` volumes (X, Y, Z) -> one, by mean, std, first, b0 or shell."""
    chosen = np.ones(count, dtype=bool)
    if reduce in ("b0", "shell"):
        chosen = (_b_values(path, count) > SHELL_TOLERANCE) == (reduce == "shell")
        if not chosen.any():
            raise VolumeError(b_values_file(path), f"has no {reduce} volume", "set opt.reduce to another reduction")
    if reduce == "first":
        return next(points)
    mean = squares = 0.0  # Welford's sums, float64
    for number, point in enumerate((each for each, wanted in zip(points, chosen) if wanted), start=1):
        apart = point.astype(np.float64) - mean
        mean = mean + apart / number
        squares = squares + apart * (point - mean)
    return (np.sqrt(squares / count) if reduce == "std" else mean).astype(np.float32)


def b_values_file(path: Path) -> Path:
    """The .bval file that belongs to an image, by its name."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".bval")


def _b_values(path: Path, count: int) -> np.ndarray:
    beside = b_values_file(path)
    if not beside.exists():
        raise VolumeError(path, f"opt.reduce needs the b-values, but {beside.name} is not beside it",
                          "put it there, or set opt.reduce to mean, std or first")
    try:
        values = np.array([float(value) for value in beside.read_text().replace(",", " ").split()])
        if not np.isfinite(values).all():
            raise ValueError("nan or inf")
    except (ValueError, OSError) as error:
        raise VolumeError(beside, f"is not a list of b-values ({_one_line(error)})", "correct it") from error
    if len(values) != count:
        raise VolumeError(beside, f"has {len(values)} b-values, the image {count} volumes", "they must agree")
    return values


def _header_only(image: nib.spatialimages.SpatialImage) -> nib.Nifti1Image:
    """A stand-in with the image's geometry and (almost) no voxels in memory, for nibabel's orientation tools."""
    return nib.Nifti1Image(np.broadcast_to(np.uint8(0), image.shape[:3]), image.affine)


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def write_volume(path: Path, volume: np.ndarray, affine: np.ndarray, reference: Path) -> None:
    """Write a RAS volume (X, Y, Z), whose RAS affine is given, as NIfTI in the frame of the file `reference`.

    Shape, affine, spacing and codes equal the reference's; a volume that was resized goes back to its native grid.
    """
    frame = nib.load(reference)
    in_ras = nib.as_closest_canonical(_header_only(frame))
    if volume.shape != in_ras.shape or not np.allclose(affine, in_ras.affine, atol=1e-4):
        volume = onto_grid(volume, affine, in_ras.shape, in_ras.affine)
    back = nib.orientations.ornt_transform(nib.io_orientation(in_ras.affine), nib.io_orientation(frame.affine))
    voxels = nib.apply_orientation(np.asarray(volume, dtype=np.float32), back)
    header = frame.header.copy()  # with both of its forms, its spacing and units
    header.extensions.clear()
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    save_image(path, type(frame)(voxels, frame.affine, header))


def save_image(path: Path, image: nib.Nifti1Image) -> None:
    """Write a .nii or .nii.gz file, the same bytes whenever it is written. Raises FileError."""
    def write(file: BinaryIO) -> None:
        if path.suffix != ".gz":
            image.to_stream(file)
            return
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
            image.to_stream(packed)

    replace_file(path, write, image.get_data_dtype().itemsize * math.prod(image.shape))
