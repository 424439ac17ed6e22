"""Processes train as one does.

Two: FSDP2 shards, with GradScaler too, DDP replicas, and both kinds in one optimizer. Four in a grid:
replicas of shards (HSDP), and shards of tensor parallel shards.
"""

import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_clip import CLIPPINGS, clip

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

STEPS = 5
BAD_STEP = 2  # one rank meets an Inf here
# Five outputs over two ranks: shards of unequal length, and the last bias of 1 leaves one of them empty.
WIDTHS = (4, 5, 1)
EVEN_WIDTHS = (4, 8, 1)  # FSDP2 takes no uneven shards of tensor parallel ones
# (method, optimizer settings): the SGD is not fused, as torch has no sharded kernel for it.
CASES = [
    ("no_clip", "SGD"),
    ("norm", "SGD"),
    ("norm", "AdamW fused"),
    ("auto_clip", "SGD"),
    ("auto_clip", "AdamW fused"),
    ("linear_rand_norm", "SGD"),
    ("quadratic_rand_autoclip", "SGD"),
    ("layer_wise", "SGD"),
    ("coordinate_wise", "SGD"),
    ("coordinate_wise", "AdamW fused"),
]
# Kinds of training, by the number of processes.
KINDS = {2: ("fsdp", "scaled", "mixed", "ddp"), 4: ("hsdp", "tensor")}
RUNS = {
    world: [
        (kind, method, name)
        for kind in kinds
        for method, name in CASES
        if not (kind == "mixed" and "fused" in name)  # torch's kernel takes no mixture
    ]
    for world, kinds in KINDS.items()
}


# What torch cannot do with shards, as of 2.15; the example of FSDP2 says so.
FAILS_SHARDED = {
    "SGD fused": lambda params: torch.optim.SGD(params, fused=True),
    "Adagrad fused": lambda params: torch.optim.Adagrad(params, fused=True),
    "Muon": torch.optim.Muon,
}


def make_model(kind):
    torch.manual_seed(0)
    a, b, c = EVEN_WIDTHS if kind == "tensor" else WIDTHS
    return torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.Tanh(), torch.nn.Linear(b, c))


def make_optimizer(model, method, name):
    if name == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return clip(optimizer, CLIPPINGS[method](**({"threshold": 0.3} if method == "layer_wise" else {})))


def train(model, optimizer, kind, part=0, parts=1):
    """Parameters and telemetry of some steps; each rank takes its part of a batch."""
    rng = torch.Generator().manual_seed(1)
    scaler = torch.amp.GradScaler("cpu", enabled=kind == "scaled", init_scale=1024.0)
    said = []
    for step in range(STEPS):
        x = torch.randn(8, WIDTHS[0], generator=rng)
        y = torch.randn(8, WIDTHS[2], generator=rng) * (5 if step % 2 else 1)
        if step == BAD_STEP:
            x[-1, 0] = torch.inf  # in the last rank's part
        x, y = x.chunk(parts)[part], y.chunk(parts)[part]
        optimizer.zero_grad()
        scaler.scale(((model(x) - y) ** 2).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        said.append([*map(float, optimizer.clipping.telemetry), scaler.get_scale()])
    return said


def whole(param):
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()


def run_rank(rank, world, folder):
    """One process: all runs."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh = init_device_mesh(
        "cpu", (2,) if world == 2 else (2, 2), mesh_dim_names=("outer", "inner")[: world // 2]
    )
    results = {}
    for kind, method, name in RUNS[world]:
        model = spread(make_model(kind), kind, mesh)
        optimizer = make_optimizer(model, method, name)
        # Ranks of a tensor parallel group work on the same part.
        part, parts = (rank // 2, 2) if kind == "tensor" else (rank, world)
        said = train(model, optimizer, kind, part, parts)
        results[kind, method, name] = said, [whole(param) for param in model.parameters()]
    if world == 2:
        results["torch alone"] = {name: outcomes(name, mesh) for name in FAILS_SHARDED}
    (folder / f"rank{rank}").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


def spread(model, kind, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "mixed":
        # The second layer is left whole; its gradients are averaged as DDP would.
        for param in model[2].parameters():
            param.register_post_accumulate_grad_hook(average)
        fully_shard(model[0], mesh=mesh)
        return model
    if kind == "tensor":
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["outer"])
    return fully_shard(model, mesh=mesh)  # of two dimensions: replicas of shards


def outcomes(name, mesh):
    """The error of a sharded step without and with clipping, None for none."""
    said = []
    for clipping in (None, CLIPPINGS["norm"]()):
        model = spread(make_model("fsdp"), "fsdp", mesh)
        optimizer = FAILS_SHARDED[name]([param for param in model.parameters() if param.ndim == 2])
        if clipping is not None:
            clip(optimizer, clipping)
        model(torch.ones(2, WIDTHS[0])).sum().backward()
        try:
            optimizer.step()
            said.append(None)
        except Exception as error:
            said.append(type(error).__name__)
    return said


def average(param):
    torch.distributed.all_reduce(param.grad)
    param.grad /= torch.distributed.get_world_size()


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory):
    """World size -> what each of so many processes found; started once."""

    @functools.cache
    def run(world):
        folder = tmp_path_factory.mktemp("ranks")
        command = [sys.executable, __file__]
        processes = [
            subprocess.Popen([*command, str(rank), str(world), str(folder)], stderr=subprocess.PIPE)
            for rank in range(world)
        ]
        try:
            errors = [process.communicate(timeout=120)[1].decode() for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
        return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(world)]

    return run


@pytest.mark.parametrize(("kind", "method", "name"), RUNS[2])
def test_two_processes_are_one(run_ranks, kind, method, name):
    assert_processes_are_one(run_ranks(2), kind, method, name)


@pytest.mark.parametrize("name", FAILS_SHARDED)
def test_clipping_fails_only_where_torch_does(run_ranks, name):
    for result in run_ranks(2):
        alone, clipped = result["torch alone"][name]
        assert clipped == alone


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method", "name"), RUNS[4])
def test_four_processes_are_one(run_ranks, kind, method, name):
    assert_processes_are_one(run_ranks(4), kind, method, name)


def assert_processes_are_one(ranks, kind, method, name):
    # B23
    model = make_model(kind)
    optimizer = make_optimizer(model, method, name)
    said = train(model, optimizer, kind)
    wanted = [whole(param) for param in model.parameters()]
    for result in ranks:
        got_said, got = result[kind, method, name]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            torch.tensor(got_said), torch.tensor(said), rtol=1e-4, atol=1e-6, equal_nan=True
        )
    # Bit for bit between ranks: the thresholds of one must be the other's.
    said_first, params_first = ranks[0][kind, method, name]
    for result in ranks[1:]:
        said_other, params_other = result[kind, method, name]
        assert repr(said_first) == repr(said_other)
        assert all(map(torch.equal, params_first, params_other))
    *_, clipped_steps, skipped_steps, scale = said[-1]
    # The step with an Inf: by us, or by the scaler, which then does not call one that is not fused.
    assert skipped_steps == (kind != "scaled" or "fused" in name)
    assert scale == (512.0 if kind == "scaled" else 1.0)
    assert (clipped_steps > 0) == (method != "no_clip")


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
