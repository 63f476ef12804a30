"""Keeping a GPU busy, as far as a CPU can show it: threads, numbers read late, and steps on a GPU that is not there."""

import collections
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import main
import models.layers
import models.losses
import training.loop
import utils.device
from data.problems import VolumeError
from data.study import Study
from tests.conftest import arguments, refine_arguments, weights
from tests.test_augment import transform
from tests.test_loop import new_stage
from tests.test_recovery import assert_same_state
from train_refine import Stage2
from training.checkpoint import STAGE_1
from training.loop import Stage
from training.optimise import Optimiser
from utils.device import CALLS_BEFORE_GRAPH, Graphed, Numbers, one_ahead
from utils.tensors import mapped

GPU = torch.device("cuda:0")


@pytest.mark.parametrize("in_thread", [False, True])
def test_items_are_made_one_ahead_and_errors_come_in_their_place(in_thread):
    made, names = [], set()

    def items():
        for number in range(3):
            names.add(threading.current_thread().name)
            made.append(number)
            yield number
        raise ValueError("the fourth")
    used = []
    with pytest.raises(ValueError, match="the fourth"):
        for item in one_ahead(items(), in_thread, torch.device("cpu")):
            used.append(item)
    assert used == made == [0, 1, 2]
    assert (threading.current_thread().name in names) == (not in_thread)
    assert list(one_ahead(range(4), in_thread, torch.device("cpu"))) == [0, 1, 2, 3]
    before = threading.active_count()
    next(steps := one_ahead(range(9), in_thread, torch.device("cpu")))
    steps.close()
    assert threading.active_count() == before


class Recording(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph and torch.cuda.graph on a CPU: keeps every operation, with its arguments, and
    replays them into the same memory. What Python computed meanwhile does not change any more, as in a graph. Other
    than a graph it computes while it records, so the first replay has nothing to do."""

    def __init__(self):
        super().__init__()
        self.operations, self.done = [], True

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        results = function(*arguments, **(named or {}))
        if not function.is_view:
            self.operations.append((function, arguments, named or {}, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for function, given, named, results in self.operations if not self.done else ():
            again = function(*given, **named)
            pairs = zip(results, again) if isinstance(results, (tuple, list)) else [(results, again)]
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)
        self.done = False


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *_, **__: graph)
    monkeypatch.setattr(utils.device, "has_twice_the_memory", lambda: True)


def test_a_function_is_recorded_for_each_shape_of_its_data_and_replayed(recording):
    calls = []

    def function(data):
        (scale, nothing), volumes = data
        calls.append(scale)
        assert nothing is None
        return scale * volumes["x"] + volumes["y"].sum()
    steps = Graphed(function)
    for number in range(6):
        for scale, size in ((2.0, 3), (2.0, 4), (5.0, 3)):
            x, y = torch.full((size,), float(number)), torch.arange(2.0) + number
            assert torch.equal(steps(((scale, None), {"x": x, "y": y})), scale * x + y.sum())
            assert (x == number).all()  # what is replayed has memory of its own
    assert len(steps.recorded) == 3 and len(calls) == 3 * (CALLS_BEFORE_GRAPH + 1)


def test_without_memory_for_graphs_steps_run_as_they_are(recording, monkeypatch, capsys):
    monkeypatch.setattr(utils.device, "has_twice_the_memory", lambda: False)
    steps = Graphed(torch.sum)
    assert [steps(torch.full((2,), number)).item() for number in (1.0, 2.0, 3.0, 4.0, 5.0)] == [2, 4, 6, 8, 10]
    assert not steps.recorded and capsys.readouterr().out.count("not recorded") == 1


@pytest.mark.parametrize("number, more", [(1, []), (1, ["--precision", "fp16", "--optimiser", "adam"]),
                                          (2, ["--accumulate", "2"])])
def test_recorded_steps_train_the_same_network(incomplete_csv, tmp_path, recording, monkeypatch, number, more):
    """Several shapes, some visits without a source, a rate that changes, pauses, and a resumed run."""
    names = {1: "last_model.pth", 2: "last_refine.pth"}
    for folder, record in (("plain", False), ("recorded", True)):
        monkeypatch.setattr(training.loop, "may_record", lambda *_: record)  # noqa: B023
        words = [*arguments(incomplete_csv, tmp_path / folder, *more), "--epochs", "8", "--refine_epochs", "8"]
        best = str(tmp_path / folder / "checkpoints/best_model.pth")
        for stage in range(1, number + 1):
            refine = ["--refine", "--resume_path", best] if stage == 2 else []
            assert main.main([*words, *refine, "--max_steps", "7"]) == main.main([*words, *refine]) == 0
    assert_same_state(*(tmp_path / folder / "checkpoints" / names[number] for folder in ("plain", "recorded")))


def test_numbers_are_those_of_the_moment_they_were_sent():
    assert Numbers(torch.tensor([1.5, -2.0])).read() == [1.5, -2.0]


def on_fake_gpu(value: object) -> object:
    """Tensors in tuples and dicts, on a GPU."""
    return mapped(lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU),
                  value)


@pytest.fixture
def no_caches():
    """Of fake tensors, before and after."""
    caches = models.layers.frequencies, models.layers.linear_weights, models.losses.gaussian_band
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("number, large, kind", [(1, 0, "muon"), (1, 2**20, "adam"), (2, 0, "adam"),
                                                 (2, 2**20, "muon")])
def test_from_the_forward_pass_to_the_optimiser_nothing_waits_for_a_gpu(incomplete_csv, tmp_path, monkeypatch,
                                                                        no_caches, number, large, kind):
    """FakeTensor knows the shapes and devices of a GPU without having one. It raises where tensors of two devices meet,
    and where Python needs a value, which a GPU has only once everything before is done. It has no backward pass."""
    stage = new_stage(incomplete_csv, tmp_path, attention_tokens=10**6)
    if number == 2:
        state = {**stage.metadata, "stage": STAGE_1, "step": 0, "ema": {"model": stage.network.state_dict()},
                 "best": 0.0, "run_id": "0" * 32, "sizes": stage.study.sizes, "network": stage.opt.network_arguments()}
        stage = Stage2(stage.opt, stage.study, torch.device("cpu"), state)
    pytest.importorskip("triton")
    from models import fused_norm
    monkeypatch.setattr(models.layers, "LARGE", large)
    monkeypatch.setattr(models.layers, "fused_norm_silu", lambda device: fused_norm.NormSiLU.apply)
    for kernel in ("sum_kernel", "map_kernel"):
        monkeypatch.setattr(fused_norm, kernel, collections.defaultdict(lambda: lambda *_, **__: None))  # [grid](...)
    monkeypatch.setattr(torch, "_fused_adam_", lambda *_, **__: None)  # PyTorch has no fake of it with a tensor as rate
    stage.ema_model, batch = stage.network, [0, 6, 7]  # the last two lack a modality
    stage.begin()
    micro_batches = stage.micro_batches(batch)
    loaded = [stage.load(target, places, batch, 0) for target, places, _ in micro_batches]
    with FakeTensorMode():
        for module in stage.network.modules():
            module._parameters.update({name: torch.nn.Parameter(on_fake_gpu(each))
                                       for name, each in module._parameters.items() if each is not None})
            module._buffers.update(on_fake_gpu(module._buffers))
        stage.device = GPU
        if number == 1:
            stage.prior.diffusion._weights = {(GPU, torch.float32): torch.empty(1001, 2, device=GPU)}
        losses = [stage.loss(stage.network, target, on_fake_gpu(data))[0]
                  for (target, *_), data in zip(micro_batches, loaded)]
        optimiser = Optimiser(stage.network, 1e-3, 1, 10, 1.0, kind, float16=number == 1)
        for parameter in stage.network.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimiser.scale(sum(losses))
        assert optimiser.step(sum(losses).detach()).device == GPU
        with pytest.raises(DataDependentOutputException):
            sum(losses).item()


def test_augmentation_is_computed_on_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    change = transform("flip", "affine", "intensity")
    with FakeTensorMode(allow_non_fake_inputs=True):
        volume = torch.empty(4, 1, 6, 5, 4, device=GPU)
        assert change.volume("fmri", volume).device == change.mask(volume).device == GPU


def test_a_kept_study_gives_the_same_volumes_and_masks_and_reads_no_file(study_csv, tmp_path, monkeypatch):
    study = new_stage(study_csv, tmp_path).study
    batches = [[3, 0], [5]]
    before = [(study.volumes(batch), study.masks(batch)) for batch in batches]
    study.keep_on(torch.device("cpu"), 1000)
    assert not study._kept
    study.keep_on(torch.device("cpu"), 10**6)
    monkeypatch.setattr("data.study.load_volume", None)
    after = [(study.volumes(batch), study.masks(batch)) for batch in batches]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_with_its_study_kept_and_its_data_made_in_a_thread_is_the_same(study_csv, trained, tmp_path, monkeypatch,
                                                                           number):
    """What a GPU's run does beside the device, and then a volume that cannot be read in the thread."""
    monkeypatch.setattr(training.loop, "one_ahead", lambda items, _, device: one_ahead(items, True, device))
    monkeypatch.setattr(Stage, "total_steps", lambda stage, total=Stage.total_steps: (
        stage.study.keep_on(torch.device("cpu"), 10**9) or total(stage)))
    words = (arguments(study_csv, tmp_path) if number == 1 else
             [*refine_arguments(study_csv, tmp_path), "--resume_path", str(trained / "checkpoints/best_model.pth")])
    assert main.main(words) == 0
    name = "last_model.pth" if number == 1 else "last_refine.pth"
    assert_same_state(tmp_path / "checkpoints" / name, trained / "checkpoints" / name)

    def unreadable(*arguments: object) -> dict:
        if threading.current_thread() is not threading.main_thread():
            raise VolumeError("x.npy", "has become unreadable", "try again")
        return volumes(*arguments)
    volumes = Study.volumes
    monkeypatch.setattr(Study, "volumes", unreadable)
    assert main.main([*words, "--epochs", "4", "--refine_epochs", "4"]) == 2
    assert weights(tmp_path / "checkpoints" / name)["step"] == 6
