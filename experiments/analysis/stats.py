"""Statistics of runs: arrays in, numbers out. No files, no plots.

A value that is not finite comes from a run that diverged. It is never left out: everywhere it counts as worse
than any number, whichever way the metric points, and NaN and both infinities are the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

ALPHA = 0.05
POWER = 0.8
EXACT_FROM = 10
"""Seeds from which a bootstrap interval holds what it says; with fewer it is too narrow: approximate."""
REPETITIONS = 5000
"""Of a bootstrap."""
RESOLUTION = 1e-6
"""Relative; values that differ by less are one number, but for the rounding of float32."""
HORIZON = 4.0
"""Times the best time at which a performance profile ends."""

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no detectable difference"


class Interval(NamedTuple):
    """A number and its 95 % interval, NaN where there is none."""

    value: float
    low: float
    high: float


class Judgement(NamedTuple):
    """What paired seeds say of a method, next to a reference."""

    seeds: int
    """Pairs."""
    difference: Interval
    """Mean of method - reference, in the metric's unit; infinite or NaN where a run diverged."""
    ratio: Interval
    """Geometric mean of method / reference; NaN unless ``test`` is of it."""
    test: str
    """What p is of: ``difference``, ``ratio`` where lower is better and all values are above 0, ``ranks``
    where a run diverged, or ``none`` where there are too few seeds."""
    p: float
    p_holm: float
    verdict: str
    """``better``, ``worse`` or ``no detectable difference``."""
    detectable: float
    """Smallest true difference, or factor above 1, that such seeds find with ``POWER`` at the strictest
    step of Holm; infinite where they are too few, NaN where a run diverged, or where each pair is of equal
    runs, which say nothing of their spread."""
    decidable: bool
    """Whether the same values could have given a verdict, had they fallen otherwise to method and reference:
    not so below two pairs, nor where a run diverged and not even ranks without overlap would pass Holm."""
    wins: float
    """Share of the pairs in which the method is better; ties count half."""
    improvement: float
    """Probability that a run of the method beats one of the reference, whatever their seeds."""


def to_scores(values: ArrayLike, higher_is_better: bool) -> np.ndarray:
    """Turn a metric so that larger is better; -inf for what is not finite.

    Example:
        >>> to_scores([0.5, float("nan"), float("-inf")], higher_is_better=False).tolist()
        [-0.5, -inf, -inf]
    """
    values = np.asarray(values, float)
    return np.where(np.isfinite(values), values if higher_is_better else -values, -np.inf)


def mean_interval(values: ArrayLike, least_spread: float = 0.0) -> Interval:
    """Mean with its t-interval; no interval of one value, or where one is not finite.

    Args:
        values: of which it is.
        least_spread: standard deviation to assume where theirs is smaller.
    """
    values = np.asarray(values, float)
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and meant so
        mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(values).all():
        return Interval(mean, math.nan, math.nan)
    standard_error = max(float(values.std(ddof=1)), least_spread) / math.sqrt(len(values))
    half = float(special.stdtrit(len(values) - 1, 1 - ALPHA / 2)) * standard_error
    return Interval(mean, mean - half, mean + half)


def judge(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]], higher_is_better: bool, alpha: float = ALPHA
) -> list[Judgement]:
    """Judge several methods, each against a reference, so that any false verdict among them is rare.

    Losses are compared by their ratios: runs under heavy-tailed noise end decades apart, where the mean of
    differences is that of the worst run, and hides all others.

    Three seeds of a metric that counts examples often differ by equally many of its grains: a spread of 0,
    which a t-test takes for proof. Where all differences, or all ratios, of a method are equal, their spread
    is taken as what rounding to the grain alone would leave, and two seeds tell nothing. One grain in each of
    three seeds is then p = 0.051, in each of five 0.005; ten grains in each of three are 0.0006.

    Args:
        pairs: for each method its values and the reference's, seed by seed.
        higher_is_better: whether a larger value is.
        alpha: bound on the probability of one false verdict or more.
    """
    compared = [tuple(to_scores(side, higher_is_better) for side in pair) for pair in pairs]
    tests = [_test(own, other, higher_is_better) for own, other in compared]
    family = sum(test.name != "none" for test in tests)
    p_values = [test.p for test in tests]
    adjusted = holm(p_values)
    lowest = [holm([*p_values[:at], test.lowest_p, *p_values[at + 1 :]])[at] for at, test in enumerate(tests)]
    return [
        _judgement(own, other, test, p_holm, lowest_p_holm <= alpha, higher_is_better, alpha, family)
        for (own, other), test, p_holm, lowest_p_holm in zip(compared, tests, adjusted, lowest, strict=True)
    ]


class _Test(NamedTuple):
    name: str
    p: float
    """Two-sided."""
    lowest_p: float = 0.0
    """That the same values could have given."""
    advantage: float = 0.0
    """Above 0 if the method is ahead."""
    spread: float = math.nan
    """Standard deviation of what the test is of."""
    grain: float = 0.0
    """Of the metric, where all differences or all ratios are equal; else 0, as it does not matter."""


def _test(own: np.ndarray, other: np.ndarray, higher_is_better: bool) -> _Test:
    """Test scores for a difference, in the way that they allow."""
    if len(own) < 2:
        return _Test("none", math.nan, lowest_p=math.nan)
    both = np.concatenate([own, other])
    if not np.isfinite(both).all():
        # No mean to test. Ranks take infinities as they are; pairs are not looked at, as the signs of five
        # differences could not even tell five diverged runs from five good ones.
        p = float(stats.mannwhitneyu(own, other).pvalue)
        lowest_p = float(stats.mannwhitneyu(*np.split(np.sort(both), 2)).pvalue)
        return _Test("ranks", p, lowest_p, probability_of_improvement(own, other) - 0.5)
    return _paired_t(own, other, ratio=not higher_is_better and bool((both < 0).all()))


def _paired_t(own: np.ndarray, other: np.ndarray, ratio: bool) -> _Test:
    """Test whether the mean difference is 0, or the mean logarithm of the ratios."""
    name = "ratio" if ratio else "difference"
    size = np.maximum(np.abs(own), np.abs(other))
    differences = own - other
    if (np.abs(differences) <= RESOLUTION * size).all():
        return _Test(name, 1.0)
    tested = _log_ratios(own, other) if ratio else differences
    equal = _is_one_number(differences, size) or (ratio and _is_one_number(tested, 1.0))
    grain = _grain(own, other) if equal else 0.0
    count, mean = len(tested), tested.mean()
    spread = max(tested.std(ddof=1), _rounding(own, other, grain, ratio))
    p = 1.0 if equal and count == 2 else 2 * special.stdtr(count - 1, -abs(mean) / spread * math.sqrt(count))
    return _Test(name, float(p), advantage=float(mean), spread=float(spread), grain=grain)


def _log_ratios(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Logarithms of ratios of negative scores, above 0 where own is better."""
    return np.log(-other) - np.log(-own)


def _is_one_number(values: np.ndarray, size: ArrayLike) -> bool:
    """Whether values are equal, but for what numbers of this size lose to rounding."""
    return bool((np.abs(values - values.mean()) <= RESOLUTION * np.asarray(size)).all())


def _grain(own: np.ndarray, other: np.ndarray) -> float:
    """Smallest step between values of two methods; no more than their largest difference."""
    values = np.unique(np.concatenate([own, other]))
    steps = np.diff(values)
    steps = steps[steps > RESOLUTION * np.maximum(np.abs(values[1:]), np.abs(values[:-1]))]
    return float(steps.min(initial=np.abs(own - other).max()))


def _rounding(own: np.ndarray, other: np.ndarray, grain: float, ratio: bool) -> float:
    """Standard deviation of the differences, or log ratios, of values rounded to a grain, from that alone.

    The error of each is spread evenly over one grain, so its variance is a twelfth of the grain's square.
    """
    errors = grain / np.concatenate([own, other]) if ratio else grain
    return math.sqrt(np.mean(np.square(errors)) / 6)


def _judgement(
    own: np.ndarray,
    other: np.ndarray,
    test: _Test,
    p_holm: float,
    decidable: bool,
    higher_is_better: bool,
    alpha: float,
    family: int,
) -> Judgement:
    verdict = NO_DIFFERENCE
    if p_holm <= alpha and test.advantage != 0:  # not so for NaN
        verdict = BETTER if test.advantage > 0 else WORSE
    detectable = math.nan
    if test.name != "ranks":
        detectable = detectable_difference(test.spread, len(own), alpha / max(family, 1))
    ratio = Interval(math.nan, math.nan, math.nan)
    if test.name == "ratio":
        with np.errstate(over="ignore"):
            rounding = _rounding(own, other, test.grain, ratio=True)
            ratio = Interval(*np.exp(mean_interval(_log_ratios(other, own), rounding)).tolist())
            detectable = float(np.exp(detectable))
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and meant so
        differences = own - other if higher_is_better else other - own
    return Judgement(
        seeds=len(own),
        difference=mean_interval(differences, _rounding(own, other, test.grain, ratio=False)),
        ratio=ratio,
        test=test.name,
        p=test.p,
        p_holm=p_holm,
        verdict=verdict,
        detectable=detectable,
        decidable=decidable,
        wins=win_share(own, other),
        improvement=probability_of_improvement(own, other),
    )


def holm(p_values: ArrayLike) -> list[float]:
    """Adjust p-values of a family of tests after Holm; NaN stands for no test.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, float)
    adjusted = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]  # NaN is sorted to the end
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


def detectable_difference(spread: float, pairs: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the smallest true difference that a paired t-test finds with probability ``power``.

    Args:
        spread: standard deviation of the differences.
        pairs: of them there are so many; infinite below 2.
        alpha: of the test, two-sided.
        power: the probability.
    """
    return spread * _detectable_effect(pairs, alpha, power) if pairs > 1 else math.inf


@functools.cache
def _detectable_effect(pairs: int, alpha: float, power: float) -> float:
    """Detectable difference of a spread of 1."""
    degrees = pairs - 1
    critical = stats.t.ppf(1 - alpha / 2, degrees)

    def missing(shift: float) -> float:
        return stats.nct.sf(critical, degrees, shift) - power

    # At a shift of `critical` about half are found; with few degrees the upper tail of t is long.
    return float(optimize.brentq(missing, 0, 10 * critical)) / math.sqrt(pairs)


def win_share(own: np.ndarray, other: np.ndarray) -> float:
    """Share of pairs whose own score is larger, ties counted half; NaN for no pairs."""
    return float((0.5 * (own > other) + 0.5 * (own >= other)).mean()) if len(own) else math.nan


def probability_of_improvement(own: np.ndarray, other: np.ndarray) -> float:
    """Share of all combinations, not only pairs, whose own score is larger, ties counted half."""
    own, other = np.meshgrid(own, other)
    return win_share(own.ravel(), other.ravel())


class TimeToTarget(NamedTuple):
    """How long runs took to reach a target, those that did not counted as censored (Kaplan-Meier)."""

    reached: int
    median: float
    """Infinite where less than half have reached it."""
    restricted_mean: float
    """Mean of the time, or of the horizon where that came first."""


def time_to_target(times: ArrayLike, reached: ArrayLike, horizon: float) -> TimeToTarget:
    """Estimate the time to a target from runs of which some were stopped before they reached it.

    Args:
        times: when a run reached the target, or was last seen without.
        reached: whether it did.
        horizon: of the restricted mean.

    Example:
        >>> time_to_target([10, 30, 100, 100], [True, True, False, False], horizon=100)
        TimeToTarget(reached=2, median=30.0, restricted_mean=60.0)
    """
    reached = np.asarray(reached, bool)
    if len(reached) == 0:
        return TimeToTarget(0, math.nan, math.nan)
    alive = stats.ecdf(stats.CensoredData.right_censored(np.asarray(times, float), ~reached)).sf
    halved = alive.probabilities <= 0.5 + 1e-9
    median = alive.quantiles[halved].min(initial=math.inf)
    edges = np.clip([0, *alive.quantiles, horizon], 0, horizon)
    area = np.diff(edges) @ [1, *alive.probabilities]
    return TimeToTarget(int(reached.sum()), float(median), float(area))


def progress(values: ArrayLike, floor: float, reference: float, higher_is_better: bool) -> np.ndarray:
    """How far values are on the way from a floor, 0, to a reference, 1; never below 0, as a diverged run.

    Where lower is better the way is measured in decades: from 1 over 0.1 to 0.01 it is twice as far. NaN
    where there is no way: the reference is no better than the floor, or lower is better than a value of 0.

    Args:
        values: of a metric.
        floor: metric of a model that learned nothing.
        reference: metric to compare with.
        higher_is_better: whether it is.

    Example:
        >>> progress([0.1, 0.01, float("nan")], floor=1.0, reference=0.1, higher_is_better=False).tolist()
        [1.0, 2.0, 0.0]
    """
    points = np.array([floor, reference, *np.asarray(values, float)])
    if not higher_is_better:
        if (points[np.isfinite(points)] <= 0).any():
            return np.full(len(points) - 2, np.nan)
        points = -np.log10(points)
    start, end, *reached = points
    if not 0 < end - start < math.inf:
        return np.full(len(reached), np.nan)
    way = (np.array(reached) - start) / (end - start)
    return np.where(np.isfinite(way), np.maximum(way, 0), 0.0)


def interquartile_mean(groups: Sequence[ArrayLike]) -> Interval:
    """Mean of the middle half of all values, with a bootstrap interval stratified by group.

    Args:
        groups: values of each task. With fewer than ``EXACT_FROM`` in one, the interval is approximate; with
            one there is none.
    """
    groups = [np.sort(np.asarray(group, float)) for group in groups]  # their order must not matter

    def resample(rng: np.random.Generator) -> np.ndarray:
        drawn = [rng.choice(group, (REPETITIONS, len(group))) for group in groups]
        return stats.trim_mean(np.concatenate(drawn, axis=1), 0.25, axis=1)

    value = float(stats.trim_mean(np.concatenate(groups), 0.25))
    return _bootstrap(value, resample, smallest=min(map(len, groups)))


def _bootstrap(
    value: float, resample: Callable[[np.random.Generator], np.ndarray], smallest: int
) -> Interval:
    if smallest < 2:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(resample(np.random.default_rng(0)), [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(value, float(low), float(high))


def mean_ranks(tasks: Sequence[ArrayLike]) -> list[Interval]:
    """Rank methods on every seed of every task, 1 the best and ties averaged; mean over seeds, then tasks.

    Args:
        tasks: scores, (seeds, methods) each: larger is better, -inf for a run that diverged.

    Returns:
        One mean for each method, with an interval from bootstrapping the seeds of each task.
    """
    ranks = [stats.rankdata(-np.asarray(scores, float), axis=1) for scores in tasks]
    ranks = [rows[np.lexsort(rows.T)] for rows in ranks]  # the order of the seeds must not matter
    means = np.mean([rows.mean(axis=0) for rows in ranks], axis=0)

    def resample(method: int) -> Callable[[np.random.Generator], np.ndarray]:
        def draw(rng: np.random.Generator) -> np.ndarray:
            drawn = [rng.choice(rows[:, method], (REPETITIONS, len(rows))).mean(axis=1) for rows in ranks]
            return np.mean(drawn, axis=0)

        return draw

    smallest = min(map(len, ranks))
    return [_bootstrap(float(mean), resample(method), smallest) for method, mean in enumerate(means)]


def time_ratios(times: ArrayLike) -> np.ndarray:
    """Each method's time over the best one's, task by task; infinite where the target was not reached.

    Args:
        times: (tasks, methods).
    """
    times = np.asarray(times, float)
    best = times.min(axis=1, keepdims=True)
    return np.divide(times, best, out=np.full(times.shape, np.inf), where=np.isfinite(times))


def performance_profile(ratios: ArrayLike, taus: ArrayLike) -> np.ndarray:
    """Share of the tasks, of one method, with a ratio of at most each tau."""
    return (np.asarray(ratios, float)[None, :] <= np.asarray(taus, float)[:, None]).mean(axis=1)


def profile_score(ratios: ArrayLike) -> float:
    """Area under a method's performance profile from 1 to ``HORIZON``, as a share of the largest possible.

    Exact, without a grid: the mean over tasks of max(0, 4 - r) / 3.

    Example:
        >>> round(profile_score([1.5, float("inf")]), 5)
        0.41667
    """
    ratios = np.asarray(ratios, float)
    return float(np.maximum(0, HORIZON - ratios).mean() / (HORIZON - 1))


def expected_best_of(scores: ArrayLike, k: int) -> float:
    r"""Expected largest score of ``k`` settings drawn with replacement from those tried.

    .. math::
        \sum_{i=1}^{N} v_{(i)} \left[\left(\frac{i}{N}\right)^k - \left(\frac{i - 1}{N}\right)^k\right]

    Args:
        scores: larger is better, one of each setting; -inf makes the sum -inf, so give diverged settings the
            score of a model that learned nothing.
        k: at least 1.
    """
    ordered = np.sort(np.asarray(scores, float))
    steps = (np.arange(len(ordered) + 1) / len(ordered)) ** k
    return float(ordered @ np.diff(steps))


def sensitivity(scores: ArrayLike, nothing_learned: float) -> float:
    """Mean loss of score, over the values of a setting, against the best of them.

    Args:
        scores: larger is better, one of each value.
        nothing_learned: score of the untrained model, below which no score counts.

    Reference:
        Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, 2023,
        https://arxiv.org/abs/2309.14322
    """
    scores = np.asarray(scores, float)
    return float(scores.max() - np.maximum(scores, nothing_learned).mean())


def usable_decades(
    settings: ArrayLike, metric: ArrayLike, higher_is_better: bool, within: float = 0.05
) -> float:
    """Decades between the smallest and largest setting, without a gap, that come close to the best.

    Args:
        settings: positive, such as learning rates.
        metric: of each.
        higher_is_better: whether a larger metric is.
        within: of the size of the best metric: so close is close.
    """
    order = np.argsort(np.asarray(settings, float))
    settings = np.asarray(settings, float)[order]
    scores = to_scores(metric, higher_is_better)[order]
    best = int(scores.argmax())
    if not np.isfinite(scores[best]):
        return 0.0
    good = scores >= scores[best] - within * abs(scores[best])
    bad_below, bad_above = np.flatnonzero(~good[:best]), np.flatnonzero(~good[best:])
    first = bad_below[-1] + 1 if len(bad_below) else 0
    last = best + bad_above[0] - 1 if len(bad_above) else len(good) - 1
    return float(np.log10(settings[last] / settings[first]))


def on_edge(settings: ArrayLike, scores: ArrayLike) -> bool:
    """Whether the best setting is the smallest or largest of those tried: a better may lie beyond.

    Beyond an infinite setting, such as a threshold that clips nothing, there is none.
    """
    settings = np.asarray(settings, float)
    best = settings[np.argmax(scores)]
    return bool(
        np.isfinite(best) and settings.min() < settings.max() and best in (settings.min(), settings.max())
    )
