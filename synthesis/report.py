"""Tables and pictures of a tree of synthesised volumes, from the volumes and their sidecars."""

from pathlib import Path

import numpy as np

from data.cache import load_volume
from data.grids import spacing_of
from data.intensity import scale
from data.volumes import on_grid, read_volume
from synthesis.derivatives import Visit, read_sidecar, read_sidecars, scores_in, volume_path
from synthesis.model import TrainedModel
from utils.figures import Panel, save_grid
from utils.files import write_table, write_text
from utils.metrics import quality, summary, write_metrics

VISITS_SHOWN = 12
TRAINED_ON = "trained on"  # in the place of "synthesised"
KINDS = ("real", "synthesised", "difference", "deviation")  # of a modality's panels


def write_scores(folder: Path) -> None:
    """Write metrics.csv of all volumes with a truth, and print their means; apart for visits of the training."""
    rows = [{"subject": entry["Subject"], "direction": entry["Direction"], "region": region,
             "volume": TRAINED_ON if entry.get("TrainedOn") else "synthesised", **scores}
            for _, entry in read_sidecars(folder) for region, scores in scores_in(entry).items()]
    if rows:
        write_metrics(folder / "metrics.csv", rows)
        print(summary(rows))
    if any(row["volume"] == TRAINED_ON for row in rows):
        print(f"{TRAINED_ON}: the model was trained or validated on these visits, so their scores say nothing about "
              "new ones")


def write_pair_tables(folder: Path, modalities: tuple[str, str]) -> None:
    """Write pairs.csv, which PDS can train on, and participants.tsv of all new pairs in the tree."""
    pairs = {}
    for path, entry in read_sidecars(folder):
        pair = pairs.setdefault(entry["Subject"], {"subject": entry["Subject"], "group": entry["Group"]})
        pair[entry["Direction"].removeprefix("->")] = path.relative_to(folder).as_posix()
    write_table(folder / "pairs.csv", ("subject", "group", *modalities), pairs.values())
    lines = ["participant_id\tgroup", *(f"{subject}\t{pair['group'] or 'n/a'}" for subject, pair in pairs.items())]
    write_text(folder / "participants.tsv", "\n".join(lines) + "\n")


def some_of(visits: list[Visit], model: TrainedModel) -> list[Visit]:
    """VISITS_SHOWN of them: half of these, or more, lack a scan, if so many do; the others rather have scans that the
    model has not seen. Each kind is spread evenly over its visits."""
    lacking, others = ([visit for visit in visits if (len(visit[1]) == 1) == lacks] for lacks in (True, False))
    new, seen = ([visit for visit in others if model.has_seen(visit[1]) == known] for known in (False, True))
    shown = []
    for kind, room in ((lacking, max(VISITS_SHOWN // 2, VISITS_SHOWN - len(others))), (new, VISITS_SHOWN),
                       (seen, VISITS_SHOWN)):
        number = min(len(kind), room, VISITS_SHOWN - len(shown))
        shown += [kind[place] for place in np.linspace(0, len(kind) - 1, number).round().astype(int)]
    return shown


def save_pictures(folder: Path, visits: list[Visit], model: TrainedModel) -> None:
    """Save synthesis.png with some of the visits or new pairs, one row each. Raises UserError."""
    shown, ranges, rows = some_of(visits, model), model.ranges, []
    for pair, scans in shown:
        panels = {(modality, "real"): Panel(load_volume(file), spacing_of(np.array(metadata["affine"])))
                  for modality, (file, metadata) in scans.items()}
        for target, (low, high) in ranges.items():
            if scans and not scans.keys() - {target}:
                continue  # it has no source
            file, std = (volume_path(folder, pair, target, kind) for kind in ("synth", "std"))
            scan, sidecar = read_volume(file, "first"), read_sidecar(file)
            scores = scores_in(sidecar)
            size, affine, truth = scan.voxels.shape, scan.affine, panels.get((target, "real"))
            if truth:  # all on its grid
                size, affine = truth.volume.shape, np.array(scans[target][1]["affine"])
            volume, spacing = scale(on_grid(scan, size, affine), low, high), spacing_of(affine)
            panels[target, "synthesised"] = Panel(volume, spacing, quality(scores["volume"]) if scores else "")
            if truth:
                panels[target, "difference"] = Panel(volume - truth.volume, spacing, kind="difference")
            if std.exists():
                deviation = on_grid(read_volume(std, "first"), size, affine) * 2 / (high - low)
                panels[target, "deviation"] = Panel(deviation, spacing, kind="deviation")
        label = pair.name, pair.group, TRAINED_ON * model.has_seen(scans)
        rows.append(("\n".join(filter(None, label)), panels))
    columns = [(modality, kind) for modality in ranges for kind in KINDS
               if any((modality, kind) in panels for _, panels in rows)]
    save_grid(folder / "synthesis.png", f"{len(shown)} of {len(visits)}",
              [f"{modality}: {kind}" for modality, kind in columns],
              [(label, [panels.get(column) for column in columns]) for label, panels in rows])
