"""Colours, lines and markers of clippings."""

import itertools

from experiments.analysis.marks import MARKS, mark, marks
from torch_clip.methods import CLIPPINGS

ORIGINAL = [
    *("no_clip", "norm", "linear_rand_norm", "quadratic_rand_norm", "layer_wise", "coordinate_wise"),
    *("auto_clip", "linear_rand_autoclip", "quadratic_rand_autoclip"),
]
# Machado et al. 2009, severity 1, on linear RGB.
COLOUR_VISION = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "no green": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}


def seen(color: str, how: tuple) -> tuple[float, float, float]:
    """Lab coordinates of a colour as somebody sees it."""
    linear = []
    for at in (1, 3, 5):
        value = int(color[at : at + 2], 16) / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    red, green, blue = (
        min(max(sum(weight * part for weight, part in zip(row, linear, strict=True)), 0), 1) for row in how
    )
    xyz = (
        (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505,
        0.2126 * red + 0.7152 * green + 0.0722 * blue,
        (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089,
    )
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_every_clipping_has_a_mark_of_its_own():
    assert set(CLIPPINGS) <= set(MARKS)
    assert len({(how.color, how.linestyle) for how in MARKS.values()}) == len(MARKS)


def test_the_original_s_methods_are_told_apart_by_any_colour_vision():
    assert len({mark(name).color for name in ORIGINAL}) == len(ORIGINAL)
    for how in COLOUR_VISION.values():
        for one, other in itertools.combinations(ORIGINAL, 2):
            points = zip(seen(mark(one).color, how), seen(mark(other).color, how), strict=True)
            distance = sum((a - b) ** 2 for a, b in points) ** 0.5
            # Where colours come near each other, dashes and markers must differ too.
            assert distance > 15 or mark(one).linestyle != mark(other).linestyle, (one, other, distance)


def test_a_mark_does_not_depend_on_what_else_is_drawn():
    assert mark("my_module.MyClip") == mark("my_module.MyClip")
    assert (
        marks([("norm", "norm")])["norm"] == marks([("a", "agc"), ("norm", "norm")])["norm"] == MARKS["norm"]
    )


def test_lines_of_one_clipping_share_its_colour_and_differ_in_stroke_and_marker():
    lines = marks([(f"norm lr={lr}", "norm") for lr in (0.1, 0.2, 0.3, 0.4)])
    assert {how.color for how in lines.values()} == {MARKS["norm"].color}
    assert len({how.linestyle for how in lines.values()}) == 4
    assert len({how.marker for how in lines.values()}) == 4
