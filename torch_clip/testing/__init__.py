"""The laws that every clipping is held to, ours or anyone's.

A law is a function of a factory: a clipping class whose arguments all have defaults, or a
``functools.partial`` of one. It fails by raising ``AssertionError`` with what was expected and what was seen.

Example:
    >>> import functools
    >>> from torch_clip.methods import NormClip
    >>> for verdict in check(functools.partial(NormClip, threshold=2.0), ["clips", "bounded"]):
    ...     print(verdict.law, verdict.status)
    clips passed
    bounded passed

In pytest, for a clipping of your own::

    @pytest.mark.parametrize("law", LAWS)
    def test_my_clip(law):
        assert_lawful(MyClip, [law])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch_clip.testing import alone, attached, processes
from torch_clip.testing.expect import Make, NotClaimed, Skipped, heavy_tailed, origin

__all__ = ["LAWS", "SLOW", "NotClaimed", "Skipped", "Verdict", "assert_lawful", "check", "heavy_tailed"]

_FACE = ("clip_", "state_dict", "load_state_dict", "telemetry", "bounded", "unit", "carries", "by_tensor")

LAWS: dict[str, Callable[[Make], None]] = {
    law.__name__: law
    for law in (
        alone.zero_gradient,
        alone.no_gradients,
        alone.huge_gradient,
        alone.half_precision,
        alone.not_finite,
        alone.clips,
        alone.in_place,
        alone.bounded,
        alone.telemetry,
        alone.one_norm,
        alone.own_draws,
        attached.resume,
        attached.optimizer_state,
        attached.before_momentum,
        attached.all_groups,
        attached.foreach_and_fused,
        attached.grad_scaler,
        attached.infinite_threshold,
        attached.no_host_read,
        processes.two_processes,
    )
}
"""Name -> law; its docstring says what it asks."""

SLOW = frozenset({"two_processes"})
"""Laws that start processes: some seconds each."""


class Verdict(NamedTuple):
    """What came of one law."""

    law: str
    status: str
    """``passed``, ``failed``, ``not claimed`` or ``skipped``."""
    message: str
    """Why; empty when passed."""


def check(make: Make, laws: Iterable[str] | None = None) -> list[Verdict]:
    """Try laws on the clippings that ``make`` makes.

    Args:
        make: makes a new clipping at each call without arguments.
        laws: keys of ``LAWS``; None means all. Without those in ``SLOW`` it is a matter of a second.

    Returns:
        One verdict a law, in the order asked for.

    Raises:
        TypeError: ``make`` needs arguments, or what it makes is no clipping.
        ValueError: a law has no such name, or ``make`` makes the same object twice.
    """
    laws = list(LAWS if laws is None else laws)
    for law in laws:
        if law not in LAWS:
            raise ValueError(f"a law must be one of {', '.join(LAWS)}, got {law!r}")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise TypeError(
            f"{make} must be callable without arguments ({error}); see functools.partial"
        ) from None
    clipping = make()
    if missing := [name for name in _FACE if not hasattr(clipping, name)]:
        raise TypeError(f"{clipping!r} is no clipping: it has no {', '.join(missing)}")
    if make() is clipping:
        raise ValueError(f"{make} must make a new clipping at each call, it returned the same one twice")

    verdicts = []
    for law in laws:
        status, message = "passed", ""
        try:
            LAWS[law](make)
        except NotClaimed as reason:
            status, message = "not claimed", str(reason)
        except Skipped as reason:
            status, message = "skipped", str(reason)
        except AssertionError as failure:
            status, message = "failed", str(failure)
        except Exception as error:  # of somebody's clipping: a verdict on it, no end of ours
            status, message = "failed", f"raised {type(error).__name__} at {origin(error)}: {error}"
        verdicts.append(Verdict(law, status, message))
    return verdicts


def assert_lawful(make: Make, laws: Iterable[str] | None = None) -> None:
    """Raise ``AssertionError`` that lists the laws broken, see ``check``."""
    failures = [f"{v.law}: {v.message}" for v in check(make, laws) if v.status == "failed"]
    if failures:
        raise AssertionError("\n".join(failures))
