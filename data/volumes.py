"""One NIfTI file in, one volume out; and back. Volumes are float32 (X, Y, Z) in canonical RAS order.

Intensities: `normalise` maps the range between two percentiles to [-1, 1]; `to_units` goes back.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy.ndimage import affine_transform

PERCENTILES = (0.1, 99.9)  # of all voxels: the intensities that become -1 and +1
SHELL_TOLERANCE = 50.0  # s/mm^2: b-values up to this count as b0


UNREADABLE = (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError,
              nib.spatialimages.HeaderDataError)


class VolumeError(ValueError):
    """A file that cannot be used; the message names the file, what is wrong, and what to do."""


def read_volume(path: Path, reduce: str = "mean") -> tuple[np.ndarray, np.ndarray]:
    """Read a 3-D or 4-D NIfTI file to its end.

    Returns (volume (X, Y, Z) float32 in RAS order, affine (4, 4) of that order). 4-D files are reduced by `reduce`:
    mean, std, first, b0 or shell (the last two take their b-values from the .bval file beside the image).
    NaN and infinite voxels become the smallest finite value. Raises VolumeError.
    """
    try:
        image = nib.load(path)
        shape, kind = image.shape, image.get_data_dtype()
        if kind.fields or kind.kind == "c":
            raise ValueError(f"its voxels are {'colours' if kind.fields else 'complex'}, not one number each")
        voxels = np.asarray(image.dataobj, dtype=np.float32)
    except FileNotFoundError:
        raise VolumeError(f"{path}: there is no such file; correct the path in the manifest") from None
    except UNREADABLE as error:
        raise VolumeError(f"{path}: cannot be read as NIfTI ({_one_line(error)}); "
                          "fetch or convert the file again") from error
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim not in (3, 4) or min(shape) < 1:
        raise VolumeError(f"{path}: has size {'x'.join(map(str, shape))}; a 3-D or 4-D image is needed")
    if voxels.ndim == 4:
        voxels = reduce_4d(voxels, reduce, path)
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise VolumeError(f"{path}: its affine is no invertible matrix; repair the header (qform or sform)")
    return _to_ras(_finite(voxels, path), image.affine), nib.as_closest_canonical(_header_only(image)).affine


def reduce_4d(voxels: np.ndarray, reduce: str, path: Path) -> np.ndarray:
    """(X, Y, Z, N) -> (X, Y, Z) by mean, std, first, b0 or shell (mean of all volumes with b > 50 s/mm^2)."""
    if reduce in ("b0", "shell"):
        weighted = _b_values(path, voxels.shape[-1]) > SHELL_TOLERANCE
        chosen = weighted if reduce == "shell" else ~weighted
        if not chosen.any():
            raise VolumeError(f"{path}: its .bval file has no {reduce} volume; set opt.reduce to another reduction")
        return voxels[..., chosen].mean(axis=-1)
    if reduce == "first":
        return voxels[..., 0]
    return voxels.std(axis=-1) if reduce == "std" else voxels.mean(axis=-1)


def b_values_file(path: Path) -> Path:
    """The .bval file that belongs to an image, by its name."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".bval")


def _b_values(path: Path, count: int) -> np.ndarray:
    beside = b_values_file(path)
    if not beside.exists():
        raise VolumeError(f"{path}: opt.reduce needs the b-values, but {beside.name} is not beside it")
    try:
        values = np.atleast_1d(np.loadtxt(beside)).ravel()
    except ValueError as error:
        raise VolumeError(f"{beside}: is not a list of b-values ({_one_line(error)})") from error
    if len(values) != count:
        raise VolumeError(f"{beside}: has {len(values)} b-values, the image {count} volumes; they must agree")
    return values


def _finite(voxels: np.ndarray, path: Path) -> np.ndarray:
    bad = ~np.isfinite(voxels)
    if bad.all():
        raise VolumeError(f"{path}: has no finite voxel; exclude the subject or repair the file")
    return np.where(bad, voxels[~bad].min(), voxels) if bad.any() else voxels


def _header_only(image: nib.spatialimages.SpatialImage) -> nib.Nifti1Image:
    """A stand-in with the image's geometry and (almost) no voxels in memory, for nibabel's orientation tools."""
    return nib.Nifti1Image(np.broadcast_to(np.uint8(0), image.shape[:3]), image.affine)


def _to_ras(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(nib.apply_orientation(voxels, nib.io_orientation(affine)))


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def resample(volume: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate a volume (X, Y, Z) linearly onto `size` voxels over the same field of view; returns also its affine.

    Where the grid gets coarser, the volume is averaged over the new voxels first (three taps each way).
    """
    zoom = np.array(volume.shape) / np.array(size)  # old voxels per new voxel
    to_old = np.diag([*zoom, 1.0])
    to_old[:3, 3] = (zoom - 1) / 2  # voxel edges of both grids coincide
    shifts = [(-z / 3, 0.0, z / 3) if z > 1 else (0.0,) for z in zoom]
    samples = [affine_transform(volume, to_old[:3, :3], to_old[:3, 3] + (dx, dy, dz), output_shape=size, order=1,
                                mode="nearest")
               for dx in shifts[0] for dy in shifts[1] for dz in shifts[2]]
    return np.mean(samples, axis=0, dtype=np.float32), affine @ to_old


def normalise(volume: np.ndarray, path: Path) -> tuple[np.ndarray, float, float]:
    """Map the 0.1 and 99.9 percentiles to -1 and 1 and clip; returns the volume and both intensities.

    Raises VolumeError where the volume is constant.
    """
    low, high = (float(p) for p in np.percentile(volume, PERCENTILES))
    if not high > low:  # nearly all voxels alike: fall back to the full range before giving up
        low, high = float(volume.min()), float(volume.max())
    if not high > low:
        raise VolumeError(f"{path}: every voxel is {low:g}; exclude the subject or repair the file")
    return scale(volume, low, high), low, high


def scale(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities in file units -> [-1, 1], clipped."""
    return np.clip((volume - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)


def to_units(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """[-1, 1] -> intensities in file units."""
    return ((volume + 1) / 2 * (high - low) + low).astype(np.float32)


def write_volume(path: Path, volume: np.ndarray, affine: np.ndarray, reference: Path) -> None:
    """Write a RAS volume (X, Y, Z), whose RAS affine is given, as NIfTI in the frame of the file `reference`.

    Shape, affine, spacing and codes equal the reference's; a volume that was resampled goes back to its native grid.
    """
    frame = nib.load(reference)
    image = nib.Nifti1Image(volume, affine)
    in_ras = nib.as_closest_canonical(_header_only(frame))
    if image.shape != in_ras.shape or not np.allclose(affine, in_ras.affine, atol=1e-4):
        image = resample_from_to(image, in_ras, order=1, cval=float(volume.min()))
    back = nib.orientations.ornt_transform(nib.io_orientation(in_ras.affine), nib.io_orientation(frame.affine))
    voxels = nib.apply_orientation(np.asarray(image.dataobj, dtype=np.float32), back)
    written = nib.Nifti1Image(voxels, frame.affine)
    for set_form, code in ((written.set_sform, "sform_code"), (written.set_qform, "qform_code")):
        set_form(frame.affine, int(frame.header[code]) if code in frame.header else 1)
    written.header.set_xyzt_units(*(frame.header.get_xyzt_units() if code in frame.header else ("mm", "sec")))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(written, path)
