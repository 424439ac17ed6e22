"""The law of two processes, and the processes."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_clip.testing.expect import Make, Run, Skipped, expect, expect_equal, heavy_tailed


def two_processes(make: Make) -> None:
    """Two processes, gradients sharded or alike on both, clip as one: same norms, thresholds and draws."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise Skipped("this torch has no gloo")
    try:
        pickled = pickle.dumps(make)
    except Exception as error:
        raise Skipped(
            f"{make} does not pickle ({error}); give a class that another process can import"
        ) from error
    if b"__main__" in pickled:
        raise Skipped(f"{make} is of __main__; give a class that another process can import")
    wanted = _distributed_run(make, lambda tensor: tensor)
    for rank, got in enumerate(_ranks(pickled)):
        for step, (its, one) in enumerate(zip(got, wanted, strict=True)):
            expect_equal(its, one, f"rank {rank}, step {step}, compared with one process", rtol=1e-4)


def _distributed_run(make: Make, shard: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    stream = heavy_tailed(60, seed=11)
    clipping = make()
    if getattr(clipping, "nonfinite", "skip") == "skip":
        stream[4][-1][-1] = math.inf  # in the last shard only
    steps = [[first, *map(shard, rest)] for first, *rest in stream]  # the first is alike on all ranks
    run = Run(clipping, steps[0])
    results = [run.step(grads) for grads in steps]
    for result in results:
        result["gradient"] = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in result["gradient"]]
    return results


def _ranks(pickled: bytes) -> list[Any]:
    """What two processes got."""
    script = "import sys; from torch_clip.testing import processes; processes.one_rank(*sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "make").write_bytes(pickled)
        processes = []
        try:
            for rank in range(2):
                with open(folder / f"errors{rank}", "w") as errors:
                    command = [sys.executable, "-c", script, name, str(rank)]
                    processes.append(subprocess.Popen(command, env=env, stderr=errors))
            deadline = time.monotonic() + 120
            # One that fails leaves the other waiting.
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                expect(time.monotonic() < deadline, "expected two processes to end, saw them wait for 120 s")
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for rank, code in enumerate(codes):
            if code:
                lines = (folder / f"errors{rank}").read_text().strip().splitlines() or ["no message"]
                raise AssertionError(f"rank {rank} ended with {code}: {lines[-1]}")
        return [torch.load(folder / f"rank{rank}") for rank in range(2)]


def one_rank(folder: str, rank: str) -> None:
    """What each process does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=int(rank), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    make = pickle.loads(Path(folder, "make").read_bytes())
    results = _distributed_run(make, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    torch.save(results, f"{folder}/rank{rank}")
    torch.distributed.destroy_process_group()
