"""Laws of the embedded graph: simple, both ways, unequal degrees, no leak, and neighbours that are needed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from experiments.tasks.samples.reddit import (
    FEWEST_NODES,
    NUM_CLASSES,
    SHARES,
    TRAIN,
    VAL,
    WITHIN,
    generate,
)

NUM_NODES = 5_000


@pytest.fixture(scope="module")
def graph():
    return generate(NUM_NODES)


def probe(features, graph) -> float:
    """Accuracy on validation nodes of the best linear rule on training nodes."""
    features = torch.cat([features, torch.ones(NUM_NODES, 1)], dim=1)
    train, val = graph.split == TRAIN, graph.split == VAL
    weights = torch.linalg.lstsq(features[train], F.one_hot(graph.labels)[train].float()).solution
    return ((features @ weights).argmax(1) == graph.labels)[val].float().mean().item()


def test_edges_go_both_ways_once_and_never_in_a_loop(graph):
    edges = set(map(tuple, graph.edges.T.tolist()))
    assert len(edges) == graph.edges.shape[1]
    assert all((b, a) in edges and a != b for a, b in edges)
    assert graph.edges.min() >= 0
    assert graph.edges.max() < NUM_NODES


def test_degrees_have_a_heavy_tail(graph):
    degrees = graph.edges[1].bincount(minlength=NUM_NODES).double()
    assert 8 <= degrees.median() <= 16
    assert degrees.max() > 40 * degrees.median()
    # Hill's estimate over the largest 5 %; the dropping of repeated edges makes it a little lighter than 1.3.
    top = degrees.topk(NUM_NODES // 20).values.log()
    assert 1 < 1 / (top - top[-1]).mean() < 2


def test_edges_prefer_their_own_community(graph):
    within = (graph.labels[graph.edges[0]] == graph.labels[graph.edges[1]]).double().mean().item()
    assert within == pytest.approx(WITHIN + (1 - WITHIN) / NUM_CLASSES, abs=0.08)


def test_every_node_is_in_one_split_and_classes_are_even(graph):
    for part, share in SHARES.items():
        labels = graph.labels[graph.split == part]
        assert len(labels) == round(share * NUM_NODES)
        assert labels.bincount(minlength=NUM_CLASSES).max() < 1.3 * len(labels) / NUM_CLASSES
    assert graph.labels.bincount().tolist() == [NUM_NODES // NUM_CLASSES] * NUM_CLASSES


def test_what_a_node_says_of_itself_does_not_do(graph):
    sources, targets = graph.edges
    degrees = targets.bincount(minlength=NUM_NODES).clamp(min=1)[:, None]
    neighbours = torch.zeros_like(graph.features).index_add_(0, targets, graph.features[sources]) / degrees
    assert probe(graph.features, graph) < 0.25
    assert 0.4 < probe(neighbours, graph) < 0.7


def test_features_of_the_splits_are_alike(graph):
    means = [graph.features[graph.split == part].mean(0) for part in SHARES]
    assert max((one - other).abs().max() for one in means for other in means) < 0.2


def test_seed_decides_everything(graph):
    assert all(map(torch.equal, generate(NUM_NODES), graph))
    assert not torch.equal(generate(NUM_NODES, seed=1).edges[:, :100], graph.edges[:, :100])


def test_the_smallest_graph_has_every_community():
    graph = generate(FEWEST_NODES)
    assert len(graph.labels) == FEWEST_NODES
    assert graph.labels.unique().tolist() == list(range(NUM_CLASSES))
    assert graph.split.unique().tolist() == list(SHARES)
