"""A classifier of transformers' of which the head alone trains: its body frozen, or computed beforehand."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from experiments.errors import UserError


def freeze_body(model: nn.Module) -> None:
    """Let the head alone train: the pooler, where there is one, and what follows it.

    Of bert-base-uncased the first 197 tensors are frozen and the last four train.

    Args:
        model: a classifier of transformers'.
    """
    # By its structure: another depth or architecture has another number of tensors.
    model.base_model.requires_grad_(False)
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(True)


class Logits(NamedTuple):
    """What a head gives, by the name that transformers' classifiers give it."""

    logits: Tensor


class Head(nn.Module):
    """The head of a BERT classifier by itself: pooler, dropout and classifier.

    Args:
        model: to take it from; they share their parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import BertForSequenceClassification

        super().__init__()
        if not isinstance(model, BertForSequenceClassification):
            raise UserError(
                f"body=cached knows the head of BERT alone, not that of {type(model).__name__}; "
                "body=frozen trains any"
            )
        self.pooler = model.bert.pooler
        self.dropout = model.dropout
        self.classifier = model.classifier

    def forward(self, features: Tensor) -> Logits:
        """Classify.

        Shapes:
            ``features`` as of ``FirstTokens``, (sentences, hidden); the logits (sentences, num_labels).
        """
        return Logits(self.classifier(self.dropout(self.pooler(features[:, None]))))
