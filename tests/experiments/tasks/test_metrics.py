"""Metrics of a confusion matrix against torchmetrics, and their edges."""

import math

import pytest
import torch

from experiments.tasks.metrics import accuracy, confusion_matrix, iou, matthews_corrcoef, mean_iou

IGNORED = 255


def draw(num_classes: int, size: tuple[int, ...], ignored: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions that are right more often than not, and targets with a share of ignored elements."""
    generator = torch.Generator().manual_seed(num_classes)
    targets = torch.randint(num_classes, size, generator=generator)
    wrong = torch.randint(num_classes, size, generator=generator)
    predictions = torch.where(torch.rand(size, generator=generator) < 0.6, targets, wrong)
    targets[torch.rand(size, generator=generator) < ignored] = IGNORED
    return predictions, targets


@pytest.mark.parametrize("num_classes", [2, 5, 21])
def test_agrees_with_torchmetrics(num_classes):
    from torchmetrics.functional import classification

    predictions, targets = draw(num_classes, (8, 40))
    confusion = confusion_matrix(predictions, targets, num_classes)
    assert torch.equal(
        confusion, classification.multiclass_confusion_matrix(predictions, targets, num_classes)
    )
    torch.testing.assert_close(
        torch.tensor([accuracy(confusion), matthews_corrcoef(confusion), mean_iou(confusion)]),
        torch.stack(
            [
                classification.multiclass_accuracy(predictions, targets, num_classes, average="micro"),
                classification.multiclass_matthews_corrcoef(predictions, targets, num_classes),
                classification.multiclass_jaccard_index(predictions, targets, num_classes),
            ]
        ),
    )


def test_agrees_with_torchmetrics_on_ignored_elements():
    from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

    predictions, targets = draw(5, (2, 30, 30), ignored=0.1)
    confusion = confusion_matrix(predictions, targets, 5, ignore_index=IGNORED)
    expected = multiclass_confusion_matrix(predictions, targets, 5, ignore_index=IGNORED)
    assert torch.equal(confusion, expected)
    assert confusion.sum() == (targets != IGNORED).sum()
    per_class = multiclass_jaccard_index(predictions, targets, 5, ignore_index=IGNORED, average="none")
    torch.testing.assert_close(torch.tensor(iou(confusion)), per_class)


def test_rows_are_targets():
    confusion = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), 2)
    assert confusion.tolist() == [[1, 2], [0, 0]]
    assert confusion.dtype == torch.int64


def test_matrices_of_batches_add_up():
    predictions, targets = draw(5, (90,), ignored=0.2)
    batches = zip(predictions.split(40), targets.split(40), strict=True)
    total = sum(confusion_matrix(*batch, 5, ignore_index=IGNORED) for batch in batches)
    assert torch.equal(total, confusion_matrix(predictions, targets, 5, ignore_index=IGNORED))


@pytest.mark.parametrize("ignore_index", [None, 100])
@pytest.mark.parametrize("stray", [-1, 2, IGNORED])
def test_a_stray_target_is_an_error_not_another_class(stray, ignore_index):
    with pytest.raises(RuntimeError):
        confusion_matrix(torch.tensor([0, 0]), torch.tensor([0, stray]), 2, ignore_index)


@pytest.mark.parametrize("confusion", [[[0, 30], [0, 70]], [[0, 0], [30, 70]], [[0, 0], [0, 0]]])
def test_mcc_is_zero_where_undefined(confusion):
    assert matthews_corrcoef(torch.tensor(confusion)) == 0.0


def test_mcc_reaches_both_ends():
    assert matthews_corrcoef(torch.tensor([[3, 0], [0, 5]])) == pytest.approx(1)
    assert matthews_corrcoef(torch.tensor([[0, 3], [5, 0]])) == pytest.approx(-1)


def test_mcc_survives_counts_whose_products_pass_int64():
    small = torch.tensor([[3, 1], [2, 5]])
    assert matthews_corrcoef(small * 10**12) == pytest.approx(matthews_corrcoef(small))


def test_iou_leaves_absent_classes_out_of_the_mean():
    # Class 2 is predicted but never true: 0. Class 3 is neither: not counted.
    confusion = torch.tensor([[4, 0, 1, 0], [0, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    values = iou(confusion)
    assert values[:3] == pytest.approx([0.8, 1.0, 0.0])
    assert math.isnan(values[3])
    assert mean_iou(confusion) == pytest.approx(0.6)


def test_empty_matrix_scores_zero():
    empty = torch.zeros(3, 3, dtype=torch.int64)
    assert accuracy(empty) == mean_iou(empty) == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_the_same_without_waiting_for_the_device():
    predictions, targets = draw(21, (4, 64, 64), ignored=0.1)
    on_device = predictions.cuda(), targets.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        confusion = confusion_matrix(*on_device, 21, ignore_index=IGNORED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(confusion.cpu(), confusion_matrix(predictions, targets, 21, ignore_index=IGNORED))
