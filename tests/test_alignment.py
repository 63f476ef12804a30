"""Anatomy lies where the scanner says: pairs with two fields of view, from file to synthesised file."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine, from_matvec
from nibabel.processing import resample_from_to
from scipy.ndimage import affine_transform

import main
import sample
from benchmarks.moved_demo import agreement, write_moved
from data import demo
from data.alignment import Alignment, align
from data.cache import Reading
from data.grids import inside
from data.intensity import brain_region, normalise
from data.pairs import Pair
from data.problems import DataError
from data.study import read_study
from models.diffusion import Diffusion
from models.losses import tissue_loss
from models.prior import Prior
from models.unet import DualModalUNet, NetworkConfig
from opt import Options
from synthesis import derivatives
from synthesis.model import TrainedModel
from tests.conftest import SIZES, arguments, read_csv, refine_arguments, save, turned, weights, write_pairs
from utils.metrics import paired_gain, score

BLOB = np.array([12.0, -7.0, 9.0])  # mm
ORIENTATIONS = [(axes, signs) for axes in itertools.permutations(range(3))
                for signs in itertools.product((-1, 1), repeat=3)]  # 48


def scan_of_a_blob(affine: np.ndarray, size: tuple[int, int, int], name: str, folder: Path) -> Path:
    """A file that shows a blob at BLOB with a tail, on this grid."""
    points = apply_affine(affine, np.moveaxis(np.indices(size), 0, -1)) - BLOB
    volume = np.exp(-(points**2).sum(-1) / (2 * 13.0**2)) + 0.5 * np.exp(-((points - [15, 8, 0])**2).sum(-1) / 200)
    return save(folder / f"{name}.nii", (1000 * volume).astype(np.float32), affine)


@st.composite
def grids(draw) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Any orientation, shear of up to 5 degrees, spacing of 0.8 .. 5 mm, around the blob but not centred on it."""
    numbers = st.floats(-1, 1, allow_nan=False)
    axes, signs = draw(st.sampled_from(ORIENTATIONS))
    spacing = np.array([draw(st.sampled_from((0.8, 1.5, 2.0, 3.3, 5.0))) for _ in range(3)])
    shear = np.eye(3) + np.tan(np.radians(5)) * np.triu([[draw(numbers) for _ in range(3)] for _ in range(3)], 1)
    linear = shear @ (np.eye(3)[list(axes)] * signs) * spacing
    size = np.ceil(110 / spacing).astype(int)
    centre = BLOB + 12 * np.array([draw(numbers) for _ in range(3)])
    return from_matvec(linear, centre - linear @ (size - 1) / 2), tuple(size.tolist())


@dataclass(frozen=True)
class Copying(TrainedModel):
    """A model whose translation is the source: on the same box, that is a matter of interpolation."""

    def translate(self, source, target, volumes, *_):
        size, old = self.readings[target].size, volumes.shape[1:]
        box = np.diag([*np.divide(old, size), 1.0])
        box[:3, 3] = (np.divide(old, size) - 1) / 2
        return {"synth": np.stack([affine_transform(np.nan_to_num(each, nan=-1), box[:3, :3], box[:3, 3], size,
                                                    order=1, mode="nearest") for each in volumes])}


@given(source=grids(), target=grids(), space=st.sampled_from(("target", "source")), known=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_what_is_synthesised_lies_over_its_source(tmp_path_factory, source, target, space, known):
    """Whatever both grids, on whichever grid it is written: read by nibabel and resampled onto its source."""
    folder = tmp_path_factory.mktemp("blob")
    files = {"a": scan_of_a_blob(*source, "a", folder), "b": scan_of_a_blob(*target, "b", folder)}
    alignment = align(Options(modalities=("a", "b"), align="world"), [Pair("1", "", "", None, files)])
    readings = {name: Reading(name, (48, 48, 48)) for name in files}
    first = {name: np.array(reading.affine) for name, reading in alignment.readings(readings, files).items()}
    model = Copying(None, None, {}, None, {}, ("a", "b"), readings, dict.fromkeys("ab", (0.0, 1000.0)), first,
                    alignment)
    pair = Pair("1", "", "", None, files if known else {"a": files["a"]})
    visits = [(pair, model.read(pair.files, folder / "cache"))]
    options = SimpleNamespace(batch_size=1, uncertainty_samples=0, average_flips=False, realism=0.0, output_space=space,
                              region_file="")
    sample.synthesise(options, model, visits, folder, {})
    made = nib.load(derivatives.volume_path(folder, pair, "b"))
    if space == "source" or known:
        reference = nib.load(files["a" if space == "source" else "b"])
        assert made.shape == reference.shape and np.allclose(made.affine, reference.affine, atol=1e-4)
    scan = nib.load(files["a"])
    over = resample_from_to(made, scan, order=1, cval=np.nan).get_fdata()
    seen = np.isfinite(over) & inside(np.linalg.inv(first["b"]) @ scan.affine, scan.shape, (48, 48, 48))
    assert np.corrcoef(over[seen], scan.get_fdata()[seen])[0, 1] > 0.98
    heaviest = [np.average(apply_affine(scan.affine, np.argwhere(seen)), axis=0, weights=volume[seen]**4)
                for volume in (over.clip(0), scan.get_fdata())]
    assert np.linalg.norm(np.subtract(*heaviest)) < 1.0  # mm


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """The first subjects of the demo, as it is and with fields of view of their own, right and wrong by 30 mm."""
    folder, count = tmp_path_factory.mktemp("demo"), 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SUBJECTS", count)
        demo.write_demo(folder / "original")
    return folder / "original", write_moved(folder / "moved", count), write_moved(folder / "wrong", count, 30.0)


def test_moved_fields_of_view_show_the_same_place(small_demo):
    original, moved, _ = small_demo
    found = list(agreement(Options(data_root=str(moved)), Options(data_root=str(original))))
    assert len(found) == 6
    for _, correlation, distance in found:
        assert correlation > 0.98 and distance < 0.5


def test_wrong_affines_are_found_by_the_check(small_demo, tmp_path, capsys):
    _, moved, wrong = small_demo
    for table, shifted in ((moved, 0), (wrong, 3)):
        assert main.main(["--check", "--folds", "1", "--data_root", str(table), "--result_dir", str(tmp_path)]) == 0
        assert "brought together in world space, a box of 1" in capsys.readouterr().out
        assert (tmp_path / "check.png").exists()
        rows = [row for row in read_csv(tmp_path / "check.csv") if "fits the fmri better if it is moved" in row["what"]]
        assert len(rows) == shifted
        assert all(abs(int(row["what"].split("R, A, S: ")[1].split(",")[0]) + 30) < 9 for row in rows)


def test_both_stages_and_sample_py_over_a_common_box(tmp_path, capsys):
    """Scans of two fields of view, native space: trained in world space, scored where known, written where they lie."""
    table = write_pairs(tmp_path / "study", name="{}_{}.nii.gz")
    for number, path in enumerate(sorted(table.parent.glob("*_dmri.nii.gz"))):
        image = nib.load(path)
        part = image.slicer[:, :, 3:] if number % 2 else image.slicer[2:, :, :]  # cut on one side
        nib.save(turned(part, "LAS" if number % 2 else "RPI"), path)
    for words in (arguments, refine_arguments):
        assert main.main(words(table, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert printed.count("alignment   in world space, a box of 1") == 2 and "for each pair around what" in printed
    saved = weights(tmp_path / "checkpoints/best_refine.pth")
    assert saved["alignment"] == saved["backbone"]["alignment"] and saved["alignment"]["how"] == "world"
    scored = {row["subject"]: row for row in read_csv(tmp_path / "results/refine/metrics.csv")
              if row["volume"] == "refined" and row["region"] == "volume" and row["direction"] == "fmri->dmri"}
    assert all(np.isfinite(float(row[column])) for row in scored.values() for column in ("psnr", "ssim", "mae"))
    assert sample.main(["--resume_path", str(tmp_path / "checkpoints/best_refine.pth"), "--data_root", str(table),
                        "--sample_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"),
                        "--device", "cpu", "--precision", "fp32"]) == 0
    again = {row["subject"]: row for row in read_csv(tmp_path / "out/translated/metrics.csv")
             if row["region"] == "volume" and row["direction"] == "fmri->dmri"}
    for subject, row in scored.items():
        assert float(again[subject]["psnr"]) == pytest.approx(float(row["psnr"]), abs=1e-3)


def test_unknown_voxels_take_no_part_in_losses():
    """A batch of two, one with unknown voxels: they have no gradient, and all others the same as if they were known."""
    torch.manual_seed(0)
    truth, refined = torch.rand(2, 1, 14, 13, 12), torch.rand(2, 1, 14, 13, 12, requires_grad=True)
    hidden = truth.clone()
    hidden[1, :, :3] = np.nan
    gradients = []
    for wanted in (truth, hidden):
        wanted = torch.where(wanted.isnan(), refined.detach(), wanted)
        tissue_loss(refined, wanted, torch.ones_like(truth), 1.0).backward()
        gradients.append(refined.grad.clone())
        refined.grad = None
    assert (gradients[1][1, :, :3] == 0).all()
    np.testing.assert_array_equal(gradients[0][1, :, 3:], gradients[1][1, :, 3:])
    network = DualModalUNet(SIZES, NetworkConfig(8, 2, 1, 1, 1, "early", 0, 0.0))
    prior = Prior(network, Diffusion(10, "v"), "independent", SIZES, torch.device("cpu"), torch.float32)
    x0 = {name: torch.rand(1, 1, *size) for name, size in SIZES.items()}
    noise, t = {name: torch.randn_like(volume) for name, volume in x0.items()}, dict.fromkeys(SIZES, torch.tensor([5]))
    x0["dmri"][..., :4] = np.nan
    mask, output = torch.zeros_like(x0["dmri"]), {}
    network.register_forward_hook(lambda *call: output.update(call[2]))
    loss = prior.loss("dmri", x0, noise, t, prior.expects("dmri", t), None, mask, 0.0, "l2")
    gradient, = torch.autograd.grad(loss.sum(), output["dmri"])
    assert loss.isfinite().all() and (gradient[..., :4] == 0).all() and (gradient[..., 4:] != 0).all()


def test_unknown_voxels_take_no_part_in_scores_intensities_and_means():
    random = np.random.default_rng(0)
    truth, made = random.uniform(-1, 1, (2, 20, 18, 16)).astype(np.float32)
    hidden = truth.copy()
    hidden[12:] = np.nan
    found, expected = (score(made[:n], volume, {"half": np.ones_like(volume, dtype=bool)})
                       for n, volume in ((20, hidden), (12, truth[:12])))
    for region, values in expected.items():
        assert found[region]["psnr"] == pytest.approx(values["psnr"])
        assert found[region]["mae"] == pytest.approx(values["mae"])
    assert found["volume"]["ssim"] == pytest.approx(expected["volume"]["ssim"])
    assert np.isfinite(list(score(hidden, truth, {})["volume"].values())).all()
    scaled, low, high = normalise(hidden, Path("x"))
    assert np.isnan(scaled[12:]).all() and (low, high) == normalise(truth[:12], Path("x"))[1:]
    assert not brain_region(hidden)[12:].any()


def test_a_slab_that_no_window_fits_into_has_no_ssim():
    truth, made = np.random.default_rng(0).uniform(-1, 1, (2, 20, 20, 20))
    truth[:, :, 8:] = np.nan
    values = score(made, truth, {})["volume"]
    assert np.isnan(values["ssim"]) and np.isfinite(values["psnr"])
    assert paired_gain([1.0, np.nan, 3.0], [0.0, 0.0, 1.0])[0] == 1.5


def test_a_copied_scan_is_found_whatever_box_it_is_read_over(tmp_path):
    """The same T1 scan under two names, beside FLAIR scans of other fields of view."""
    rows = ["subject,t1,flair"]
    for number, top in enumerate((12, 16, 20)):
        t1 = save(tmp_path / f"{number}t1.nii", random_volume(max(number, 1)), from_matvec(np.eye(3) * 4))
        flair = save(tmp_path / f"{number}flair.nii", random_volume(9 + number)[:, :, :top], from_matvec(np.eye(3) * 4))
        rows.append(f"{number},{t1.name},{flair.name}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    options = Options(data_root=str(tmp_path / "pairs.csv"), modalities=("t1", "flair"), image_size=12, folds=1,
                      cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"1t1.nii: holds the same scan as .*0t1.nii of sub-0"):
        read_study(options)


def test_a_translation_lies_where_its_source_says_now(tmp_path, capsys):
    """Sources that only a mended header can place, and one whose affine is corrected between two runs."""
    affine = from_matvec(np.diag([-4.0, 4, 4]), [30, -20, 10])
    image = nib.Nifti1Image(random_volume(1), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 0)
    image.header["quatern_c"] *= 1 + 1e-6  # rounded
    path = tmp_path / "a.nii"
    path.write_bytes(image.header.binaryblock[:108] + np.float32(352).tobytes() + image.header.binaryblock[112:]
                     + bytes(4) + image.get_fdata(dtype=np.float32).tobytes("F"))
    readings = {name: Reading(name, (20, 20, 20)) for name in "ab"}
    box = Alignment("world", (80.0, 80.0, 80.0), (), {"a": (0.0, 0.0, 0.0), "b": (0.0, 0.0, 0.0)})
    first = dict.fromkeys("ab", np.array(box.readings(readings, {"a": path})["a"].affine))
    model = Copying(None, None, {}, None, {}, ("a", "b"), readings, dict.fromkeys("ab", (0.0, 1.0)), first, box)
    options = SimpleNamespace(batch_size=1, uncertainty_samples=0, average_flips=False, realism=0.0,
                              output_space="target", region_file="")
    pair = Pair("1", "", "", None, {"a": path})

    def made() -> nib.Nifti1Image:
        sample.synthesise(options, model, [(pair, model.read(pair.files, tmp_path / "cache"))], tmp_path, {})
        return nib.load(derivatives.volume_path(tmp_path, pair, "b"))

    np.testing.assert_allclose(made().affine[:3, 3], [30 - 4 * 19, -20, 10], atol=1e-3)
    nib.save(nib.Nifti1Image(random_volume(1), from_matvec(np.diag([-4.0, 4, 4]), [30, -20, 60])), path)  # corrected
    np.testing.assert_allclose(made().affine[:3, 3], [30 - 4 * 19, -20, 60], atol=1e-3)
    assert "replaced, because its source" in capsys.readouterr().out
    image.set_qform(None, 0)
    nib.save(image, path)  # no codes at all: readers use their default, which mirrors
    scan, default = made(), nib.load(path)
    np.testing.assert_allclose(scan.affine @ [19, 0, 0, 1], default.affine @ [0, 0, 0, 1], atol=1e-3)


def test_pairs_that_share_too_little_are_refused_and_a_single_scan_has_its_place(tmp_path):
    paths = {name: save(tmp_path / f"{name}.nii", random_volume(n), from_matvec(np.eye(3) * 4, offset))
             for n, (name, offset) in enumerate({"a": (0, 0, 0), "b": (0, 0, 16), "c": (0, 0, 70)}.items())}
    near, far = ({"a": paths["a"], "b": paths[other]} for other in "bc")
    pairs = [Pair(str(n), "", "", None, files) for n, files in enumerate((near, near, far))]
    options = Options(modalities=("a", "b"))
    assert align(options, pairs[:1]).how == "world" and align(replace(options, align="grid"), pairs) == Alignment()
    alignment, readings = align(options, pairs), {name: Reading(name, (12, 12, 12)) for name in "ab"}
    assert alignment.box == (80.0, 80.0, 64.0) and not alignment.centre
    placed = alignment.readings(readings, near)
    assert placed["a"].affine == placed["b"].affine == alignment.readings(readings, {"a": paths["a"]})["a"].affine
    with pytest.raises(DataError, match=r"a.nii and .*c.nii: both see only ..?% of the common box of 80x80x64 mm"):
        alignment.readings(readings, far)
    fixed = align(replace(options, space="template", box_size=(40.0, 40.0, 40.0)), pairs)
    assert fixed.centre == (38.0, 38.0, 46.0) and fixed.box == (40.0, 40.0, 40.0)
    with pytest.raises(DataError, match="the two scans of no pair overlap"):
        align(options, [Pair("1", "", "", None, {"a": paths["a"], "b": save(tmp_path / "d.nii", random_volume(9),
                                                from_matvec(np.eye(3), (900, 0, 0)))})])
    assert align(options, [Pair("1", "", "", None, {"a": paths["a"], "b": paths["a"]})]) == Alignment()


def random_volume(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((20, 20, 20), np.float32)


def test_a_model_trained_edge_to_edge_says_where_new_scans_differ(tmp_path, capsys):
    for seed, (name, offset) in enumerate({"a": 0, "b": 0, "c": 0, "d": 50, "e": 0}.items()):
        save(tmp_path / f"{name}.nii", random_volume(seed), from_matvec(np.eye(3) * 4, (0, 0, offset)))
    (tmp_path / "pairs.csv").write_text("subject,t1,flair\n1,a.nii,b.nii\n2,c.nii,d.nii\n3,e.nii,\n")
    readings = {name: Reading(name, (20, 20, 20)) for name in ("t1", "flair")}
    model = Copying(None, None, {}, None, {}, tuple(readings), readings, {}, {}, Alignment())
    options = Options(data_root=str(tmp_path / "pairs.csv"), modalities=tuple(readings), cache_dir=str(tmp_path))
    assert len(sample.read_visits(options, model)) == 3
    printed = capsys.readouterr().out
    assert printed.count("note:") == 1 and "c.nii and d.nii: their fields of view differ by up to 50 mm" in printed
