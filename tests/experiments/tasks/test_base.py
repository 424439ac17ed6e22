"""What every task promises the runner, held against each ``conf/task/*.yaml``; and the loaders they share."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from experiments.tasks.base import EpochLoader, Output, Task, as_is
from experiments.training.presets import conf_dir

CPU = torch.device("cpu")
TASKS = sorted(path.stem for path in (conf_dir() / "task").glob("*.yaml"))


@functools.cache
def loaded(name: str) -> Task:
    config = {
        "data_dir": None,
        "preset": OmegaConf.load(conf_dir() / f"preset/{name}/mini.yaml"),
        "task": OmegaConf.load(conf_dir() / f"task/{name}.yaml"),
    }
    task = instantiate(OmegaConf.create(config).task)
    task.load()
    return task


def built(task: Task) -> torch.nn.Module:
    torch.manual_seed(0)
    return task.build_model()


def batches(task: Task, seed: int, epoch: int) -> list[dict[str, torch.Tensor]]:
    loader = task.train_loader(seed)
    loader.set_epoch(epoch)
    torch.manual_seed(seed + epoch)  # which must not matter
    return [batch for batch, _ in zip(loader, range(2), strict=False)]


def same(these, those) -> bool:
    return all(
        this.keys() == that.keys() and all(torch.equal(this[name], that[name]) for name in this)
        for this, that in zip(these, those, strict=True)
    )


@pytest.mark.parametrize("name", TASKS)
def test_batches_come_from_seed_and_epoch_alone(name):
    task = loaded(name)
    assert len(task.train_loader(0)) > 0
    first = batches(task, 1, 2)
    again = task.train_loader(1)
    for epoch in (0, 2):
        again.set_epoch(epoch)
        repeated = [batch for batch, _ in zip(again, first, strict=False)]
    assert same(first, repeated)
    assert not same(first, batches(task, 1, 1))
    assert not same(first, batches(task, 2, 2))


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_gives_a_loss_its_size_and_a_tally_that_adds_up(name):
    task = loaded(name)
    model = built(task).train()
    outputs = [task.forward(model, batch) for batch in batches(task, 0, 0)]
    for output in outputs:
        assert output.loss.shape == ()
        assert output.loss.isfinite()
        assert isinstance(output.size, int)
        assert output.size > 0
        assert not getattr(output.tally, "requires_grad", False)
    metrics = task.metrics(sum(output.tally for output in outputs))
    assert task.metric in {*metrics, "loss"}
    assert "loss" not in metrics  # it is recorded anyway
    assert all(type(value) is float for value in metrics.values())
    outputs[0].loss.backward()
    assert any(param.grad is not None and param.grad.any() for param in model.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_repeats_itself_and_builds_no_graph(name):
    task = loaded(name)
    model = built(task).train()
    (batch, *_) = batches(task, 0, 0)
    task.forward(model, batch)
    loss, metrics = task.evaluate(model, CPU)
    assert not model.training
    assert type(loss) is float
    assert math.isfinite(loss)
    assert task.metric in {*metrics, "loss"}
    assert task.evaluate(model, CPU) == (loss, metrics)


@pytest.mark.parametrize("name", TASKS)
def test_models_come_from_the_global_generator(name):
    task = loaded(name)
    first, second = (built(task).state_dict() for _ in range(2))
    assert same([first], [second])


class Numbers(Dataset):
    """0, 1, 2 ..., ten times the epoch added as if it augmented."""

    epoch = 0

    def __len__(self) -> int:
        return 10

    def __getitems__(self, indices):
        return {"x": torch.tensor(indices) + 10 * self.epoch}

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_covers_an_epoch_and_tells_the_data_which_it_is(num_workers):
    loader = EpochLoader(Numbers(), 3, seed=0, collate_fn=as_is, num_workers=num_workers)
    assert len(loader) == 3
    for epoch in (0, 4):
        loader.set_epoch(epoch)
        drawn = torch.stack([batch["x"] for batch in loader])
        assert drawn.shape == (3, 3)
        assert len(drawn.unique()) == 9
        assert (drawn // 10 == epoch).all()


def test_a_set_smaller_than_a_batch_is_one_batch():
    loader = EpochLoader(Numbers(), 64, seed=0, collate_fn=as_is)
    assert [len(batch["x"]) for batch in loader] == [10]


class Means(Task):
    """Batches of unlike size, whose mean loss is their mean."""

    metric = "count"

    def load(self):
        pass

    def build_model(self):
        return torch.nn.Identity()

    def train_loader(self, seed):
        raise NotImplementedError

    def eval_loader(self):
        return [{"x": torch.tensor([1.0, 2.0, 3.0])}, {"x": torch.tensor([10.0])}]

    def forward(self, model, batch):
        x = model(batch["x"])
        assert not torch.is_grad_enabled()
        return Output(x.mean(), len(x), torch.tensor([len(x), 1]))

    def metrics(self, tally):
        return {"count": float(tally[0]), "batches": float(tally[1])}


def test_evaluation_weighs_batches_by_their_size():
    assert Means().evaluate(torch.nn.Identity(), CPU) == (4.0, {"count": 4.0, "batches": 2.0})
