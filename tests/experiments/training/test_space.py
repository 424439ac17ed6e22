"""What a search may choose, from Hydra's grammar to values."""

from __future__ import annotations

import math

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.errors import UserError
from experiments.training.space import Dimension, dimension, points


def of(text: str) -> Dimension:
    return dimension(OverridesParser.create().parse_override(text))


def values(text: str, count: int = 64) -> list[float]:
    one = of(text)
    return [float(point[one.key]) for point in points([one], count, seed=0)]


def test_choices_lists_and_ranges_keep_their_words():
    assert of("clipping=norm,auto_clip").choices == ["norm", "auto_clip"]
    assert of("a=choice(0.3,1,inf)").choices == ["0.3", "1", "inf"]
    assert of("a=range(1,4)").choices == ["1", "2", "3"]
    assert of("a=choice([1,2],[3])").choices == ["[1,2]", "[3]"]
    drawn = [point["a"] for point in points([of("a=x,y,z,w")], 8, seed=3)]
    assert sorted(drawn) == sorted("xyzw" * 2)  # evenly


def test_an_interval_is_even_from_end_to_end():
    drawn = values("a=interval(-2,2)")
    assert -2 <= min(drawn) < -1.9 < 1.9 < max(drawn) <= 2
    assert sum(value < -1 for value in drawn) == 16


def test_a_logarithmic_interval_is_even_in_its_decades():
    drawn = values("a=tag(log,interval(1e-4,1e-1))", count=96)
    assert 1e-4 <= min(drawn) < 1.2e-4 < 0.08 < max(drawn) <= 1e-1
    decades = [sum(10.0**low <= value < 10.0 ** (low + 1) for value in drawn) for low in (-4, -3, -2)]
    assert all(30 <= count <= 34 for count in decades)


@pytest.mark.parametrize("text", ["a=int(interval(1,4))", "a=tag(log,int(interval(1,4)))"])
def test_whole_numbers_have_both_ends(text):
    assert set(values(text)) == {1, 2, 3, 4}
    assert all("." not in point["a"] for point in points([of(text)], 8, seed=0))


def test_infinity_is_one_point_in_eight():
    drawn = values("a=tag(log,or_inf,interval(0.1,10))")
    finite = [value for value in drawn if math.isfinite(value)]
    assert len(finite) == 56
    assert 0.1 <= min(finite) < 0.12 < 8 < max(finite) <= 10
    assert of("a=0.1,inf").has_infinity
    assert not of("a=interval(0.1,10)").has_infinity


def test_more_points_begin_with_the_same():
    space = [of("a=interval(0,1)"), of("b=x,y,z"), of("c=tag(log,or_inf,interval(1,9))")]
    assert points(space, 12, seed=1)[:8] == points(space, 8, seed=1)
    assert points(space, 100, seed=1)[:12] == points(space, 12, seed=1)
    assert points(space, 8, seed=2) != points(space, 8, seed=1)


def test_edges():
    interval = of("lr=tag(log,interval(0.001,1))")
    assert "lower end, 0.001" in interval.edge("0.0012")
    assert "upper end, 1" in interval.edge("0.9")
    assert interval.edge("0.03") is None
    choices = of("threshold=0.3,1,3,inf")
    assert "smallest" in choices.edge("0.3")
    # Beyond infinity there is nothing, and below it there are choices.
    assert [choices.edge(value) for value in ("1", "3", "inf")] == [None] * 3
    assert "largest" in of("k=1,2,3").edge("3")
    assert of("k=1,2").edge("1") is None
    assert of("k=x,y,z").edge("x") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a=interval(2,1)", "smaller one first"),
        ("a=interval(1,inf)", "smaller one first"),
        ("a=tag(log,interval(0,1))", "begins above 0"),
        ("a=tag(lgo,interval(1,2))", "lgo"),
    ],
)
def test_refusals(text, told):
    with pytest.raises(UserError, match=told):
        of(text)
