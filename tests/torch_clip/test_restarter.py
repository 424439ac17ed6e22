"""Restarts: right count, right mean, in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_clip import clip
from torch_clip.methods import AutoClip, NormClip
from torch_clip.optimizers import ClippedSGD, ClippedSSTM
from torch_clip.optimizers_collector import (
    ModelProperties,
    OptimizerProperties,
    OptimizersCollector,
    OptimizersCollectorWithRestarts,
    RestartProperties,
)
from torch_clip.restarter import Restarter, RestartScheduler, RunningMean

PROPERTIES = OptimizerProperties(ClippedSGD, lr=0.1, momentum=0.9, clipping_type="norm", clipping_level=1)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def set_all(net: nn.Module, value: float) -> None:
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(value)


def values(net: nn.Module) -> list[float]:
    return [value for param in net.parameters() for value in param.flatten().tolist()]


def test_restart_goes_to_the_mean_of_the_points_after_exactly_so_many():
    # B36: divided by the number of points; B38: after the first 5 points, not 6; B39: the interval grows.
    net = model()
    optimizer = PROPERTIES.optimizer_class(net.parameters(), **PROPERTIES.optimizer_kwargs)
    restarter = Restarter(PROPERTIES, first_restart_steps_cnt=5, restart_coeff=1.5, max_steps_cnt=9)
    restarts, point = [], 0
    for interval in (5, 8, 9, 9):
        start = point
        for _ in range(interval):
            point += 1
            set_all(net, float(point))
            restarter.add_coords(net.parameters())
            assert restarter.make_restart(net, optimizer) is optimizer
            if values(net)[0] != point:
                restarts.append(point)
        assert values(net) == pytest.approx([start + (interval + 1) / 2] * len(values(net)))
    assert restarts == [5, 13, 22, 31]


def test_an_interval_of_one_grows():
    net, restarter = model(), Restarter(PROPERTIES, 1, 1.0, 10)  # B39
    optimizer = torch.optim.SGD(net.parameters())
    lengths, length = [], 0
    for _ in range(10):
        restarter.add_coords(net.parameters())
        length += 1
        before = restarter.state_dict()["interval"]["length"]
        restarter.make_restart(net, optimizer)
        if restarter.state_dict()["interval"]["length"] != before:
            lengths.append(length)
            length = 0
    assert lengths == [1, 2, 3, 4]


def test_restart_is_in_place():
    # B40: frozen stays frozen; B41, B42: the optimizer, its scheduler, groups and settings stay.
    net = model()
    net[0].weight.requires_grad_(False)
    groups = [{"params": net[0].parameters(), "lr": 0.3}, {"params": net[1].parameters()}]
    optimizer = clip(torch.optim.SGD(groups, lr=0.1, momentum=0.9), AutoClip())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    frozen, pointers = net[0].weight.clone(), [param.data_ptr() for param in net.parameters()]
    restarter = Restarter(PROPERTIES, first_restart_steps_cnt=3)
    for _ in range(3):
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        restarter.add_coords(net.parameters())
    assert optimizer.state
    assert len(optimizer.clipping.threshold.history) == 3
    optimizer = restarter.make_restart(net, optimizer)
    assert not optimizer.state
    assert len(optimizer.clipping.threshold.history) == 0
    assert optimizer.clipping.state_dict()["steps"] == 3
    assert [param.data_ptr() for param in net.parameters()] == pointers
    assert [param.requires_grad for param in net.parameters()] == [False, True, True, True]
    assert torch.equal(net[0].weight, frozen)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.15, 0.05]


def test_the_mean_is_one_float32_buffer_for_each_parameter():
    # B37; 1,000 bfloat16 points whose sum a bfloat16 would lose.
    param = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    mean = RunningMean()
    for k in range(1000):
        with torch.no_grad():
            param.fill_(k % 2)
        mean.add([param])
    (buffer,) = mean.state_dict()["means"]
    assert buffer.dtype is torch.float32
    assert buffer.tolist() == pytest.approx([0.5] * 8, rel=1e-4)
    with pytest.raises(ValueError, match="not those of the calls before"):
        mean.add([nn.Parameter(torch.zeros(8))])


def test_restarter_resumes():
    def go(net, restarter, optimizer, points):
        for point in points:
            set_all(net, float(point))
            restarter.add_coords(net.parameters())
            restarter.make_restart(net, optimizer)

    one, other = model(), model()
    first, second = Restarter(PROPERTIES, 4), Restarter(PROPERTIES, 4)
    go(one, first, torch.optim.SGD(one.parameters()), range(10))
    go(other, second, torch.optim.SGD(other.parameters()), range(7))
    third = Restarter(PROPERTIES, 4)
    third.load_state_dict(second.state_dict())
    assert str(third.state_dict()) == str(second.state_dict())
    go(other, third, torch.optim.SGD(other.parameters()), range(7, 10))
    assert values(one) == values(other)
    assert values(one)[0] != 9.0


def test_points_of_another_model_are_refused():
    restarter = Restarter(PROPERTIES, 1)
    restarter.add_coords(model().parameters())
    net = model()
    with pytest.raises(ValueError, match="another model"):
        restarter.make_restart(net, torch.optim.SGD(net.parameters()))


def quadratic_step(param, optimizer, generator):
    param.grad = param.detach() + torch.randn(param.shape, generator=generator)
    optimizer.step()


def test_scheduler_averages_at_a_constant_interval_and_decays_the_threshold():
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.ones(3))
    optimizer = ClippedSGD([param], 0.1, 0.9, clipping_level=2.0)
    scheduler = RestartScheduler(optimizer, first=4, threshold_decay=0.5)
    for restart in range(1, 4):
        points = []
        for k in range(4):
            quadratic_step(param, optimizer, generator)
            points.append(param.detach().clone())
            assert scheduler.step() == (k == 3)
        torch.testing.assert_close(param.detach(), torch.stack(points).mean(0))
        assert optimizer.clipping.threshold.value == 2.0 * 0.5**restart
        assert not optimizer.state
    again = RestartScheduler(ClippedSGD([nn.Parameter(torch.ones(3))]), first=4, threshold_decay=0.5)
    again.load_state_dict(scheduler.state_dict())
    assert again.restarts == 3
    assert again.optimizer.clipping.threshold.value == 0.25


def test_scheduler_restarts_sstm_from_its_output():
    # B43: from y, where the papers restart, with k and A anew.
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.ones(3))
    optimizer = ClippedSSTM([param], 0.1, 1.0, clipping_type="norm")
    scheduler = RestartScheduler(optimizer, first=5, output="last")
    for k in range(5):
        quadratic_step(param, optimizer, generator)
        if k == 4:
            optimizer.eval()
            y = param.detach().clone()
            optimizer.train()
        scheduler.step()
    torch.testing.assert_close(param.detach(), y)
    assert optimizer.param_groups[0]["k"] == 0
    assert optimizer.param_groups[0]["A"] == 0.0
    assert optimizer.param_groups[0]["training"]
    quadratic_step(param, optimizer, generator)


def test_restarter_takes_sstm_from_its_output():
    # B43
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.ones(3))
    net = nn.ParameterList([param])
    optimizer = ClippedSSTM([param], 0.1, 1.0, clipping_type="norm")
    restarter = Restarter(OptimizerProperties(ClippedSSTM, lr=0.1, L=1.0), 3)
    for _ in range(3):
        quadratic_step(param, optimizer, generator)
        restarter.add_coords([param])
    optimizer.eval()
    y = param.detach().clone()
    optimizer.train()
    restarter.make_restart(net, optimizer)
    torch.testing.assert_close(param.detach(), y)
    assert optimizer.param_groups[0]["k"] == 0
    assert RestartScheduler(optimizer).output == "last"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "middle"}, "output must be one of average, last, got 'middle'"),
        ({"threshold_decay": 0.0}, "threshold_decay must be in"),
        ({"first": 0}, "at least 1 step, got 0"),
        ({"factor": 0.5}, "factor of at least 1, got 0.5"),
        ({"first": 9, "max_interval": 3}, "at least the first, 9, got 3"),
    ],
)
def test_scheduler_settings_out_of_range(settings, message):
    optimizer = clip(torch.optim.SGD([nn.Parameter(torch.ones(1))]), NormClip())
    with pytest.raises(ValueError, match=message):
        RestartScheduler(optimizer, **settings)


def test_threshold_decay_needs_a_constant_threshold():
    optimizer = clip(torch.optim.SGD([nn.Parameter(torch.ones(1))]), AutoClip())
    with pytest.raises(ValueError, match="constant threshold"):
        RestartScheduler(optimizer, threshold_decay=0.5)


def test_collector_starts_all_models_from_the_same_weights():
    properties = [PROPERTIES, OptimizerProperties(torch.optim.Adam, lr=1e-3)]
    collector = OptimizersCollector(
        ModelProperties(nn.Linear, in_features=3, out_features=2),
        properties,
        bs_muls=[4, 1],
        history_random_seed=7,
    )
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    first, second = collector.get_nets()
    assert values(first) == values(second)
    assert first.weight is not second.weight
    assert collector.get_names_optimizers() == [
        "ClippedSGD; lr=0.1, momentum=0.9, clipping_type=norm, clipping_level=1",
        "Adam; lr=0.001",
    ]
    assert isinstance(collector.get_optimizer_objects()[0], ClippedSGD)
    assert collector.get_optimizer_objects()[1].param_groups[0]["params"][0] is second.weight
    assert collector.bs_muls == [4, 1]  # B46
    assert collector.lr_decays == [1, 1]
    with pytest.raises(ValueError, match="lr_decays needs a value for each of 2 optimizers, got 1"):
        OptimizersCollector(
            ModelProperties(nn.Linear, in_features=3, out_features=2), properties, lr_decays=[1]
        )


def test_collector_with_restarts():
    collector = OptimizersCollectorWithRestarts(
        ModelProperties(nn.Linear, in_features=3, out_features=2),
        [PROPERTIES, PROPERTIES],
        [RestartProperties(Restarter, first_restart_steps_cnt=2), None],
        start_point_random_seed=1,
    )
    both = OptimizersCollectorWithRestarts(
        ModelProperties(nn.Linear, in_features=3, out_features=2),
        [PROPERTIES, PROPERTIES],
        RestartProperties(Restarter),
        1,
        2,
        [4, 1],
    )
    assert all(isinstance(restarter, Restarter) for restarter in both.get_restarters())
    assert both.bs_muls == [4, 1]
    restarter, none = collector.get_restarters()
    assert none is None
    assert restarter.state_dict()["interval"]["length"] == 2
    assert RestartProperties(Restarter).get_kwargs() == {
        "first_restart_steps_cnt": 100,
        "restart_coeff": 1.5,
        "max_steps_cnt": 5000,
    }
