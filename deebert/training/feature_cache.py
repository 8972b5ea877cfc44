"""The feature cache of stage 2: the frozen backbone's states, computed once for all epochs.

With the backbone frozen and in eval mode, the input of a ramp never changes. Each hidden state that
a ramp reads is therefore computed once, and the ramps train on the cache. The states lie in a
memory-mapped file, so they need not fit in memory. The file takes 4 bytes x rows x layers x width
(MNLI with BERT-base: 14 GB, with ramp=pair 41 GB). This module does not know tasks or losses.

Shapes: B rows of a batch, N rows of a split, R features that all ramps read together.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deebert.data.datamodule import LengthBatches, TextDataModule
from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.models.early_exit import INPUTS, EarlyExitModel


class StateDataset(Dataset[dict[str, Tensor]]):
    """Frozen states with the other columns of their rows, indexed by a list of rows.

    Args:
        states_NR: the features that the ramps read.
        columns: the other columns (labels, index, ...), each with one value per row.
    """

    def __init__(self, states_NR: Tensor, columns: dict[str, Tensor]) -> None:
        self.states_NR = states_NR
        self.columns = columns

    def __len__(self) -> int:
        return len(self.states_NR)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(rows)
        return {
            "states": self.states_NR[index],
            **{name: values[index] for name, values in self.columns.items()},
        }


class FeatureCache(L.LightningDataModule):
    """The data module that gives batches of frozen states in place of batches of tokens.

    Args:
        data: the source of the tokens. Its batch sizes and its seed are used here, too.
        model: the model whose backbone is run, in eval mode and without gradients.
        folder: the folder of the memory-mapped files.
        standardize: the ramps, counted from 0, whose features are standardized
            (`Ramp.standardize`).
    """

    def __init__(
        self,
        data: TextDataModule,
        model: EarlyExitModel,
        folder: Path,
        *,
        standardize: Collection[int],
    ) -> None:
        super().__init__()
        self.standardize = standardize
        self.data = data
        self.model = model
        self.folder = folder
        self.eval_splits = data.eval_splits
        self._cache: dict[str, StateDataset] = {}

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def fingerprint(self, split: str) -> str:
        """Return the fingerprint of a split's tokens and labels."""
        return self.data.fingerprint(split)

    def texts(self, split: str, indices: list[int]) -> list[str]:
        """Return the texts of some rows of a split."""
        return self.data.texts(split, indices)

    def setup(self, stage: str) -> None:
        """Run the backbone over every split. Each process computes its own cache."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        train = [self.data.train_split] if self.data.train_split else []
        for split in (*train, *self.eval_splits):
            if split not in self._cache:
                self._cache[split] = self._compute(split, device)
                if self.standardize and split == self.data.train_split:
                    self._standardize(self._cache[split].states_NR)

    def _standardize(self, states_NR: Tensor) -> None:
        ramps, features = self.model.all_ramps, self.model.features(states_NR)
        for index in self.standardize:
            ramps[index].standardize(features[index])

    @torch.no_grad()
    def _compute(self, split: str, device: torch.device) -> StateDataset:
        """Run the backbone over one split, and return its states with the other columns."""
        self.model.to(device).eval()
        loader = self.data.loader(split)
        width = sum(ramp.num_features for ramp in self.model.all_ramps)
        size = (len(self.data.tokens(split)), width)
        states_NR = _mapped(self.folder, size)
        columns: dict[str, Tensor] = {}
        position = 0
        for batch in loader:
            inputs = {name: batch[name].to(device) for name in INPUTS if name in batch}
            states_BR = self.model.states(**inputs)
            end = position + len(states_BR)
            states_NR[position:end] = states_BR.float().cpu()
            for name in set(batch) - set(INPUTS):
                values = batch[name]
                columns.setdefault(name, values.new_empty(size[0]))[position:end] = values
            position = end
        assert position == size[0]
        return StateDataset(states_NR, columns)

    def train_dataloader(self) -> DataLoader:
        assert self.data.train_split is not None
        return self._loader(self.data.train_split, self.data.batch_size, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        size = self.data.eval_batch_size
        return [self._loader(split, size, shuffle=False) for split in self.eval_splits]

    def _loader(self, split: str, batch_size: int, *, shuffle: bool) -> DataLoader:
        dataset = self._cache[split]
        sampler = LengthBatches(
            [0] * len(dataset),  # all states have one length, so the batches are plainly shuffled
            batch_size,
            shuffle=shuffle,
            seed=self.data.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        return DataLoader(dataset, sampler=sampler, batch_size=None)


def _mapped(folder: Path, size: tuple[int, ...]) -> Tensor:
    """Return a new float32 tensor of this size in a memory-mapped file.

    The file has no name once it is open, so it disappears when the process ends.

    Raises:
        UserError: the disk of the folder has too little free space.
    """
    numel = torch.Size(size).numel()
    free = shutil.disk_usage(folder).free
    if 4 * numel > free:
        raise UserError(
            f"the frozen states take {4 * numel / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB "
            "free: choose another hydra.run.dir, or stages.2.cache=false and "
            "stages.2.standardize=false"
        )
    handle, name = tempfile.mkstemp(dir=folder, prefix="states-")
    try:
        # In a sparse file, a disk that is full later would end the process with SIGBUS.
        if numel and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, 4 * numel)
    except OSError as error:
        if error.errno in whole_files.FULL:  # another error: the file system cannot reserve space
            os.unlink(name)
            raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(handle)
    tensor = torch.from_file(name, shared=True, size=numel, dtype=torch.float32)
    # Windows does not remove a mapped file, so the file stays in the folder there.
    with contextlib.suppress(PermissionError):
        os.unlink(name)
    return tensor.view(size)
