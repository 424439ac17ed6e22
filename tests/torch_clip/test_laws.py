"""Laws that hold for every method; a new entry in CLIPPINGS is tested without a new line here."""

import math

import pytest

from torch_clip import CLIPPINGS, NonFiniteGradientError
from torch_clip.testing import LAWS, SLOW, check

pytestmark = pytest.mark.parametrize("name", CLIPPINGS)

NO_THRESHOLD = {"adagc", "adaclip", "adagn", "stable_spam", "normalized"}
BY_TENSOR = {"layer_wise", "layer_wise_autoclip", "agc", "adagc", "adaclip", "adagn", "stable_spam"}
NOT_CLAIMED = {
    ("no_clip", "clips"),
    ("uclip", "zero_gradient"),
    *((name, "infinite_threshold") for name in NO_THRESHOLD),
    *((name, "one_norm") for name in BY_TENSOR),
    *((name, "bounded") for name in ("adagn", "stable_spam", "uclip", "normalized")),
}


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("law", [law for law in LAWS if law not in SLOW])
def test_law(name, law, path, device_path):
    if path == "device":
        device_path()
    (verdict,) = check(CLIPPINGS[name], [law])
    wanted = "not claimed" if (name, law) in NOT_CLAIMED else "passed"
    assert verdict.status == wanted, verdict.message


@pytest.mark.slow  # together; test_distributed.py has all methods in one pair of processes
@pytest.mark.parametrize("law", sorted(SLOW))
def test_slow_law(name, law):
    (verdict,) = check(CLIPPINGS[name], [law])
    assert verdict.status == "passed", verdict.message


# How NaN and Inf propagate, and what an error says, is each method's own.


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_propagate(name, path, bad, parameters, device_path, same):
    if path == "device":
        device_path()
    clipping = CLIPPINGS[name](nonfinite="propagate")
    clipping.clip_(parameters([1.0], [1.0]))
    before = clipping.state_dict()
    params = parameters([bad], [5.0])
    telemetry = clipping.clip_(params)
    assert not math.isfinite(telemetry.grad_norm)
    if name in list(CLIPPINGS)[:9] and clipping.by_factor:
        # As torch.nn.utils.clip_grad_norm_: NaN goes everywhere; Inf leaves NaN and zeros.
        assert params[0].grad.isnan().all() or name == "no_clip"
        assert params[1].grad.isnan().all() or (bad == math.inf and params[1].grad.item() in (0.0, 5.0))
        assert params[1].grad.item() != 5.0 or name == "no_clip"
    elif name == "layer_wise":
        assert params[0].grad.isnan().all()
        assert params[1].grad.item() == 1.0
    # B16: a history takes only finite norms.
    after = clipping.state_dict()
    assert after["skipped_steps"] == 0
    assert same(after.get("history"), before.get("history"))
    assert math.isfinite(clipping.clip_(parameters([3.0], [4.0])).clip_coef)


@pytest.mark.parametrize("path", ["host", "device"])
def test_error_names_the_parameters(name, path, parameters, device_path, same):
    if path == "device":
        device_path()
    clipping = CLIPPINGS[name](nonfinite="error")
    clipping.clip_(parameters([1.0]))
    before = clipping.state_dict()
    params = parameters([1.0], [math.nan, 2.0], [2.0], [math.inf])
    with pytest.raises(NonFiniteGradientError, match="norm is not finite in parameter 1, parameter 3;"):
        clipping.clip_(params)
    assert params[0].grad.item() == 1.0
    assert same(clipping.state_dict(), before)
    with pytest.raises(NonFiniteGradientError, match="parameter 4 and 2 more;"):
        clipping.clip_(parameters(*[math.nan] * 7))
    with pytest.raises(NonFiniteGradientError, match="overflows float32"):
        clipping.clip_(parameters(*[[1.5e19]] * 10))


def test_state_of_another_method_is_refused(name):
    other = next(n for n in CLIPPINGS if n != name)
    with pytest.raises(ValueError, match=f"the state is of {CLIPPINGS[other].__name__}, this clipping is"):
        CLIPPINGS[name]().load_state_dict(CLIPPINGS[other]().state_dict())
