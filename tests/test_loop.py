"""The loop and stage 1: jobs of the ranks, the loss of a micro-batch, a run that is stopped or finished."""

from dataclasses import replace

import pytest
import torch

import training.distributed as ranks
from data.study import read_study
from models.prior import EXPECTED_WEIGHT
from opt import PRESETS, opt
from tests.conftest import arguments, weights
from train import Stage1
from training.loop import Pauses, fit, means_over_ranks, split_jobs
from utils.arguments import parse_arguments
from utils.stop import interruptible, stop


def new_stage(study_csv, folder, **changes) -> Stage1:
    settings = replace(parse_arguments(opt, PRESETS, arguments(study_csv, folder), "test"), **changes)
    return Stage1(settings, read_study(settings), torch.device("cpu"))


def test_each_direction_has_its_own_noise_and_the_expected_volume_has_none(study_csv, tmp_path):
    first, batch = new_stage(study_csv, tmp_path, pattern_weight=0.0), [0, 2, 3, 5]
    expected = []
    for step in range(20):
        micro_batches = first.micro_batches(batch)
        assert [(target, places, weight) for target, places, weight in micro_batches] == [
            (target, [0, 1, 2, 3], 0.5) for target in first.study.modalities]
        loaded = [first.load(target, places, batch, step) for target, places, _ in micro_batches]
        for (target, *_), (x0, _, _, t, *_) in zip(micro_batches, loaded):
            expected += ((t[target] == 1000) & (t[first.network.source(target)] == 0)).tolist()
            assert torch.equal(x0[target], first.study.volumes(batch)[target])
        assert not torch.equal(loaded[0][2]["fmri"], loaded[1][2]["fmri"])
    assert 0.25 < sum(expected) / len(expected) < 0.5
    (target, *_), (x0, _, noise, t, blank, group) = micro_batches[0], loaded[0]
    assert torch.equal(blank, (t[target] == 1000) & (t[first.network.source(target)] == 0))
    assert torch.equal(blank, noise[target].abs().amax(dim=(1, 2, 3, 4)) == 0)
    v = first.prior.diffusion.target(x0[target], noise[target], t[target])
    expected = (torch.where(blank, EXPECTED_WEIGHT, 1.0) * v.square().mean(dim=(1, 2, 3, 4))).mean()
    seen = []

    def network(xt, t, targets, group):  # predicts 0
        seen.append(xt[target])
        return {target: torch.zeros_like(xt[target])}
    loss, _ = first.loss(network, target, loaded[0])
    assert group is None and loss.item() == pytest.approx(expected.item(), rel=1e-5) and blank.any()
    assert torch.equal(seen[0].abs().amax(dim=(1, 2, 3, 4)) == 0, blank)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 9])
def test_every_job_is_done_by_one_rank(monkeypatch, world, accumulate):
    jobs, done, loads = [("a", 0), ("a", 2), ("a", 3), ("b", 1)], [], []
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        mine = split_jobs(jobs, accumulate)
        assert mine, "a rank without a micro-batch would not exchange gradients"
        loads.append([(target, place) for target, places, weight in mine if weight for place in places])
        done += loads[-1]
    assert sorted(done) == jobs and max(map(len, loads)) - min(map(len, loads)) <= 1


def test_the_mean_of_a_validation_that_is_stopped_is_that_so_far(monkeypatch):
    columns = "a", "b"
    assert means_over_ranks(columns, iter([("a", 1.0), ("b", 7.0), ("a", 5.0)])) == {"a": 3, "b": 7}

    def values():
        yield "a", 4.0
        monkeypatch.setattr(stop, "reason", "test")
        yield from interruptible([("a", 100.0)])
    assert means_over_ranks(columns, values()) == {"a": 4, "b": 0}


def test_a_finished_run_ends_at_once_also_with_fewer_steps(study_csv, tmp_path):
    for max_steps in (2, 1):
        assert fit(new_stage(study_csv, tmp_path, max_steps=max_steps))
        assert weights(tmp_path / "checkpoints/last_model.pth")["step"] == 2


def test_affine_augmentation_ends_where_the_learning_rate_decays(study_csv, tmp_path):
    first = new_stage(study_csv, tmp_path, augment=("affine", "intensity"), epochs=8)  # 16 steps
    transforms = [first.transform(step, [0, 1]) for step in range(16)]
    assert [each.matrices is not None for each in transforms] == [True] * 12 + [False] * 4
    assert all((gamma != 1).all() for each in transforms for gamma in each.gammas.values())
    first.opt.augment = ("affine",)
    assert first.transform(0, [0]) and first.transform(12, [0]) is None


def test_pauses_wait_where_they_would_take_more_than_their_share(monkeypatch):
    now = 0.0
    monkeypatch.setattr("training.loop.time.monotonic", lambda: now)

    def run(share: float, start: int = 0) -> dict[str, list[int]]:
        """Steps of 1 s, pictures of 10 s every 10 steps, saves of 0.1 s every 3."""
        nonlocal now
        pauses, taken = Pauses({"pictures": (10,), "saves": (3,)}, start, 200, share), {"pictures": [], "saves": []}
        for step in range(start, 201):
            for kind, seconds in (("pictures", 10), ("saves", 0.1)):
                if pauses.is_due(kind, step):
                    with pauses.taking(kind):
                        now += seconds
                    taken[kind].append(step)
            now += 1
        return taken
    assert run(1) == {"pictures": [*range(10, 201, 10)], "saves": [*range(3, 199, 3), 200]}
    few = run(0.2)  # a tenth each: 10 s of pictures after 80 s of steps, then 20 after 160
    assert few == {"pictures": [10, 80, 160, 200], "saves": [*range(3, 199, 3), 200]}
    assert run(0) == {"pictures": [10, 200], "saves": [3, 200]}
    assert run(1, 20)["pictures"][0] == 20 and run(1, 19)["saves"][0] == 21 and run(1, 200)["pictures"] == [200]
