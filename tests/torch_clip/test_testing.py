"""The conformance kit finds each planted bug by the law of its name, and asks nothing that is not claimed."""

import functools
import importlib
from pathlib import Path

import pytest
import torch

from torch_clip.methods import AutoClip, CoordWiseClip, NormClip
from torch_clip.testing import LAWS, SLOW, assert_lawful, check

FAST = [law for law in LAWS if law not in SLOW]
# Bug -> the laws that it breaks, and no others.
BUGS = {
    "Lawful": set(),
    "SaysItLengthens": set(),
    "NoOp": {"clips"},
    "LyingNoOp": {"clips", "telemetry"},
    "ClipsTheMomentum": {"before_momentum"},
    "ForgetsInStateDict": {"resume", "optimizer_state"},
    "ForgetsInPickle": {"resume", "optimizer_state"},
    "DrawsPerTensor": {"own_draws", "one_norm", "telemetry"},
    "AbsorbsNaN": {"not_finite"},
    "ReadsTheDevice": {"no_host_read"},
    "CopiesToTheHost": {"no_host_read"},
    "Lengthens": {"bounded", "telemetry"},
    "PerGroup": {"all_groups"},
    "PerTensorInDisguise": {"one_norm", "telemetry"},
    "SaysAnotherThreshold": {"telemetry"},
    "TakesScaledNorms": {"grad_scaler"},
    "NormInHalf": {"half_precision"},
    "Replaces": {"in_place"},
}
# These break much else as well.
BROAD_BUGS = {"OwnMomentum": {"before_momentum", "bounded"}, "DrawsFromTorch": {"own_draws"}}
# What the message says of what was expected and what was seen.
SAID = [
    ("NoOp", "clips", r"some of \d+ gradients of norm .* at thresholds from 1 to 1, saw none changed"),
    (
        "ClipsTheMomentum",
        "before_momentum",
        r"step \d+, compared with clip_ then momentum: .*expected 0\.\d+, saw",
    ),
    ("OwnMomentum", "before_momentum", "a zero gradient after a spike: .*expected 0, saw -"),
    ("ForgetsInStateDict", "resume", r"resuming through a file: threshold: expected 5\.\d+, saw 0\.0"),
    ("ForgetsInPickle", "resume", "step 0 after resuming through deepcopy"),
    ("DrawsPerTensor", "own_draws", r"five zero gradients more .*expected .* \(\d+ of \d+ elements differ\)"),
    ("DrawsFromTorch", "own_draws", "step 0: expected no draw from a global generator, saw one"),
    (
        "AbsorbsNaN",
        "not_finite",
        r"nan under nonfinite='skip': the state, .*: mean: expected 3\.\d+, saw nan",
    ),
    ("ReadsTheDevice", "no_host_read", r"saw one at planted.py:\d+ \(aten._local_scalar_dense"),
    ("CopiesToTheHost", "no_host_read", r"saw one at planted.py:\d+ \(copied to the host\)"),
    ("Lengthens", "bounded", r"step 0, torch.float32: expected a norm of at most 0\.02\d+, saw 1\.0"),
    ("PerGroup", "all_groups", r"in 4 groups compared with one: .*expected 0\.99\d+, saw 0\.98"),
    (
        "NormInHalf",
        "half_precision",
        r"elements of 300 in torch.float16: grad_norm: expected 948\d+.*, saw inf",
    ),
]


@pytest.fixture
def planted(monkeypatch):
    """The module of bugs, importable by other processes too."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("planted")


def broken(make, laws=FAST):
    return {verdict.law: verdict.message for verdict in check(make, laws) if verdict.status == "failed"}


@pytest.mark.parametrize("bug", [*BUGS, *BROAD_BUGS])
def test_a_planted_bug_is_found_by_name(planted, bug):
    found = broken(getattr(planted, bug))
    if bug in BUGS:
        assert found.keys() == BUGS[bug], found
    else:
        assert found.keys() >= BROAD_BUGS[bug], found


@pytest.mark.parametrize(("bug", "law", "said"), SAID)
def test_a_failure_says_what_was_seen(planted, bug, law, said):
    with pytest.raises(AssertionError, match=said):
        assert_lawful(getattr(planted, bug), [law])


@pytest.mark.parametrize("bug", ["LocalNorm", pytest.param("DrawsByRank", marks=pytest.mark.slow)])
def test_a_bug_of_several_processes_is_found(planted, bug):
    assert not broken(getattr(planted, bug))
    found = broken(getattr(planted, bug), ["two_processes"])
    assert "compared with one process: " in found["two_processes"]


class _Unreadable(float):
    """Can be pickled, and not be read."""

    def __reduce__(self):
        return float, ("nothing",)


def test_a_process_that_ends_is_told():
    found = broken(functools.partial(NormClip, threshold=_Unreadable(1.0)), ["two_processes"])
    assert "ValueError: could not convert string to float: 'nothing'" in found["two_processes"]


def verdict_of(make, law):
    (verdict,) = check(make, [law])
    return verdict


def test_what_is_not_claimed(planted):
    assert verdict_of(planted.SaysItLengthens, "bounded")[1:] == ("not claimed", "bounded is False")
    assert verdict_of(functools.partial(NormClip, torch.inf), "clips").status == "not claimed"
    assert verdict_of(planted.AbsorbsNaN, "infinite_threshold").status == "not claimed"
    raising = functools.partial(NormClip, nonfinite="error")
    assert verdict_of(raising, "no_host_read").status == "not claimed"
    assert not broken(raising)
    assert not broken(functools.partial(CoordWiseClip, nonfinite="propagate"))


def test_a_threshold_of_inf_that_clips(planted):
    class Secret(planted.Whole):
        def coef(self, total, threshold):
            return planted.hard(total, 1.0)

    class SecretClip(planted.Planted):
        scope_class = Secret

    make = functools.partial(SecretClip, threshold=torch.inf)
    assert "says that nothing is clipped, saw 223 gradients changed" in broken(make)["clips"]


def test_a_clipping_that_never_needs_to_clip_is_told():
    # It says a finite threshold, which is always the longest norm so far.
    assert "saw none changed" in broken(functools.partial(AutoClip, percentile=1.0))["clips"]


def test_processes_need_a_class_that_they_can_import():
    verdict = verdict_of(lambda: NormClip(), "two_processes")
    assert verdict.status == "skipped"
    assert "does not pickle" in verdict.message


def test_a_clipping_that_raises_has_failed():
    class Raises(NormClip):
        def record(self, measured, coef, clipped):
            raise KeyError("threshold")

    verdict = verdict_of(Raises, "telemetry")
    assert verdict.status == "failed"
    assert verdict.message.startswith("raised KeyError at test_testing.py:")


def test_assert_lawful_lists_what_is_broken(planted):
    assert_lawful(NormClip, FAST)
    with pytest.raises(AssertionError, match=r"(?s)^resume: step 0 .*\noptimizer_state: parameters"):
        assert_lawful(planted.ForgetsInStateDict, FAST)


def test_what_is_no_factory_of_clippings(planted):
    with pytest.raises(TypeError, match=r"without arguments \(missing a required argument: 'scope'\)"):
        check(planted.Clipping)
    with pytest.raises(TypeError, match=r"is no clipping: it has no clip_, state_dict, .*, unit"):
        check(object)
    one = NormClip()
    with pytest.raises(ValueError, match="must make a new clipping at each call"):
        check(lambda: one)
    with pytest.raises(ValueError, match=r"a law must be one of zero_gradient, .*, got 'clip'"):
        check(NormClip, ["clip"])


def test_each_law_says_what_it_asks_in_a_line():
    for law in LAWS.values():
        assert law.__doc__.endswith(".")
        assert "\n" not in law.__doc__
    assert LAWS.keys() > SLOW
