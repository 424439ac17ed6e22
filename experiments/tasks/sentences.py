"""Sentences as data sets: their tokens, or what the body of a BERT makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from experiments.tasks.base import Batch

BODY_BATCH_SIZE = 32
MOST_KEPT = 4
"""Sets of features: of two splits, each from two bodies."""


class EncodedSentences(Dataset):
    """Tokens of all sentences in one tensor; a batch is cut out of it, as long as its longest sentence."""

    def __init__(self, encoded: Sequence[Sequence[int]], labels: Sequence[int], pad_id: int) -> None:
        self.lengths = torch.tensor([len(tokens) for tokens in encoded])
        self.labels = torch.tensor(labels)
        self._places = torch.arange(int(self.lengths.max()))
        self.tokens = torch.full((len(encoded), len(self._places)), pad_id)
        self.tokens[self._places < self.lengths[:, None]] = torch.tensor(
            [t for tokens in encoded for t in tokens]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.tensor(indices)
        lengths = self.lengths[index]
        longest = int(lengths.max())
        return {
            "input_ids": self.tokens[index, :longest],
            "attention_mask": (self._places[:longest] < lengths[:, None]).long(),
            "labels": self.labels[index],
        }


class FirstTokens(Dataset):
    """The last hidden state of each sentence's first token: all that the head of a BERT sees of it.

    Computed on the CPU and in evaluation mode, once in a process: runs of a sweep share it.

    Args:
        body: a BERT without a head.
        sentences: to run through it.
    """

    def __init__(self, body: nn.Module, sentences: EncodedSentences) -> None:
        key = _digest(body, sentences)
        if key not in _computed:
            if len(_computed) >= MOST_KEPT:
                _computed.clear()
            _computed[key] = _first_tokens(body, sentences)
        self._features = _computed[key]
        self._labels = sentences.labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.tensor(indices)
        return {"features": self._features[index], "labels": self._labels[index]}


_computed: dict[str, Tensor] = {}


def _digest(body: nn.Module, sentences: EncodedSentences) -> str:
    """Of all that the features are computed from; the configuration decides what the weights do."""
    digest = hashlib.sha256(body.config.to_json_string().encode())
    # A head's pooler, which is new in each run, comes after the features.
    weights = [tensor for name, tensor in body.state_dict().items() if not name.startswith("pooler.")]
    for tensor in (*weights, sentences.tokens, sentences.lengths):
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _first_tokens(body: nn.Module, sentences: EncodedSentences) -> Tensor:
    body.eval()
    features = torch.empty(len(sentences), body.config.hidden_size)
    # Shortest first: little is padded.
    for index in sentences.lengths.argsort(stable=True).split(BODY_BATCH_SIZE):
        batch = sentences.__getitems__(index.tolist())
        states = body(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        features[index] = states[:, 0]
    return features
