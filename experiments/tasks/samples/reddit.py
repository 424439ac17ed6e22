"""A graph of communities whose members are connected very unequally: posts of a small forum.

A degree-corrected stochastic block model. A node's label is its community; its features say little of it, its
neighbours' features together say most, so that a model must aggregate to score.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEWEST_NODES = 100
NUM_CLASSES = 10
NUM_FEATURES = 32
MEAN_DEGREE = 25  # before repeated edges and loops are dropped
TAIL_INDEX = 1.3  # of the Pareto law of the weights; the variance of degrees is infinite below 2
WITHIN = 0.7  # share of the edges that stay in a community by choice, not by chance
SIGNAL = 0.4  # length of a community's mean feature, in standard deviations of the noise
TRAIN, VAL, TEST = 1, 2, 3
SHARES = {TRAIN: 0.6, VAL: 0.2, TEST: 0.2}


class GraphSample(NamedTuple):
    """A directed graph with features and labels of its nodes."""

    features: Tensor
    """(num_nodes, num_features), float32."""
    labels: Tensor
    """Class indices, (num_nodes,)."""
    split: Tensor
    """``TRAIN``, ``VAL`` or ``TEST``, (num_nodes,)."""
    edges: Tensor
    """From node, to node, (2, num_edges): no loop and no edge twice."""


def generate(num_nodes: int, seed: int = 0) -> GraphSample:
    r"""Draw a graph in which every edge has its reverse.

    .. math::
        P(\text{an edge joins } i \text{ and } j) \propto
        \theta_i \theta_j \left(1 - w + w \frac{[c_i = c_j] \, \Theta}{\Theta_{c_i}}\right), \qquad
        P(\theta > t) = t^{-1.3}, \ t \geq 1,

    with communities :math:`c`, the sum :math:`\Theta` of all weights :math:`\theta`, their sum
    :math:`\Theta_c` in community c, and the share :math:`w` of edges that stay within by choice.

    Args:
        num_nodes: at least ``FEWEST_NODES``.
        seed: of the draw.

    Reference:
        Karrer, Newman, Stochastic blockmodels and community structure in networks, 2011,
        https://arxiv.org/abs/1008.3926
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    labels = torch.randperm(num_nodes, generator=generator) % NUM_CLASSES
    weights = (1 - uniform(num_nodes)) ** (-1 / TAIL_INDEX)

    # With the nodes in the order of their communities, each community is an interval of the running sum.
    order = labels.argsort(stable=True)
    running = weights[order].cumsum(0)
    ends = running[labels.bincount(minlength=NUM_CLASSES).cumsum(0) - 1]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])

    def weighted(low: Tensor, high: Tensor) -> Tensor:
        """Nodes with probability proportional to their weights, from an interval of the running sum each."""
        place = torch.searchsorted(running, low + (high - low) * uniform(len(low)), right=True)
        return order[place.clamp(max=num_nodes - 1)]

    num_draws = num_nodes * MEAN_DEGREE // 2
    nowhere, everywhere = torch.zeros(num_draws).double(), running[-1].expand(num_draws)
    one = weighted(nowhere, everywhere)
    stays = uniform(num_draws) < WITHIN
    community = labels[one]
    other = weighted(
        torch.where(stays, starts[community], nowhere), torch.where(stays, ends[community], everywhere)
    )
    both_ways = torch.stack([torch.cat([one, other]), torch.cat([other, one])])
    edges = torch.unique(both_ways[:, both_ways[0] != both_ways[1]], dim=1)

    means = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)
    means *= SIGNAL / means.norm(dim=1, keepdim=True)
    noise = torch.randn(num_nodes, NUM_FEATURES, generator=generator)
    counts = torch.tensor([round(share * num_nodes) for share in SHARES.values()])
    counts[-1] += num_nodes - counts.sum()
    split = torch.tensor(list(SHARES)).repeat_interleave(counts)[
        torch.randperm(num_nodes, generator=generator)
    ]
    return GraphSample(means[labels] + noise, labels, split, edges)
