"""A graph on a device, and mini-batches of it by neighbour sampling, vectorised."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.tasks.base import Batch, epoch_generator

ALL = -1
"""Fan-out that takes every neighbour."""


class Graph(nn.Module):
    """Features and labels of nodes, and the edges into each: constants, which follow a model that owns them.

    Args:
        features: (num_nodes, num_features).
        labels: class indices, (num_nodes,).
        edges: from node, to node, (2, num_edges), in any order.
    """

    def __init__(self, features: Tensor, labels: Tensor, edges: Tensor) -> None:
        super().__init__()
        sources, targets = edges
        pointers = targets.bincount(minlength=len(features)).cumsum(0)
        # Not persistent: they are data, which no checkpoint should hold.
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("pointers", torch.cat([pointers.new_zeros(1), pointers]), persistent=False)
        self.register_buffer("sources", sources[targets.argsort(stable=True)], persistent=False)

    @property
    def num_nodes(self) -> int:
        return len(self.features)

    def targets(self) -> Tensor:
        """The node that each edge goes to, (num_edges,), in the order of ``sources``."""
        degrees = self.pointers.diff()
        return torch.repeat_interleave(torch.arange(self.num_nodes, device=degrees.device), degrees)

    def adjacency(self) -> Tensor:
        """CSR matrix, (num_nodes, num_nodes), float32: 1 in row i, column j for an edge from j to i."""
        ones = torch.ones(len(self.sources), device=self.sources.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls the layout beta
            return torch.sparse_csr_tensor(
                self.pointers, self.sources, ones, size=(self.num_nodes, self.num_nodes)
            )


def choose(sizes: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Draw ``num`` different numbers from 0 to size - 1 for each size; all subsets are equally likely.

    Args:
        sizes: at least ``num`` each.
        num: at least 1.
        generator: on the device of ``sizes``.

    Shapes:
        ``sizes`` (n,); the result (n, num), int64.

    Reference:
        Floyd's algorithm, in: Bentley, Programming pearls: a sample of brilliance, 1987.
    """
    uniform = torch.rand((num, len(sizes)), generator=generator, device=sizes.device, dtype=torch.float64)
    chosen = sizes.new_empty(len(sizes), num)
    for column in range(num):
        largest = sizes - num + column
        pick = (uniform[column] * (largest + 1)).long()
        taken = (chosen[:, :column] == pick[:, None]).any(1)
        chosen[:, column] = torch.where(taken, largest, pick)
    return chosen


def draw_neighbours(
    graph: Graph, nodes: Tensor, fan_out: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw edges into each node: ``fan_out`` of them without replacement, or all where there are no more.

    Args:
        graph: where the edges are.
        nodes: (n,).
        fan_out: at least 1, or ``ALL``.
        generator: on the graph's device.

    Returns:
        The nodes that the edges come from, and the positions in ``nodes`` that they go to, in order.
    """
    first = graph.pointers[nodes]
    degrees = graph.pointers[nodes + 1] - first
    counts = degrees if fan_out == ALL else degrees.clamp(max=fan_out)
    places = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
    slots = torch.arange(len(places), device=nodes.device) - (counts.cumsum(0) - counts)[places]
    if fan_out != ALL:
        more = degrees > fan_out
        slots[more[places]] = choose(degrees[more], fan_out, generator).flatten()
    return graph.sources[first[places] + slots], places


def sample(graph: Graph, nodes: Tensor, fan_outs: Sequence[int], generator: torch.Generator) -> Batch:
    """The part of a graph that two layers need for ``nodes``. Every node draws its neighbours once.

    Args:
        graph: sampled from.
        nodes: different nodes whose labels are learned, on the graph's device.
        fan_outs: of these nodes, and of the neighbours that they drew.
        generator: on the graph's device.

    Returns:
        ``inner``: ``nodes`` and their neighbours, the input of the second layer; ``outer``: further nodes,
        which the first layer needs too. ``edges_1`` go from any of these to inner ones, ``edges_2`` from
        inner ones to ``nodes``: (2, number), positions in inner and outer one after the other. ``labels`` of
        ``nodes``.
    """
    known = [nodes]
    hops = []
    position = nodes.new_full((graph.num_nodes,), -1)
    position[nodes] = torch.arange(len(nodes), device=nodes.device)
    for fan_out in fan_outs:
        start = sum(map(len, known[:-1]))
        sources, places = draw_neighbours(graph, known[-1], fan_out, generator)
        new = sources[position[sources] < 0].unique()
        position[new] = start + len(known[-1]) + torch.arange(len(new), device=nodes.device)
        hops.append(torch.stack([position[sources], start + places]))
        known.append(new)
    return {
        "inner": torch.cat(known[:-1]),
        "outer": known[-1],
        "edges_1": torch.cat(hops, dim=1),
        "edges_2": hops[0],
        "labels": graph.labels[nodes],
    }


def part(batch: Batch, rank: int, world: int) -> Batch:
    """What one of ``world`` processes needs of a batch: its share of the nodes, and what reaches them.

    Args:
        batch: as of ``sample``.
        rank: of the process.
        world: processes; the last ones may have a node less.

    Returns:
        A batch of the same kind, in which every node keeps the neighbours that it drew. ``mean_over``: what
        to divide the sum of its losses by, so that their mean over the processes is that of the batch.
    """
    nodes, labels = torch.cat([batch["inner"], batch["outer"]]), batch["labels"]
    picked = [torch.arange(len(labels), device=nodes.device)[rank::world]]
    position = nodes.new_full((len(nodes),), -1)
    position[picked[0]] = torch.arange(len(picked[0]), device=nodes.device)
    edges = []
    for reaching in (batch["edges_2"], batch["edges_1"]):
        kept = reaching[:, position[reaching[1]] >= 0]
        new = kept[0][position[kept[0]] < 0].unique()
        position[new] = sum(map(len, picked)) + torch.arange(len(new), device=nodes.device)
        picked.append(new)
        edges.append(position[kept])
    return {
        "inner": nodes[torch.cat(picked[:2])],
        "outer": nodes[picked[2]],
        "edges_1": edges[1],
        "edges_2": edges[0],
        "labels": labels[picked[0]],
        "mean_over": labels.new_full((), len(labels) / world, dtype=torch.float32),
    }


class SampleLoader:
    """Mini-batches of sampled neighbourhoods, on the graph's device; each from (seed, epoch, batch) alone.

    The last batch of an epoch may be smaller.

    Args:
        graph: sampled from.
        nodes: to go through in each epoch.
        batch_size: of ``nodes`` in a batch.
        fan_outs: as of ``sample``.
        seed: of the run.
    """

    def __init__(
        self, graph: Graph, nodes: Tensor, batch_size: int, fan_outs: Sequence[int], seed: int
    ) -> None:
        self._graph = graph
        self._nodes = nodes
        self._batch_size = batch_size
        self._fan_outs = list(fan_outs)
        self._seed = seed
        self._epoch = 0
        self._start = 0
        self._rank, self._world = 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is, counted from 0."""
        self._epoch = epoch
        self._start = 0

    def skip(self, batches: int) -> None:
        """Leave out so many batches at the start of the next iteration; after ``set_epoch``."""
        self._start = batches

    def split(self, rank: int, world: int) -> None:
        """Give one of ``world`` parts of every batch from now on; each process draws the whole of it."""
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return -(-len(self._nodes) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        generator = epoch_generator(self._seed, self._epoch)
        order = self._nodes[torch.randperm(len(self._nodes), generator=generator)]
        keys = torch.randint(2**62, (len(self),), generator=generator).tolist()
        batches = self._batches(order[self._start * self._batch_size :], keys[self._start :])
        if self._world == 1:
            return batches
        return (part(batch, self._rank, self._world) for batch in batches)

    def _batches(self, order: Tensor, keys: list[int]) -> Iterator[Batch]:
        """Batches of the nodes in ``order``, each drawn from its key."""
        device = self._graph.sources.device
        generator = torch.Generator(device)
        for nodes, key in zip(order.to(device).split(self._batch_size), keys, strict=True):
            yield sample(self._graph, nodes, self._fan_outs, generator.manual_seed(key))


class PygLoader(SampleLoader):
    """The same by PyG's ``NeighborLoader``, on the host.

    Note:
        With torch-sparse 0.6.18 as its extension the draw is not even: of 6 neighbours 2 were drawn with the
        frequencies 0.40, 0.40, 0.40, 0.39, 0.21, 0.20, where each should have 1/3.
    """

    def _batches(self, order: Tensor, keys: list[int]) -> Iterator[Batch]:
        pyg = torch_geometric()
        graph = self._graph
        data = pyg.data.Data(edge_index=torch.stack([graph.sources, graph.targets()]).cpu())
        data.num_nodes = graph.num_nodes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch-sparse, which is on its way out
            loader = pyg.loader.NeighborLoader(
                data, self._fan_outs, input_nodes=order, batch_size=self._batch_size, is_sorted=True
            )
        batches = iter(loader)
        for key in keys:
            # The extensions draw from torch's own generator of the CPU.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(key)
                found = next(batches)
            nodes, edges = found.n_id, found.edge_index
            # Nodes are numbered hop by hop and each drew once: the first hop is the edges of the batch's own.
            edges_2 = edges[:, edges[1] < found.batch_size]
            num_inner = 1 + max([found.batch_size - 1, *edges_2[0].tolist()])
            yield {
                "inner": nodes[:num_inner],
                "outer": nodes[num_inner:],
                "edges_1": edges,
                "edges_2": edges_2,
                "labels": graph.labels[nodes[: found.batch_size].to(graph.labels.device)],
            }


def torch_geometric() -> Any:
    """The package, without what torch says of its calls when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import torch_geometric
    return torch_geometric
