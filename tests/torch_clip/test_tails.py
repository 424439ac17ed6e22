"""Estimators of tails on samples whose law is known: values, bands, intervals and verdicts."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from torch_clip.tails import (
    FEWEST,
    LEVEL,
    TAILS,
    block,
    compare_lognormal,
    examine,
    hill,
    hill_plot,
    lognormal_p,
    qq,
    skewness,
)

N = 2000
DRAWS = 200
LAWS = {
    "pareto 1.5": lambda rng, n: rng.pareto(1.5, n) + 1,
    "stable 1.5": lambda rng, n: symmetric_stable(rng, 1.5, n),
    "student 1.5": lambda rng, n: rng.standard_t(1.5, n),
    "student 3": lambda rng, n: rng.standard_t(3, n),
    "lognormal": lambda rng, n: rng.lognormal(0, 1, n),
    "lognormal, wide": lambda rng, n: rng.lognormal(0, 2, n),
    "exponential": lambda rng, n: rng.exponential(1, n),
    "normal": lambda rng, n: rng.standard_normal(n),
    "normal, magnitudes": lambda rng, n: np.abs(rng.standard_normal(n)),
    "chi 100": lambda rng, n: np.sqrt(rng.chisquare(100, n)),
}


def symmetric_stable(rng, alpha, n):
    """Chambers, Mallows, Stuck, 1976."""
    angle, wait = np.pi * (rng.random(n) - 0.5), rng.exponential(1, n)
    return (
        np.sin(alpha * angle)
        / np.cos(angle) ** (1 / alpha)
        * (np.cos((1 - alpha) * angle) / wait) ** ((1 - alpha) / alpha)
    )


def samples(law, draws=DRAWS, n=N, seed=0):
    rng = np.random.default_rng(seed)
    return (LAWS[law](rng, n) for _ in range(draws))


def generator(seed=0):
    return np.random.default_rng(seed)


# --- the bands of 200 draws of 2,000 each: median, 5th and 95th percentile


@pytest.mark.parametrize(
    ("law", "estimate", "median", "low", "high"),
    [
        ("pareto 1.5", lambda x: hill(x, 0.02), 1.50, 1.20, 1.98),
        ("pareto 1.5", lambda x: hill(x, 0.05), 1.50, 1.30, 1.79),
        ("pareto 1.5", lambda x: hill(x, 0.1), 1.51, 1.35, 1.69),
        ("stable 1.5", lambda x: hill(x, 0.02), 1.55, 1.25, 2.07),
        ("stable 1.5", lambda x: hill(x, 0.05), 1.64, 1.40, 2.01),
        ("stable 1.5", lambda x: hill(x, 0.1), 1.71, 1.54, 1.93),
        ("stable 1.5", block, 1.51, 1.35, 1.67),
        ("lognormal", lambda x: hill(x, 0.02), 2.73, None, None),
        ("lognormal", lambda x: hill(x, 0.05), 2.38, None, None),
        ("lognormal", lambda x: hill(x, 0.1), 2.09, None, None),
        ("normal", lambda x: hill(x, 0.02), 7.8, None, None),
        ("normal", lambda x: hill(x, 0.05), 5.9, None, None),
        ("normal", lambda x: hill(x, 0.1), 4.7, None, None),
        ("normal", block, 2.00, 1.77, 2.28),
        ("chi 100", lambda x: hill(x, 0.02), 43, None, None),
        ("chi 100", lambda x: hill(x, 0.05), 37, None, None),
        ("chi 100", lambda x: hill(x, 0.1), 32, None, None),
    ],
)
def test_estimates_lie_in_the_known_bands(law, estimate, median, low, high):
    values = np.array([estimate(sample).value for sample in samples(law)])
    # Three standard errors of the difference of two such bands, for a median and for an outer percentile.
    spread = 3 * math.sqrt(2) * values.std() / math.sqrt(DRAWS)
    rounding = 0.05 if median < 10 else 0.5
    assert np.median(values) == pytest.approx(median, abs=1.25 * spread + rounding / 10)
    if low is not None:
        found = np.quantile(values, [0.05, 0.95])
        np.testing.assert_allclose(found, [low, high], atol=2.11 * spread + 0.005, rtol=0)


def test_pooled_coordinates_of_unequal_scale_look_stable_though_each_is_gaussian():
    """The trap: 1.99, 1.78, 1.42, 0.86. Each coordinate divided by its own scale gives 2 again."""
    rng = generator()
    for log_scale, expected in ((0, 1.99), (0.5, 1.78), (1, 1.42), (2, 0.86)):
        pooled, standardised = [], []
        for _ in range(60):
            noise = rng.standard_normal((100, 100)) * np.exp(log_scale * rng.standard_normal(100))
            pooled.append(block(noise.ravel(), 100).value)
            standardised.append(block((noise / noise.std(0)).ravel(), 100).value)
        assert np.median(pooled) == pytest.approx(expected, abs=0.05)
        assert np.median(standardised) == pytest.approx(2, abs=0.1)


# --- verdicts


@pytest.mark.parametrize(
    ("law", "verdict"),
    [
        ("pareto 1.5", "heavy"),
        ("student 1.5", "heavy"),
        ("normal", "not heavy"),
        ("normal, magnitudes", "not heavy"),
        ("chi 100", "not heavy"),
    ],
)
def test_verdict_is_right_in_at_least_95_percent_of_draws(law, verdict):
    found = [examine(sample).verdict for sample in samples(law)]
    assert found.count(verdict) >= 0.95 * DRAWS


@pytest.mark.parametrize("law", ["lognormal", "lognormal, wide", "exponential", "student 3"])
def test_what_has_a_finite_variance_is_not_called_heavy(law):
    found = [examine(sample).verdict for sample in samples(law)]
    assert found.count("heavy") <= 0.04 * DRAWS


@pytest.mark.slow
@pytest.mark.parametrize("n", [2000, 20_000])
def test_verdicts_on_fresh_draws(n):
    """1,000 of them, so that the rates are known to a percent."""
    for law, verdict in (("pareto 1.5", "heavy"), ("normal", "not heavy"), ("chi 100", "not heavy")):
        found = [examine(sample).verdict for sample in samples(law, draws=1000, n=n, seed=1)]
        assert found.count(verdict) >= 950, law
    for law in ("lognormal", "lognormal, wide"):
        found = [examine(sample).verdict for sample in samples(law, draws=1000, n=n, seed=1)]
        assert found.count("heavy") <= 30, law


@pytest.mark.parametrize("law", LAWS)
def test_few_values_are_undecided(law):
    (sample,) = samples(law, draws=1, n=FEWEST - 1)
    found = examine(sample)
    assert found.verdict == "undecided"
    assert f"at least {FEWEST} are needed" in found.reason


def test_reasons_say_what_stands_against_heavy():
    (lognormal,) = samples("lognormal, wide", draws=1)
    assert "the whole sample may be lognormal" in examine(lognormal).reason
    (student,) = samples("student 3", draws=1, n=20_000)
    assert "the variance seems finite" in examine(student).reason
    (lognormal,) = samples("lognormal", draws=1)
    assert "reaches across 2" in examine(lognormal).reason
    # Stretched exponentials are no lognormals, and further in they look like power laws.
    assert "rises from 1." in examine(generator().weibull(0.5, 20_000)).reason
    assert "lognormal fits the tail better" in examine(generator().weibull(0.3, 20_000)).reason


def test_a_power_law_that_is_cut_off_is_undecided():
    """Further in it has a tail index of 1.5, at the end of 20."""
    sample = generator().pareto(1.5, N) + 1
    last = np.quantile(sample, 0.98)
    cut = np.where(sample > last, last * (sample / last) ** (1.5 / 20), sample)
    found = examine(cut)
    assert found.verdict == "undecided"
    assert "rises from 1." in found.reason


def test_samples_without_spread_and_with_zeros():
    assert examine(np.full(N, 3.0)).verdict == "not heavy"
    (sample,) = samples("pareto 1.5", draws=1)
    assert examine(np.concatenate([sample, np.zeros(500)])).hill == examine(sample).hill


def test_unit_and_order_do_not_matter():
    (sample,) = samples("pareto 1.5", draws=1)
    found = examine(sample)
    for other in (examine(1e-6 * sample), examine(sample[::-1].copy())):
        assert other.verdict == found.verdict
        np.testing.assert_allclose(list(other.hill.values()), list(found.hill.values()), rtol=1e-9)
        np.testing.assert_allclose(other.skewness, found.skewness, rtol=1e-9)
        assert other.lognormal.log_ratio == pytest.approx(found.lognormal.log_ratio, abs=1e-8)


# --- each estimator against its formula


def test_hill_is_its_formula_in_numpy():
    (sample,) = samples("stable 1.5", draws=1)
    logs = np.log(np.sort(np.abs(sample))[::-1])
    for k in (1, 40, 200, N - 1):
        expected = 1 / (logs[:k] - logs[k]).mean()
        assert hill(sample, k).value == pytest.approx(expected, rel=1e-12)
    assert hill(sample, 0.02) == hill(sample, 40)
    assert hill(torch.tensor(sample), 40) == hill(sample.tolist(), 40)


def test_hill_plot_holds_the_same_estimates_and_falls_for_a_lognormal():
    (sample,) = samples("lognormal", draws=1)
    plot = hill_plot(sample)
    assert plot.k[0] == 5
    assert plot.k[-1] == N // 5
    for place in (0, 100, -1):
        expected = hill(sample, int(plot.k[place]))
        np.testing.assert_allclose([float(part[place]) for part in plot[1:]], expected, rtol=1e-12)
    assert hill_plot(sample, [40, 200]).k.tolist() == [40, 200]
    by_share = np.mean([hill_plot(x, [40, 100, 200]).alpha.numpy() for x in samples("lognormal")], axis=0)
    assert (np.diff(by_share) < 0).all()


@pytest.mark.parametrize("k", [10, 40, 200, 2000])
def test_the_interval_of_hill_is_that_of_a_gamma_law(k):
    sample = generator().pareto(1.5, 5000) + 1
    value, low, high = hill(sample, k)
    np.testing.assert_allclose([low / value, high / value], stats.gamma(k).ppf([0.025, 0.975]) / k, rtol=2e-3)


@pytest.mark.parametrize(
    ("law", "truth", "estimate"),
    [
        ("pareto 1.5", 1.5, lambda x: hill(x, 0.1)),
        ("stable 1.5", 1.5, block),
        ("normal", 2.0, block),
        ("normal", 0.0, skewness),
    ],
)
def test_intervals_hold_the_truth_in_95_percent(law, truth, estimate):
    found = [estimate(sample) for sample in samples(law, draws=4000)]
    covered = np.mean([low <= truth <= high for _, low, high in found])
    assert 0.93 <= covered <= 0.97


def test_block_is_its_formula_in_numpy():
    (sample,) = samples("stable 1.5", draws=1)
    blocks = sample[:1995].reshape(95, 21)
    expected = (np.log(np.abs(blocks.sum(1))).mean() - np.log(np.abs(blocks)).mean()) / np.log(21)
    assert 1 / block(sample, 21).value == pytest.approx(expected, rel=1e-12)


def test_block_is_asked_of_samples_of_both_signs_only():
    (sample,) = samples("normal", draws=1)
    assert examine(sample).block == block(sample)
    assert examine(np.abs(sample)).block is None


def test_the_lognormal_is_the_one_of_most_likelihood():
    rng = generator()
    for law, k in (("lognormal", 200), ("normal", 200), ("pareto 1.5", 400), ("chi 100", 1000)):
        sample = np.abs(LAWS[law](rng, N))
        fit = compare_lognormal(sample, k)
        ordered = np.sort(sample)[::-1]
        tail, x_min = ordered[:k], ordered[k]
        assert fit.x_min == x_min
        power = np.sum(np.log(fit.alpha / tail) - fit.alpha * np.log(tail / x_min))

        def log_likelihood(theta, tail=tail, x_min=x_min):
            mu, sigma = theta[0], np.exp(theta[1])
            above = stats.norm.logsf(np.log(x_min), mu, sigma)
            return np.sum(stats.norm.logpdf(np.log(tail), mu, sigma) - np.log(tail) - above)

        start = [np.log(tail).mean(), np.log(np.log(tail).std())]
        best = optimize.minimize(lambda theta: -log_likelihood(theta), start, method="Nelder-Mead", tol=1e-9)
        assert fit.log_ratio == pytest.approx(power + best.fun, abs=1e-4)
        if math.isfinite(fit.mu):
            ours = log_likelihood([fit.mu, math.log(fit.sigma)])
            assert fit.log_ratio == pytest.approx(power - ours, abs=1e-8)


def test_the_lognormal_is_no_better_where_the_tail_spreads_more_than_a_power_law():
    sample = np.exp(generator().pareto(2.0, N))
    fit = compare_lognormal(sample)
    assert (fit.log_ratio, fit.p, fit.vuong_p, fit.mu) == (0, 1, 1, -math.inf)


def test_power_laws_are_rejected_as_often_as_the_level_says():
    p = np.array([compare_lognormal(x).p for x in samples("pareto 1.5", draws=1000)])
    for level in (0.1, 0.05, LEVEL):
        assert np.mean(p < level) == pytest.approx(level, abs=4 * math.sqrt(level / 1000))
    assert np.mean(p == 1) == pytest.approx(0.5, abs=0.08)


def test_the_power_law_package_agrees():
    powerlaw = pytest.importorskip("powerlaw")
    for sample in samples("lognormal", draws=3):
        ours = compare_lognormal(sample, 400)
        tail = np.sort(sample)[-400:]
        theirs = powerlaw.Fit(tail, xmin=ours.x_min, verbose=False)
        assert theirs.power_law.alpha - 1 == pytest.approx(ours.alpha, rel=1e-3)
        ratio, p = theirs.distribution_compare("power_law", "lognormal")
        assert ratio == pytest.approx(ours.log_ratio, rel=0.05, abs=0.05)
        assert p == pytest.approx(ours.vuong_p, abs=0.03)


def test_lognormality_is_jarque_and_beras():
    for law in LAWS:
        (sample,) = samples(law, draws=1)
        expected = stats.jarque_bera(np.log(np.abs(sample))).pvalue
        assert lognormal_p(sample) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_skewness_is_scipys():
    (sample,) = samples("lognormal", draws=1)
    assert skewness(sample).value == pytest.approx(stats.skew(sample), rel=1e-12)
    (sample,) = samples("normal", draws=1)
    value, low, high = skewness(sample)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(6 / N), rel=0.1)
    assert (low + high) / 2 == pytest.approx(value)


def test_the_interval_of_skewness_is_that_of_the_jackknife():
    (sample,) = samples("exponential", draws=1)
    others = np.broadcast_to(sample, (N, N))[~np.eye(N, dtype=bool)].reshape(N, N - 1)
    error = np.sqrt((N - 1) * stats.skew(others, axis=1).var())
    _, low, high = skewness(sample)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_qq_has_normal_quantiles_and_a_band_that_normal_samples_keep_to():
    inside = []
    for sample in samples("normal", draws=50):
        plot = qq(sample)
        np.testing.assert_array_equal(plot.sample, np.sort(sample))
        inside.append(((plot.low <= plot.sample) & (plot.sample <= plot.high)).double().mean())
    expected = sample.mean() + sample.std(ddof=1) * stats.norm.ppf((np.arange(N) + 0.5) / N)
    np.testing.assert_allclose(plot.normal, expected, rtol=1e-9)
    # Wider than it would be around the true line, as mean and deviation are fitted: seldom left.
    assert 0.93 < np.mean(inside) <= 1
    (heavy,) = samples("pareto 1.5", draws=1)
    plot = qq(heavy)
    assert plot.sample[-1] > plot.high[-1]


# --- what is said


def test_what_is_found_can_be_read():
    (sample,) = samples("normal", draws=1)
    found = examine(sample)
    lines = str(found).splitlines()
    assert lines[0] == f"not heavy: {found.reason}"
    assert lines[1].split() == ["values", str(N)]
    for share in TAILS:
        assert f"largest {share:.0%}: {found.hill[share]}" in lines[2]
    assert str(found.block) in lines[3]
    assert f"p = {found.lognormal.p:.2g}" in lines[4]
    assert str(found.skewness) in lines[5]
    assert str(hill([4.0, 2.0, 1.0], 2)).startswith("0.96 [")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: hill([1.0, math.nan]), "1 of 2 values are not finite"),
        (lambda: hill([[1.0, 2.0]]), r"one dimension and at least two values, got \(1, 2\)"),
        (lambda: hill([1.0, 2.0, 3.0], 3), r"a number from 1 to 2, got 3"),
        (lambda: hill([1.0, 2.0, 3.0], 1.5), r"a share in \(0, 1\)"),
        (lambda: hill([1.0, 2.0, 3.0], 0.0), r"a share in \(0, 1\)"),
        (lambda: block([1.0, -2.0, 3.0], 2), "size must be from 2 to half of the 3 values, got 2"),
        (lambda: compare_lognormal([2.0, 2.0, 2.0, 1.0], 2), "the 2 largest values are all 2"),
        (lambda: examine([1.0] * 39 + [0.0] * 10), "at least 40 values that are not 0, got 39"),
    ],
)
def test_what_cannot_be_asked(call, told):
    with pytest.raises(ValueError, match=told):
        call()
