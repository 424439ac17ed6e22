"""AGC: units as modules define them, exclusions by whatever name, and the worked value.

What two processes do with shards is in test_scopes.py.
"""

import contextlib
import copy
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn

from torch_clip import Clipping, clip
from torch_clip.methods import AGC
from torch_clip.scopes import PerUnit
from torch_clip.thresholds import Constant

SGD = torch.optim.SGD


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def give_gradients(params, seed=1, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = scale * torch.randn(param.shape, generator=rng, dtype=torch.float64).to(param.dtype)


def agc_of(units, threshold=0.01, eps=1e-3):
    """What each (gradient, weight) unit is to be scaled by (C2)."""
    return [min(1.0, threshold * max(w.norm().item(), eps) / max(g.norm().item(), 1e-30)) for g, w in units]


# Formula.


def test_worked_value(path):
    weight, bias = nn.Parameter(torch.tensor([[0.3, 0.4], [0.0, 0.0]])), nn.Parameter(torch.zeros(2))
    weight.grad, bias.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([0.3, 0.4])
    clipping = AGC(exclude=None)
    said = clipping.clip_([weight, bias])
    torch.testing.assert_close(weight.grad, torch.tensor([[0.003, 0.004], [6e-6, 8e-6]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(bias.grad, torch.tensor([6e-6, 8e-6]), rtol=1e-5, atol=0)
    assert (float(said.clipped), clipping.unit) == (1.0, "rows")
    assert float(said.grad_norm) == pytest.approx(math.sqrt(25.5))
    assert float(said.clip_coef) == pytest.approx(math.hypot(0.005, 1e-5, 1e-5) / math.sqrt(25.5), rel=1e-5)
    assert float(said.threshold) == pytest.approx(1e-5)  # the median of 0.005, 1e-5, 1e-5

    # Rows short enough are left bit for bit.
    weight.grad = torch.tensor([[0.003, 0.003], [1.0, 0.0]])
    bias.grad = torch.tensor([5e-6, 5e-6])
    said = clipping.clip_([weight, bias])
    assert torch.equal(weight.grad[0], torch.tensor([0.003, 0.003]))
    assert torch.equal(bias.grad, torch.tensor([5e-6, 5e-6]))
    assert weight.grad[1].tolist() == pytest.approx([1e-5, 0.0])
    assert float(said.clipped) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("threshold", "eps"), [(0.01, 1e-3), (0.3, 1.0), (math.inf, 1e-3), (0, 1e-3)])
def test_settings(path, threshold, eps):
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.03, 0.04]], dtype=torch.float64))
    weight.grad = torch.tensor([[0.6, 0.8], [60.0, 80.0]], dtype=torch.float64)
    coefs = agc_of(zip(weight.grad, weight.detach(), strict=True), threshold, eps)
    wanted = weight.grad * torch.tensor(coefs, dtype=torch.float64)[:, None]
    AGC(threshold, eps, exclude=None).clip_([weight])
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-12, atol=0)


def outputs(module):
    """Each output of a module as one number, from parameters that any element of its weight matters to."""
    size = {1: (5,), 2: (3, 4), 3: (3, 2, 3)}
    if isinstance(module, nn.Linear):
        return module(torch.rand(3, module.in_features, dtype=torch.float64)).unbind(-1)
    if isinstance(module, nn.Embedding):
        return [module(torch.tensor([token])) for token in range(module.num_embeddings)]
    if isinstance(module, nn.MultiheadAttention):  # the queries, keys and values, each of its own output
        return nn.functional.linear(torch.rand(3, 4, dtype=torch.float64), module.in_proj_weight).unbind(-1)
    dims = module.weight.ndim - 2
    return module(torch.rand(2, module.in_channels, *size[dims], dtype=torch.float64)).unbind(1)


MODULES = {
    "Linear": lambda: nn.Linear(4, 3),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, (2, 3)),
    "Conv2d groups": lambda: nn.Conv2d(4, 6, 2, groups=2),
    "Conv2d depthwise": lambda: nn.Conv2d(4, 4, 2, groups=4),
    "Conv3d": lambda: nn.Conv3d(2, 3, 2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "ConvTranspose1d groups": lambda: nn.ConvTranspose1d(4, 6, 2, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 2, 2, stride=2),
    "ConvTranspose2d groups": lambda: nn.ConvTranspose2d(4, 6, (2, 1), groups=2),
    "ConvTranspose2d depthwise": lambda: nn.ConvTranspose2d(4, 4, 2, groups=4),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "ConvTranspose3d groups": lambda: nn.ConvTranspose3d(4, 4, 2, groups=2),
    "Embedding": lambda: nn.Embedding(5, 3),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
}


LAYOUTS = [(name, "contiguous") for name in MODULES]
LAYOUTS += [(name, "channels_last") for name in MODULES if "2d" in name or "3d" in name]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_a_unit_is_what_leads_to_one_output(path, name, layout):
    """Found by asking autograd which elements of the weight an output depends on."""
    module = seeded(MODULES[name])
    weight = module.in_proj_weight if name == "MultiheadAttention" else module.weight
    masks = [torch.autograd.grad(out.sum(), weight, retain_graph=True)[0] != 0 for out in outputs(module)]
    assert torch.stack(masks).sum(0).eq(1).all()  # each element leads to one output

    with torch.no_grad():  # units of unlike lengths, one of them zero
        for k, mask in enumerate(masks):
            weight[mask] *= k
    give_gradients(module.parameters())
    with torch.no_grad():
        for k, mask in enumerate(masks):  # half, three and twenty times as long as they may be
            most = 0.1 * max(weight[mask].norm().item(), 1e-3)
            weight.grad[mask] *= (3.0, 0.5, 20.0)[k % 3] * most / weight.grad[mask].norm()
    if layout == "channels_last":
        last = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
        weight.grad = weight.grad.contiguous(memory_format=last)
    strides = weight.grad.stride()
    coefs = agc_of([(weight.grad[mask], weight.detach()[mask]) for mask in masks], 0.1)
    assert coefs == pytest.approx([(1 / 3, 1.0, 1 / 20)[k % 3] for k in range(len(masks))])
    wanted = weight.grad.clone()
    for mask, coef in zip(masks, coefs, strict=True):
        wanted[mask] *= coef
    others = {
        other: (other.grad * agc_of([(other.grad, other.detach())], 0.1)[0])
        for other in module.parameters()
        if other.ndim == 1
    }

    clipping = AGC(0.1, exclude=None, model=module)
    clipping.clip_(module.parameters())
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-12, atol=0)
    assert weight.grad.stride() == strides
    for other, its in others.items():  # a bias is one unit
        torch.testing.assert_close(other.grad, its, rtol=1e-12, atol=0)


def test_without_model_a_transposed_convolution_is_taken_by_its_first_dimension(path):
    # As the note says: nothing tells it from a convolution.
    weight = nn.Parameter(torch.ones(2, 3, 2, dtype=torch.float64))
    give_gradients([weight])
    wanted = [
        (g * c).clone()
        for g, c in zip(weight.grad, agc_of(zip(weight.grad, weight, strict=True)), strict=True)
    ]
    AGC(exclude=None).clip_([weight])
    torch.testing.assert_close(weight.grad, torch.stack(wanted), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tokens", [[1, 3, 3, 0], [0, 1, 2, 3, 4], []])
def test_a_sparse_embedding_is_clipped_as_a_dense_one(path, tokens):
    grads = []
    for sparse in (False, True):
        module = seeded(lambda sparse=sparse: nn.Embedding(5, 3, sparse=sparse))
        with torch.no_grad():
            module.weight[1] = 0.0
        weights = torch.linspace(1e-4, 50.0, len(tokens), dtype=torch.float64)[:, None]
        (module(torch.tensor(tokens, dtype=torch.int64)) * weights).sum().backward()
        for _ in range(2):  # the second time nothing is left to clip
            said = AGC(exclude=None).clip_(module.parameters())
            assert module.weight.grad.is_sparse == sparse
        if tokens:
            assert float(said.clip_coef) == pytest.approx(1.0)
        grads.append((module.weight.grad.to_dense(), [float(value) for value in said]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=0)


def test_norm_layers_biases_and_scalars_are_one_unit_each(path):
    norm = seeded(lambda: nn.LayerNorm((2, 3)))  # two dimensions: rows, as of any matrix
    scale = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))
    flat = seeded(lambda: nn.LayerNorm(5))
    params = [scale, *flat.parameters(), norm.weight]
    give_gradients(params, scale=10.0)
    flat.bias.grad = torch.full_like(flat.bias, 1e-7)
    units = [[scale], [flat.weight], [flat.bias], list(norm.weight)]
    grads = [[scale.grad], [flat.weight.grad], [flat.bias.grad], list(norm.weight.grad)]
    wanted = [
        torch.stack([g * c for g, c in zip(gs, agc_of(zip(gs, ws, strict=True)), strict=True)])
        for gs, ws in zip(grads, units, strict=True)
    ]
    said = AGC(exclude=None).clip_(params)
    for param, want in zip(params, wanted, strict=True):
        torch.testing.assert_close(param.grad, want.view_as(param), rtol=1e-12, atol=0)
    assert scale.grad.abs().item() == pytest.approx(0.04)
    assert torch.equal(flat.bias.grad, torch.full_like(flat.bias, 1e-7))
    assert float(said.clipped) == pytest.approx(4 / 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_measured_in_float32(path, dtype):
    weight = nn.Parameter(torch.full((2, 3000), 0.5, dtype=dtype))
    weight.grad = torch.full((2, 3000), 8.0, dtype=dtype)  # of norm 438: float16 cannot hold its square
    weight.grad[1] = 1e-4
    AGC(0.01, exclude=None).clip_([weight])
    assert weight.grad.dtype is dtype
    row = weight.grad[0].double()
    assert row.norm().item() == pytest.approx(0.01 * 0.5 * 3000**0.5, rel=1e-2)
    assert torch.equal(weight.grad[1], torch.full((3000,), 1e-4, dtype=dtype))


def test_complex_and_empty_parameters(path):
    weight = nn.Parameter(torch.tensor([[3 + 4j, 0], [0, 1j]]))
    weight.grad = torch.tensor([[30 + 40j, 0], [0, 1e-4j]])
    empty, none = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2, 2))
    empty.grad = torch.ones(0, 3)
    said = AGC(exclude=None).clip_([empty, weight, none])
    torch.testing.assert_close(weight.grad, torch.tensor([[0.03 + 0.04j, 0], [0, 1e-4j]]))
    assert float(said.clipped) == 0.5
    assert none.grad is None


# A row that is not finite.


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_propagate_spoils_only_the_row(path, bad):
    weight, bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    weight.grad, bias.grad = torch.full((3, 2), 5.0), torch.full((3,), 5.0)
    weight.grad[1, 0] = bad
    said = AGC(exclude=None, nonfinite="propagate").clip_([weight, bias])
    share = 0.01 * math.sqrt(2) / math.hypot(5, 5)
    torch.testing.assert_close(weight.grad[[0, 2]], torch.full((2, 2), 5.0 * share))
    assert not weight.grad[1].isfinite().all()
    torch.testing.assert_close(bias.grad, torch.full((3,), 0.01))
    assert not math.isfinite(float(said.grad_norm))


# Exclusions.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)


NAMES = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"]


def excluded_by(optimizer, params):
    """Which parameters are left as they are by a step with large gradients."""
    give_gradients(params, scale=100.0)
    before = [param.grad.clone() for param in params]
    optimizer.step()
    return [n for n, (p, grad) in enumerate(zip(params, before, strict=True)) if torch.equal(p.grad, grad)]


EXCLUDE = [
    (lambda net: "last", [4, 5]),
    (lambda net: None, []),
    (lambda net: (), []),
    (lambda net: ["head.*"], [4, 5]),
    (lambda net: "head.*", [4, 5]),
    (lambda net: ["*.bias", "body.1.*"], [1, 2, 3, 5]),
    (lambda net: ["body.0.weight"], [0]),
    (lambda net: [net.head], [4, 5]),
    (lambda net: net.head, [4, 5]),
    (lambda net: [net.head.weight], [4]),
    (lambda net: net.body[0].bias, [1]),
    (lambda net: (module for module in net.body), [0, 1, 2, 3]),
    (lambda net: [net.body[1], "head.bias", net.head.weight], [2, 3, 4, 5]),
]


@pytest.mark.parametrize("names", ["model=", "named_parameters"])
@pytest.mark.parametrize(("exclude", "left"), EXCLUDE)
def test_exclude(path, exclude, left, names):
    net = Net()
    clipping = AGC(exclude=exclude(net), model=net if names == "model=" else None)
    named = names == "named_parameters"
    optimizer = clip(SGD(net.named_parameters() if named else net.parameters(), lr=0.1), clipping)
    for _ in range(2):
        assert excluded_by(optimizer, list(net.parameters())) == left
    rows = [4, 1, 1, 1, 2, 1]  # of each parameter
    clipped = float(clipping.telemetry.clipped)
    assert clipped == (1.0 if len(left) < 6 else 0.0)
    assert float(clipping.telemetry.grad_norm) == pytest.approx(
        torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
        / float(clipping.telemetry.clip_coef),
        rel=1e-5,
    )
    assert sum(rows) == 10

    # By names that come with the parameters, without an optimizer.
    give_gradients(net.parameters(), scale=100.0)
    before = [param.grad.clone() for param in net.parameters()]
    AGC(exclude=exclude(net)).clip_(net.named_parameters())
    pairs = enumerate(zip(net.parameters(), before, strict=True))
    assert [n for n, (p, grad) in pairs if torch.equal(p.grad, grad)] == left


def test_the_last_layer_is_left_out_unless_told(path):
    # The paper's rule, also where nothing has a name: the last matrix, with what belongs to it.
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    for params in (net.parameters(), net.named_parameters()):
        optimizer = clip(SGD(params, lr=0.1), AGC())
        left = excluded_by(optimizer, list(net.parameters()))
        assert set(left) >= {2, 3}
        assert not {0, 1} & set(left)
    only_vectors = nn.LayerNorm(3)
    assert excluded_by(clip(SGD(only_vectors.parameters()), AGC()), list(only_vectors.parameters())) == []


def test_the_last_layer_of_unnamed_groups(path):
    """Matrices with weight decay in one group, the rest without in another: the commonest way to make one."""
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    params = list(net.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    left = excluded_by(clip(SGD(groups, lr=0.1), AGC()), params)
    assert 4 in left  # the last matrix
    assert not {0, 1, 2, 3} & set(left)  # biases and norms of other layers are clipped
    assert excluded_by(clip(SGD(groups, lr=0.1), AGC(model=net)), params) == [4, 5]


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["fc.*"], "exclude='fc.*' matches none of body.0.weight, body.0.bias"),
        (["head.*", "bdy.*"], "exclude='bdy.*' matches none of"),
        ([nn.Linear(2, 2)], "2 of its parameters are not among those clipped"),
        ([nn.Parameter(torch.ones(1))], "1 of its parameters are not among those clipped"),
    ],
)
def test_an_exclusion_that_excludes_nothing_is_an_error(path, exclude, message):
    net = Net()
    plain, clipping = SGD(net.named_parameters(), lr=0.1), AGC(exclude=exclude)
    with pytest.raises(ValueError, match=re.escape(message)):
        clip(plain, clipping)  # not at the first step, some minutes into a run
    assert "clipping" not in plain.state_dict()
    give_gradients(net.parameters())
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            clipping.clip_(net.named_parameters())


def test_patterns_need_names(path):
    net = Net()
    give_gradients(net.parameters())
    for act in (
        lambda: clip(SGD(net.parameters()), AGC(exclude=["head.*"])),
        lambda: AGC(exclude="head.*").clip_(net.parameters()),
        lambda: AGC(exclude="head.*", model=net.body).clip_(net.parameters()),  # a model, but not all of it
    ):
        with pytest.raises(
            ValueError, match=r"needs parameter names: make the optimizer of\s+model.named_param"
        ):
            act()
    for wrong in (3, [3], [None]):
        with pytest.raises((TypeError, ValueError), match="exclude takes name patterns, parameters and mod"):
            AGC(exclude=wrong)


def test_frozen_parameters_and_gradients_that_come_and_go(path):
    net = Net()
    net.body[0].weight.requires_grad_(False)
    params = list(net.parameters())
    optimizer = clip(SGD(net.named_parameters(), lr=0.0), AGC(exclude=["head.*"]))
    for absent in ((0,), (0, 4, 5), (0, 1, 2, 3), (0, 2), (0,)):
        give_gradients(params, scale=100.0)
        for k in absent:
            params[k].grad = None
        before = [p.grad for p in params]
        before = [None if grad is None else grad.clone() for grad in before]
        optimizer.step()
        for k, (param, grad) in enumerate(zip(params, before, strict=True)):
            if grad is None:
                assert param.grad is None
            elif k >= 4:
                assert torch.equal(param.grad, grad)
            else:
                units = [(grad, param.detach())]
                torch.testing.assert_close(param.grad, grad * agc_of(units)[0], rtol=1e-5, atol=0)


def test_a_group_added_later(path):
    net = Net()
    optimizer = clip(SGD(net.body.named_parameters(), lr=0.1), AGC(exclude=["1.*"]))
    assert excluded_by(optimizer, list(net.body.parameters())) == [2, 3]
    optimizer.add_param_group({"params": list(net.head.named_parameters())})
    assert excluded_by(optimizer, list(net.parameters())) == [2, 3]
    assert float(optimizer.clipping.telemetry.clipped) == 1.0

    # The last layer is another one now.
    optimizer = clip(SGD(net.body.parameters(), lr=0.1), AGC(exclude="last"))
    assert 0 in excluded_by(optimizer, list(net.body.parameters()))
    optimizer.add_param_group({"params": list(net.head.parameters())})
    assert excluded_by(optimizer, list(net.parameters())) == [4, 5]


def test_nothing_is_remembered_of_other_parameters(path):
    """AGC has no memory: it takes other parameters at the next call, alike in number or not."""
    clipping = AGC(exclude=None)
    first = nn.Parameter(torch.ones(2, 2))
    for others in ([nn.Parameter(torch.ones(2, 2))], [nn.Parameter(torch.ones(4, 2))], []):
        params = [first, *others]
        give_gradients(params, scale=100.0)
        clipping.clip_(params)
        for param in params:
            lengths = torch.linalg.vector_norm(param.grad, dim=1)
            torch.testing.assert_close(lengths, torch.full_like(lengths, 0.01 * math.sqrt(2)))
    named = Clipping(PerUnit(["a.*"]), Constant(1.0))
    for names, left in ((("a.w", "b.w"), 0), (("b.w", "a.w"), 1)):
        params = [first, nn.Parameter(torch.ones(2, 2))] if left == 0 else params
        give_gradients(params, scale=100.0)
        named.clip_(zip(names, params, strict=True))
        assert params[left].grad.norm() > 10
        assert params[1 - left].grad.norm() < 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file"])
def test_copies_exclude_their_own_parameters(path, how):
    net = Net()
    clipping = AGC(exclude=[net.head, "body.1.*"], model=net)
    optimizer = clip(SGD(net.parameters(), lr=0.1), clipping)
    assert excluded_by(optimizer, list(net.parameters())) == [2, 3, 4, 5]
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    params = other.param_groups[0]["params"]
    assert not {id(p) for p in params} & {id(p) for p in net.parameters()}
    assert excluded_by(other, params) == [2, 3, 4, 5]
    net2, other2 = copy.deepcopy((net, optimizer))
    assert excluded_by(other2, list(net2.parameters())) == [2, 3, 4, 5]


@pytest.mark.parametrize("old", [False, True], ids=["parametrization", "hook"])
def test_a_weight_normed_transposed_convolution(path, old):
    """Its weight is no parameter but a product of two: vocoders are full of them."""
    weight_norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    with pytest.warns(FutureWarning) if old else contextlib.nullcontext():
        net = seeded(lambda: nn.Sequential(nn.Linear(3, 3), weight_norm(nn.ConvTranspose1d(2, 3, 2), dim=1)))
    optimizer = clip(SGD(net.parameters(), lr=0.0), AGC(exclude=None, model=net))
    direction = next(p for p in net[1].parameters() if p.shape == (2, 3, 2))
    with torch.no_grad():
        direction *= torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64)
    give_gradients(net.parameters(), scale=10.0)
    grads, weights = direction.grad.unbind(1), direction.detach().unbind(1)
    coefs = agc_of(zip(grads, weights, strict=True))
    wanted = torch.stack([g * c for g, c in zip(grads, coefs, strict=True)], 1)
    optimizer.step()
    torch.testing.assert_close(direction.grad, wanted, rtol=1e-12, atol=0)
    net[1](torch.ones(1, 2, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    if not old:  # torch's old one cannot be copied itself
        copy.deepcopy(optimizer).step()


@pytest.mark.parametrize(("cls", "settings"), [(SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
@pytest.mark.parametrize("fused", [False, True])
def test_attached_it_is_clipping_by_hand(path, cls, settings, fused):
    nets = [seeded(Net) for _ in range(2)]
    plain, clipped = (cls(net.parameters(), lr=0.1, fused=fused, **settings) for net in nets)
    clip(clipped, AGC(0.1, exclude=[nets[1].head]))
    by_hand = AGC(0.1, exclude=[nets[0].head])
    for k in range(10):
        for net in nets:
            give_gradients(net.parameters(), seed=k, scale=3.0 if k % 3 else 0.01)
        by_hand.clip_(nets[0].parameters())
        plain.step()
        clipped.step()
    torch.testing.assert_close(list(nets[1].parameters()), list(nets[0].parameters()), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1}, "threshold must be in [0, inf], got -1"),
        ({"threshold": math.nan}, "threshold must be in [0, inf], got nan"),
        ({"eps": 0}, "eps must be in (0, inf), got 0"),
        ({"eps": math.inf}, "eps must be in (0, inf), got inf"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AGC(**settings)
