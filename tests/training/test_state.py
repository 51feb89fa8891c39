"""What a run resumes from, read by one process and by a sharded model, from either; and who saves what."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mige.training.adamw import StochasticAdamW
from mige.training.ema import AveragedWeights
from mige.training.muon import BatchedMuon
from mige.training.state import TrainingState, share


@pytest.fixture(scope="module")
def mesh():
    """A mesh of this process alone: its tensors are sharded ones, in one shard."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def small(seed: int, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2)).to(dtype)
    model[1].requires_grad_(False)
    return model


def training(model: nn.Module, make) -> tuple[TrainingState, AveragedWeights]:
    trained = [p for p in model.parameters() if p.requires_grad]
    ema = AveragedWeights(trained, 0.9)
    return TrainingState(model, [make(trained)], ema), ema


def steps(state: TrainingState, numbers: range) -> None:
    for number in numbers:
        for name, p in state.trained.items():
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(number + len(name)))
            p.grad = gradient.to(p.dtype)
        for optimizer in state.optimizers:
            optimizer.step()
        state.ema.step(list(state.trained.values()))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def stochastic(parameters):
    return StochasticAdamW(parameters, lr=1e-2)


def muon(parameters):
    return BatchedMuon([p for p in parameters if p.ndim == 2], lr=1e-2)


def save(state: TrainingState, folder) -> None:
    dcp.save(share(state.tensors(), 0, 1), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


@pytest.mark.parametrize(
    ("make", "dtype"), [(adamw, torch.float32), (stochastic, torch.bfloat16), (muon, torch.float32)]
)
def test_a_resumed_state_takes_the_same_steps(make, dtype, tmp_path):
    whole, _ = training(small(0, dtype), make)
    steps(whole, range(3))
    save(whole, tmp_path / "state")
    resumed, ema = training(small(0, dtype), make)
    resumed.load(tmp_path / "state")
    assert ema.optimization_step == 3
    for one in (whole, resumed):
        steps(one, range(3, 5))
    there, here = whole.tensors(), resumed.tensors()
    assert there.keys() == here.keys() and "parameters.1.weight" not in there  # what is frozen is not saved
    assert all(torch.equal(there[name], here[name]) and there[name].dtype is here[name].dtype for name in there)


@pytest.mark.parametrize("onto", ["sharded", "whole"])
def test_sharded_and_whole_read_each_other(mesh, onto, tmp_path):
    plain, sharded = small(0), small(0)
    fully_shard(sharded, mesh=mesh)
    states = {"whole": training(plain, adamw)[0], "sharded": training(sharded, adamw)[0]}
    target, source = states.pop(onto), next(iter(states.values()))
    for p in source.trained.values():
        p.grad = p.detach() * 0.5
    source.optimizers[0].step()
    source.ema.step(list(source.trained.values()))
    save(source, tmp_path / "state")
    target.load(tmp_path / "state")
    there, here = source.tensors(), target.tensors()
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        one, other = (getattr(t, "full_tensor", lambda t=t: t)() for t in (tensor, here[name]))
        assert torch.equal(one, other), name
        if name.startswith(("parameters", "averages.")) or name.endswith("exp_avg"):
            assert isinstance(here[name], type(target.trained["0.weight"].data)), name  # each in its own layout


def test_a_state_of_another_model_is_named(tmp_path):
    save(training(small(0), adamw)[0], tmp_path / "state")
    other = small(0)
    other[0] = nn.Linear(6, 9)
    with pytest.raises(ValueError, match=r"parameters.0.weight: \(8, 6\) there, \(9, 6\) expected"):
        training(other, adamw)[0].load(tmp_path / "state")
    other[0] = small(0)[0]
    other[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameters.1.weight: nothing there, \(4, 8\) expected"):
        training(other, adamw)[0].load(tmp_path / "state")


def test_what_all_hold_is_saved_by_one_each_and_shards_by_all(mesh):
    state = {f"parameters.{number}": torch.zeros(100 + number) for number in range(20)}
    mine = [share(state, rank, 4) for rank in range(4)]
    assert sorted(name for one in mine for name in one) == sorted(state)
    sizes = [sum(tensor.nbytes for tensor in one.values()) for one in mine]
    assert max(sizes) < 1.1 * min(sizes)
    sharded = small(0)
    fully_shard(sharded, mesh=mesh)
    shards = training(sharded, adamw)[0].tensors()
    assert all({"parameters.0.weight", "averages.0.weight"} <= share(shards, rank, 4).keys() for rank in range(4))
