"""The CoLA protocol of arXiv 2106.05958: the tenth held out, the frozen body, its cache, the settings."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.errors import UserError
from experiments.tasks import sentences
from experiments.tasks.cola import CoLA, hold_out
from experiments.tasks.frozen import Head, freeze_body
from experiments.tasks.samples.cola import generate
from experiments.training.presets import conf_dir

CPU = torch.device("cpu")
CONFIG = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
CONFIG["initializer_range"] = 0.5  # or all sentences look alike
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
POOLER = ["pooler.dense.weight", "pooler.dense.bias"]
CLASSIFIER = ["classifier.weight", "classifier.bias"]
# The paper's; the tuned one is ours, to measure its gradient noise.
EXPERIMENTS = sorted(
    {path.stem for path in (conf_dir() / "experiment").glob("cola_*.yaml")} - {"cola_adam_tuned"}
)


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """205 training and 20 + 20 dev sentences in CoLA's format, every one with a number of its own."""
    raw = tmp_path / "cola_public" / "raw"
    raw.mkdir(parents=True)
    train, val = generate(205, 40)
    files = {"in_domain_train": train, "in_domain_dev": val[:20], "out_of_domain_dev": val[20:]}
    for name, split in files.items():
        lines = (f"{name}\t{s.label}\t\tno {name[0]}{i} {s.text}\n" for i, s in enumerate(split))
        (raw / f"{name}.tsv").write_text("".join(lines))
    return raw.parent


def task_on(data_dir: Path, **changes) -> CoLA:
    settings = {"model": {"config": {**CONFIG, **NO_DROPOUT}}, "split": "holdout", "batch_size": 16}
    task = CoLA(**{**settings, "data_dir": str(data_dir), **changes})
    task.load()
    return task


def built(task: CoLA) -> torch.nn.Module:
    torch.manual_seed(3)
    return task.build_model()


def train(task: CoLA, model: torch.nn.Module, epochs: int = 2) -> list[float]:
    """Losses of SGD on what is not frozen, and that of the evaluation at the end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    loader = task.train_loader(5)
    losses = []
    model.train()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = task.forward(model, batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return [*losses, task.evaluate(model, CPU)[0]]


# The split


@pytest.mark.parametrize("size", [2, 9, 10, 11, 6372, 8551])
def test_held_out_rows_are_those_of_scikit_learn(size):
    selection = pytest.importorskip("sklearn.model_selection")
    texts, labels = [f"row {i}" for i in range(size)], [i % 3 % 2 for i in range(size)]
    expected = selection.train_test_split(texts, labels, test_size=0.1, random_state=49)
    (train_texts, train_labels), (val_texts, val_labels) = hold_out((texts, labels))
    assert [train_texts, val_texts, train_labels, val_labels] == expected


def test_held_out_rows_of_the_whole_corpus_are_known():
    train_rows, val_rows = (rows for rows, _ in hold_out((list(range(8551)), [0] * 8551)))
    assert (len(train_rows), len(val_rows)) == (7695, 856)
    assert sorted(train_rows + val_rows) == list(range(8551))
    assert -(-len(train_rows) // 32) == 241  # the paper's batches in an epoch
    assert (val_rows[:4], train_rows[:4]) == ([1141, 4623, 3047, 760], [804, 3043, 8458, 7074])


def test_a_tenth_is_held_out_and_nothing_of_it_is_seen_in_training(data_dir):
    task = task_on(data_dir, batch_size=184)
    (seen,) = task.train_loader(0)
    (held_out,) = task.eval_loader()
    assert (len(seen["labels"]), len(held_out["labels"])) == (184, 21)
    # Each sentence has a word of its own: known where it is trained on, and nowhere else.
    own_words = seen["input_ids"][:, 2].tolist()
    unknown = task._encoder.unknown_id
    assert len(set(own_words)) == 184
    assert unknown not in own_words
    assert set(held_out["input_ids"][:, 2].tolist()) == {unknown}
    assert set(held_out["input_ids"][:, 1].tolist()) == {task._encoder._index["no"]}


def test_labels_stay_with_their_sentences(data_dir):
    lines = (data_dir / "raw" / "in_domain_train.tsv").read_text().splitlines()
    label_of = {line.split("\t")[3]: int(line.split("\t")[1]) for line in lines}
    parts = hold_out((list(label_of), list(label_of.values())))
    assert sum(len(texts) for texts, _ in parts) == len(label_of) == 205
    for texts, labels in parts:
        assert [label_of[text] for text in texts] == labels


def test_the_split_is_the_same_for_every_seed(data_dir):
    held_out = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        (batch,) = task_on(data_dir).eval_loader()
        held_out.append(batch["input_ids"])
    assert torch.equal(*held_out)


def test_one_sentence_cannot_be_split():
    with pytest.raises(UserError, match="split=holdout needs at least 2 training sentences, got 1"):
        CoLA(model={"config": CONFIG}, num_train=1, num_val=1, split="holdout").load()


@pytest.mark.skipif(
    "CLIPBENCH_DATA" not in os.environ, reason="needs CLIPBENCH_DATA, a folder of unpacked sets"
)
def test_real_sentences_are_split():
    task = task_on(Path(os.environ["CLIPBENCH_DATA"]) / "cola_public/cola_public", batch_size=10_000)
    (seen,) = task.train_loader(0)
    assert len(seen["labels"]) == 5_734
    assert sum(len(batch["labels"]) for batch in task.eval_loader()) == 638


# The frozen body


def test_of_twelve_layers_the_first_197_tensors_are_frozen():
    from transformers import BertConfig, BertForSequenceClassification

    layers = {"num_hidden_layers": 12, "vocab_size": 20}
    model = BertForSequenceClassification(BertConfig(**{**CONFIG, **layers}))
    freeze_body(model)
    assert [p.requires_grad for p in model.parameters()] == [False] * 197 + [True] * 4
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        *(f"bert.{name}" for name in POOLER),
        *CLASSIFIER,
    ]


def test_of_another_architecture_the_encoder_is_frozen():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    model = DistilBertForSequenceClassification(
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=20)
    )
    freeze_body(model)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == ["pre_classifier.weight", "pre_classifier.bias", *CLASSIFIER]
    with pytest.raises(UserError, match="body=cached knows the head of BERT alone, not that of DistilBert"):
        Head(model)


def test_training_moves_the_head_and_nothing_below(data_dir):
    task = task_on(data_dir, body="frozen")
    model = built(task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(task, model)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {*(f"bert.{name}" for name in POOLER), *CLASSIFIER}


def test_a_frozen_body_has_its_dropout_in_training(data_dir):
    task = task_on(data_dir, body="frozen", model={"config": {**CONFIG, "classifier_dropout": 0.0}})
    model = built(task).train()
    (batch,) = task.eval_loader()
    assert task.forward(model, batch).loss != task.forward(model, batch).loss


# The cached body


def test_cached_and_frozen_train_alike_without_dropout(data_dir):
    losses = {}
    for body in ("frozen", "cached"):
        task = task_on(data_dir, body=body)
        losses[body] = train(task, built(task))
    assert losses["cached"] == pytest.approx(losses["frozen"], rel=1e-4)
    assert len(losses["cached"]) == 2 * 11 + 1
    assert max(losses["cached"]) > min(losses["cached"]) + 0.2


def test_features_are_those_of_the_body_in_evaluation_mode(data_dir):
    """Sentence by sentence, each alone and unpadded, with a dropout that would show."""
    dropout = {"config": {**CONFIG, "hidden_dropout_prob": 0.5}}
    plain, cached = (task_on(data_dir, body=body, model=dropout) for body in ("trained", "cached"))
    model, head = built(plain).eval(), built(cached)
    (sentences,), (features,) = plain.eval_loader(), cached.eval_loader()
    assert torch.equal(features["labels"], sentences["labels"])
    with torch.no_grad():
        for row, tokens in enumerate(sentences["input_ids"]):
            alone = tokens[sentences["attention_mask"][row].bool()][None]
            state = model.bert(alone).last_hidden_state[0, 0]
            torch.testing.assert_close(features["features"][row], state, rtol=1e-4, atol=1e-5)
        together = model(sentences["input_ids"], attention_mask=sentences["attention_mask"]).logits
        torch.testing.assert_close(head.eval()(features["features"]).logits, together)
    assert head.train()(features["features"]).logits.ne(together).any()  # its own dropout stays


def test_what_is_trained_and_saved_of_a_cached_body_is_the_head(data_dir):
    task = task_on(data_dir, body="cached")
    head = built(task)
    assert list(head.state_dict()) == POOLER + CLASSIFIER
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert not next(iter(task.train_loader(0)))["features"].requires_grad


def test_a_second_model_has_its_own_features(data_dir):
    task = task_on(data_dir, body="cached")
    seen = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        task.build_model()
        (batch,) = task.eval_loader()
        seen.append(batch["features"])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"split": "hold_out"},
            "split must be published or holdout, got 'hold_out'. Did you mean 'holdout'?",
        ),
        ({"body": "froze"}, "body must be trained or frozen or cached, got 'froze'. Did you mean 'frozen'?"),
        ({"body": True}, "got True"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CoLA(model={"config": CONFIG}, **settings)


# The experiments


PUBLISHED = {
    "cola_adam": ("Adam", {"lr": 5e-5, "weight_decay": 5e-4, "betas": [0.9, 0.999]}, "NoClip", None, 1),
    "cola_sgd": ("SGD", {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0}, "NoClip", None, 1),
    "cola_clipped_sgd": ("SGD", {"lr": 2e-3, "momentum": 0.9, "weight_decay": 0.0}, "CoordWiseClip", 0.1, 1),
    "cola_sstm": (
        *("SSTM", {"lr": 0.08, "L": 10.0, "nu": 1.0, "a_k_ratio_upper_bound": 1.0}, "NormClip", 1.0, 8),
    ),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_the_papers(name, composed):
    optimizer, settings, clipping, threshold, batches = PUBLISHED[name]
    config = composed(f"experiment={name}")
    assert config.optimizer._target_.endswith(f".{optimizer}")
    assert {key: config.optimizer[key] for key in settings} == settings
    assert config.clipping._target_.endswith(f".{clipping}")
    assert config.clipping.get("threshold") == threshold
    assert config.accumulate == batches
    assert config.max_steps == 2410 // batches
    assert config.eval_every == 241 // batches
    assert "constant" in config.scheduler._target_
    task = config.task
    assert (task.split, task.body, task.batch_size, task.max_length) == ("holdout", "frozen", 32, 48)
    assert task.model.name_or_path == "bert-base-uncased"
    assert config.warmup_steps == 0


def test_no_experiment_is_left_out():
    assert set(PUBLISHED) == set(EXPERIMENTS)


def test_the_command_line_wins_over_an_experiment(composed):
    config = composed("experiment=cola_sstm", "task.body=cached", "optimizer.lr=1", "preset=cola/mini")
    assert (config.task.body, config.optimizer.lr, config.task.source) == ("cached", 1, "embedded")


def test_runs_of_one_process_share_the_features(data_dir, monkeypatch):
    passes, compute = [], sentences._first_tokens
    monkeypatch.setattr(sentences, "_first_tokens", lambda *given: passes.append(1) or compute(*given))

    def features(seed: int, **changes) -> Tensor:
        task = task_on(data_dir, body="cached", model={"config": CONFIG | changes})
        torch.manual_seed(seed)
        task.build_model()
        (batch,) = task.eval_loader()
        return batch["features"]

    first = features(0)
    assert len(passes) == 2  # training and held-out sentences
    assert torch.equal(features(0), first)
    assert len(passes) == 2
    assert not torch.equal(features(1), first)  # other weights
    assert not torch.equal(features(0, layer_norm_eps=0.1), first)  # the same weights, used otherwise
    assert len(passes) == 6
