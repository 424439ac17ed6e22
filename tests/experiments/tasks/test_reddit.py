"""The Reddit task: data in each of its forms, the model and its inference, messages, and that it learns."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.nn import functional as F

import torch_clip
from experiments.errors import UserError
from experiments.tasks import needs, reddit
from experiments.tasks.graphs import PygLoader, torch_geometric
from experiments.tasks.reddit import Reddit
from torch_clip.methods import NoClip

CONF = Path(__file__).parents[3] / "conf"
CPU = torch.device("cpu")
NUM_NODES = 9
EDGES = [(0, 1), (2, 1), (5, 1), (1, 0), (7, 3), (3, 4), (8, 5), (8, 6), (1, 8)]  # from, to; not both ways
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2]
TYPES = [1, 1, 1, 1, 2, 2, 2, 3, 3]


def small_task(**changes) -> Reddit:
    task = Reddit(**{"model": {"hidden": 8}, "num_nodes": 300, "batch_size": 32, **changes})
    task.load()
    return task


def built(task: Reddit, seed: int = 0) -> reddit.GraphConvNet:
    torch.manual_seed(seed)
    return task.build_model()


def write(folder: Path, **changes) -> Path:
    """A small graph in the layout of Reddit; an array given as None is left out."""
    features = np.random.default_rng(0).normal(size=(NUM_NODES, 5)).astype(np.float32)
    arrays = {"feature": features, "label": np.array(LABELS), "node_types": np.array(TYPES), **changes}
    matrix = arrays.pop("graph", None)
    if matrix is None:
        matrix = scipy.sparse.coo_matrix(
            (np.ones(len(EDGES)), tuple(np.array(EDGES).T)), shape=(NUM_NODES,) * 2
        )
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    np.savez(raw / "reddit_data.npz", **{name: value for name, value in arrays.items() if value is not None})
    scipy.sparse.save_npz(raw / "reddit_graph.npz", matrix)
    return folder


def composed(preset: str, *overrides: str):
    config = {
        "data_dir": None,
        "preset": OmegaConf.load(CONF / f"preset/reddit/{preset}.yaml"),
        "task": OmegaConf.load(CONF / "task/reddit.yaml"),
    }
    return OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))


# Configuration


@pytest.mark.parametrize("name", ["mini", "paper", "reference"])
@pytest.mark.parametrize("aggr", ["mean", "add"])
def test_presets_give_the_task_its_settings(name, aggr):
    task = instantiate(composed(name, f"task.model.aggr={aggr}").task)
    assert isinstance(task, Reddit)
    assert task.input_files() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "embeded"},
            "source must be embedded or download, got 'embeded'. Did you mean 'embedded'?",
        ),
        ({"sampler": "torhc"}, "sampler must be torch or pyg, got 'torhc'. Did you mean 'torch'?"),
        ({"model": {"aggr": "sum"}}, "model.aggr must be mean or add, got 'sum'"),
        ({"model": {"agr": "mean"}}, "got 'agr'. Did you mean 'aggr'?"),
        ({"model": "mean"}, "model takes aggr, hidden, dropout, got 'mean'"),
        ({"model": {"hidden": 0}}, "model.hidden must be a whole number of at least 1, got 0"),
        ({"model": {"dropout": 1}}, "model.dropout must be a number in [0, 1), got 1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"num_nodes": 99}, "num_nodes must be a whole number of at least 100, got 99"),
        ({"fan_out": [10]}, "fan_out must be 2 whole numbers, each at least 1, or -1 for all, got [10]"),
        ({"fan_out": [10, 0]}, "got [10, 0]"),
        ({"fan_out": [10, -2]}, "got [10, -2]"),
        ({"fan_out": [10, 2.5]}, "got [10, 2.5]"),
        ({"fan_out": 10}, "got 10"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Reddit(**{"model": {}, **settings})


# The sampler of PyG


def test_the_sampler_of_pyg_is_refused_where_it_would_fail_at_the_first_batch(monkeypatch):
    typing = torch_geometric().typing
    for flag in ("WITH_PYG_LIB", "WITH_TORCH_SPARSE"):
        monkeypatch.setattr(typing, flag, False)
    with pytest.raises(UserError, match=r"pyg-lib or torch-sparse.*task\.sampler=torch") as error:
        small_task(sampler="pyg")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["WITH_PYG_LIB", "WITH_TORCH_SPARSE"])
def test_either_extension_will_do(monkeypatch, flag):
    typing = torch_geometric().typing
    for other in ("WITH_PYG_LIB", "WITH_TORCH_SPARSE"):
        monkeypatch.setattr(typing, other, other == flag)
    assert type(small_task(sampler="pyg").train_loader(0)) is PygLoader


# The model


def dense(model: reddit.GraphConvNet, adjacency: np.ndarray, aggr: str) -> np.ndarray:
    """Logits of all nodes by the formula, in float64."""
    if aggr == "mean":
        adjacency = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1)
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    h = model.graph.features.double().numpy()
    for layer in ("first", "second"):
        own, others = state[f"{layer}.lin_root.weight"], state[f"{layer}.lin_rel.weight"]
        h = h @ own.T + adjacency @ h @ others.T + state[f"{layer}.lin_rel.bias"]
        h = np.maximum(h, 0) if layer == "first" else h
    return h


@pytest.mark.parametrize("aggr", ["mean", "add"])
def test_inference_follows_the_formula_along_the_edges(tmp_path, aggr):
    task = small_task(data_dir=str(write(tmp_path)), model={"aggr": aggr, "hidden": 8})
    model = built(task).eval()
    adjacency = np.zeros((NUM_NODES, NUM_NODES))
    for source, target in EDGES:
        adjacency[target, source] = 1
    expected = dense(model, adjacency, aggr)
    with torch.no_grad():
        np.testing.assert_allclose(model.infer().numpy(), expected, rtol=1e-5, atol=1e-6)
    loss, metrics = task.evaluate(model, CPU)
    val = np.array(TYPES) == 2
    assert metrics == {"accuracy": pytest.approx((expected.argmax(1) == LABELS)[val].mean())}
    logits = torch.from_numpy(expected[val])
    assert loss == pytest.approx(F.cross_entropy(logits, torch.tensor(LABELS)[val]).item(), rel=1e-5)


@pytest.mark.parametrize("aggr", ["mean", "add"])
def test_a_batch_with_every_neighbour_is_inference(aggr):
    task = small_task(model={"aggr": aggr, "hidden": 8}, fan_out=[-1, -1], batch_size=50)
    model = built(task).eval()
    with torch.no_grad():
        everywhere = model.infer()
        for batch in task.train_loader(0):
            nodes = batch["inner"][: len(batch["labels"])]
            torch.testing.assert_close(model(batch), everywhere[nodes], rtol=1e-4, atol=1e-4)


def test_forward_gives_the_mean_loss_and_counts_classes():
    task = small_task()
    model = built(task).eval()
    batch = next(iter(task.train_loader(0)))
    output = task.forward(model, batch)
    logits = model(batch)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, batch["labels"]))
    assert output.size == 32
    right = (logits.argmax(1) == batch["labels"]).double().mean().item()
    assert task.metrics(output.tally) == {"accuracy": pytest.approx(right)}


def test_dropout_is_for_training_alone():
    task = small_task(model={"hidden": 8, "dropout": 0.5})
    model = built(task)
    batch = next(iter(task.train_loader(0)))
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize("aggr", ["mean", "add"])
def test_half_precision_trains_and_infers_in_full(aggr):
    task = small_task(model={"hidden": 8, "aggr": aggr})
    model = built(task)
    expected = task.evaluate(model, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = task.forward(model.train(), next(iter(task.train_loader(0))))
        assert task.evaluate(model, CPU) == expected
    output.loss.backward()
    assert output.loss.isfinite()


def test_processes_that_train_together_do_not_send_the_graph(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        replica = torch.nn.parallel.DistributedDataParallel(built(small_task()))
        assert replica.modules_buffers == []
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("aggr", ["mean", "add"])
def test_cuda_follows_the_model_and_its_forward_does_not_wait(aggr):
    task = small_task(model={"hidden": 8, "aggr": aggr}, fan_out=[-1, -1])
    model = built(task).cuda()
    batch = next(iter(task.train_loader(0)))
    task.forward(model, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = task.forward(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss, metrics = task.evaluate(model, torch.device("cuda"))
    assert output.loss.is_cuda
    on_host = task.evaluate(model.cpu(), CPU)
    assert loss == pytest.approx(on_host[0], rel=1e-4)
    assert metrics == pytest.approx(on_host[1], abs=0.05)  # a tie may fall the other way


def test_only_training_nodes_are_learned_from():
    task = small_task()
    learned = torch.cat([batch["inner"][: len(batch["labels"])] for batch in task.train_loader(0)])
    assert torch.equal(learned.sort().values, task._train_nodes)
    assert not set(learned.tolist()) & set(task._val_nodes.tolist())


# Data as published


def test_published_files_are_read_as_they_are_and_nothing_is_written(tmp_path, capfd):
    task = small_task(data_dir=str(write(tmp_path)))
    assert task.input_files() == [tmp_path / name for name in reddit.FILES]
    graph = task._graph
    assert set(zip(graph.sources.tolist(), graph.targets().tolist(), strict=True)) == set(EDGES)
    assert graph.labels.tolist() == LABELS
    assert graph.features.dtype == torch.float32
    assert task._train_nodes.tolist() == [0, 1, 2, 3]
    assert task._val_nodes.tolist() == [4, 5, 6]
    assert built(task).second.out_channels == 3
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert capfd.readouterr() == ("", "")


def test_files_are_read_again_only_when_they_change(tmp_path, monkeypatch):
    first = small_task(data_dir=str(write(tmp_path)))
    reads = []
    load = np.load
    monkeypatch.setattr(
        np, "load", lambda path, *args, **options: reads.append(path) or load(path, *args, **options)
    )
    second = small_task(data_dir=str(tmp_path))
    assert second._graph.features is first._graph.features
    assert not reads
    write(tmp_path, label=np.array(LABELS[::-1]))
    assert small_task(data_dir=str(tmp_path))._graph.labels.tolist() == LABELS[::-1]
    assert reads


class Planted:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran the code of a data set')",))


def test_what_pyg_has_processed_before_is_not_unpickled(tmp_path):
    write(tmp_path)
    processed = tmp_path / "processed"
    processed.mkdir()
    for name in ("data.pt", "pre_transform.pt", "pre_filter.pt"):
        torch.save(Planted(), processed / name)
    assert small_task(data_dir=str(tmp_path))._graph.labels.tolist() == LABELS


def cut(folder: Path) -> None:
    file = folder / "raw" / "reddit_graph.npz"
    file.write_bytes(file.read_bytes()[:100])


def no_archive(folder: Path) -> None:
    (folder / "raw" / "reddit_data.npz").write_text("<html>not found</html>")


def pickled(folder: Path) -> None:
    (folder / "raw" / "reddit_data.npz").write_bytes(pickle.dumps(Planted()))


@pytest.mark.parametrize(
    ("changes", "damage", "message"),
    [
        ({"label": None}, None, "KeyError 'label is not a file in the archive'"),
        ({"label": np.array([0] * 8)}, None, "features, labels and node types are of 8, 9 nodes"),
        ({"node_types": np.array([1] * 9)}, None, "no node is of type 2, validation"),
        ({"node_types": np.array([2] * 9)}, None, "no node is of type 1, training"),
        ({"label": np.array([-1] * 9)}, None, "labels are counted from 0, one is -1"),
        ({"label": np.array([Planted()] * 9)}, None, "allow_pickle=False"),
        (
            {"graph": scipy.sparse.coo_matrix(([1.0], ([0], [9])), shape=(10, 10))},
            None,
            "an edge names node 9 of 9, counted from 0",
        ),
        ({"graph": scipy.sparse.csr_matrix((9, 9))}, None, "no attribute 'row'"),
        ({}, cut, "File is not a zip file"),
        ({}, no_archive, "cannot read a graph from"),
        ({}, pickled, "contains pickled (object) data"),
    ],
)
def test_a_malformed_file_gets_one_message(tmp_path, changes, damage, message):
    write(tmp_path, **changes)
    if damage:
        damage(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        small_task(data_dir=str(tmp_path))
    assert str(tmp_path / "raw") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_folder_is_told_the_right_one(tmp_path):
    root = write(tmp_path / "sets" / "graph")
    for wrong in (root / "raw", tmp_path, tmp_path / "sets"):
        with pytest.raises(UserError, match=re.escape(f"give data_dir={root}")):
            Reddit(model={}, data_dir=str(wrong)).input_files()
    with pytest.raises(UserError, match=re.escape(f"there is no folder {tmp_path / 'nowhere'}")):
        Reddit(model={}, data_dir=str(tmp_path / "nowhere")).input_files()
    (root / "raw" / "reddit_graph.npz").unlink()
    with pytest.raises(UserError, match=r"missing in .*graph: raw/reddit_graph\.npz$"):
        Reddit(model={}, data_dir=str(root)).input_files()


# Reddit itself


@pytest.fixture
def pyg_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(torch_geometric(), "get_home_dir", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_without_network_the_message_says_the_ways_on(pyg_home, no_network, capfd):
    with pytest.raises(
        UserError, match=r"no network.*data\.dgl\.ai.*in \S+/Reddit\..*data_dir=.*preset=mini"
    ) as error:
        small_task(source="download")
    assert "\n" not in str(error.value)
    assert list(pyg_home.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_an_earlier_download_is_used(pyg_home, no_network):
    write(pyg_home / "Reddit")
    assert small_task(source="download")._graph.labels.tolist() == LABELS


def test_pyg_downloads_where_there_is_a_network(pyg_home, tmp_path, monkeypatch):
    prepared = write(tmp_path / "served")
    fetched = []

    def fetch(self):
        fetched.append(self.url)
        shutil.copytree(prepared / "raw", self.raw_dir, dirs_exist_ok=True)

    monkeypatch.setattr(torch_geometric().datasets.Reddit, "download", fetch)
    monkeypatch.setattr(needs, "reachable", lambda url: url == reddit.URL)
    for _ in range(2):
        assert small_task(source="download")._graph.labels.tolist() == LABELS
    assert fetched == [reddit.URL]
    assert {path.name for path in (pyg_home / "Reddit").iterdir()} == {"raw"}


def test_a_download_that_breaks_off_says_where(pyg_home, monkeypatch):
    def fetch(self):
        Path(self.raw_dir, "reddit.zip").write_text("half of it")  # which PyG would take for the whole
        raise urllib.error.URLError("timed out")

    monkeypatch.setattr(torch_geometric().datasets.Reddit, "download", fetch)
    monkeypatch.setattr(needs, "reachable", lambda url: True)
    with pytest.raises(UserError, match=r"cannot get Reddit: .*timed out.*Ways on: data_dir="):
        small_task(source="download")
    assert list((pyg_home / "Reddit").iterdir()) == []


def test_paper_asks_for_the_file_that_pyg_fetches():
    assert torch_geometric().datasets.Reddit.url == reddit.URL


# Learning


def train(task: Reddit, seed: int, steps: int, lr: float) -> tuple[float, list[float]]:
    """Train with Adam and linear decay; validation accuracy at the end, and the norm of every gradient."""
    model = built(task, seed)
    optimizer = torch_clip.clip(torch.optim.Adam(model.parameters(), lr=lr), NoClip())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    loader = task.train_loader(seed)
    norms = []
    for step in range(steps):
        if step % len(loader) == 0:
            loader.set_epoch(step // len(loader))
            batches = iter(loader)
        optimizer.zero_grad()
        task.forward(model.train(), next(batches)).loss.backward()
        optimizer.step()
        schedule.step()
        norms.append(float(optimizer.clipping.telemetry.grad_norm))
    return task.evaluate(model, CPU)[1]["accuracy"], norms


def test_it_learns_from_neighbours():
    accuracy, _ = train(small_task(num_nodes=1_000, model={"hidden": 32}), seed=0, steps=150, lr=0.01)
    assert accuracy > 0.4  # the floor is 0.1, a node's own features give 0.2


def test_training_repeats_itself_bit_for_bit():
    task = small_task()
    assert train(task, 0, 12, 0.01) == train(task, 0, 12, 0.01)


def test_summed_neighbours_give_gradients_a_heavy_tail_unless_their_number_is_capped():
    def spread(aggr, fan_out):
        task = small_task(num_nodes=4_000, model={"aggr": aggr, "hidden": 16}, fan_out=fan_out, batch_size=16)
        _, norms = train(task, seed=0, steps=80, lr=0.0)
        return np.max(norms) / np.median(norms)

    assert spread("add", [-1, 10]) > 2 * spread("add", [10, 10])
    assert spread("add", [-1, 10]) > 2 * spread("mean", [-1, 10])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_mini_preset_learns_and_leaves_room(seed):
    config = composed("mini")
    task = instantiate(config.task)
    task.load()
    accuracy, _ = train(task, seed, config.preset.max_steps, config.preset.lr.adam)
    assert 0.85 < accuracy < 0.95


# Real data


@pytest.fixture
def github() -> str:
    if "CLIPBENCH_DATA" not in os.environ:
        pytest.skip("needs CLIPBENCH_DATA")
    return os.path.join(os.environ["CLIPBENCH_DATA"], "graph_github_redditformat")


def test_real_data_has_its_known_sizes(github):
    task = small_task(data_dir=github)
    graph = task._graph
    assert graph.features.shape == (37_700, 602)
    assert len(graph.sources) == 578_006
    assert graph.pointers.diff().max() == 9_458
    assert (len(task._train_nodes), len(task._val_nodes)) == (24_829, 3_856)
    loss, metrics = task.evaluate(built(task), CPU)
    assert loss == pytest.approx(0.69, abs=0.3)
    assert set(metrics) == {"accuracy"}


@pytest.mark.slow
@pytest.mark.parametrize(("aggr", "first_norm", "reached"), [("mean", 0.82, 0.86), ("add", 1150, 0.75)])
def test_full_batches_on_real_data_do_what_is_known_of_them(github, aggr, first_norm, reached):
    task = small_task(
        data_dir=github, model={"aggr": aggr, "hidden": 64}, fan_out=[-1, -1], batch_size=24_829
    )
    accuracy, norms = train(task, seed=0, steps=30, lr=0.01)
    assert norms[0] == pytest.approx(first_norm, rel=0.1)
    assert accuracy > reached
