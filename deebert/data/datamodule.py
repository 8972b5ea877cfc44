"""A LightningDataModule that makes token batches of rows.

`loading` reads the rows. This module tokenizes them once, keeps the result on disk, and gives the
batches to one or more processes. The inputs of a batch have a similar length, and a batch is as
long as its longest input. The module does not know models.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from deebert.data import batching, loading, tokenization
from deebert.data.file_split import SplitFile
from deebert.data.tasks import HELD_OUT, UNLABELLED, Task
from deebert.errors import UserError
from deebert.options import job_command

log = logging.getLogger(__name__)

POOL = 50  # batches of rows that are sorted by length together


class LengthBatches(Sampler[list[int]]):
    """Batches of the numbers of rows of similar length. All processes make the same batches.

    For training, rows are shuffled by (seed, epoch) and cut into pools of 50 batches. Each pool is
    sorted by length and cut into batches, and the batches are shuffled. For evaluation, all rows
    are sorted by length. A process takes every world_size-th batch. If the number of batches is no
    multiple of world_size, the first batches are repeated, so that all processes take equally many
    steps.

    Args:
        lengths: the number of tokens of each row.
        batch_size: rows in a batch.
        shuffle: true for training.
        seed: of the order.
        rank: the number of this process, from 0.
        world_size: the number of processes.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the order depends on. Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        num_batches = -(-len(self.lengths) // self.batch_size)
        return -(-num_batches // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
            order = torch.randperm(len(self.lengths), generator=generator)
            pools = [self._by_length(pool) for pool in order.split(POOL * self.batch_size)]
            batches = [batch for pool in pools for batch in pool.split(self.batch_size)]
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[i] for i in shuffled]
        else:
            batches = list(self._by_length(torch.arange(len(self.lengths))).split(self.batch_size))
        for step in range(len(self)):
            yield batches[(step * self.world_size + self.rank) % len(batches)].tolist()

    def _by_length(self, rows: Tensor) -> Tensor:
        return rows[self.lengths[rows].argsort(stable=True)]


class TextDataModule(L.LightningDataModule):
    """Token batches of a task.

    A batch is a dict of tensors. `input_ids`, `attention_mask` and, if the tokenizer makes them,
    `token_type_ids` are (B, S). `labels`, if the split has them, `index`, `length` and, if the task
    has groups, `group` are (B,).

    Args:
        task: the task whose rows are read.
        tokenizer: the tokenizer of the backbone.
        root: the local folder with the files, a file to split, or None for the task's own folder or
            the hub.
        max_length: the largest number of tokens. The longer text of a pair is cut first.
        limit_train: the number of training rows to use, or None for all. Every seed uses the same
            rows.
        calibration_size: the number of training rows that are held out for choosing thresholds, or
            None for `calibration_size_of`. They are the same for every seed, and they are the split
            "calibration".
        unlabelled: splits whose rows are also trained on, without their labels.
        batch_size: training rows in a batch of one device.
        eval_batch_size: evaluation rows in a batch of one device.
        num_workers: the number of processes that load batches.
        seed: of the order of the training rows.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        *,
        root: loading.Root,
        max_length: int,
        limit_train: int | None,
        calibration_size: int | None,
        unlabelled: Sequence[str] = (),
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.task = task
        self.tokenizer = tokenizer
        self.root = root
        self.max_length = max_length
        self.limit_train = limit_train
        self._calibration_size = calibration_size
        self.unlabelled = unlabelled
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.eval_splits = self._present(task.validation)
        self._tokens: dict[str, datasets.Dataset] = {}

    def _present(self, splits: tuple[str, ...]) -> tuple[str, ...]:
        present = tuple(split for split in splits if loading.exists(self.task, split, self.root))
        for split in set(splits) - set(present) if present else ():
            log.warning("%s: split %r is not there; going on without it", self.flag, split)
        return present or splits  # if no split exists, loading the first one raises the error

    def tokens(self, split: str) -> datasets.Dataset:
        """Return a split as token ids. The cache on disk keeps what was tokenized before."""
        if split not in self._tokens:
            self._tokens[split] = (
                self._with_unlabelled()
                if self.unlabelled and split == self.train_split
                else _tokenize(self.rows(split), self.tokenizer, self.max_length)
            )
        return self._tokens[split]

    @property
    def train_split(self) -> str | None:
        """The split to train on: "train", or "train+test" if the rows of "test" are unlabelled."""
        if self.task.train is None:
            return None
        return "+".join((self.task.train, *self.unlabelled))

    def _with_unlabelled(self) -> datasets.Dataset:
        assert self.task.train is not None
        labelled = self.tokens(self.task.train)
        label_feature = labelled.features["label"]
        hidden = math.nan if self.task.is_regression else UNLABELLED
        parts = [labelled]
        for split in self.unlabelled:
            if split in (self.task.train, HELD_OUT, *self.task.validation):
                raise UserError(
                    f"data.unlabelled=[{split}]: its rows are trained on with their labels, held "
                    f"out or reported; choose from: {', '.join(self.task.test)}, or a file of your "
                    "own under data.root"
                )
            rows = self.tokens(split)
            if "label" in rows.column_names:
                rows = rows.remove_columns("label")
            parts.append(rows.add_column("label", [hidden] * len(rows), feature=label_feature))
        return datasets.concatenate_datasets(parts)

    def rows(self, split: str) -> datasets.Dataset:
        """Return the texts and labels of a split, without the training rows that are left out.

        Raises:
            UserError: there is no such split, or no row is left to train on.
        """
        train = self.task.train
        if split not in (train, HELD_OUT) or train is None:
            return loading.load(self.task, split, self.root)
        rows = loading.load(self.task, train, self.root)
        held_out = self._calibration_size
        if held_out is None:
            held_out = calibration_size_of(len(rows))
        if held_out >= len(rows):
            raise UserError(
                f"data.calibration_size={held_out} leaves nothing of the {len(rows)} training rows "
                "to train on (data.calibration_size)"
            )
        self._calibration_size = held_out
        rows_left = len(rows) - held_out
        if held_out or self.limit_train is not None:
            rows = rows.shuffle(seed=0)  # a fixed seed: every run sees the same rows
        if split == HELD_OUT and not held_out:
            raise UserError(
                "split=calibration: no training row was held out (data.calibration_size=0)"
            )
        if split == HELD_OUT:
            return rows.select(range(rows_left, len(rows)))
        return rows.select(range(min(self.limit_train or rows_left, rows_left)))

    @property
    def calibration_size(self) -> int:
        """The number of training rows that are held out."""
        if self.task.train is None:
            return 0
        if self._calibration_size is None:
            self.tokens(self.task.train)
        assert self._calibration_size is not None
        return self._calibration_size

    def fingerprint(self, split: str) -> str:
        """Return a hash of the tokens and labels of a split. It does not depend on the file."""
        return str(Hasher.hash(_columns(self.tokens(split), "input_ids", "label")))

    def text_fingerprint(self, split: str) -> str:
        """Return a hash of the words and labels of a split. It does not depend on the tokenizer."""
        return str(Hasher.hash(_words_and_labels(self.rows(split))))

    @property
    def flag(self) -> str:
        """The flag that names the rows, with its value, for messages."""
        return loading.flag_of(self.root)

    @property
    def split_fingerprint(self) -> str | None:
        """A hash of the words and labels of a file that is split, and of the split; else None."""
        if not isinstance(self.root, SplitFile):
            return None
        rows = loading.file_rows(self.task, self.root)
        validation = loading.load(self.task, self.task.validation[0], self.root)
        return str(Hasher.hash([_words_and_labels(rows), validation["index"][:]]))

    def texts(self, split: str, indices: list[int]) -> list[str]:
        """Return the texts of some rows.

        Args:
            split: the split that holds the rows.
            indices: the `index` of each row.

        Returns:
            One text for each row. The two texts of a pair are joined by " / ".
        """
        rows = self.rows(split)
        row_of = {index: row for row, index in enumerate(rows["index"][:])}
        chosen = rows.select([row_of[index] for index in indices])
        columns = [chosen[name][:] for name in ("text_a", "text_b") if name in rows.column_names]
        return [" / ".join(texts) for texts in zip(*columns, strict=True)]

    def prepare_data(self) -> None:
        """Tokenize in one process, so that the other processes read the cache."""
        fitting = self.trainer is None or self.trainer.state.fn == "fit"
        train = (self.train_split,) if self.train_split and fitting else ()
        for split in (*train, *self.eval_splits):
            self.tokens(split)

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled batches of the training split.

        Raises:
            UserError: the task has no training split.
        """
        if self.train_split is None:
            raise UserError(
                f"task {self.task.name} has no training split; score it with a checkpoint of "
                f"{self.task.checkpoint_task}: {job_command('evaluate')} ckpt=... "
                f"task={self.task.name}"
            )
        return self.loader(self.train_split, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        """Return the sorted batches of each split in `eval_splits`."""
        return [self.loader(split) for split in self.eval_splits]

    def test_dataloader(self) -> list[DataLoader]:
        """Return the sorted batches of each split in `eval_splits`."""
        return self.val_dataloader()

    def loader(self, split: str, *, shuffle: bool = False) -> DataLoader:
        """Return the batches of a split.

        Args:
            split: the split to read.
            shuffle: true for shuffled batches of `batch_size` rows, false for batches of
                `eval_batch_size` rows that are sorted by length.
        """
        tokens = self.tokens(split)
        sampler = LengthBatches(
            tokens["length"][:],
            self.batch_size if shuffle else self.eval_batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        # batch_size=None, as the sampler yields whole batches. Lightning then calls its set_epoch.
        return DataLoader(
            tokens,
            sampler=sampler,
            batch_size=None,
            collate_fn=self._collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _collate(self, rows: Any) -> dict[str, Tensor]:
        names = [name for name in tokenization.TOKENS if name in rows]
        tokens = zip(*(rows[name] for name in names), strict=True)
        # The tokenizer itself might pad at the left, where ramps expect the first token.
        batch = batching.padded(
            [dict(zip(names, values, strict=True)) for values in tokens],
            self.tokenizer.pad_token_id,
        )
        batch |= {
            name: torch.tensor(rows[name]) for name in ("index", "length", "group") if name in rows
        }
        if "label" in rows:
            batch["labels"] = torch.tensor(rows["label"], dtype=self.task.target_dtype())
        return batch


def _columns(rows: datasets.Dataset, *names: str) -> list[list[Any]]:
    """Return the values of those of the columns that the rows have."""
    return [rows[name][:] for name in names if name in rows.column_names]


def _words_and_labels(rows: datasets.Dataset) -> list[list[Any]]:
    """Return the words of each text column, and the labels."""
    words = [[text.split() for text in column] for column in _columns(rows, "text_a", "text_b")]
    return [*words, *_columns(rows, "label")]


def calibration_size_of(num_rows: int) -> int:
    """Return how many training rows are held out by default.

    This is a tenth of the rows, 2,000 at most. It is 0 if a tenth is less than 400: so few rows are
    too few for a guarantee, and they are worth more in training. Thresholds are then cross-fitted
    on validation rows.
    """
    tenth = min(num_rows // 10, 2000)
    return tenth if tenth >= 400 else 0


def _tokenize(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """Add token ids and their number. The datasets cache keeps the result under a content hash."""
    texts = [name for name in ("text_a", "text_b") if name in rows.column_names]

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        encoded = tokenization.encode(tokenizer, [batch[name] for name in texts], max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    # The hash that `datasets` computes of a fast tokenizer changes with each call.
    columns = {name: rows[name][:] for name in rows.column_names}
    name = Hasher.hash([columns, tokenization.files_of(tokenizer), max_length])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "deebert"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error}); set HF_DATASETS_CACHE") from error
    return rows.map(
        encode,
        batched=True,
        remove_columns=texts,
        cache_file_name=str(folder / f"{name}.arrow"),
        new_fingerprint=name,
        desc=f"tokenizing {len(rows)} rows",
    )
