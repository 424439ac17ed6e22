"""Every statistic against worked values, SciPy or simulation; and that it is right as often as it says."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from experiments.analysis.stats import (
    ALPHA,
    BETTER,
    NO_DIFFERENCE,
    POWER,
    WORSE,
    detectable_difference,
    expected_best_of,
    holm,
    interquartile_mean,
    judge,
    mean_interval,
    mean_ranks,
    on_edge,
    performance_profile,
    probability_of_improvement,
    profile_score,
    progress,
    sensitivity,
    time_ratios,
    time_to_target,
    to_scores,
    usable_decades,
    win_share,
)

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.filterwarnings("error")


class TestInterval:
    def test_worked(self):
        # t(0.975, 2) = 4.30265; the standard error is 1 / sqrt(3)
        assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-5)

    def test_one_value_has_none(self):
        mean, low, high = mean_interval([0.5])
        assert mean == 0.5
        assert np.isnan([low, high]).all()

    def test_a_value_that_is_not_finite_has_none_and_is_not_left_out(self):
        mean, low, high = mean_interval([1, INF])
        assert mean == INF
        assert np.isnan([low, high]).all()

    def test_no_values(self):
        assert np.isnan(mean_interval([])).all()

    @pytest.mark.parametrize("seeds", [3, 5, 10])
    def test_coverage(self, seeds):
        rng = np.random.default_rng(seeds)
        draws = rng.normal(7, 2, (5000, seeds))
        intervals = np.array([mean_interval(draw) for draw in draws])
        covered = ((intervals[:, 1] <= 7) & (intervals[:, 2] >= 7)).mean()
        assert 0.93 <= covered <= 0.97

    @pytest.mark.parametrize("seeds", [3, 5, 10])
    def test_coverage_of_paired_differences_and_ratios(self, seeds):
        """Seeds shift both alike; the true difference is 0.3, the true ratio 0.7."""
        rng = np.random.default_rng(seeds)
        difference = ratio = 0
        for _ in range(3000):
            shift, *noise = rng.normal(0, [[3], [1], [1]], (3, seeds))
            (higher,) = judge([(shift + noise[0] + 0.3, shift + noise[1])], higher_is_better=True)
            (lower,) = judge([(0.7 * np.exp(shift + noise[0]), np.exp(shift + noise[1]))], False)
            difference += higher.difference.low <= 0.3 <= higher.difference.high
            ratio += lower.ratio.low <= 0.7 <= lower.ratio.high
        assert 0.93 <= difference / 3000 <= 0.97
        assert 0.93 <= ratio / 3000 <= 0.97


class TestHolm:
    def test_worked(self):
        # 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 not below the one before
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_never_above_one(self):
        assert holm([0.9, 0.8]) == [1, 1]

    def test_no_test_is_no_member_of_the_family(self):
        first, nothing, second = holm([0.01, NAN, 0.5])
        assert (first, second) == (0.02, 0.5)
        assert math.isnan(nothing)


class TestJudge:
    def test_difference_where_higher_is_better(self):
        own, other = [0.9, 0.8, 0.85, 0.7], [0.5, 0.45, 0.4, 0.42]
        (judged,) = judge([(own, other)], higher_is_better=True)
        expected = scipy.stats.ttest_rel(own, other)
        interval = expected.confidence_interval()
        assert judged.test == "difference"
        assert judged.p == judged.p_holm == pytest.approx(expected.pvalue)
        assert judged.difference == pytest.approx((0.37, interval.low, interval.high))
        assert (judged.verdict, judged.wins, judged.improvement, judged.seeds) == (BETTER, 1, 1, 4)
        (judged,) = judge([(other, own)], higher_is_better=True)
        assert judged.verdict == WORSE

    def test_ratio_where_lower_is_better(self):
        own, other = np.array([0.02, 0.03, 0.025]), np.array([0.2, 0.4, 9.0])
        (judged,) = judge([(own, other)], higher_is_better=False)
        expected = scipy.stats.ttest_rel(np.log(own), np.log(other))
        interval = expected.confidence_interval()
        assert judged.test == "ratio"
        assert judged.p == pytest.approx(expected.pvalue)
        assert judged.ratio == pytest.approx(
            (scipy.stats.gmean(own / other), math.exp(interval.low), math.exp(interval.high))
        )
        assert judged.difference == pytest.approx(mean_interval(own - other))

    def test_a_loss_of_zero_or_less_has_no_ratio(self):
        (judged,) = judge([([-3, -2.5, -2.8], [1, 1.1, 0.8])], higher_is_better=False)
        assert (judged.test, judged.verdict) == ("difference", BETTER)
        assert np.isnan(judged.ratio).all()

    def test_a_ratio_sees_what_one_bad_run_of_the_reference_hides_from_a_difference(self):
        """The calibrated quadratic: without clipping one of five runs ends far away."""
        own, other = [0.028, 0.029, 0.03, 0.026, 0.034], [0.47, 0.37, 0.6, 0.39, 26.35]
        assert scipy.stats.ttest_rel(own, other).pvalue > 0.3
        (judged,) = judge([(own, other)], higher_is_better=False)
        assert judged.verdict == BETTER

    def test_ratios_too_large_for_a_float(self):
        (judged,) = judge([([1e-38, 1e38], [1e38, 1e-30])], higher_is_better=False)
        assert (judged.verdict, judged.detectable, judged.ratio.high) == (NO_DIFFERENCE, INF, INF)

    def test_holm_over_the_methods(self):
        rng = np.random.default_rng(0)
        other = rng.normal(size=5)
        pairs = [(other + rng.normal(0.5, 0.4, 5), other) for _ in range(3)]
        judged = judge(pairs, higher_is_better=True)
        p_values = [scipy.stats.ttest_rel(*pair).pvalue for pair in pairs]
        assert [each.p_holm for each in judged] == pytest.approx(holm(p_values))

    def test_order_of_seeds_and_methods_does_not_matter(self):
        rng = np.random.default_rng(1)
        pairs = [(rng.lognormal(size=6), rng.lognormal(size=6)) for _ in range(3)]
        order = rng.permutation(6)
        shuffled = [(own[order], other[order]) for own, other in reversed(pairs)]
        for one, two in zip(judge(pairs, False), reversed(judge(shuffled, False)), strict=True):
            assert one.verdict == two.verdict
            assert one.p_holm == pytest.approx(two.p_holm)

    @pytest.mark.parametrize("higher_is_better", [True, False])
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_a_method_whose_runs_all_diverged_is_worse_and_its_reference_would_be_better(
        self, bad, higher_is_better
    ):
        good = [0.5, 0.6, 0.55, 0.52, 0.58]
        (judged,) = judge([([bad] * 5, good)], higher_is_better)
        assert (judged.verdict, judged.test, judged.wins, judged.improvement) == (WORSE, "ranks", 0, 0)
        assert judged.difference.value == (-INF if higher_is_better else INF)
        (judged,) = judge([(good, [bad] * 5)], higher_is_better)
        assert (judged.verdict, judged.wins, judged.improvement) == (BETTER, 1, 1)

    def test_nan_and_both_infinities_are_the_same(self):
        other = [0.3, 0.2, 0.25, 0.28]
        judged = [judge([([0.1, 0.2, bad, 0.15], other)], False)[0] for bad in (NAN, INF, -INF)]
        assert len({(each.verdict, each.p, each.wins, each.difference.value) for each in judged}) == 1

    @pytest.mark.parametrize("higher_is_better", [True, False])
    @pytest.mark.parametrize("seeds", range(6))
    def test_there_is_always_a_verdict(self, seeds, higher_is_better):
        choices = (NAN, INF, -INF, 0.0, 0.5, 0.7)
        for own, other in itertools.islice(
            zip(
                itertools.product(choices, repeat=seeds),
                itertools.product(choices[::-1], repeat=seeds),
                strict=True,
            ),
            0,
            None,
            max(1, len(choices) ** seeds // 200),
        ):
            (judged,) = judge([(own, other)], higher_is_better)
            assert judged.verdict in (BETTER, WORSE, NO_DIFFERENCE)
            assert 0 <= judged.wins <= 1 or seeds == 0

    def test_all_diverged_on_both_sides(self):
        (judged,) = judge([([NAN] * 5, [INF] * 5)], higher_is_better=False)
        assert (judged.verdict, judged.p, judged.wins, judged.improvement) == (NO_DIFFERENCE, 1, 0.5, 0.5)

    def test_one_seed_or_none_tells_nothing(self):
        one, none, other = judge([([9.0], [0.1]), ([], []), ([1.0, 1.1, 0.9], [0.1, 0.12, 0.11])], False)
        assert (one.verdict, one.test, one.detectable) == (NO_DIFFERENCE, "none", INF)
        assert (none.verdict, none.seeds) == (NO_DIFFERENCE, 0)
        assert math.isnan(one.p)
        assert other.p_holm == other.p  # they are no members of the family


class TestGrain:
    """Equal differences have a spread of 0, and a metric that counts examples has them by chance."""

    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_one_grain_in_each_of_three_seeds_is_no_proof(self, dtype):
        (judged,) = judge([(np.array([0.91, 0.62, 0.33], dtype), np.array([0.90, 0.61, 0.32], dtype))], True)
        # By hand: each value errs by 0.01 / sqrt(12), a difference by 0.01 / sqrt(6), so t = sqrt(6) sqrt(3).
        assert judged.p == pytest.approx(2 * scipy.stats.t.sf(math.sqrt(18), 2), rel=1e-4)
        assert judged.verdict == NO_DIFFERENCE
        assert judged.difference.low < 0 < judged.difference.value < judged.difference.high
        assert judged.detectable == pytest.approx(detectable_difference(0.01 / math.sqrt(6), 3), rel=1e-4)

    def test_nor_is_one_error_more_in_each_of_three_seeds_though_the_ratios_differ(self):
        own, other = [18, 19, 17], [17, 18, 16]
        assert scipy.stats.ttest_rel(np.log(own), np.log(other)).pvalue < 0.002
        (judged,) = judge([(own, other)], higher_is_better=False)
        assert (judged.test, judged.verdict) == ("ratio", NO_DIFFERENCE)
        assert judged.p == pytest.approx(0.05, abs=0.005)
        assert judged.ratio.low < 1 < judged.ratio.high
        assert judged.difference.low < 0 < judged.difference.high
        assert judged.detectable > 1.05

    def test_equal_ratios_are_no_certainty(self):
        own, other = np.array([2, 4, 6]), np.array([1, 2, 3])
        (judged,) = judge([(own, other)], higher_is_better=False)
        spread = math.sqrt(np.mean(1 / own**2 + 1 / other**2) / 12)  # of a logarithm, for a grain of 1
        assert judged.ratio.value == pytest.approx(2)
        assert judged.p == pytest.approx(2 * scipy.stats.t.sf(math.log(2) / spread * math.sqrt(3), 2))

    @pytest.mark.parametrize(("seeds", "grains"), [(3, 10), (5, 1), (5, 10), (10, 1)])
    def test_many_grains_or_many_seeds_are_found_among_eight_methods(self, seeds, grains):
        correct = 70 + np.random.default_rng(0).permutation(seeds)
        alike = [(correct / 100, correct[::-1] / 100)] * 7
        *_, higher = judge([*alike, ((correct + grains) / 100, correct / 100)], True)
        *_, lower = judge([*alike, ((correct + grains) / 100, correct / 100)], False)
        assert (higher.verdict, lower.verdict, lower.test) == (BETTER, WORSE, "ratio")

    def test_two_equal_differences_tell_nothing(self):
        assert judge([([0.51, 0.61], [0.50, 0.60])], True)[0].verdict == NO_DIFFERENCE
        assert judge([([0.91, 0.93], [0.50, 0.52])], True)[0].p == 1

    @pytest.mark.parametrize("values", [[0.5, 0.6, 0.4], [0.5, 0.5, 0.5]])
    @pytest.mark.parametrize("higher_is_better", [True, False])
    def test_equal_runs(self, values, higher_is_better):
        (judged,) = judge([(values, values)], higher_is_better)
        assert (judged.p, judged.verdict, judged.difference) == (1, NO_DIFFERENCE, (0, 0, 0))
        assert math.isnan(judged.detectable)

    @pytest.mark.parametrize("higher_is_better", [True, False])
    def test_a_metric_without_a_grain_has_the_plain_test(self, higher_is_better):
        """Also where a method moves seeds that lie far apart by almost the same: no step is that small."""
        rng = np.random.default_rng(0)
        for seeds in range(2, 11):
            for noise in (1, 1e-3):
                seed, own, other = rng.normal([[0], [0.3], [0]], [[2], [noise], [noise]], (3, seeds))
                own, other = seed + own, seed + other
                pair = (own, other) if higher_is_better else (np.exp(own), np.exp(other))
                (judged,) = judge([pair], higher_is_better)
                assert judged.p == pytest.approx(scipy.stats.ttest_rel(own, other).pvalue)
                assert judged.difference == pytest.approx(mean_interval(pair[0] - pair[1]))
                if not higher_is_better:
                    assert judged.ratio == pytest.approx(tuple(np.exp(mean_interval(own - other))))


class TestDecidable:
    @pytest.mark.parametrize(
        ("seeds", "methods", "decidable"), [(3, 1, False), (4, 1, True), (4, 8, False), (6, 8, True)]
    )
    def test_all_diverged_against_all_good(self, seeds, methods, decidable):
        judged = judge([([NAN] * seeds, np.arange(seeds) + 0.5)] * methods, higher_is_better=True)
        assert {each.decidable for each in judged} == {decidable}
        assert {each.verdict for each in judged} == {WORSE if decidable else NO_DIFFERENCE}

    def test_it_is_of_what_could_have_been(self):
        (judged,) = judge([([0.5, NAN, 0.6, 0.7], [0.4, 0.65, 0.55, 0.3])], higher_is_better=True)
        assert (judged.verdict, judged.decidable) == (NO_DIFFERENCE, True)

    def test_verdicts_of_others_leave_more_to_one_method(self):
        rng = np.random.default_rng(0)
        other = rng.normal(size=4)
        found = (other + rng.normal(9, 0.01, 4), other)
        *_, judged = judge([*[found] * 7, ([NAN] * 4, other)], higher_is_better=True)
        assert (judged.verdict, judged.decidable) == (WORSE, True)

    def test_a_mean_can_always_tell_and_one_seed_never(self):
        assert judge([([1, 2], [2, 1])], True)[0].decidable
        assert not judge([([1], [2])], True)[0].decidable


METHODS, SEEDS, DRAWS = 4, 5, 1000


def rounded(sd: float, mean: float = 80.3):
    """A percentage without decimals."""
    return lambda rng, size: np.round(rng.normal(mean, sd, size)) / 100


def counted(examples: int, chance: float):
    return lambda rng, size: rng.binomial(examples, chance, size) / examples


def sometimes_diverged(rng, size):
    return np.where(rng.random(size) < 0.25, rng.choice([NAN, INF, -INF], size), rng.lognormal(size=size))


def correlated(rng, size):
    return rng.normal(size=size) + 3 * rng.normal(size=(1, size[1]))


@pytest.mark.parametrize(
    ("draw", "higher_is_better", "seeds"),
    [
        (lambda rng, size: rng.normal(size=size), True, SEEDS),
        (correlated, True, SEEDS),
        (lambda rng, size: rng.standard_t(1.5, size), True, SEEDS),
        (lambda rng, size: rng.lognormal(size=size), False, SEEDS),
        (lambda rng, size: rng.lognormal(size=size), False, 3),
        (lambda rng, size: rng.pareto(1.5, size) + 1, False, 10),
        (rounded(2), True, 2),
        (rounded(2), True, 3),
        (sometimes_diverged, False, 3),
        (sometimes_diverged, False, SEEDS),
        (sometimes_diverged, True, 10),
    ],
)
def test_no_method_is_called_better_when_all_are_alike(draw, higher_is_better, seeds):
    """1,000 comparisons of four methods with a reference that is drawn from the same distribution."""
    assert max(false_verdicts(draw, higher_is_better, seeds, METHODS)) <= 0.05 * DRAWS


@pytest.mark.parametrize(
    ("draw", "higher_is_better", "seeds"),
    [
        (rounded(0.6), True, 3),
        (rounded(0.8), True, 3),
        (rounded(0.8), True, SEEDS),
        (rounded(0.8, mean=17.3), False, 3),
        (counted(128, 0.99), True, 3),
        (counted(1, 0.5), True, 3),
        (counted(1, 0.5), True, 4),
    ],
)
def test_nor_are_eight_by_a_metric_of_few_values(draw, higher_is_better, seeds):
    assert max(false_verdicts(draw, higher_is_better, seeds, methods=8)) <= 0.05 * DRAWS


def false_verdicts(draw, higher_is_better: bool, seeds: int, methods: int) -> tuple[int, int]:
    """Draws with a false `better`, and with a false `worse`."""
    rng = np.random.default_rng(0)
    better = worse = 0
    for _ in range(DRAWS):
        other, *others = draw(rng, (1 + methods, seeds))
        verdicts = {each.verdict for each in judge([(own, other) for own in others], higher_is_better)}
        better += BETTER in verdicts
        worse += WORSE in verdicts
    return better, worse


def test_without_holm_they_would_be():
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(300):
        other, *methods = rng.normal(size=(1 + 20, SEEDS))
        false += any(judge([(own, other)], True)[0].verdict == BETTER for own in methods)
    assert false > 0.1 * 300


class TestDetectable:
    @pytest.mark.parametrize(("pairs", "alpha"), [(3, 0.05), (5, 0.05 / 4), (20, 0.05)])
    def test_a_test_finds_it_as_often_as_promised(self, pairs, alpha):
        true = detectable_difference(2.0, pairs, alpha)
        rng = np.random.default_rng(0)
        found = scipy.stats.ttest_1samp(rng.normal(true, 2.0, (40_000, pairs)), 0, axis=1).pvalue <= alpha
        assert found.mean() == pytest.approx(POWER, abs=0.01)

    def test_published(self):
        # Cohen's textbook case: an effect of 0.5 with power 0.8 takes 34 pairs.
        assert detectable_difference(1, 34) < 0.5 < detectable_difference(1, 33)

    def test_one_pair_detects_nothing(self):
        assert detectable_difference(1, 1) == INF

    def test_it_is_that_of_the_strictest_step_and_a_factor_for_ratios(self):
        rng = np.random.default_rng(0)
        pairs = [(rng.lognormal(size=6), rng.lognormal(size=6)) for _ in range(3)]
        for (own, other), judged in zip(pairs, judge(pairs, False), strict=True):
            spread = np.std(np.log(own / other), ddof=1)
            assert judged.detectable == pytest.approx(math.exp(detectable_difference(spread, 6, ALPHA / 3)))


class TestWins:
    def test_ties_count_half(self):
        own, other = to_scores([1, 2, 3, NAN], True), to_scores([1, 1, 4, INF], True)
        assert win_share(own, other) == (0.5 + 1 + 0 + 0.5) / 4

    def test_improvement_is_the_statistic_of_mann_and_whitney(self):
        rng = np.random.default_rng(0)
        own, other = rng.integers(0, 5, 7).astype(float), rng.integers(0, 5, 4).astype(float)
        expected = scipy.stats.mannwhitneyu(own, other).statistic / (7 * 4)
        assert probability_of_improvement(own, other) == pytest.approx(expected)


class TestTimeToTarget:
    def test_textbook(self):
        """Kaplan-Meier by hand: 6 at risk at 3, 5 at 5 (one is censored there), 3 at 8."""
        found = time_to_target([3, 5, 5, 8, 10, 10], [True, True, False, True, False, False], horizon=10)
        survival = (5 / 6, 5 / 6 * 4 / 5, 5 / 6 * 4 / 5 * 2 / 3)
        assert found.reached == 3
        assert found.median == 8
        assert found.restricted_mean == pytest.approx(3 + 2 * survival[0] + 3 * survival[1] + 2 * survival[2])

    def test_without_censoring_it_is_median_and_mean(self):
        assert time_to_target([1, 2, 6], [True] * 3, horizon=10) == (3, 2, pytest.approx(3))

    def test_never_reached_is_neither_dropped_nor_zero(self):
        assert time_to_target([100] * 3, [False] * 3, horizon=100) == (0, INF, 100)
        half = time_to_target([10, 20, 100, 100, 100], [True, True, False, False, False], horizon=100)
        assert (half.median, half.restricted_mean) == (INF, pytest.approx((10 + 20 + 300) / 5))

    def test_no_runs(self):
        assert time_to_target([], [], horizon=1).reached == 0


class TestAcrossTasks:
    def test_interquartile_mean(self):
        assert interquartile_mean([[1, 8, 2, 7], [3, 6, 4, 5]]).value == 4.5
        rng = np.random.default_rng(0)
        values = rng.normal(size=(4, 10))
        iqm = interquartile_mean(list(values))
        assert iqm.value == pytest.approx(scipy.stats.trim_mean(values, 0.25, axis=None))
        assert iqm.low < iqm.value < iqm.high

    def test_interval_is_stratified(self):
        """Between two tasks that never vary there is nothing to resample."""
        iqm = interquartile_mean([[1.0] * 5, [9.0] * 5])
        assert iqm == (5, 5, 5)

    def test_interval_against_scipy(self):
        rng = np.random.default_rng(3)
        values = rng.normal(size=20)
        expected = scipy.stats.bootstrap(
            (values,), lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis), method="percentile", rng=rng
        ).confidence_interval
        assert interquartile_mean([values])[1:] == pytest.approx(expected, abs=0.05)

    def test_one_seed_has_no_interval(self):
        assert np.isnan(interquartile_mean([[1.0], [2.0, 3.0]])[1:]).all()

    def test_order_does_not_matter(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(3, 5))
        assert interquartile_mean(list(values)) == interquartile_mean([row[::-1] for row in values])
        tasks = rng.normal(size=(2, 6, 3))
        assert mean_ranks(list(tasks)) == mean_ranks([task[::-1] for task in tasks])

    def test_mean_ranks(self):
        first = [[3, 1, 1], [2, -INF, -INF]]  # ranks 1, 2.5, 2.5 both times
        second = [[2, 3, 1], [2, 1, 3]]  # ranks 2, 1, 3 and 2, 3, 1
        ranks = mean_ranks([first, second])
        assert [rank.value for rank in ranks] == [1.5, 2.25, 2.25]
        assert ranks[0] == (1.5, 1.5, 1.5)  # its ranks are the same at every seed
        assert (ranks[1].low, ranks[1].high) == (1.75, 2.75)

    def test_profile_score_is_exact(self):
        assert profile_score([1.5, INF]) == pytest.approx(0.41667, abs=5e-6)
        rng = np.random.default_rng(0)
        for _ in range(5):
            ratios = 1 + rng.exponential(2, 6)
            taus = np.linspace(1, 4, 300_001)
            area = performance_profile(ratios, taus).mean()
            assert profile_score(ratios) == pytest.approx(area, abs=1e-4)
        assert profile_score([1, 1]) == 1
        assert profile_score([INF, 4, 9]) == 0

    def test_profile_steps(self):
        assert performance_profile([1, 2, INF, 4], [1, 1.9, 2, 4]).tolist() == [0.25, 0.25, 0.5, 0.75]

    def test_time_ratios(self):
        ratios = time_ratios([[10, 15, INF], [INF, INF, INF]])
        assert ratios.tolist() == [[1, 1.5, INF], [INF, INF, INF]]

    def test_progress(self):
        assert progress([0.6, 0.3, -0.2, NAN], 0, 0.6, True).tolist() == [1, 0.5, 0, 0]
        assert progress([0.1, 0.01, 1, 5, INF], 1, 0.1, False).tolist() == pytest.approx([1, 2, 0, 0, 0])

    @pytest.mark.parametrize(
        ("values", "floor", "reference", "higher"),
        [
            ([0.5], 0, -0.1, True),
            ([0.5], 0, -INF, True),
            ([0.5], 1, 2, False),
            ([0.5], NAN, 0.1, False),
            ([0.0], 1, 0.5, False),
        ],
    )
    def test_progress_without_a_way(self, values, floor, reference, higher):
        assert np.isnan(progress(values, floor, reference, higher)).all()


class TestTuning:
    def test_expected_best_of_is_the_mean_over_all_draws(self):
        values = [0.3, 0.9, 0.5, 0.5]
        for k in (1, 2, 3):
            best = [max(drawn) for drawn in itertools.product(values, repeat=k)]
            assert expected_best_of(values, k) == pytest.approx(np.mean(best))

    def test_expected_best_of_against_simulation(self):
        rng = np.random.default_rng(0)
        values = rng.random(30)
        for k in (1, 3, 10):
            drawn = rng.choice(values, (200_000, k)).max(axis=1)
            assert expected_best_of(values, k) == pytest.approx(drawn.mean(), abs=0.003)

    def test_sensitivity(self):
        """Losses 0.1, 0.4 and one that diverged, which counts as the untrained model's 2.0."""
        scores = to_scores([0.1, 0.4, INF], higher_is_better=False)
        assert sensitivity(scores, nothing_learned=-2.0) == pytest.approx((0.1 + 0.4 + 2.0) / 3 - 0.1)

    def test_usable_rates_of_gradient_descent_end_at_twice_the_inverse_curvature(self):
        """On f = a x^2 / 2 an error shrinks by |1 - lr a| a step: closed form on both sides."""
        curvature, steps = 2.0, 50
        rates = np.geomspace(1e-3, 10, 81)  # 20 a decade
        with np.errstate(over="ignore"):
            loss = 1 + (1 - rates * curvature) ** (2 * steps)  # 1 is the noise floor
        loss[rates > 2 / curvature] = INF
        slowest = (1 - 0.05 ** (1 / (2 * steps))) / curvature
        expected = math.log10((2 - slowest * curvature) / curvature / slowest)
        assert usable_decades(rates, loss, higher_is_better=False) == pytest.approx(expected, abs=0.1)

    def test_usable_rates_have_no_gap(self):
        rates = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
        assert usable_decades(rates, [0.89, NAN, 0.89, 0.9, 0.1], higher_is_better=True) == pytest.approx(1)
        assert usable_decades(rates[::-1], [0.1, 0.9, 0.89, NAN, 0.89], True) == pytest.approx(1)
        assert usable_decades(rates, [NAN] * 5, True) == 0

    def test_edge(self):
        assert on_edge([0.1, 0.01, 1], [2, 1, 3])
        assert on_edge([0.1, 0.01, 1], [2, 3, 1])
        assert not on_edge([0.1, 0.01, 1], [3, 2, 1])
        assert not on_edge([0.1, INF], [1, 2])  # beyond no clipping there is nothing
        assert not on_edge([0.1], [1])
