"""Neighbour sampling: the right distribution, the right subgraph, and batches that can be drawn again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from experiments.tasks import graphs
from experiments.tasks.graphs import ALL, Graph, PygLoader, SampleLoader, choose, draw_neighbours, sample
from experiments.tasks.samples.reddit import generate


@pytest.fixture(params=[SampleLoader, PygLoader])
def loader(request):
    typing = graphs.torch_geometric().typing
    if request.param is PygLoader and not (typing.WITH_PYG_LIB or typing.WITH_TORCH_SPARSE):
        pytest.skip("needs pyg-lib or torch-sparse")
    return request.param


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def graph_of(edges: list[tuple[int, int]], num_nodes: int) -> Graph:
    """Node i has feature i and label 10 i."""
    nodes = torch.arange(num_nodes)
    return Graph(nodes[:, None].float(), 10 * nodes, torch.tensor(edges).T)


@pytest.fixture(scope="module")
def graph() -> Graph:
    drawn = generate(300, seed=1)
    return Graph(drawn.features, drawn.labels, drawn.edges)


def into(graph: Graph, node: int) -> list[int]:
    """Nodes with an edge into ``node``, read off the dense matrix."""
    return graph.adjacency().to_dense()[node].nonzero()[:, 0].tolist()


def test_edges_lie_at_the_node_they_go_to():
    graph = graph_of([(3, 1), (0, 1), (1, 2), (2, 0)], num_nodes=4)
    assert graph.pointers.tolist() == [0, 1, 3, 4, 4]
    assert [into(graph, node) for node in range(4)] == [[2], [0, 3], [1], []]
    assert list(zip(graph.sources.tolist(), graph.targets().tolist(), strict=True)) == [
        (2, 0),
        (3, 1),
        (0, 1),
        (1, 2),
    ]


def test_data_follows_a_model_to_its_device_and_stays_out_of_its_state():
    graph = graph_of([(0, 1)], num_nodes=2)
    assert not graph.state_dict()
    assert {buffer.device.type for buffer in torch.nn.Sequential(graph).to("meta").buffers()} == {"meta"}


# The draw


@pytest.mark.parametrize(("size", "num"), [(5, 2), (6, 3), (4, 1), (5, 4), (3, 3)])
def test_all_subsets_are_equally_likely(size, num):
    draws = choose(torch.full((30_000,), size), num, seeded(3)).sort(dim=1).values
    subsets = {subset: place for place, subset in enumerate(itertools.combinations(range(size), num))}
    counts = np.zeros(len(subsets))
    for subset, count in zip(
        *(part.tolist() for part in draws.unique(dim=0, return_counts=True)), strict=True
    ):
        counts[subsets[tuple(subset)]] = count  # a KeyError: a number twice, or out of range
    assert counts.sum() == 30_000
    assert len(counts) == 1 or stats.chisquare(counts).pvalue > 0.01


def test_draws_of_different_nodes_are_independent():
    first, second = choose(torch.full((2, 20_000), 3).flatten(), 1, seeded(4)).view(2, -1)
    table = np.histogram2d(first, second, bins=3)[0]
    assert stats.chi2_contingency(table).pvalue > 0.01


def test_large_sizes_are_reached_to_both_ends():
    draws = choose(torch.full((20_000,), 1000), 10, seeded(5))
    assert (draws.sort(dim=1).values.diff(dim=1) > 0).all()
    assert stats.chisquare(draws.flatten().bincount(minlength=1000)).pvalue > 0.01


@pytest.mark.parametrize("fan_out", [1, 3, 10, 10_000, ALL])
def test_each_node_draws_some_of_its_own_or_all(graph, fan_out):
    nodes = torch.randperm(graph.num_nodes, generator=seeded(6))[:60]
    sources, places = draw_neighbours(graph, nodes, fan_out, seeded())
    assert (places.diff() >= 0).all()
    for place, node in enumerate(nodes.tolist()):
        drawn, there = sources[places == place].tolist(), into(graph, node)
        assert len(set(drawn)) == len(drawn) == (len(there) if fan_out == ALL else min(fan_out, len(there)))
        assert set(drawn) <= set(there)


def test_neighbours_are_drawn_evenly(graph):
    node = int(graph.pointers.diff().argmax())
    degree = len(into(graph, node))
    sources, _ = draw_neighbours(graph, torch.full((40_000,), node), 3, seeded(7))
    counts = sources.bincount(minlength=graph.num_nodes)[into(graph, node)].numpy()
    assert counts.sum() == 3 * 40_000
    # Without replacement the counts vary a little less than the test supposes.
    assert stats.chisquare(counts).pvalue > 0.01
    assert degree > 50


# The subgraph


@pytest.mark.parametrize("fan_outs", [(2, 3), (ALL, 2), (2, ALL), (ALL, ALL)])
def test_a_batch_is_a_part_of_the_graph(graph, loader, fan_outs):
    nodes = torch.randperm(graph.num_nodes, generator=seeded(8))[:20]
    (batch,) = loader(graph, nodes, 20, fan_outs, seed=0)
    outer, inner, labels = batch["outer"].tolist(), batch["inner"].tolist(), batch["labels"]
    drawn = [*inner, *outer]
    assert len(set(drawn)) == len(drawn)
    assert sorted(inner[:20]) == sorted(nodes.tolist())
    assert torch.equal(labels, graph.labels[inner[:20]])

    edges = [(drawn[a], drawn[b]) for a, b in batch["edges_1"].T.tolist()]
    assert len(set(edges)) == len(edges)
    assert set(edges) <= set(zip(graph.sources.tolist(), graph.targets().tolist(), strict=True))
    # Every node draws once: the second layer uses some of the edges that the first one has.
    last = [(drawn[a], drawn[b]) for a, b in batch["edges_2"].T.tolist()]
    assert sorted(last) == sorted(edge for edge in edges if edge[1] in inner[:20])
    assert set(inner[20:]) == {a for a, _ in last} - set(inner[:20])
    assert set(outer) == {a for a, _ in edges} - set(inner)

    for place, node in enumerate(inner):
        fan_out = fan_outs[place >= 20]
        degree = len(into(graph, node))
        assert sum(b == node for _, b in edges) == (degree if fan_out == ALL else min(degree, fan_out))


def test_nodes_without_neighbours_make_a_batch(loader):
    graph = graph_of([(0, 1)], num_nodes=4)
    (batch,) = loader(graph, torch.tensor([2, 3]), 2, (5, 5), seed=0)
    assert sorted(batch["inner"].tolist()) == [2, 3]
    assert batch["outer"].tolist() == []
    assert batch["edges_1"].shape == batch["edges_2"].shape == (2, 0)


# The loader


def test_an_epoch_goes_through_all_nodes_once(graph, loader):
    nodes = torch.arange(10, 93)
    batches = loader(graph, nodes, 20, (2, 2), seed=0)
    drawn = [batch["inner"][: len(batch["labels"])] for batch in batches]
    assert [len(part) for part in drawn] == [20, 20, 20, 20, 3]
    assert len(batches) == 5
    assert torch.equal(torch.cat(drawn).sort().values, nodes)


def test_a_batch_depends_on_seed_epoch_and_place_alone(graph, loader):
    def batches(seed, epoch, skip=0):
        made = loader(graph, torch.arange(100), 20, (2, 2), seed)
        made.set_epoch(epoch)
        made.skip(skip)
        torch.manual_seed(skip)  # which must not matter
        return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in made]

    whole = batches(3, 1)
    assert batches(3, 1, skip=2) == whole[2:]
    for other in (batches(3, 0), batches(4, 1)):
        assert not any(batch in whole for batch in other)


def test_setting_the_epoch_forgets_what_was_to_be_skipped(graph, loader):
    made = loader(graph, torch.arange(100), 20, (2, 2), seed=0)
    made.skip(3)
    made.set_epoch(1)
    assert len(list(made)) == 5


def test_drawing_leaves_the_global_generator_alone_while_it_goes_on(graph, loader):
    batches = iter(loader(graph, torch.arange(100), 20, (2, 2), seed=0))
    next(batches)
    state = torch.get_rng_state()
    next(batches)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fan_outs", [(2, 3), (ALL, ALL)])
def test_cuda_draws_where_the_graph_lies(fan_outs):
    drawn = generate(300, seed=1)
    graph = Graph(drawn.features, drawn.labels, drawn.edges).cuda()
    nodes = torch.arange(20)
    (batch,) = SampleLoader(graph, nodes, 20, fan_outs, seed=0)
    assert {tensor.device.type for tensor in batch.values()} == {"cuda"}
    on_host = Graph(drawn.features, drawn.labels, drawn.edges)
    (expected,) = SampleLoader(on_host, nodes, 20, fan_outs, seed=0)
    assert torch.equal(batch["inner"][:20].cpu(), expected["inner"][:20])
    if fan_outs == (ALL, ALL):
        assert all(torch.equal(batch[name].cpu(), expected[name]) for name in expected)


def test_sampling_by_hand():
    """0 is learned; 1 and 2 point to it; 3 points to 1, and 0 points to 2."""
    graph = graph_of([(1, 0), (2, 0), (3, 1), (0, 2), (4, 3)], num_nodes=5)
    batch = sample(graph, torch.tensor([0]), (ALL, ALL), seeded())
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "inner": [0, 1, 2],
        "outer": [3],
        "edges_1": [[1, 2, 3, 0], [0, 0, 1, 2]],
        "edges_2": [[1, 2], [0, 0]],
        "labels": [0],
    }
