"""Is an English sentence acceptable? BERT on CoLA, or on sentences of our own small grammar."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from experiments.errors import UserError, nearest
from experiments.tasks.base import Batch, EpochLoader, Output, Task, as_is
from experiments.tasks.hub import Checkpoint, looked_at, reachable, reason
from experiments.tasks.metrics import accuracy, confusion_matrix, matthews_corrcoef
from experiments.tasks.samples import cola as samples

SOURCES = ("embedded", "hub")
HUB_DATA, PAPER_MODEL = "nyu-mll/glue", "bert-base-uncased"
MODEL_KEYS = ("name_or_path", "config")
TRAIN_FILE = "in_domain_train.tsv"
FILES = (TRAIN_FILE, "in_domain_dev.tsv", "out_of_domain_dev.tsv")
COLUMNS = "4 tab-separated columns: source, label (0 or 1), mark, sentence"
NUM_CLASSES = 2
EVAL_BATCH_SIZE = 256

Split = tuple[list[str], list[int]]
"""Sentences, and their labels: 1 acceptable, 0 not."""


class CoLA(Task):
    """Sentence classification with a BERT, scored by the Matthews correlation over the whole dev set.

    A constant answer scores 0, however unbalanced the classes are.

    Args:
        model: ``name_or_path`` of a checkpoint, whose tokenizer is used too: a local folder or a name on the
            hub. Or None there, and ``config`` with the BertConfig fields of a model built from scratch, whose
            vocabulary is the words of the training split.
        data_dir: folder that holds ``raw/*.tsv`` as published. Replaces ``source`` and changes nothing else.
        source: ``embedded`` for generated sentences, ``hub`` for CoLA itself.
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
        batch_size: int = 64,
        max_length: int = 64,
        num_train: int = 30_000,
        num_val: int = 2_000,
    ) -> None:
        if source not in SOURCES:
            raise UserError(
                f"source must be {' or '.join(SOURCES)}, got {source!r}.{nearest(str(source), SOURCES)}"
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
        self._batch_size = batch_size
        self._max_length = max_length
        self._num_train = num_train
        self._num_val = num_val

    def input_files(self) -> list[Path]:
        data = [] if self._data_dir is None else published_files(self._data_dir)
        return [*data, *self._encoder.files()]

    def load(self) -> None:
        train, val = self._sentences()
        self._encoder.load(train[0])
        if self._max_length > self._encoder.longest:
            raise UserError(
                f"max_length must be at most {self._encoder.longest}, the positions that the model has, "
                f"got {self._max_length}"
            )
        self._train_set, self._val_set = (
            EncodedSentences(self._encoder.encode(sentences, self._max_length), labels, self._encoder.pad_id)
            for sentences, labels in (train, val)
        )

    def build_model(self) -> nn.Module:
        return self._encoder.build(NUM_CLASSES)

    def train_loader(self, seed: int) -> EpochLoader:
        return EpochLoader(self._train_set, self._batch_size, seed, collate_fn=as_is)

    def eval_loader(self) -> DataLoader:
        sampler = BatchSampler(SequentialSampler(self._val_set), EVAL_BATCH_SIZE, drop_last=False)
        return DataLoader(self._val_set, batch_sampler=sampler, collate_fn=as_is)

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"]
        tally = confusion_matrix(logits.argmax(-1), labels, NUM_CLASSES)
        return Output(F.cross_entropy(logits, labels), len(labels), tally)

    def metrics(self, tally: Tensor) -> dict[str, float]:
        return {"mcc": matthews_corrcoef(tally), "accuracy": accuracy(tally)}

    def _sentences(self) -> tuple[Split, Split]:
        """Training and evaluation split."""
        if self._data_dir is not None:
            return read_published(self._data_dir)
        if self._source == "hub":
            return fetch_from_hub()
        train, val = samples.generate(self._num_train, self._num_val)
        return _as_split(train), _as_split(val)


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


class EncodedSentences(Dataset):
    """Tokens of all sentences in one tensor; a batch is cut out of it, as long as its longest sentence."""

    def __init__(self, encoded: Sequence[Sequence[int]], labels: Sequence[int], pad_id: int) -> None:
        self._lengths = torch.tensor([len(tokens) for tokens in encoded])
        self._labels = torch.tensor(labels)
        self._places = torch.arange(int(self._lengths.max()))
        self._tokens = torch.full((len(encoded), len(self._places)), pad_id)
        self._tokens[self._places < self._lengths[:, None]] = torch.tensor(
            [t for tokens in encoded for t in tokens]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.tensor(indices)
        lengths = self._lengths[index]
        longest = int(lengths.max())
        return {
            "input_ids": self._tokens[index, :longest],
            "attention_mask": (self._places[:longest] < lengths[:, None]).long(),
            "labels": self._labels[index],
        }


def published_files(data_dir: Path) -> list[Path]:
    """The three files under ``data_dir/raw``, training split first; an error says which folder to give."""
    files = [data_dir / "raw" / name for name in FILES]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    expected = f"data_dir must hold raw/ with {', '.join(FILES)}"
    inside = [data_dir] if (data_dir / TRAIN_FILE).is_file() else []
    below = [found for depth in ("*", "*/*") for found in sorted(data_dir.glob(f"{depth}/raw/{TRAIN_FILE}"))]
    if not data_dir.is_dir():
        found = f"there is no folder {data_dir.absolute()}"
    elif inside:
        found = f"{data_dir.absolute()} is that folder raw itself: give data_dir={data_dir.absolute().parent}"
    elif below:
        found = f"not in {data_dir.absolute()} but further in: give data_dir={below[0].absolute().parents[1]}"
    else:
        found = f"missing in {data_dir.absolute() / 'raw'}: {', '.join(missing)}"
    raise UserError(f"{expected}; {found}")


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


def fetch_from_hub() -> tuple[Split, Split]:
    """CoLA by the usual loader; its validation split is both published dev files together."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    online = reachable()
    try:
        # Offline mode looks in the cache alone; the loader would retry for half a minute before it does.
        datasets.config.HF_HUB_OFFLINE = not online
        loaded = datasets.load_dataset(HUB_DATA, "cola")
    except Exception as error:  # network, cache, disk: the library raises a dozen unrelated types
        why = reason(error) if online else "no network, and no earlier download"
        raise UserError(
            f"cannot get CoLA ({HUB_DATA}): {why}. Looked in {looked_at()}. Ways on: "
            "data_dir=<folder that holds raw/ with the published .tsv files>, a network, or preset=mini, "
            "which brings its own sentences"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    train, val = loaded["train"], loaded["validation"]
    return (list(train["sentence"]), list(train["label"])), (list(val["sentence"]), list(val["label"]))


def _as_split(sentences: Sequence[samples.Sentence]) -> Split:
    return [sentence.text for sentence in sentences], [sentence.label for sentence in sentences]


def missing_for_paper(given: Mapping[str, str]) -> str | None:
    """What the paper preset needs that is neither given, nor here, nor can be fetched; None if nothing is.

    Args:
        given: settings of the command line.
    """
    from huggingface_hub import try_to_load_from_cache

    if reachable():
        return None
    missing = []
    if "task.model.name_or_path" not in given and not try_to_load_from_cache(PAPER_MODEL, "config.json"):
        missing.append(f"{PAPER_MODEL} (give task.model.name_or_path)")
    if "data_dir" not in given and not try_to_load_from_cache(HUB_DATA, "README.md", repo_type="dataset"):
        missing.append("CoLA (give data_dir)")
    return f"{' and '.join(missing)}: not in {looked_at()}" if missing else None
