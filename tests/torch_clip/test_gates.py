"""The random gate: its draws, their frequency, their independence."""

import math

import pytest
import torch

from torch_clip import CLIPPINGS, clip
from torch_clip.gates import RandomGate, uniform
from torch_clip.methods import LinearRandNormClip

RANDOM = [
    name for name, method in CLIPPINGS.items() if isinstance(getattr(method(), "gate", None), RandomGate)
]
SEEDS = [0, 1, 12345, -7, 2**63 + 11, 2**80 + 3]

# The first outputs of SplitMix64 as published, from seeds 0 and 1234567.
PUBLISHED = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431],
}


def test_uniform_is_splitmix64():
    for seed, words in PUBLISHED.items():
        for step, word in enumerate(words):
            assert uniform(seed, step) == (word >> 11) / 2**53


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_is_equal_on_host_and_device(seed):
    steps = [*range(200), 10**6, 2**40 + 1]
    there = uniform(seed, torch.tensor(steps))
    assert there.dtype is torch.float64
    assert there.tolist() == [uniform(seed, step) for step in steps]
    assert 0 <= there.min() <= there.max() < 1


def test_streams_of_neighbouring_seeds_differ():
    draws = torch.stack([uniform(seed, torch.arange(10_000)) for seed in range(4)])
    correlation = torch.corrcoef(draws) - torch.eye(4)
    assert correlation.abs().max() < 4 / math.sqrt(10_000)
    assert (draws.mean(dim=1) - 0.5).abs().max() < 4 * math.sqrt(1 / 12 / 10_000)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("beta", "coef"), [(0.85, 0.2), (0.5, 0.2), (0.85, 0.8), (0.1, 0.9), (0.3, 0.0)])
def test_frequency_of_clipping(power, beta, coef):
    count = 100_000
    wanted = beta ** (coef**power)
    fired = RandomGate(beta, power, seed=5).fires(coef, torch.arange(count)).double().mean().item()
    assert fired == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / count) + 1e-12)


def test_seeded_exact_case(parameters):
    """n = 5, T = 1, beta = 0.5: the gradient is clipped in the steps whose draw is below 0.5 ** 0.2."""
    clipping = LinearRandNormClip(1.0, beta=0.5, seed=1234567)
    coefs = [clipping.clip_(parameters([3.0, 4.0])).clip_coef for _ in range(4)]
    words = PUBLISHED[1234567]
    assert coefs == pytest.approx([0.2 if word / 2**64 < 0.870551 else 1.0 for word in words])
    long = LinearRandNormClip(1.0, beta=0.5, seed=1)
    got = [long.clip_(parameters([3.0, 4.0])).clipped for _ in range(300)]
    assert got == [float(uniform(1, step) < 0.5**0.2) for step in range(300)]
    assert 0 < sum(got) < 300


@pytest.mark.parametrize("name", RANDOM)
def test_one_draw_for_all_parameters(parameters, name):
    # B6: the direction of the gradient is kept.
    clipping = CLIPPINGS[name](beta=0.3, seed=2)
    fates = set()
    for step in range(40):
        params = parameters(*[[(step % 5 + 1) / 5] * 3] * 10)
        before = params[0].grad[0].item()
        clipping.clip_(params)
        (after,) = {element for param in params for element in param.grad.tolist()}
        fates.add(after == before)
    assert fates == {True, False}


@pytest.mark.parametrize("name", RANDOM)
def test_draws_do_not_depend_on_the_gradients(parameters, name):
    """One draw a step, whether the gradient is short, absent, or not finite."""
    one, other = CLIPPINGS[name](beta=0.5, seed=3), CLIPPINGS[name](beta=0.5, seed=3)
    for value in (0.1, torch.nan, 0.2, torch.inf, 0.0, 0.3):
        one.clip_(parameters([value]))
        other.clip_(parameters([0.1]) if value != 0.2 else [])
    one.threshold.reset(), other.threshold.reset()
    for norm in (1.0, 30.0, 2.0, 50.0, 60.0, 90.0):
        first, second = one.clip_(parameters([norm])), other.clip_(parameters([norm]))
        assert first.clip_coef == second.clip_coef


@pytest.mark.parametrize("name", RANDOM)
def test_seeds_give_different_decisions(parameters, name):
    clippings = [CLIPPINGS[name](beta=0.3, seed=seed) for seed in (0, 1)]
    decisions = [
        [clipping.clip_(parameters([float(k + 2)])).clipped for k in range(60)] for clipping in clippings
    ]
    assert decisions[0] != decisions[1]


@pytest.mark.parametrize("name", RANDOM)
def test_torchs_generator_is_left_alone(name):
    """A random method shifts neither torch.rand nor dropout, and a reseeded torch does not shift it."""

    def losses(clipping):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        # The weights stay, so that the losses show the masks and nothing else.
        optimizer = clip(torch.optim.SGD(model.parameters(), lr=0.0), clipping)
        seen = []
        for step in range(20):
            loss = (model(torch.randn(3, 4)) * (step + 1)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += [loss.item(), torch.rand(()).item()]
        return seen

    assert losses(CLIPPINGS[name](beta=0.5)) == losses(CLIPPINGS["no_clip"]())


@pytest.mark.parametrize("name", RANDOM)
def test_decisions_are_the_clippings_own(parameters, name):
    def decisions(reseed):
        clipping = CLIPPINGS[name](beta=0.2, seed=4)
        fired = []
        for k in range(40):
            if reseed:
                torch.manual_seed(k)
            fired.append(clipping.clip_(parameters([1.1 + k / 100])).clipped)
        return fired

    assert decisions(reseed=False) == decisions(reseed=True)
    assert 5 < sum(decisions(reseed=False)) < 35
