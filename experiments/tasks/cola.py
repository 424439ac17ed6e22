"""Is an English sentence acceptable? BERT on CoLA, or on sentences of our own small grammar."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from experiments.errors import UserError, nearest
from experiments.tasks import needs
from experiments.tasks.base import Batch, EpochLoader, Output, Task, as_is
from experiments.tasks.frozen import Head, freeze_body
from experiments.tasks.hub import Checkpoint, address
from experiments.tasks.metrics import accuracy, confusion_matrix, matthews_corrcoef
from experiments.tasks.needs import NOT_FETCHED, Need, in_folder, reason
from experiments.tasks.samples import cola as samples
from experiments.tasks.sentences import EncodedSentences, FirstTokens

SOURCES = ("embedded", "hub")
SPLITS = ("published", "holdout")
BODIES = ("trained", "frozen", "cached")
HUB_DATA = "nyu-mll/glue"
MODEL_KEYS = ("name_or_path", "config")
FILES = ("raw/in_domain_train.tsv", "raw/in_domain_dev.tsv", "raw/out_of_domain_dev.tsv")
COLUMNS = "4 tab-separated columns: source, label (0 or 1), mark, sentence"
NUM_CLASSES = 2
EVAL_BATCH_SIZE = 256
HOLDOUT_SHARE, HOLDOUT_SEED = 0.1, 49

Split = tuple[list[str], list[int]]
"""Sentences, and their labels: 1 acceptable, 0 not."""


class CoLA(Task):
    """Sentence classification with a BERT, scored by the Matthews correlation over the whole dev set.

    A constant answer scores 0, however unbalanced the classes are.

    With ``split="holdout", body="frozen"`` it is the task of arXiv 2106.05958, which reports the accuracy.

    Args:
        model: ``name_or_path`` of a checkpoint, whose tokenizer is used too: a local folder or a name on the
            hub. Or None there, and ``config`` with the BertConfig fields of a model built from scratch, whose
            vocabulary is the words of the training split.
        data_dir: folder that holds ``raw/*.tsv`` as published. Replaces ``source`` and changes nothing else.
        source: ``embedded`` for generated sentences, ``hub`` for CoLA itself.
        split: ``published`` to evaluate on both dev sets together, ``holdout`` to evaluate on a tenth of the
            training sentences, as ``hold_out`` takes it, and train on the others.
        body: ``trained``; ``frozen``, where only pooler and classifier train; or ``cached``, the same with
            what a BERT's body says of each sentence computed once before, so that a step takes a fraction of
            the time. A cached body has no dropout, a frozen one has it in training, as in the paper.
        batch_size: sentences in a training batch.
        max_length: tokens kept of a sentence, the two special ones included.
        num_train: embedded sentences to train on.
        num_val: embedded sentences to evaluate on.
    """

    metric = "mcc"

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        data_dir: str | None = None,
        source: str = "embedded",
        split: str = "published",
        body: str = "trained",
        batch_size: int = 64,
        max_length: int = 64,
        num_train: int = 30_000,
        num_val: int = 2_000,
    ) -> None:
        for name, choice, choices in (
            ("source", source, SOURCES),
            ("split", split, SPLITS),
            ("body", body, BODIES),
        ):
            if choice not in choices:
                raise UserError(
                    f"{name} must be {' or '.join(choices)}, got {choice!r}.{nearest(str(choice), choices)}"
                )
        if not isinstance(model, Mapping):
            raise UserError(
                f"model takes {' and '.join(MODEL_KEYS)}, got {model!r}; a path goes to model.name_or_path"
            )
        for key in model:
            if key not in MODEL_KEYS:
                raise UserError(
                    f"model takes {' and '.join(MODEL_KEYS)}, got {key!r}.{nearest(key, MODEL_KEYS)}"
                )
        name_or_path, config = model.get("name_or_path"), model.get("config")
        if not name_or_path and not config:
            raise UserError(
                "model needs name_or_path (a checkpoint) or config (BertConfig fields), got neither"
            )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 3),
            ("num_train", num_train, 1),
            ("num_val", num_val, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        self._encoder = Checkpoint(str(name_or_path)) if name_or_path else WordBert(config)
        self._data_dir = None if data_dir is None else Path(str(data_dir)).expanduser()
        self._source = source
        self._split = split
        self._body = body
        self._batch_size = batch_size
        self._max_length = max_length
        self._num_train = num_train
        self._num_val = num_val

    def input_files(self) -> list[Path]:
        data = [] if self._data_dir is None else published_files(self._data_dir)
        return [*data, *self._encoder.files()]

    def needs(self) -> list[Need]:
        data = self._data()
        return [*([] if data is None else [data]), *self._encoder.needs()]

    def load(self) -> None:
        train, val = self._sentences()
        if self._split == "holdout":
            train, val = hold_out(train)
        self._encoder.load(train[0])
        if self._max_length > self._encoder.longest:
            raise UserError(
                f"max_length must be at most {self._encoder.longest}, the positions that the model has, "
                f"got {self._max_length}"
            )
        self._encoded = [
            EncodedSentences(self._encoder.encode(sentences, self._max_length), labels, self._encoder.pad_id)
            for sentences, labels in (train, val)
        ]
        self._train_set, self._val_set = self._encoded

    def build_model(self) -> nn.Module:
        """A new model; where its body is cached, its head, for loaders made from then on."""
        model = self._encoder.build(NUM_CLASSES)
        if self._body == "frozen":
            freeze_body(model)
        if self._body != "cached":
            return model
        head = Head(model)
        self._train_set, self._val_set = (
            FirstTokens(model.base_model, sentences) for sentences in self._encoded
        )
        return head

    def train_loader(self, seed: int) -> EpochLoader:
        return EpochLoader(self._train_set, self._batch_size, seed, collate_fn=as_is)

    def eval_loader(self) -> DataLoader:
        sampler = BatchSampler(SequentialSampler(self._val_set), EVAL_BATCH_SIZE, drop_last=False)
        return DataLoader(self._val_set, batch_sampler=sampler, collate_fn=as_is)

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        labels = batch["labels"]
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        tally = confusion_matrix(logits.argmax(-1), labels, NUM_CLASSES)
        return Output(F.cross_entropy(logits, labels), len(labels), tally)

    def metrics(self, tally: Tensor) -> dict[str, float]:
        return {"mcc": matthews_corrcoef(tally), "accuracy": accuracy(tally)}

    def _sentences(self) -> tuple[Split, Split]:
        """Training and evaluation split."""
        data = self._data()
        if data is None:
            train, val = samples.generate(self._num_train, self._num_val)
            return _as_split(train), _as_split(val)
        data.get()
        return read_kept() if self._data_dir is None else read_published(self._data_dir)

    def _data(self) -> Need | None:
        if self._data_dir is not None:
            return in_folder("CoLA", self._data_dir, published_files)
        return download() if self._source == "hub" else None


class WordBert:
    """A BERT from scratch on lower-cased words and punctuation marks.

    Args:
        config: BertConfig fields.
    """

    special_tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    pad_id, unknown_id, first_id, last_id = range(len(special_tokens))
    token = re.compile(r"\w+(?:'\w+)*|[^\w\s]")

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._fields = dict(config)

    def files(self) -> list[Path]:
        return []

    def needs(self) -> list[Need]:
        return []

    def load(self, sentences: Sequence[str]) -> None:
        """Number the words of the training sentences, and check that the model can be built."""
        from transformers import BertConfig, BertForSequenceClassification

        words = sorted({word for sentence in sentences for word in self._words(sentence)})
        self._index = {word: index for index, word in enumerate((*self.special_tokens, *words))}
        known = BertConfig().to_dict()
        for field in self._fields:
            if field not in known:
                raise UserError(f"model.config: BertConfig has no field {field!r}.{nearest(field, known)}")
        try:
            self._config = BertConfig(**self._fields, vocab_size=len(self._index), pad_token_id=self.pad_id)
            with torch.device("meta"):
                BertForSequenceClassification(self._config)
        except Exception as error:  # wrong types, sizes and names each raise a type of their own
            raise UserError(f"model.config makes no BERT: {reason(error)}") from error
        self.longest: int = self._config.max_position_embeddings

    def encode(self, sentences: Sequence[str], max_length: int) -> list[list[int]]:
        """Token indices of each sentence, special tokens included, cut at ``max_length``."""
        return [
            [self.first_id, *self._lookup(sentence)[: max_length - 2], self.last_id] for sentence in sentences
        ]

    def build(self, num_labels: int) -> nn.Module:
        from transformers import BertForSequenceClassification

        self._config.num_labels = num_labels
        return BertForSequenceClassification(self._config)

    def _lookup(self, sentence: str) -> list[int]:
        return [self._index.get(word, self.unknown_id) for word in self._words(sentence)]

    def _words(self, sentence: str) -> list[str]:
        return self.token.findall(sentence.lower())


def hold_out(sentences: Split) -> tuple[Split, Split]:
    """Split off a tenth at random, always the same rows: those that arXiv 2106.05958 evaluates on.

    They are those of scikit-learn's ``train_test_split(test_size=0.1, random_state=49)``. A sentence that
    stands in CoLA twice may lie in both parts, as it did there.
    """
    texts, labels = sentences
    num_val = math.ceil(HOLDOUT_SHARE * len(texts))
    if num_val == len(texts):
        raise UserError(f"split=holdout needs at least 2 training sentences, got {len(texts)}")
    # NumPy's frozen generator, as scikit-learn uses it.
    order = np.random.RandomState(HOLDOUT_SEED).permutation(len(texts))
    train, val = (
        ([texts[i] for i in rows], [labels[i] for i in rows]) for rows in (order[num_val:], order[:num_val])
    )
    return train, val


def published_files(data_dir: Path) -> list[Path]:
    """The three files under ``data_dir/raw``, training split first; an error says which folder to give."""
    return needs.published_files(data_dir, FILES, ", ".join(FILES))


def read_published(data_dir: Path) -> tuple[Split, Split]:
    """CoLA as published; both dev files together are the evaluation split."""
    train, *dev = [_read_tsv(file) for file in published_files(data_dir)]
    return train, ([s for sentences, _ in dev for s in sentences], [y for _, labels in dev for y in labels])


def _read_tsv(path: Path) -> Split:
    sentences: list[str] = []
    labels: list[int] = []
    # By bytes and line feeds: text mode would also break lines at the rarer separators inside sentences.
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        try:
            columns = line.removesuffix(b"\r").decode("utf-8").split("\t")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: expected UTF-8 text, got byte {line[error.start]:#04x}"
            ) from error
        if len(columns) != 4:
            raise UserError(f"{path}, line {number}: expected {COLUMNS}; got {len(columns)} column(s)")
        _, label, _, sentence = columns
        if label not in ("0", "1"):
            raise UserError(f"{path}, line {number}: expected label 0 or 1 in column 2, got {label!r}")
        if not sentence.strip():
            raise UserError(f"{path}, line {number}: expected a sentence in column 4, got none")
        sentences.append(sentence)
        labels.append(int(label))
    return sentences, labels


def download() -> Need:
    """CoLA by the usual loader, which keeps it."""
    import datasets

    try:
        _kept()
        problem = None
    except Exception:  # the library raises a dozen unrelated types where it has kept nothing
        problem = NOT_FETCHED
    return Need(
        "CoLA",
        Path(datasets.config.HF_DATASETS_CACHE),
        problem,
        source=address(f"datasets/{HUB_DATA}"),
        fetch=lambda: datasets.load_dataset(HUB_DATA, "cola"),
        give=f"data_dir=<folder that holds {', '.join(FILES)}>",
    )


def _kept() -> Mapping[str, Any]:
    """CoLA as the loader has kept it: the network is not asked, and nothing said about that."""
    import datasets

    offline, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    try:
        datasets.config.HF_HUB_OFFLINE = True
        datasets.logging.set_verbosity_error()
        return datasets.load_dataset(HUB_DATA, "cola")
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        datasets.logging.set_verbosity(verbosity)


def read_kept() -> tuple[Split, Split]:
    """CoLA as the loader has kept it; its validation split is both published dev files together."""
    loaded = _kept()
    train, val = loaded["train"], loaded["validation"]
    return (list(train["sentence"]), list(train["label"])), (list(val["sentence"]), list(val["label"]))


def _as_split(sentences: Sequence[samples.Sentence]) -> Split:
    return [sentence.text for sentence in sentences], [sentence.label for sentence in sentences]
