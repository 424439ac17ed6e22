"""The heavy-tailed regression of arXiv 2106.05958: linear and convex, with rows of very unequal length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from experiments.errors import UserError
from experiments.tasks.base import Batch, Output, Task, epoch_generator

NUM_ROWS, NUM_FEATURES = 10_000, 200
NUM_TRAIN = NUM_ROWS // 2
POWER = 1.75  # of the residuals
LEVY_SCALE, LEVY_LARGEST = 0.5, 10_000.0
NOISE_SCALE = 10 / LEVY_LARGEST
NORM_AT_START = 10.0
LARGEST_SEED = 2**32 - 1


class Regression(Task):
    r"""Find the weights that made the targets, from rows and noise with the heaviest of tails.

    .. math::
        f(w) = \mathbb{E} \, |\langle a, w \rangle - y|^{1.75}, \qquad
        a = \ell g / \sigma, \qquad y = \langle a, w^* \rangle + 10^{-3} \ell'

    with standard normal :math:`g`, two Levy variables a row, :math:`\ell, \ell'`, of scale 0.5, none
    above 10,000 and less their mean, and the standard deviation :math:`\sigma` of each feature over all rows.
    The true weights have norm 1, those at the start norm 10; both are drawn at random. The targets of the
    evaluation split have no noise.

    The metric is ``distance``, :math:`\|w - w^*\|`. Over training steps its mean is recorded.

    Args:
        data_seed: of the data, the true weights and those at the start; 0 to 2 are the paper's three.
        batch_size: rows in a training batch.

    Reference:
        Gorbunov et al., Near-optimal high probability complexity bounds for non-smooth stochastic
        optimization with heavy-tailed noise, 2021, https://arxiv.org/abs/2106.05958
    """

    metric = "distance"
    higher_is_better = False

    def __init__(self, *, data_seed: int = 0, batch_size: int = 5) -> None:
        for name, value, least, most in (
            ("data_seed", data_seed, 0, LARGEST_SEED),
            ("batch_size", batch_size, 1, NUM_TRAIN),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
        self._data_seed = data_seed
        self._batch_size = batch_size

    def load(self) -> None:
        self._problem = generate(self._data_seed)

    def build_model(self) -> Linear:
        return Linear(self._problem.start, self._problem.true)

    def train_loader(self, seed: int) -> RowLoader:
        return RowLoader(*self._problem.train, self._batch_size, seed)

    def eval_loader(self) -> list[Batch]:
        features, targets = self._problem.val
        return [{"features": features, "targets": targets}]

    def forward(self, model: Linear, batch: Batch) -> Output:
        predictions, distance = model(batch["features"])
        losses = (predictions - batch["targets"]).abs().pow(POWER)
        loss = losses.sum() / batch["mean_over"] if "mean_over" in batch else losses.mean()
        return Output(loss, len(losses), distance)

    def metrics(self, tally: Tensor) -> dict[str, float]:
        distance, batches = tally.tolist()
        return {"distance": distance / batches}


class Linear(nn.Module):
    """A linear function that knows how far it is from the true one.

    Args:
        start: weights, (num_features,).
        true: the weights to find, (num_features,).
    """

    def __init__(self, start: Tensor, true: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(start.clone())
        self.register_buffer("true", true)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predict from rows of features.

        Shapes:
            ``features`` (rows, num_features); the predictions (rows,); beside them the distance to the true
            weights and 1, (2,), whose sums over batches give the mean distance.
        """
        distance = (self.weights.detach() - self.true).norm()
        return features @ self.weights, torch.stack([distance, torch.ones_like(distance)])


class RowLoader:
    """Batches of rows in an order drawn from (seed, epoch) alone, cut out of one shuffled copy an epoch.

    Args:
        features: (rows, num_features).
        targets: (rows,).
        batch_size: rows in a batch; a last, smaller batch is dropped.
        seed: of the run.
    """

    def __init__(self, features: Tensor, targets: Tensor, batch_size: int, seed: int) -> None:
        self._features = features
        self._targets = targets
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0
        self._rank, self._world = 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is, counted from 0."""
        self._epoch = epoch

    def split(self, rank: int, world: int) -> None:
        """Give one of ``world`` parts of every batch from now on; not all need have the same size."""
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return len(self._targets) // self._batch_size

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self._targets), generator=epoch_generator(self._seed, self._epoch))
        order = order[: len(self) * self._batch_size].view(-1, self._batch_size)[:, self._rank :: self._world]
        batches = zip(self._features[order].unbind(), self._targets[order].unbind(), strict=True)
        told = {} if self._world == 1 else {"mean_over": torch.tensor(self._batch_size / self._world)}
        return ({"features": x, "targets": y, **told} for x, y in batches)


class Problem(NamedTuple):
    """Data and weights, float32."""

    train: tuple[Tensor, Tensor]
    """Features, (5000, 200), and noisy targets, (5000,)."""
    val: tuple[Tensor, Tensor]
    """Features, (5000, 200), and targets without noise, (5000,)."""
    true: Tensor
    """Weights that made the targets, (200,), norm 1."""
    start: Tensor
    """Weights to start from, (200,), norm 10."""


def generate(seed: int) -> Problem:
    """Draw the problem, number by number as the paper's own experiments do: the same seed, the same data.

    Args:
        seed: of the draw.
    """
    # NumPy's frozen generator, as the paper used it.
    rng = np.random.RandomState(seed)
    # 20 times the rows: what remains below the largest is always enough for features and noise.
    levy = torch.special.ndtri(torch.from_numpy(1 - rng.random_sample(20 * NUM_ROWS) / 2)).numpy() ** -2.0
    levy *= LEVY_SCALE
    levy = levy[levy < LEVY_LARGEST]
    levy -= levy.mean()

    features = rng.normal(size=(NUM_ROWS, NUM_FEATURES)) * levy[:NUM_ROWS, None]
    features /= features.std(axis=0)
    true, start = (rng.normal(size=NUM_FEATURES) for _ in range(2))
    true /= np.linalg.norm(true)
    start *= NORM_AT_START / np.linalg.norm(start)
    clean = features @ true
    noisy = clean + NOISE_SCALE * levy[NUM_ROWS : 2 * NUM_ROWS]

    order = rng.permutation(NUM_ROWS)
    in_train, in_val = order[:NUM_TRAIN], order[NUM_TRAIN:]

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float()

    return Problem(
        train=(tensor(features[in_train]), tensor(noisy[in_train])),
        val=(tensor(features[in_val]), tensor(clean[in_val])),
        true=tensor(true),
        start=tensor(start),
    )
