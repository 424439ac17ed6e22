"""Sentences as data sets: their tokens, or what the body of a BERT makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import Dataset

from experiments.tasks.base import Batch

BODY_BATCH_SIZE = 32


class EncodedSentences(Dataset):
    """Tokens of all sentences in one tensor; a batch is cut out of it, as long as its longest sentence."""

    def __init__(self, encoded: Sequence[Sequence[int]], labels: Sequence[int], pad_id: int) -> None:
        self.lengths = torch.tensor([len(tokens) for tokens in encoded])
        self.labels = torch.tensor(labels)
        self._places = torch.arange(int(self.lengths.max()))
        self._tokens = torch.full((len(encoded), len(self._places)), pad_id)
        self._tokens[self._places < self.lengths[:, None]] = torch.tensor(
            [t for tokens in encoded for t in tokens]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.tensor(indices)
        lengths = self.lengths[index]
        longest = int(lengths.max())
        return {
            "input_ids": self._tokens[index, :longest],
            "attention_mask": (self._places[:longest] < lengths[:, None]).long(),
            "labels": self.labels[index],
        }


class FirstTokens(Dataset):
    """The last hidden state of each sentence's first token: all that the head of a BERT sees of it.

    Computed once, on the CPU and in evaluation mode.

    Args:
        body: a BERT without a head.
        sentences: to run through it.
    """

    @torch.no_grad()
    def __init__(self, body: nn.Module, sentences: EncodedSentences) -> None:
        body.eval()
        self._features = torch.empty(len(sentences), body.config.hidden_size)
        self._labels = sentences.labels
        # Shortest first: little is padded.
        for index in sentences.lengths.argsort(stable=True).split(BODY_BATCH_SIZE):
            batch = sentences.__getitems__(index.tolist())
            states = body(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            self._features[index] = states[:, 0]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.tensor(indices)
        return {"features": self._features[index], "labels": self._labels[index]}
