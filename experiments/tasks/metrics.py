"""Metrics as functions of one confusion matrix: rows are true classes, columns are predicted ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def confusion_matrix(
    predictions: Tensor, targets: Tensor, num_classes: int, ignore_index: int | None = None
) -> Tensor:
    """Count how often each true class was predicted as each class.

    Args:
        predictions: class indices in [0, num_classes).
        targets: class indices in [0, num_classes), or ``ignore_index``.
        num_classes: side of the matrix.
        ignore_index: target value whose elements are left out.

    Shapes:
        ``predictions`` and ``targets`` share any shape; the result is int64, (num_classes, num_classes), on
        their device. Matrices of batches add up to the matrix of the whole set.

    Example:
        >>> import torch
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 255]), 2, ignore_index=255)
        tensor([[1, 1],
                [0, 0]])
    """
    cells = num_classes * num_classes
    index = targets.long() * num_classes + predictions
    if index.is_cpu:
        counted = index.flatten() if ignore_index is None else index[targets != ignore_index]
        # A stray class gives more cells than the matrix has, and the view refuses them.
        return torch.bincount(counted, minlength=cells).view(num_classes, num_classes)
    # Selecting elements and bincount both wait for the device. A spare last cell for the ignored elements and
    # adding into a fixed size do not; sums of integers are exact in any order.
    if ignore_index is not None:
        index = torch.where(targets == ignore_index, cells, index)
    counts = index.new_zeros(cells + 1).scatter_add_(0, index.flatten(), torch.ones_like(index).flatten())
    return counts[:cells].view(num_classes, num_classes)


def accuracy(confusion: Tensor) -> float:
    """Share of elements predicted right; 0 for an empty matrix."""
    confusion = confusion.cpu()
    return confusion.diagonal().sum().item() / max(1, confusion.sum().item())


def matthews_corrcoef(confusion: Tensor) -> float:
    r"""Correlation between true and predicted classes, in [-1, 1]; 0 for any constant prediction.

    .. math::
        \frac{c s - \sum_k t_k p_k}{\sqrt{(s^2 - \sum_k p_k^2) (s^2 - \sum_k t_k^2)}}

    with :math:`s` elements, :math:`c` of them right, :math:`t_k` truly and :math:`p_k` predicted of class k.

    Example:
        >>> import torch
        >>> matthews_corrcoef(torch.tensor([[0, 30], [0, 70]]))
        0.0

    Reference:
        Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004.
    """
    confusion = confusion.cpu()
    # Python integers: the products below pass 2^63 for a set of pictures counted by pixel.
    true = confusion.sum(1).tolist()
    predicted = confusion.sum(0).tolist()
    total = sum(true)
    right = int(confusion.diagonal().sum())
    covariance = right * total - sum(t * p for t, p in zip(true, predicted, strict=True))
    variances = (total**2 - sum(p * p for p in predicted)) * (total**2 - sum(t * t for t in true))
    return covariance / math.sqrt(variances) if variances else 0.0


def iou(confusion: Tensor) -> list[float]:
    """Intersection over union of each class; NaN for a class neither true nor predicted anywhere."""
    confusion = confusion.cpu().double()
    right = confusion.diagonal()
    return (right / (confusion.sum(0) + confusion.sum(1) - right)).tolist()


def mean_iou(confusion: Tensor) -> float:
    """Mean of ``iou`` over the classes that are true or predicted somewhere; 0 for an empty matrix."""
    present = [value for value in iou(confusion) if not math.isnan(value)]
    return sum(present) / len(present) if present else 0.0
