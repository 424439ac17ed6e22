"""Pretrained text classifiers, from a local folder or the hub: no chatter, one message where none is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from experiments.errors import UserError
from experiments.tasks.needs import NOT_FETCHED, Need, in_folder, reason

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
KEPT_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
KEPT_WEIGHTS += ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What else lies in a model's folder (read-me files, optimizer states) changes no number.
MODEL_FILES = (*WEIGHTS, "*.json", "*.model", "vocab.txt", "merges.txt")


def kept(repo: str, *names: str, revision: str | None = None) -> Path | None:
    """Where the hub's cache has a model's file of one of these names; None where it has none."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repo, name, revision=revision) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def address(repo: str) -> str:
    """Of a model or data set on the hub."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


class Checkpoint:
    """A pretrained encoder under a new classifier, with its own tokenizer.

    Only configuration and weights are read; code that a checkpoint brings is never run.

    Args:
        name_or_path: a folder as ``save_pretrained`` writes it, or a model's name on the hub.
    """

    def __init__(self, name_or_path: str) -> None:
        self.name_or_path = name_or_path

    def _is_local(self) -> bool:
        name = self.name_or_path
        # A name on the hub is "model" or "owner/model"; anything more is meant as a path.
        return Path(name).expanduser().exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1

    def folder(self) -> Path | None:
        """The local folder, or None for a name on the hub."""
        if not self._is_local():
            return None
        folder = Path(self.name_or_path).expanduser()
        if not folder.is_dir():
            raise self._unusable("there is no such folder")
        return folder

    def files(self) -> list[Path]:
        """Local files that change the numbers: weights, configuration, tokenizer."""
        folder = self.folder()
        if folder is None:
            return []
        return sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file())

    def needs(self) -> list[Need]:
        """The files, in a folder or on the hub."""
        return [self._need()]

    def _need(self) -> Need:
        from huggingface_hub import constants

        name = self.name_or_path
        if self._is_local():
            return in_folder(f"the model {name!r}", Path(name).expanduser(), self._check)
        config, weights = kept(name, "config.json"), kept(name, *KEPT_WEIGHTS)
        return Need(
            f"the model {name!r}",
            weights.parent if weights else Path(constants.HF_HUB_CACHE),
            # Weights come last, so that with them the tokenizer's files are there too.
            problem=None if config and weights else NOT_FETCHED,
            source=address(name),
            fetch=self._fetch,
            give="task.model.name_or_path=<folder as save_pretrained writes it>",
        )

    def _check(self, folder: Path) -> None:
        if not folder.is_dir():
            raise self._unusable("there is no such folder")
        if not (folder / "config.json").is_file():
            raise self._unusable("it has no config.json")
        if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            raise self._unusable(f"it has no weights ({' or '.join(WEIGHTS)})")

    def _fetch(self) -> None:
        self.load(())
        self.build(num_labels=2)

    def load(self, sentences: Sequence[str]) -> None:
        """Read configuration and tokenizer, and look for the weights; the training sentences add nothing."""
        from transformers import AutoConfig, AutoTokenizer

        need = self._need()
        need.check()
        self._source = str(self.folder() or self.name_or_path)
        # What was fetched once stays as it is, whatever becomes of it on the hub.
        self._options = {"trust_remote_code": False, "local_files_only": need.problem is None}
        with self._loading():
            config = AutoConfig.from_pretrained(self._source, **self._options)
            self._tokenizer = AutoTokenizer.from_pretrained(self._source, **self._options)
            # In here: an architecture without these fields is no text classifier that can be used.
            self._vocab_size: int = config.vocab_size
            self.longest: int = config.max_position_embeddings
        # Without its files some tokenizers come up empty, and every word would read as unknown.
        num_words = len(self._tokenizer) - len(self._tokenizer.all_special_ids)
        if self._tokenizer.pad_token_id is None or num_words <= 0:
            raise self._unusable("its tokenizer has no vocabulary or no padding token")
        self.pad_id: int = self._tokenizer.pad_token_id

    def encode(self, sentences: Sequence[str], max_length: int) -> list[list[int]]:
        """Token indices of each sentence, special tokens included, cut at ``max_length``."""
        encoded = self._tokenizer(
            list(sentences),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        largest = max(map(max, encoded))
        if largest >= self._vocab_size:
            raise self._unusable(
                f"its tokenizer gives index {largest}, its model knows {self._vocab_size} tokens"
            )
        return encoded

    def build(self, num_labels: int) -> nn.Module:
        """The model in float32; what the checkpoint lacks is drawn from torch's global generator."""
        from transformers import AutoModelForSequenceClassification

        with self._loading():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self._source,
                num_labels=num_labels,
                ignore_mismatched_sizes=True,  # another task's classifier; the encoder's are refused below
                output_loading_info=True,
                **self._options,
            )
        # Weights that do not fit would leave a random encoder under the name of a pretrained one.
        unfilled = [
            name
            for name in (*report["missing_keys"], *(key[0] for key in report["mismatched_keys"]))
            if name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name
        ]
        if unfilled:
            raise self._unusable(f"its weights do not fill its encoder, {min(unfilled)} for one")
        return model.float().train()

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """No load report (a new classifier on an old encoder is the plan); one message for whatever fails."""
        from huggingface_hub.utils import are_progress_bars_disabled
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        # Bars stay for what may be downloaded; a folder is read in a moment.
        hide_bars = self._options["local_files_only"] and not are_progress_bars_disabled()
        logging.set_verbosity_error()
        if hide_bars:
            logging.disable_progress_bar()
        try:
            yield
        # Pickles, shapes, JSON, network: the libraries raise a dozen unrelated types.
        except Exception as error:
            raise self._unusable(reason(error)) from error
        finally:
            logging.set_verbosity(verbosity)
            if hide_bars:
                logging.enable_progress_bar()

    def _unusable(self, why: str) -> UserError:
        return UserError(
            f"cannot use the model {self.name_or_path!r}: {why}. task.model.name_or_path takes "
            "a folder as save_pretrained writes it (config.json, weights, tokenizer files) or a model's "
            "name on the hub; preset=mini needs neither"
        )
