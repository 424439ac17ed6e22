"""The toy expectation problem: its gradient, four noises and statistics, and the spikes clipping removes."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from scipy import stats

import torch_clip
from experiments.errors import UserError
from experiments.tasks.expectation import NOISES, Expectation, RememberedPoint
from torch_clip.methods import NoClip, NormClip

CPU = torch.device("cpu")
START = 0.01 * np.arange(100)
LAWS = {
    "normal": stats.norm(),
    "exponential": stats.expon(),
    "weibull": stats.weibull_min(0.2),
    "burr": stats.burr12(1, 2.3),
}


def train(task: Expectation, clipping, steps: int, seed: int = 0) -> tuple[list[float], dict[str, float]]:
    """Plain SGD; the recorded losses, and the evaluation."""
    model = task.build_model()
    optimizer = torch_clip.clip(torch.optim.SGD(model.parameters(), lr=0.001, fused=True), clipping)
    loader = task.train_loader(seed)
    losses = []
    for step in range(steps):
        if step % len(loader) == 0:
            loader.set_epoch(step // len(loader))
            batches = iter(loader)
        loss = task.forward(model, next(batches)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    mean, metrics = task.evaluate(model, CPU)
    return losses, {"mean": mean, **metrics}


def test_it_starts_where_the_paper_does():
    model = Expectation().build_model()
    np.testing.assert_allclose(model.x.detach().numpy(), START, rtol=1e-6)
    assert model(torch.zeros(100)).item() == pytest.approx(16.4175)


def test_gradient_is_the_point_plus_noise_and_loss_is_without():
    noise = np.random.default_rng(0).standard_t(2, 100)
    model = RememberedPoint()
    loss = Expectation().forward(model, {"noise": torch.tensor(noise).float()}).loss
    loss.backward()
    assert loss.item() == pytest.approx(16.4175)
    np.testing.assert_allclose(model.x.grad.numpy(), START + noise, rtol=1e-5)


# The noises


@pytest.mark.parametrize("name", NOISES)
def test_noise_has_the_distribution_it_says(name):
    """Against scipy's law, shifted and scaled by scipy's own mean and deviation."""
    law = LAWS[name]
    sample = NOISES[name]((4_000, 100), torch.Generator().manual_seed(2)).numpy()
    assert sample.dtype == np.float64
    raw = sample * law.std() + law.mean()
    assert stats.kstest(raw.ravel(), law.cdf).pvalue > 0.01
    # A test of the bulk says little of the tail: the share beyond its quantiles, within 4 standard errors.
    for share in (1e-2, 1e-3, 1e-4):
        beyond = (raw > law.isf(share)).mean()
        assert beyond == pytest.approx(share, abs=4 * np.sqrt(share / sample.size))
    ranks = np.argsort(np.argsort(sample, axis=0), axis=0)
    assert abs(np.corrcoef(ranks.T)[np.triu_indices(100, 1)]).max() < 5 / np.sqrt(len(sample))


@pytest.mark.parametrize("name", ["exponential", "weibull", "burr"])
def test_the_rarest_draws_are_finite(name, monkeypatch):
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda shape, **options: ends)
    assert NOISES[name]((2,), torch.Generator()).isfinite().all()


def test_each_noise_seed_and_epoch_has_its_own_draws():
    def first(noise, seed, epoch):
        loader = Expectation(noise=noise).train_loader(seed)
        loader.set_epoch(epoch)
        return next(iter(loader))["noise"]

    drawn = [first(*of) for of in (("burr", 0, 0), ("burr", 0, 1), ("burr", 1, 0), ("normal", 0, 0))]
    assert all(noise.shape == (100,) and noise.dtype == torch.float32 for noise in drawn)
    assert len({tuple(noise.tolist()) for noise in drawn}) == 4


# The statistics


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_evaluation_looks_at_the_second_half(steps):
    losses, found = train(Expectation(), NoClip(), steps)
    late = losses[steps // 2 :]
    assert found == pytest.approx(
        {"mean": np.mean(late), "median": np.median(late), "max": max(late)}, rel=1e-6
    )


def test_evaluation_in_between_changes_nothing():
    task, model = Expectation(), RememberedPoint()
    batches = iter(task.train_loader(0))
    for _ in range(4):
        task.forward(model, next(batches))
        task.evaluate(model, CPU)
    assert len(model.losses()) == 4


def test_losses_travel_with_the_model_through_a_file():
    task, first, second = Expectation(), RememberedPoint(), RememberedPoint()
    for batch, _ in zip(task.train_loader(0), range(5), strict=False):
        task.forward(first, batch).loss.backward()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    task.forward(first, batch)
    task.forward(second, batch)
    assert torch.equal(first.losses(), second.losses())
    assert len(second.losses()) == 6


def test_losses_hold_no_graph():
    model = RememberedPoint()
    model(torch.zeros(100))
    assert not model.losses().requires_grad


def test_without_noise_the_path_is_that_of_gradient_descent(monkeypatch):
    monkeypatch.setitem(NOISES, "normal", lambda shape, generator: torch.zeros(shape))
    losses, _ = train(Expectation(noise="normal"), NoClip(), steps=200)
    np.testing.assert_allclose(losses, 16.4175 * 0.999 ** (2 * np.arange(200)), rtol=1e-4)


# What the paper shows


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_clipping_removes_the_late_spikes_and_leaves_the_median(seed):
    found = {
        name: train(Expectation(noise="weibull"), clipping, 20_000, seed)[1]
        for name, clipping in (("none", NoClip()), ("norm", NormClip(threshold=100.0)))
    }
    assert found["norm"]["max"] < 0.045 < found["none"]["max"]
    assert found["norm"]["median"] == pytest.approx(found["none"]["median"], rel=0.35)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", "exponential"])
def test_light_tails_are_never_clipped_and_settle_where_theory_says(noise):
    losses, found = train(Expectation(noise=noise), NoClip(), 20_000)
    clipped, _ = train(Expectation(noise=noise), NormClip(threshold=100.0), 20_000)
    assert losses == clipped
    assert found["mean"] == pytest.approx(0.1 / (2 * (2 - 0.001)), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "weibul"}, "noise must be normal, exponential, weibull, burr, got 'weibul'. Did you mean"),
        ({"noise": None}, "got None"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Expectation(**settings)
