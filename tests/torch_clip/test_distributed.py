"""Two processes train as one does: FSDP2 shards, DDP replicas, and both kinds in one optimizer."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_clip import CLIPPINGS, clip

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

WORLD = 2
STEPS = 5
BAD_STEP = 2  # one rank meets an Inf here
# Five outputs over two ranks: shards of unequal length, and the last bias of 1 leaves one of them empty.
WIDTHS = (4, 5, 1)
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
RUNS = [
    (kind, method, name)
    for kind in ("fsdp", "mixed", "ddp")
    for method, name in CASES
    if not (kind == "mixed" and "fused" in name)  # torch's kernel takes no mixture
]


def make_model():
    torch.manual_seed(0)
    a, b, c = WIDTHS
    return torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.Tanh(), torch.nn.Linear(b, c))


def make_optimizer(model, method, name):
    if name == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return clip(optimizer, CLIPPINGS[method](**({"threshold": 0.3} if method == "layer_wise" else {})))


def train(model, optimizer, rank=None):
    """Parameters and telemetry of some steps; each rank takes its half of a batch, or all is one."""
    rng = torch.Generator().manual_seed(1)
    said = []
    for step in range(STEPS):
        x = torch.randn(8, WIDTHS[0], generator=rng)
        y = torch.randn(8, WIDTHS[2], generator=rng) * (5 if step % 2 else 1)
        if step == BAD_STEP:
            x[-1, 0] = torch.inf  # in the last rank's half
        if rank is not None:
            x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        said.append([float(value) for value in optimizer.clipping.telemetry])
    return said


def whole(param):
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()


def run_rank(rank, folder):
    """One process: all runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for kind, method, name in RUNS:
        model = make_model()
        if kind == "fsdp":
            fully_shard(model, mesh=mesh)
        elif kind == "mixed":
            # The second layer is left whole; its gradients are averaged as DDP would.
            fully_shard(model[0], mesh=mesh)
            for param in model[2].parameters():
                param.register_post_accumulate_grad_hook(average)
        else:
            model = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = make_optimizer(model, method, name)
        said = train(model, optimizer, rank)
        results[kind, method, name] = said, [whole(param) for param in model.parameters()]
    (folder / f"rank{rank}").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


def average(param):
    torch.distributed.all_reduce(param.grad)
    param.grad /= WORLD


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(WORLD)]


@pytest.mark.parametrize(("kind", "method", "name"), RUNS)
def test_two_processes_are_one(ranks, kind, method, name):
    # B23
    model = make_model()
    optimizer = make_optimizer(model, method, name)
    said = train(model, optimizer)
    wanted = [whole(param) for param in model.parameters()]
    for result in ranks:
        got_said, got = result[kind, method, name]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            torch.tensor(got_said), torch.tensor(said), rtol=1e-4, atol=1e-6, equal_nan=True
        )
    # Bit for bit between ranks: the thresholds of one must be the other's.
    (said_0, params_0), (said_1, params_1) = (result[kind, method, name] for result in ranks)
    assert repr(said_0) == repr(said_1)
    assert all(map(torch.equal, params_0, params_1))
    assert said[-1][-1] == 1  # the step with an Inf was skipped
    assert (said[-1][-2] > 0) == (method != "no_clip")


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
