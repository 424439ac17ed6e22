"""The calibrated problem: its gradient, its noise, its statistic, and that clipping matters on it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy import stats

import torch_clip
from experiments.errors import UserError
from experiments.tasks.quadratic import DIMENSIONS, STEPS_IN_EPOCH, Point, Quadratic, gaussian, student
from torch_clip.methods import CLIPPINGS

CPU = torch.device("cpu")
CURVATURE = np.linspace(0.1, 1.0, DIMENSIONS)


def noise_of(task: Quadratic, seed: int, steps: int) -> torch.Tensor:
    loader = task.train_loader(seed)
    return torch.stack([batch["noise"] for batch, _ in zip(loader, range(steps), strict=False)])


def train(task: Quadratic, clipping: str, seed: int, steps: int = 2_000, lr: float = 0.03) -> list[float]:
    """Train with SGD; the recorded losses, and the evaluation last."""
    model = task.build_model()
    optimizer = torch_clip.clip(torch.optim.SGD(model.parameters(), lr=lr, fused=True), CLIPPINGS[clipping]())
    losses = []
    for batch, _ in zip(task.train_loader(seed), range(steps), strict=False):
        output = task.forward(model, batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return [*losses, task.evaluate(model, CPU)[0]]


def test_it_starts_at_ones_with_loss_five_and_a_half():
    model = Quadratic().build_model()
    assert torch.equal(model.x, torch.ones(20))
    assert model(torch.zeros(20)).item() == pytest.approx(5.5)


@pytest.mark.parametrize("size", [0.3, 1e6])
def test_gradient_is_of_the_quadratic_plus_noise_and_loss_is_without(size):
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal(DIMENSIONS), size * rng.standard_t(1.5, DIMENSIONS)
    model = Point()
    with torch.no_grad():
        model.x.copy_(torch.tensor(x))
    loss = Quadratic().forward(model, {"noise": torch.tensor(noise).float()}).loss
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (CURVATURE * x * x).sum(), rel=1e-6)
    np.testing.assert_allclose(model.x.grad.numpy(), CURVATURE * x + noise, rtol=1e-5)


def test_without_noise_the_path_is_that_of_gradient_descent():
    losses = train(Quadratic(scale=0.0), "no_clip", seed=0, steps=300)
    x = (1 - 0.03 * CURVATURE) ** np.arange(300)[:, None]
    expected = 0.5 * (CURVATURE * x**2).sum(1)
    np.testing.assert_allclose(losses[:-1], expected, rtol=1e-4)
    assert losses[-1] == pytest.approx(expected[-200:].mean(), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 150, 200, 201, 350])
def test_evaluation_is_the_mean_loss_of_the_last_200_steps(steps):
    *losses, final = train(Quadratic(), "norm", seed=0, steps=steps)
    assert final == pytest.approx(np.mean(losses[-200:]), rel=1e-6)


def test_recent_losses_travel_with_the_model():
    task, first, second = Quadratic(), Point(), Point()
    for noise in noise_of(task, 0, 5):
        task.forward(first, {"noise": noise})
    second.load_state_dict(first.state_dict())
    assert second.recent_loss() == first.recent_loss() == pytest.approx(5.5)


@pytest.mark.parametrize(
    ("draw", "law"), [(student, stats.t(1.5)), (gaussian, stats.norm())], ids=["student", "gaussian"]
)
def test_noise_has_the_distribution_it_says(draw, law):
    sample = draw((20_000, 20), torch.Generator().manual_seed(1)).numpy()
    assert stats.kstest(sample.ravel(), law.cdf).pvalue > 0.01
    # A test of the bulk says little of the tail: the share beyond its quantiles, within 4 standard errors.
    for share in (1e-2, 1e-3, 1e-4):
        beyond = (np.abs(sample) > law.isf(share / 2)).mean()
        assert beyond == pytest.approx(share, abs=4 * np.sqrt(share / sample.size))
    ranks = np.argsort(np.argsort(np.abs(sample), axis=0), axis=0)
    assert abs(np.corrcoef(ranks.T)[np.triu_indices(20, 1)]).max() < 4 / np.sqrt(len(sample))


def test_noise_is_scaled_and_drawn_apart_for_each_seed_and_epoch():
    task = Quadratic(scale=0.6)
    first = noise_of(task, 3, 40)
    assert first.shape == (40, DIMENSIONS)
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, 2 * noise_of(Quadratic(scale=0.3), 3, 40))
    assert not torch.equal(first, noise_of(task, 4, 40))
    assert not torch.equal(first, noise_of(Quadratic(noise="gaussian", scale=0.6), 3, 40))


def test_noise_is_not_what_the_coin_of_a_randomised_clipping_sees():
    generator = torch.Generator().manual_seed(0)  # as a clipping of seed 0 has it
    as_coin = 0.3 * student((STEPS_IN_EPOCH, DIMENSIONS), generator)
    assert not torch.isclose(noise_of(Quadratic(), 0, 10).double(), as_coin[:10], rtol=1e-4).any()


def test_clipping_wins_under_heavy_tails_and_loses_nothing_under_gaussian_noise():
    """Coarsely, on few seeds; the rule itself takes twenty."""
    final = {
        (noise, clipping): np.array([train(Quadratic(noise=noise), clipping, seed)[-1] for seed in range(3)])
        for noise in ("student", "gaussian")
        for clipping in ("no_clip", "norm")
    }
    assert (final["student", "norm"] < final["student", "no_clip"]).all()
    assert np.median(final["student", "no_clip"]) > 5 * np.median(final["student", "norm"])
    assert np.median(final["gaussian", "norm"]) < 1.1 * np.median(final["gaussian", "no_clip"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "studnt"}, "noise must be student or gaussian, got 'studnt'. Did you mean 'student'?"),
        ({"scale": -0.3}, "scale must be a number in [0, inf), got -0.3"),
        ({"scale": "much"}, "scale must be a number in [0, inf), got 'much'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Quadratic(**settings)
