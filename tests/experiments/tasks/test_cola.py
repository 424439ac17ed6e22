"""The CoLA task: data in each of its forms, checkpoints, loaders, messages, and that it learns."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.nn import functional as F

from experiments.errors import UserError
from experiments.tasks import needs
from experiments.tasks.cola import CoLA
from experiments.tasks.metrics import confusion_matrix
from experiments.tasks.sentences import EncodedSentences

CONF = Path(__file__).parents[3] / "conf"
CONFIG = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
SCRATCH = {"name_or_path": None, "config": CONFIG}
COLUMNS = "expected 4 tab-separated columns: source, label (0 or 1), mark, sentence"
GOOD_LINE = "gj04\t1\t\tThey drank the pub dry.\n"
PUBLISHED = {
    "in_domain_train.tsv": 'gj04\t1\t\tThe "doll" won\'t move.\ngj04\t0\t*\tMove doll the.\n',
    "in_domain_dev.tsv": "cj99\t1\t\tThe doll sings.\n",
    "out_of_domain_dev.tsv": "clc95\t0\t*\tSings doll.\nclc95\t1\t\tMove, doll\x85!\r\n",
}


def preset(name: str):
    """The preset and the task that Hydra composes of it, with nothing resolved yet."""
    return OmegaConf.create(
        {
            "data_dir": None,
            "preset": OmegaConf.load(CONF / f"preset/cola/{name}.yaml"),
            "task": OmegaConf.load(CONF / "task/cola.yaml"),
        }
    )


def small_task(**changes) -> CoLA:
    task = CoLA(**{"model": SCRATCH, "num_train": 100, "num_val": 40, "batch_size": 8, **changes})
    task.load()
    return task


def train(task: CoLA, seed: int, steps: int, warmup: int, lr: float) -> float:
    """Train with AdamW, linear warm-up and decay; the MCC at the end."""
    torch.manual_seed(seed)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    loader = task.train_loader(seed)
    for step in range(steps):
        if step % len(loader) == 0:
            loader.set_epoch(step // len(loader))
            batches = iter(loader)
        optimizer.zero_grad()
        task.forward(model, next(batches)).loss.backward()
        optimizer.step()
        schedule.step()
    return task.evaluate(model, torch.device("cpu"))[1]["mcc"]


@pytest.fixture
def data_dir(tmp_path) -> Path:
    raw = tmp_path / "sets" / "cola_public" / "raw"
    raw.mkdir(parents=True)
    for name, text in PUBLISHED.items():
        (raw / name).write_bytes(text.encode())
    return raw.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny encoder with its tokenizer, saved the way pretrained models are."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "do", "##ll", "sings", "cat", "##s", "."]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=32, **CONFIG)).save_pretrained(
        folder
    )
    return folder


def use(checkpoint: Path, **changes) -> CoLA:
    model = {"name_or_path": str(checkpoint), "config": None}
    return CoLA(**{"model": model, "max_length": 32, "num_train": 20, "num_val": 10, **changes})


# Configuration


@pytest.mark.parametrize("name", ["mini", "paper", "reference", "frozen"])
def test_presets_give_the_task_its_settings(name):
    config = preset(name)
    task = instantiate(config.task)
    assert isinstance(task, CoLA)
    assert task.input_files() == []
    assert {"sgd", "adam", "adamw"} < set(config.preset.lr)


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_a_checkpoint_is_chosen_by_one_override(name, checkpoint, data_dir):
    config = preset(name)
    config.data_dir = str(data_dir)
    config.task.model.name_or_path = str(checkpoint)
    config.task.max_length = 32
    task = instantiate(config.task)
    task.load()
    assert task.build_model().config.vocab_size == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "hubb"}, "source must be embedded or hub, got 'hubb'. Did you mean 'hub'?"),
        ({"model": {"name_or_pat": "x"}}, "got 'name_or_pat'. Did you mean 'name_or_path'?"),
        ({"model": {}}, "model needs name_or_path"),
        ({"model": "some/folder"}, "a path goes to model.name_or_path"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"max_length": 2}, "max_length must be a whole number of at least 3, got 2"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CoLA(**{"model": SCRATCH, **settings})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hiden_size": 8}, "no field 'hiden_size'. Did you mean 'hidden_size'?"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "makes no BERT: The hidden size (10)"),
        ({"hidden_act": "nope"}, "makes no BERT: KeyError 'nope'"),
        ({"max_position_embeddings": 16}, "max_length must be at most 16"),
    ],
)
def test_bad_model_fields_are_refused_in_loading(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        small_task(model={"config": {**CONFIG, **config}})


# Batches


def test_batches_are_as_long_as_their_longest_sentence():
    sentences = EncodedSentences([[5, 6, 7, 8], [5], [6, 7]], [1, 0, 1], pad_id=9)
    batch = sentences.__getitems__([2, 1])
    assert batch["input_ids"].tolist() == [[6, 7], [5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_padding_changes_no_prediction():
    task = small_task()
    model = task.build_model().eval()
    padded = next(iter(task.eval_loader()))
    with torch.no_grad():
        together = model(padded["input_ids"], attention_mask=padded["attention_mask"]).logits.argmax(-1)
        for row, target in enumerate(padded["labels"]):
            length = int(padded["attention_mask"][row].sum())
            cut = {key: padded[key][row : row + 1, :length] for key in ("input_ids", "attention_mask")}
            alone = task.forward(model, {**cut, "labels": target[None]})
            assert alone.tally[target, together[row]] == 1


def test_order_comes_from_seed_and_epoch_alone():
    task = small_task()

    def epochs(seed, numbers):
        loader = task.train_loader(seed)
        for epoch in numbers:
            loader.set_epoch(epoch)
            yield [batch["input_ids"].tolist() for batch in loader]

    first, second = epochs(3, [0, 1])
    assert first != second
    assert len(first) == 100 // 8
    assert [*epochs(3, [1])] == [second]
    assert [*epochs(4, [0])] != [first]


def test_evaluation_covers_the_split_once_in_order():
    task = small_task(num_val=601)
    labels = torch.cat([batch["labels"] for batch in task.eval_loader()])
    assert len(labels) == 601
    assert torch.equal(labels, torch.cat([batch["labels"] for batch in task.eval_loader()]))


def test_forward_gives_the_mean_loss_and_counts_the_likelier_class():
    task = small_task()
    model = task.build_model().eval()
    batch = next(iter(task.train_loader(0)))
    output = task.forward(model, batch)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, batch["labels"]))
    assert output.size == len(batch["labels"])
    assert torch.equal(output.tally, confusion_matrix(logits.argmax(1), batch["labels"], 2))


def test_a_constant_answer_scores_zero():
    metrics = small_task().metrics(torch.tensor([[0, 30], [0, 70]]))
    assert metrics == {"mcc": 0.0, "accuracy": 0.7}


# Data as published


def test_published_files_are_read_as_they_are(data_dir):
    task = small_task(data_dir=str(data_dir))
    assert task.input_files() == [data_dir / "raw" / name for name in PUBLISHED]
    (train_batch,) = task.train_loader(0)
    (dev,) = task.eval_loader()
    assert sorted(train_batch["labels"].tolist()) == [0, 1]
    assert dev["labels"].tolist() == [1, 0, 1]
    # After the four special tokens come the words of the training split in order: " . doll move the won't
    assert dev["input_ids"].tolist() == [[2, 8, 6, 1, 5, 3], [2, 1, 6, 5, 3, 0], [2, 7, 1, 6, 1, 3]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b"gj04\t1\tThree columns.",
            f"{COLUMNS}; got 3",
        ),
        (b"gj04\t1\t\tTab\tinside.", f"{COLUMNS}; got 5"),
        (b"", f"{COLUMNS}; got 1"),
        (b"source\tlabel\tmark\tsentence", "expected label 0 or 1 in column 2, got 'label'"),
        (b"gj04\t2\t\tLabel two.", "expected label 0 or 1 in column 2, got '2'"),
        (b"gj04\t1\t\t ", "expected a sentence in column 4, got none"),
        (b"gj04\t1\t\tCaf\xe9.", "expected UTF-8 text, got byte 0xe9"),
    ],
)
def test_a_malformed_line_is_named(data_dir, line, message):
    file = data_dir / "raw" / "in_domain_dev.tsv"
    file.write_bytes(GOOD_LINE.encode() + line + b"\n" + GOOD_LINE.encode())
    with pytest.raises(UserError, match=re.escape(f"{file}, line 2: {message}")) as error:
        small_task(data_dir=str(data_dir))
    assert "\n" not in str(error.value)


def test_an_empty_file_is_named(data_dir):
    file = data_dir / "raw" / "out_of_domain_dev.tsv"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=re.escape(f"{file}, line 1")):
        small_task(data_dir=str(data_dir))


@pytest.mark.parametrize("step", ["raw", "..", "../.."])
def test_a_neighbouring_folder_is_told_the_right_one(data_dir, step):
    (data_dir / "inner").mkdir()
    given = (data_dir / step).resolve()
    with pytest.raises(UserError, match=re.escape(f"give data_dir={data_dir}")):
        CoLA(model=SCRATCH, data_dir=str(given)).input_files()


def test_missing_data_is_named(data_dir):
    (data_dir / "raw" / "in_domain_dev.tsv").unlink()
    with pytest.raises(UserError, match=rf"missing in {data_dir}: raw/in_domain_dev\.tsv$"):
        small_task(data_dir=str(data_dir))
    with pytest.raises(UserError, match="there is no folder /no/such/folder"):
        small_task(data_dir="/no/such/folder")


@pytest.mark.skipif(
    "CLIPBENCH_DATA" not in os.environ, reason="needs CLIPBENCH_DATA, a folder of unpacked sets"
)
def test_real_sentences():
    task = small_task(
        data_dir=os.path.join(os.environ["CLIPBENCH_DATA"], "cola_public/cola_public"), batch_size=10_000
    )
    (train_batch,) = task.train_loader(0)
    dev = torch.cat([batch["labels"] for batch in task.eval_loader()])
    assert len(train_batch["labels"]) == 6_372
    assert train_batch["labels"].float().mean() == pytest.approx(0.703, abs=0.001)
    assert len(dev) == 389 + 380
    loss = task.forward(task.build_model(), train_batch).loss
    assert loss.item() == pytest.approx(0.69, abs=0.1)


# The hub


@pytest.fixture
def no_network(monkeypatch):
    """A hub that refuses connections; gives the seconds that somebody waited for it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def test_hub_data_without_network_fails_at_once_with_the_ways_on(no_network, monkeypatch, capfd):
    import datasets

    seen = []

    def load_dataset(*names):
        seen.append((names, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("Couldn't reach it")

    before = datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"no network.*127\.0\.0\.1:9.*data_dir=.*preset=mini"):
        small_task(source="hub")
    assert seen == [(("nyu-mll/glue", "cola"), True)]
    assert before == datasets.config.HF_HUB_OFFLINE
    assert no_network == []
    assert capfd.readouterr() == ("", "")


def test_hub_model_without_network_fails_at_once_with_the_ways_on(no_network, capfd):
    with pytest.raises(UserError, match=r"'nobody/no-such-model'.*127\.0\.0\.1:9.*name_or_path.*preset=mini"):
        small_task(model={"name_or_path": "nobody/no-such-model"})
    assert no_network == []
    assert capfd.readouterr() == ("", "")


def test_hub_data_is_split_as_published(monkeypatch):
    import datasets

    def rows(*labels):
        return datasets.Dataset.from_dict({"sentence": [f"Doll {y}." for y in labels], "label": labels})

    loaded = {"train": rows(1, 0, 1), "validation": rows(0, 1), "test": rows(-1, -1)}
    monkeypatch.setattr(needs, "reachable", lambda url: pytest.fail("asked for what is there"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: loaded)
    task = small_task(source="hub")
    assert [batch["labels"].tolist() for batch in task.eval_loader()] == [[0, 1]]
    assert sum(int(batch["labels"].sum()) for batch in task.train_loader(0)) == 2


# Checkpoints


def test_a_checkpoint_brings_weights_and_tokenizer_without_chatter(checkpoint, data_dir, capfd):
    from safetensors.torch import load_file

    task = use(checkpoint, data_dir=str(data_dir))
    task.load()
    torch.manual_seed(1)
    model = task.build_model()
    assert capfd.readouterr() == ("", "")
    saved = load_file(checkpoint / "model.safetensors")
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, saved["embeddings.word_embeddings.weight"]
    )
    assert model.training
    assert model.classifier.out_features == 2
    (dev,) = task.eval_loader()
    assert dev["input_ids"][0].tolist() == [2, 5, 6, 7, 8, 11, 3]  # the do ##ll sings .
    assert torch.isfinite(task.forward(model, dev).loss)


def test_the_new_classifier_comes_from_the_seed(checkpoint):
    task = use(checkpoint)
    task.load()
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(task.build_model().classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_half_precision_checkpoint_trains_in_float32(checkpoint, tmp_path):
    from transformers import BertModel

    folder = shutil.copytree(checkpoint, tmp_path / "half")
    BertModel.from_pretrained(folder).half().save_pretrained(folder)
    task = use(folder)
    task.load()
    assert {parameter.dtype for parameter in task.build_model().parameters()} == {torch.float32}


def test_another_tasks_classifier_is_replaced(checkpoint, tmp_path):
    from transformers import BertForSequenceClassification

    folder = shutil.copytree(checkpoint, tmp_path / "three_classes")
    BertForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    task = use(folder)
    task.load()
    assert task.build_model().classifier.out_features == 2


def test_model_files_join_the_identity(checkpoint, data_dir):
    (checkpoint / "README.md").write_text("no number depends on this")
    names = {file.name for file in use(checkpoint, data_dir=str(data_dir)).input_files()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", *PUBLISHED}
    assert "README.md" not in names


def remove(*patterns):
    def change(folder):
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return change


def write(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def bring_code(folder):
    (folder / "own.py").write_text("raise SystemExit('ran the code of a checkpoint')")
    write("config.json", '"model_type": "bert"', '"model_type": "own", "auto_map": {"AutoConfig": "own.C"}')(
        folder
    )


class Planted:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran the code of a checkpoint')",))


def bring_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Planted()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("config.json"), "it has no config.json"),
        (remove("*.safetensors"), "it has no weights"),
        (remove("tokenizer*", "vocab.txt", "special*"), "its tokenizer has no vocabulary"),
        (write("config.json", "{", ""), "not a valid JSON file"),
        (write("config.json", 'vocab_size": 12', 'vocab_size": 8'), "its model knows 8 tokens"),
        (write("config.json", 'intermediate_size": 32', 'intermediate_size": 48'), "do not fill its encoder"),
        (write("config.json", 'num_hidden_layers": 1', 'num_hidden_layers": 2'), "do not fill its encoder"),
        (cut_weights, "cannot use the model"),
        (bring_code, "contains custom code"),
        (bring_pickle, "Weights only load failed"),
    ],
)
def test_a_folder_that_is_no_model_gets_one_message(checkpoint, data_dir, tmp_path, capfd, change, message):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    change(folder)
    task = use(folder, data_dir=str(data_dir))

    def load_and_build():
        task.load()
        task.build_model()

    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_and_build()
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "a/folder/deep"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(needs, "reachable", lambda url: pytest.fail("asked the hub for a path"))
    task = CoLA(model={"name_or_path": path})
    for call in (task.input_files, task.load):
        with pytest.raises(UserError, match=f"'{path}': there is no such folder"):
            call()


# Learning


def test_a_small_set_is_learned_by_heart():
    task = small_task(
        num_train=48, model={"config": {**CONFIG, "hidden_dropout_prob": 0.0, "initializer_range": 0.1}}
    )
    task._val_set = task._train_set
    assert train(task, seed=0, steps=90, warmup=10, lr=1e-2) > 0.9


def test_training_repeats_itself_bit_for_bit():
    task = small_task()
    assert train(task, 0, 12, 2, 1e-2) == train(task, 0, 12, 2, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_mini_preset_learns_and_leaves_room(seed):
    config = preset("mini")
    task = instantiate(config.task)
    task.load()
    mcc = train(task, seed, config.preset.max_steps, config.preset.warmup_steps, config.preset.lr.adamw)
    assert 0.5 < mcc < 0.95
