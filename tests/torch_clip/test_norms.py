"""Norms: float32 whatever the dtype, every kind of gradient, one number for all."""

import numpy as np
import pytest
import torch

from torch_clip import CLIPPINGS
from torch_clip.methods import CoordWiseClip, LayerWiseClip, NormClip
from torch_clip.norms import Grads, tensor_norms


def numpy_norm(tensors):
    return np.sqrt(sum(float((t.detach().to(torch.complex128).abs() ** 2).sum()) for t in tensors))


@pytest.mark.parametrize("path", ["host", "device"])
def test_norms_of_mixed_gradients(parameters, device_path, path):
    """Long and short, float16 to float64, transposed, complex, empty and without a gradient, in one list."""
    if path == "device":
        device_path()
    rng = torch.Generator().manual_seed(0)
    grads = [
        torch.randn(200, 150, generator=rng),
        torch.randn(150, 200, generator=rng).T,  # long and not contiguous
        torch.randn(7, generator=rng),
        torch.randn(3, 5, generator=rng).bfloat16(),
        torch.randn(11, generator=rng).half(),
        torch.randn(4, generator=rng).double(),
        torch.randn(3, dtype=torch.complex64, generator=rng),
        torch.empty(0),
        torch.tensor(2.5),
    ]
    params = [*parameters(*grads), torch.nn.Parameter(torch.ones(3))]
    norms = tensor_norms(Grads(params))
    assert norms.dtype is torch.float64
    np.testing.assert_allclose(norms.numpy(), [numpy_norm([g]) for g in grads], rtol=1e-5)

    telemetry = NormClip(1.0).clip_(params)
    assert float(telemetry.grad_norm) == pytest.approx(numpy_norm(grads), rel=1e-5)
    assert numpy_norm(p.grad for p in params[:-1]) == pytest.approx(1.0, rel=1e-3)
    assert params[-1].grad is None
    for param, grad in zip(params, grads, strict=False):
        assert param.grad.dtype == grad.dtype
        assert param.grad.shape == grad.shape


@pytest.mark.parametrize("name", CLIPPINGS)
def test_bfloat16_does_not_stop_counting(parameters, name):
    # B17: accumulated in bfloat16 the norm would stay at 16.
    telemetry = CLIPPINGS[name]().clip_(parameters(*[[1.0]] * 2000, dtype=torch.bfloat16))
    assert telemetry.grad_norm == pytest.approx(44.72136, rel=1e-4)


@pytest.mark.parametrize("name", CLIPPINGS)
def test_float16_does_not_overflow(parameters, name):
    # B17: 300 squared is inf in float16, and so is the sum of squares long before.
    params = parameters([300.0] * 1000, dtype=torch.float16)
    telemetry = CLIPPINGS[name]().clip_(params)
    assert telemetry.grad_norm == pytest.approx(300 * 1000**0.5, rel=1e-3)
    grad = params[0].grad
    assert grad.dtype is torch.float16
    assert grad.isfinite().all()
    assert (grad > 0).all()


@pytest.mark.parametrize("name", list(CLIPPINGS)[:9])  # the others have files of their own
def test_one_call_for_all_equals_a_loop(heavy_tailed, parameters, name):
    """foreach or not, the optimizer sees the same: the product of each gradient and its coefficient."""
    clipping = CLIPPINGS[name]()
    for grads in heavy_tailed(4, 10):
        params = parameters(*grads)
        telemetry = clipping.clip_(params)
        for param, grad in zip(params, grads, strict=True):
            if name == "layer_wise":
                wanted = grad * min(1.0, 1.0 / numpy_norm([grad]))
            elif name == "coordinate_wise":
                wanted = grad.clamp(-0.1, 0.1)
            else:
                wanted = grad * telemetry.clip_coef
            torch.testing.assert_close(param.grad, wanted)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11, of its own coalescing
def test_sparse_gradients():
    def sparse():
        param = torch.nn.Parameter(torch.zeros(5, 2))
        # Row 1 twice: its parts must be added up before anything is measured.
        rows, values = [[1, 1, 3]], [[2.0, 0.0], [1.0, 0.0], [0.0, 4.0]]
        param.grad = torch.sparse_coo_tensor(rows, values, (5, 2), check_invariants=True)
        return param

    for clipping, row1, row3, coef in [
        (NormClip(1.0), 0.6, 0.8, 0.2),
        (LayerWiseClip(1.0), 0.6, 0.8, 0.2),
        (CoordWiseClip(0.5), 0.5, 0.5, 0.5**0.5 / 5),
    ]:
        param = sparse()
        telemetry = clipping.clip_([param])
        assert telemetry.grad_norm == 5.0
        assert telemetry.clip_coef == pytest.approx(coef)
        dense = torch.zeros(5, 2)
        dense[1, 0], dense[3, 1] = row1, row3
        torch.testing.assert_close(param.grad.to_dense(), dense)

    nothing = torch.nn.Parameter(torch.zeros(5, 2))
    rows, values = torch.empty(1, 0, dtype=torch.long), torch.empty(0, 2)
    nothing.grad = torch.sparse_coo_tensor(rows, values, (5, 2), check_invariants=True)
    for name, method in CLIPPINGS.items():
        if name in ("spam", "uclip"):
            with pytest.raises(
                ValueError, match="parameter 0 has a sparse gradient; a memory of each element"
            ):
                method().clip_([nothing])
        else:
            assert method().clip_([nothing]).grad_norm == 0


def test_a_single_tensor_is_a_list_of_one():
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    assert NormClip(1.0).clip_(param).grad_norm == 5.0
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


def test_gradients_are_written_in_place(heavy_tailed, parameters):
    """Buckets, views and tied storage stay what they are."""
    for method in CLIPPINGS.values():
        params = parameters(*heavy_tailed(0, 1)[0])
        places = [(id(p.grad), p.grad.data_ptr()) for p in params]
        method().clip_(params)
        assert [(id(p.grad), p.grad.data_ptr()) for p in params] == places
        assert all(p.grad.grad_fn is None for p in params)
