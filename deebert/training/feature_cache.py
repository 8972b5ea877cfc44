"""Stage 2's shortcut: the frozen backbone's states, computed once for all epochs.

With the backbone frozen and in eval mode, a ramp's input never changes, so each hidden state that a
ramp reads is computed once and the ramps train on the cache. The states lie in a memory-mapped file
(4 bytes x rows x layers x width; MNLI under BERT-base: 14 GB, with ramp=pair 41 GB), so they need
not fit in memory.

Knows nothing of tasks or losses. Shapes: N rows, R features that all ramps read together.
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
from deebert.errors import UserError
from deebert.models.early_exit import INPUTS, EarlyExitModel


class StateDataset(Dataset[dict[str, Tensor]]):
    """Frozen states and the facts of their rows; indexed by a list of rows."""

    def __init__(self, states_NR: Tensor, facts: dict[str, Tensor]) -> None:
        self.states_NR = states_NR
        self.facts = facts

    def __len__(self) -> int:
        return len(self.states_NR)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(rows)
        return {
            "states": self.states_NR[index],
            **{name: values[index] for name, values in self.facts.items()},
        }


class FeatureCache(L.LightningDataModule):
    """Takes token batches from a `TextDataModule`, gives batches of states in their place.

    Args:
        data: where the tokens come from; its batch sizes and seed are used here too.
        model: its backbone is run in eval mode without gradients.
        folder: where the memory-mapped files lie while the run lasts.
        standardize: the ramps, from 0, that are to know how their states vary
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
        return self.data.fingerprint(split)

    def texts(self, split: str, indices: list[int]) -> list[str]:
        return self.data.texts(split, indices)

    def setup(self, stage: str) -> None:
        """Run the backbone over every split; each process does so for itself."""
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
        self.model.to(device).eval()
        loader = self.data.loader(split)
        width = sum(ramp.num_features for ramp in self.model.all_ramps)
        size = (len(self.data.tokens(split)), width)
        states_NR = _mapped(self.folder, size)
        facts: dict[str, Tensor] = {}
        position = 0
        for batch in loader:
            inputs = {name: batch[name].to(device) for name in INPUTS if name in batch}
            states_BR = self.model.states(**inputs)
            end = position + len(states_BR)
            states_NR[position:end] = states_BR.float().cpu()
            for name in set(batch) - set(INPUTS):
                values = batch[name]
                facts.setdefault(name, values.new_empty(size[0]))[position:end] = values
            position = end
        assert position == size[0]
        return StateDataset(states_NR, facts)

    def train_dataloader(self) -> DataLoader:
        assert self.data.train_split is not None
        return self._loader(self.data.train_split, self.data.batch_size, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        size = self.data.eval_batch_size
        return [self._loader(split, size, shuffle=False) for split in self.eval_splits]

    def _loader(self, split: str, batch_size: int, *, shuffle: bool) -> DataLoader:
        dataset = self._cache[split]
        sampler = LengthBatches(
            [0] * len(dataset),  # states have no length: plain shuffled batches
            batch_size,
            shuffle=shuffle,
            seed=self.data.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        return DataLoader(dataset, sampler=sampler, batch_size=None)


def _mapped(folder: Path, size: tuple[int, ...]) -> Tensor:
    """A float32 tensor in a file that nothing but this process sees, gone when the process is."""
    numel = torch.Size(size).numel()
    free = shutil.disk_usage(folder).free
    if 4 * numel > free:  # a sparse file would end in SIGBUS half-way
        raise UserError(
            f"the frozen states take {4 * numel / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB "
            "free: choose another hydra.run.dir, or stages.2.cache=false and "
            "stages.2.standardize=false"
        )
    handle, name = tempfile.mkstemp(dir=folder, prefix="states-")
    os.close(handle)
    tensor = torch.from_file(name, shared=True, size=numel, dtype=torch.float32)
    with contextlib.suppress(PermissionError):  # Windows keeps mapped files: it stays in the folder
        os.unlink(name)
    return tensor.view(size)
