"""Clippings with one bug each. Not a test: test_testing.py says which law must find which."""

import itertools
import math

import torch

from torch_clip.clipping import Clipping
from torch_clip.gates import RandomGate
from torch_clip.methods import AutoClip, LinearRandNormClip, NormClip
from torch_clip.norms import tensor_norms
from torch_clip.scalars import isfinite, number, opposite, where
from torch_clip.scopes import Global, PerTensor, Scope, multiply_, ratio
from torch_clip.shapes import hard
from torch_clip.thresholds import Constant, Threshold


def share(condition):
    return condition.to(torch.float32) if isinstance(condition, torch.Tensor) else float(condition)


class Whole(Scope):
    """A scope of our own for the whole gradient; no ``Global``, so that no fused kernel takes its place."""

    unit = "steps"

    def coef(self, total, threshold):
        return hard(total, threshold)

    def scale_(self, grads, measured, coef_of):
        coef = self.coef(measured.total, measured.threshold)
        multiply_(grads.tensors, coef)
        return coef, share(coef != 1)


class Planted(Clipping):
    """``NormClip`` with another scope, threshold or gate."""

    scope_class = Whole

    def __init__(self, threshold=1.0, *, nonfinite="skip"):
        super().__init__(self.scope_class(), Constant(threshold), nonfinite=nonfinite)


class Lawful(Planted):
    """No bug: what the others differ from."""


class NoOp(Planted):
    """Clips nothing, and does not say so."""

    scope_class = Global

    def _coef_of(self, measured):
        return lambda total, threshold: torch.ones_like(total) if isinstance(total, torch.Tensor) else 1.0


class LyingNoOp(Planted):
    """Clips nothing, and says that it does."""

    class scope_class(Whole):
        def scale_(self, grads, measured, coef_of):
            coef = self.coef(measured.total, measured.threshold)
            return coef, share(coef != 1)


class ClipsTheMomentum(NormClip):
    """Scales the optimizer's momentum too: what is clipped is the sum of the two."""

    optimizer = None

    def measure(self, grads, grad_scale=1.0, threshold_scale=1.0, describe=None, finite=True):
        self.optimizer = describe.args[0] if describe else None
        return super().measure(grads, grad_scale, threshold_scale, describe, finite)

    def record(self, measured, coef, clipped):
        optimizer, self.optimizer = self.optimizer, None
        for state in optimizer.state.values() if optimizer else ():
            if (buffer := state.get("momentum_buffer")) is not None:
                buffer.mul_(coef)
        return super().record(measured, coef, clipped)


class OwnMomentum(Planted):
    """B1, the original's: alpha from the gradient's norm multiplies a momentum of unclipped gradients."""

    class scope_class(Whole):
        def __init__(self):
            self.buffers = []

        def scale_(self, grads, measured, coef_of):
            if len(self.buffers) != len(grads.tensors):
                self.buffers = [torch.zeros_like(grad) for grad in grads.tensors]
            coef = self.coef(measured.total, measured.threshold)
            for grad, buffer in zip(grads.tensors, self.buffers, strict=True):
                grad.copy_(buffer.mul_(0.9).add_(grad) * coef)
            return ratio(number(torch.linalg.vector_norm(tensor_norms(grads))), measured.total), 1.0


class ForgetsInStateDict(AutoClip):
    def state_dict(self):
        return {key: value for key, value in super().state_dict().items() if key != "history"}

    def load_state_dict(self, state):
        super().load_state_dict({**state, "history": torch.empty(0)})


class ForgetsInPickle(AutoClip):
    def __reduce__(self):
        return ForgetsInPickle, (self.threshold.percentile,)


class DrawsPerTensor(LinearRandNormClip):
    """B6: a coin for each tensor."""

    class Coins(Whole):
        def scale_(self, grads, measured, coef_of):
            coef = self.coef(measured.total, measured.threshold)
            fired = [coef_of(measured.total, measured.threshold) == coef for _ in grads.tensors]
            for grad, one in zip(grads.tensors, fired, strict=True):
                grad.mul_(where(one, coef, 1.0))
            after = number(torch.linalg.vector_norm(tensor_norms(grads)))
            return ratio(after, measured.total), share(sum(fired) * (coef != 1) > 0)

    def __init__(self, threshold=1.0, beta=0.85, *, seed=0, nonfinite="skip"):
        super().__init__(threshold, beta, seed=seed, nonfinite=nonfinite)
        self.scope = self.Coins()

    def _coef_of(self, measured):
        draws = itertools.count(1000 * self._counts_beside(measured.total)[0])
        return lambda total, threshold: where(
            self.gate.fires(hard(total, threshold), next(draws)), hard(total, threshold), 1.0
        )


class DrawsFromTorch(Planted):
    """One draw a step, of torch's global generator."""

    class scope_class(Whole):
        def coef(self, total, threshold):
            return where(bool(torch.rand(()) < 0.85), hard(total, threshold), 1.0)


class AbsorbsNaN(Clipping):
    """ZClip's: a running mean that takes every norm."""

    class Mean(Threshold):
        def __init__(self):
            self.mean = 0.0

        def update(self, norm, moment):
            mean = where(self.mean == 0, norm, 0.9 * self.mean + 0.1 * norm)
            self.mean = where(norm == 0, self.mean, mean)
            return self.mean

        def state_dict(self):
            return {"mean": self.mean}

        def load_state_dict(self, state):
            self.mean = state["mean"]

        def reset(self):
            self.mean = 0.0

    def __init__(self, *, nonfinite="skip"):
        super().__init__(Whole(), Constant(1.0), nonfinite=nonfinite)
        self.threshold = self.Mean()


class ReadsTheDevice(Planted):
    class scope_class(Whole):
        def coef(self, total, threshold):
            return hard(float(total), threshold)


class CopiesToTheHost(Planted):
    class scope_class(Whole):
        def coef(self, total, threshold):
            return hard(total.cpu() if isinstance(total, torch.Tensor) else total, threshold)


class Lengthens(Planted):
    """Makes every gradient as long as the threshold, and claims to be bounded."""

    class scope_class(Whole):
        def coef(self, total, threshold):
            if threshold == math.inf:
                return hard(total, threshold)
            return where(total == 0, 1.0, threshold / where(total == 0, 1.0, total))


class SaysItLengthens(Lengthens):
    bounded = False


class PerGroup(Planted):
    """B13: a norm for each parameter group."""

    class scope_class(Whole):
        groups = ()

        def scale_(self, grads, measured, coef_of):
            group_of = {id(param): g for g, params in enumerate(self.groups) for param in params}
            groups = [group_of.get(id(param), 0) for param in grads.params]
            coefs = []
            for g in sorted(set(groups)):
                chosen = [i for i, group in enumerate(groups) if group == g]
                coefs.append(
                    self.coef(number(torch.linalg.vector_norm(measured.norms[chosen])), measured.threshold)
                )
                multiply_([grads.tensors[i] for i in chosen], coefs[-1])
            after = number(torch.linalg.vector_norm(tensor_norms(grads)))
            return ratio(after, measured.total), share(sum(coef != 1 for coef in coefs) > 0)

    def measure(self, grads, grad_scale=1.0, threshold_scale=1.0, describe=None, finite=True):
        groups = describe.args[0].param_groups if describe else ()
        self.scope.groups = [group["params"] for group in groups]
        return super().measure(grads, grad_scale, threshold_scale, describe, finite)


class PerTensorInDisguise(Planted):
    """A norm for each tensor, of a method that says its unit is the whole gradient."""

    class scope_class(Whole):
        def scale_(self, grads, measured, coef_of):
            scope = PerTensor()
            measured = measured._replace(lengths=scope.norms(grads)[1])
            coef, clipped = scope.scale_(grads, measured, coef_of)
            return coef, share(clipped > 0)


class NormInHalf(Planted):
    """B17: the norm in the gradient's dtype."""

    def measure(self, grads, grad_scale=1.0, threshold_scale=1.0, describe=None, finite=True):
        measured = super().measure(grads, grad_scale, threshold_scale, describe, finite)
        if not grads.tensors:
            return measured
        norms = torch.stack([grad.norm().float() for grad in grads.tensors])
        total = number(torch.linalg.vector_norm(norms))
        finite = isfinite(total)
        skip = opposite(finite) if self.nonfinite == "skip" else False
        return measured._replace(total=total, finite=finite, skip=skip)


class SaysAnotherThreshold(Planted):
    """Clips at one threshold, and publishes another."""

    def record(self, measured, coef, clipped):
        return super().record(measured._replace(shown=2 * measured.shown), coef, clipped)


class TakesScaledNorms(NormClip):
    """Measures what a GradScaler has scaled."""

    def measure(self, grads, grad_scale=1.0, threshold_scale=1.0, describe=None, finite=True):
        return super().measure(grads, 1.0, threshold_scale, describe, finite)


class Replaces(Planted):
    """Puts new tensors in the place of the gradients."""

    class scope_class(Whole):
        def scale_(self, grads, measured, coef_of):
            coef = self.coef(measured.total, measured.threshold)
            for param in grads.params:
                param.grad = param.grad * coef
            return coef, share(coef != 1)


class LocalNorm(NormClip):
    """B23: the norm of this rank's shards."""

    def measure(self, grads, grad_scale=1.0, threshold_scale=1.0, describe=None, finite=True):
        grads.meshes.clear()
        return super().measure(grads, grad_scale, threshold_scale, describe, finite)


class DrawsByRank(LinearRandNormClip):
    """Another stream on each rank."""

    def __init__(self, threshold=1.0):
        super().__init__(threshold)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.gate = RandomGate(0.85, 1, seed=rank)
