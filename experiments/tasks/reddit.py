"""Which community does a post belong to? GraphConv on Reddit's graph of posts, or on a graph of our own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.errors import UserError, nearest
from experiments.tasks import needs
from experiments.tasks.base import Batch, Output, Task, TrainLoader
from experiments.tasks.graphs import ALL, Graph, PygLoader, SampleLoader, torch_geometric
from experiments.tasks.metrics import accuracy, confusion_matrix
from experiments.tasks.needs import NOT_FETCHED, Need, fetch_whole, in_folder, reason
from experiments.tasks.samples import reddit as samples
from experiments.tasks.samples.reddit import TEST, TRAIN, VAL, GraphSample

SOURCES = ("embedded", "download")
SAMPLERS = ("torch", "pyg")
AGGREGATIONS = ("mean", "add")
MODEL_KEYS = ("aggr", "hidden", "dropout")
FILES = ("raw/reddit_data.npz", "raw/reddit_graph.npz")
URL = "https://data.dgl.ai/dataset/reddit.zip"  # where PyG has it from
NUM_LAYERS = 2


class Reddit(Task):
    """Node classification with two GraphConv layers, trained on sampled neighbourhoods.

    The metric is the accuracy on the validation nodes by full inference: layer by layer over the whole graph,
    with every neighbour.

    Args:
        model: ``aggr`` of the neighbours, ``mean`` or ``add``; ``hidden`` units; ``dropout``, the share of
            hidden units that is dropped in training.
        data_dir: folder that holds ``raw/reddit_data.npz`` and ``raw/reddit_graph.npz``, as PyG lays them
            out. Replaces ``source`` and changes nothing else.
        source: ``embedded`` for a generated graph, ``download`` for Reddit by PyG, which keeps it.
        batch_size: nodes in a training batch.
        fan_out: neighbours drawn for the nodes of a batch, and for each of those; -1 takes all.
        sampler: ``torch`` draws on the device, from (seed, epoch, batch) alone; ``pyg`` is PyG's
            NeighborLoader, on the host, which needs pyg-lib or torch-sparse.
        num_nodes: of the embedded graph.
    """

    metric = "accuracy"

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        data_dir: str | None = None,
        source: str = "embedded",
        batch_size: int = 64,
        fan_out: Sequence[int] = (ALL, 10),
        sampler: str = "torch",
        num_nodes: int = 10_000,
    ) -> None:
        if not isinstance(model, Mapping):
            raise UserError(f"model takes {', '.join(MODEL_KEYS)}, got {model!r}")
        for key in model:
            if key not in MODEL_KEYS:
                raise UserError(
                    f"model takes {', '.join(MODEL_KEYS)}, got {key!r}.{nearest(key, MODEL_KEYS)}"
                )
        self._aggr = model.get("aggr", "mean")
        self._hidden = model.get("hidden", 64)
        self._dropout = model.get("dropout", 0.0)
        for name, value, choices in (
            ("source", source, SOURCES),
            ("sampler", sampler, SAMPLERS),
            ("model.aggr", self._aggr, AGGREGATIONS),
        ):
            if value not in choices:
                raise UserError(
                    f"{name} must be {' or '.join(choices)}, got {value!r}.{nearest(str(value), choices)}"
                )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("model.hidden", self._hidden, 1),
            ("num_nodes", num_nodes, samples.FEWEST_NODES),
        ):
            if not _is_whole(value) or value < least:
                raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(self._dropout, int | float) or not 0 <= self._dropout < 1:
            raise UserError(f"model.dropout must be a number in [0, 1), got {self._dropout!r}")
        if (
            not isinstance(fan_out, Sequence)
            or len(fan_out) != NUM_LAYERS
            or not all(_is_whole(value) and (value == ALL or value >= 1) for value in fan_out)
        ):
            raise UserError(
                f"fan_out must be {NUM_LAYERS} whole numbers, each at least 1, or -1 for all, got {fan_out!r}"
            )
        self._data_dir = None if data_dir is None else Path(str(data_dir)).expanduser()
        self._source = source
        self._batch_size = batch_size
        self._fan_out = list(fan_out)
        self._sampler = sampler
        self._num_nodes = num_nodes

    def input_files(self) -> list[Path]:
        return [] if self._data_dir is None else published_files(self._data_dir)

    def needs(self) -> list[Need]:
        if self._data_dir is not None:
            return [in_folder("Reddit", self._data_dir, published_files)]
        return [download()] if self._source == "download" else []

    def load(self) -> None:
        if self._sampler == "pyg":
            check_pyg_sampler()
        data = self._data()
        self._graph = Graph(data.features, data.labels, data.edges)
        self._train_nodes, self._val_nodes = ((data.split == part).nonzero()[:, 0] for part in (TRAIN, VAL))
        self._num_classes = int(data.labels.max()) + 1

    def build_model(self) -> GraphConvNet:
        return GraphConvNet(self._graph, self._hidden, self._num_classes, self._aggr, self._dropout)

    def train_loader(self, seed: int) -> TrainLoader:
        loader = SampleLoader if self._sampler == "torch" else PygLoader
        return loader(self._graph, self._train_nodes, self._batch_size, self._fan_out, seed)

    def forward(self, model: GraphConvNet, batch: Batch) -> Output:
        logits, labels = model(batch), batch["labels"]
        output = self._output(logits, labels)
        if "mean_over" not in batch:
            return output
        return output._replace(loss=F.cross_entropy(logits, labels, reduction="sum") / batch["mean_over"])

    def metrics(self, tally: Tensor) -> dict[str, float]:
        return {"accuracy": accuracy(tally)}

    @torch.no_grad()
    def evaluate(self, model: GraphConvNet, device: torch.device) -> tuple[float, dict[str, float]]:
        model.eval()
        nodes = self._val_nodes.to(device)
        output = self._output(model.infer()[nodes], model.graph.labels[nodes])
        return output.loss.item(), self.metrics(output.tally)

    def _output(self, logits: Tensor, labels: Tensor) -> Output:
        tally = confusion_matrix(logits.argmax(-1), labels, self._num_classes)
        return Output(F.cross_entropy(logits, labels), len(labels), tally)

    def _data(self) -> GraphSample:
        if not (needed := self.needs()):
            return samples.generate(self._num_nodes)
        (data,) = needed
        data.get()
        return read_published(data.place)


class GraphConvNet(nn.Module):
    r"""Two GraphConv layers over a graph that is part of the model, so that it lies on the same device.

    .. math::
        h_i = \text{ReLU}\Bigl(W_1 x_i + W_2 \operatorname*{aggr}_{j \to i} x_j\Bigr), \qquad
        z_i = W_3 h_i + W_4 \operatorname*{aggr}_{j \to i} h_j

    Args:
        graph: constants, in no ``state_dict``.
        hidden: units.
        num_classes: of the logits z.
        aggr: of the neighbours, ``mean`` or ``add``.
        dropout: share of h that is dropped in training.

    Reference:
        Morris et al., Weisfeiler and Leman go neural: higher-order graph neural networks, 2018,
        https://arxiv.org/abs/1810.02244
    """

    def __init__(self, graph: Graph, hidden: int, num_classes: int, aggr: str, dropout: float) -> None:
        super().__init__()
        graph_conv = torch_geometric().nn.GraphConv
        self.graph = graph
        self.first = graph_conv(graph.features.shape[1], hidden, aggr=aggr)
        self.second = graph_conv(hidden, num_classes, aggr=aggr)
        self.dropout = nn.Dropout(dropout)
        # Or processes that train together would send each other the graph before every step.
        constants = [f"graph.{name}" for name, _ in graph.named_buffers()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, constants)

    def forward(self, batch: Batch) -> Tensor:
        """Logits, (nodes, num_classes), of the nodes whose neighbours ``batch`` holds: see ``sample``."""
        x = self.graph.features[torch.cat([batch["inner"], batch["outer"]])]
        h = self.first((x, x[: len(batch["inner"])]), batch["edges_1"])
        h = self.dropout(h.relu())
        return self.second((h, h[: len(batch["labels"])]), batch["edges_2"])

    def infer(self) -> Tensor:
        """Logits of all nodes, (num_nodes, num_classes), float32: layer by layer, with every neighbour."""
        adjacency = self.graph.adjacency()
        # On a CPU torch multiplies sparse matrices in float32 and float64 alone.
        with torch.autocast(adjacency.device.type, enabled=False):
            h = self.first(self.graph.features, adjacency).relu()
            return self.second(h, adjacency)


def check_pyg_sampler() -> None:
    """Refuse PyG's sampler where it would fail at the first batch: it can be made without its extension."""
    typing = torch_geometric().typing
    if not typing.WITH_PYG_LIB and not typing.WITH_TORCH_SPARSE:
        raise UserError(
            "sampler=pyg needs pyg-lib or torch-sparse, and neither can be imported: install one "
            "(https://pyg.org has wheels), or leave task.sampler=torch, which needs neither"
        )


def published_files(data_dir: Path) -> list[Path]:
    """The two files under ``data_dir/raw``; an error says which folder to give."""
    return needs.published_files(data_dir, FILES, " and ".join(FILES))


def read_published(data_dir: Path) -> GraphSample:
    """Reddit as published, or another graph in its layout."""
    stamp = tuple((stat.st_mtime_ns, stat.st_size) for stat in map(Path.stat, published_files(data_dir)))
    return _read(data_dir.absolute(), stamp)


@functools.lru_cache(maxsize=1)  # Reddit takes a while, and a sweep asks for it in every run
def _read(root: Path, stamp: tuple[tuple[int, int], ...]) -> GraphSample:
    """The graph whose files lie in ``root / "raw"``.

    Args:
        root: folder of the data set.
        stamp: of its files: with another one they are read anew.
    """

    class Raw(torch_geometric().datasets.Reddit):
        """Reads raw/ each time: what lies in processed/ may be of other files, and PyG would unpickle it."""

        def _process(self) -> None:
            self.process()

        def save(self, data_list: list, path: str) -> None:
            (self.found,) = data_list

        def load(self, path: str) -> None:
            pass

    try:
        data = Raw(str(root)).found
        masks = {TRAIN: data.train_mask, VAL: data.val_mask, TEST: data.test_mask}
        split = sum(part * mask.long() for part, mask in masks.items())
        graph = GraphSample(data.x, data.y, split, data.edge_index)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # archives, arrays, networks: the libraries raise a dozen unrelated types
        raise UserError(f"cannot read a graph from {root / 'raw'}: {reason(error)}") from error
    wrong = _what_is_wrong(graph)
    if wrong:
        raise UserError(f"cannot read a graph from {root / 'raw'}: {wrong}")
    return graph


def _what_is_wrong(graph: GraphSample) -> str | None:
    sizes = {len(graph.features), len(graph.labels), len(graph.split)}
    if len(sizes) > 1:
        return f"features, labels and node types are of {', '.join(map(str, sorted(sizes)))} nodes"
    if graph.edges.numel() and int(graph.edges.max()) >= len(graph.labels):
        return f"an edge names node {int(graph.edges.max())} of {len(graph.labels)}, counted from 0"
    if int(graph.labels.min()) < 0:
        return f"labels are counted from 0, one is {int(graph.labels.min())}"
    for part, name in ((TRAIN, "training"), (VAL, "validation")):
        if not (graph.split == part).any():
            return f"no node is of type {part}, {name}"
    return None


def download() -> Need:
    """Reddit by PyG, kept where PyG keeps it."""
    root = Path(torch_geometric().get_home_dir()).expanduser() / "Reddit"
    found = in_folder("Reddit", root, published_files)
    return found._replace(
        problem=found.problem and NOT_FETCHED,
        source=URL,
        fetch=lambda: fetch_whole(_fetch, root, "raw"),
        give=f"data_dir=<folder that holds {' and '.join(FILES)}>",
    )


def _fetch(folder: Path) -> None:
    class Files(torch_geometric().datasets.Reddit):
        """Downloads, and reads nothing."""

        def _process(self) -> None:
            pass

        def load(self, path: str) -> None:
            pass

    Files(str(folder))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
