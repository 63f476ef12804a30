"""The loop and stage 1: jobs of the ranks, the loss of a micro-batch, a run that is stopped or finished."""

from dataclasses import replace

import pytest
import torch

import training.distributed as ranks
from data.study import read_study
from opt import PRESETS, opt
from tests.conftest import arguments, weights
from train import Stage1
from training.loop import fit, mean_over_ranks, split_jobs
from utils.arguments import parse_arguments
from utils.stop import interruptible, stop


def new_stage(study_csv, folder, **changes) -> Stage1:
    settings = replace(parse_arguments(opt, PRESETS, arguments(study_csv, folder), "test"), **changes)
    return Stage1(settings, read_study(settings), torch.device("cpu"))


def test_a_given_modality_is_not_predicted(study_csv, tmp_path):
    first, batch = new_stage(study_csv, tmp_path, pattern_weight=0.0), [0, 2, 3, 5]
    for step in range(20):
        t = first.timesteps(step, range(len(batch)))
        for target, places, weight in first.micro_batches(batch, step):
            assert places == [place for place in range(4) if t[target][place] > 0] and weight == 0.5 / len(places)
    target, places, _ = micro_batch = first.micro_batches(batch, 1)[0]
    x0, masks, noise, t, group = first.load(micro_batch, batch, 1)
    assert torch.equal(x0[target], first.study.volumes([batch[place] for place in places])[target]) and group is None
    loss, _ = first.loss(first.network, micro_batch, (x0, masks, noise, t, group))  # a new network predicts 0
    v = first.prior.diffusion.target(x0[target], noise[target], t[target])
    assert loss.item() == pytest.approx(0.5 * v.square().mean().item(), rel=1e-5)


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
    assert mean_over_ranks(iter([1.0, 2.0, 6.0])) == 3 and mean_over_ranks([]) == 0

    def values():
        yield 4.0
        monkeypatch.setattr(stop, "reason", "test")
        yield from interruptible([100.0])
    assert mean_over_ranks(values()) == 4


def test_a_finished_run_ends_at_once_also_with_fewer_steps(study_csv, tmp_path):
    for max_steps in (2, 1):
        assert fit(new_stage(study_csv, tmp_path, max_steps=max_steps))
        assert weights(tmp_path / "checkpoints/last_model.pth")["step"] == 2
