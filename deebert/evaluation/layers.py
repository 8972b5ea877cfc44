"""The change that each layer makes to the states, and the score that is left without it.

The module runs a model on token batches. It knows nothing of training, exit rules or files.
Shapes: N rows, B rows of a batch, S tokens, H hidden, L layers, C labels.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deebert.data.tasks import Task
from deebert.models.early_exit import INPUTS, EarlyExitModel
from deebert.reporting.split_results import Correlations, LayerAnalysis


@dataclass(frozen=True)
class LayerTable:
    """The layers of a model. Values are None where they are undefined.

    Attributes:
        num_rows: the number of rows that were run.
        score: their score at full depth (the last ramp); None without labels.
        layers: each layer.
        cka: L x L numbers (`linear_cka`); None for constant states.
    """

    num_rows: int
    score: float | None
    layers: list[LayerAnalysis]
    cka: Correlations


@torch.no_grad()
def layer_table(
    model: EarlyExitModel, batches: Iterable[dict[str, Tensor]], task: Task, max_rows: int = 2000
) -> LayerTable:
    """Measure each layer's change of the states, its likeness to others, and the score without it.

    Block influence and CKA describe states. Both are poor proxies for the cost of removing a layer,
    since the next layers may need a small change (Hinostroza et al. 2026, "Rethinking Layer
    Relevance in Large Language Models Beyond Cosine Similarity"; for CKA, Davari et al. 2022,
    "Reliability of CKA as a Similarity Measure in Deep Learning"). So the table also has
    `score_without`, the score when this one layer is really skipped and nothing is retrained.

    The work is that of 1 + (L-1)/2 forward passes. The state of each row's first token is kept for
    every layer.

    Args:
        model: the model. It runs on its own device and in eval mode; its mode is restored.
        batches: token batches of a split, as `TextDataModule.loader` gives them.
        task: the task, which computes the scores.
        max_rows: the number of rows to run. If the split has more rows, these are spread evenly
            over it, since its batches are sorted by length.
    """
    device = next(model.parameters()).device
    backbone, num_layers = model.backbone, len(model.ramps)
    last_ramp = model.ramps[-1]
    influence = [0.0] * num_layers
    num_tokens = 0
    states: list[Tensor] = []
    logits: list[Tensor] = []  # (B, 1 + L, C) a batch: full depth, then without each layer
    labels: list[Tensor] = []
    with _eval_mode(model):
        for batch in _spread(list(batches), max_rows):
            inputs = {name: batch[name].to(device) for name in INPUTS if name in batch}
            real_BS = inputs["attention_mask"].bool()
            hidden_BSH, context = backbone.embed(**inputs)
            states_BH, without_BC = [], []
            for layer in range(num_layers):
                # The layers before the skipped one have run already: start from their state.
                skipped_BSH = backbone.skip_layer(layer, hidden_BSH, context)
                for later in range(layer + 1, num_layers):
                    skipped_BSH = backbone.run_layer(later, skipped_BSH, context)
                without_BC.append(last_ramp(skipped_BSH[:, 0]))
                next_BSH = backbone.run_layer(layer, hidden_BSH, context)
                cosine_BS = nn.functional.cosine_similarity(
                    hidden_BSH.float(), next_BSH.float(), dim=-1
                )
                influence[layer] += (1 - cosine_BS)[real_BS].sum().item()
                hidden_BSH = next_BSH
                states_BH.append(hidden_BSH[:, 0])
            num_tokens += int(real_BS.sum())
            states.append(torch.stack(states_BH, 1).float().cpu())
            logits.append(torch.stack([last_ramp(hidden_BSH[:, 0]), *without_BC], 1).float().cpu())
            if "labels" in batch:
                labels.append(batch["labels"].cpu())
    cka = [
        [None if math.isnan(value) else value for value in row]
        for row in linear_cka(torch.cat(states)).tolist()
    ]
    scores: list[float | None] = [None] * (1 + num_layers)
    if labels:
        labels_N = torch.cat(labels).to(task.target_dtype())
        predictions = task.predict(torch.cat(logits)).unbind(1)
        scores = [task.score(predictions_N, labels_N) for predictions_N in predictions]
    full = scores[0]
    layers = [
        LayerAnalysis(
            layer=layer + 1,
            block_influence=influence[layer] / num_tokens,
            cka_with_last=cka[layer][-1],
            score_without=without,
            score_drop=None if full is None or without is None else full - without,
        )
        for layer, without in enumerate(scores[1:])
    ]
    return LayerTable(sum(map(len, states)), full, layers, cka)


def linear_cka(states_NLH: Tensor) -> Tensor:
    """Compute the linear centred kernel alignment (CKA) between layers: (N, L, H) -> (L, L).

    It is 1 for states that differ by a rotation, a scale and a shift only, and about 0 for
    unrelated states. It is NaN if states are constant or there are fewer than 4 rows.

    CKA is HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)). HSIC is ||X'Y||² of the centred states (N, H)
    (Kornblith et al. 2019, section 3) minus its bias (Song et al. 2012; computed from features as
    in Kornblith's code). The bias is large: with H = 768, unrelated noise has a plain CKA of 0.28
    for 2000 rows and of 0.79 for 200 rows.
    """
    num_rows, num_layers, _ = states_NLH.shape
    if num_rows < 4:
        return torch.full((num_layers, num_layers), math.nan, dtype=torch.float64)
    # float64, since the first tokens of early layers differ by a thousandth of their size.
    centred_LNH = states_NLH.transpose(0, 1).double()
    centred_LNH = centred_LNH - centred_LNH.mean(1, keepdim=True)
    centred_LNH[states_NLH.amin(0).eq(states_NLH.amax(0)).all(-1)] = math.nan
    # With norm 1, float32 is exact enough for the products, which take most of the time.
    unit_LNH = (centred_LNH / centred_LNH.norm(dim=(1, 2), keepdim=True)).float()
    overlap_LL = torch.empty(num_layers, num_layers, dtype=torch.float64)
    for i in range(num_layers):
        for j in range(i, num_layers):
            overlap = (unit_LNH[i].T @ unit_LNH[j]).double().square().sum()
            overlap_LL[i, j] = overlap_LL[j, i] = overlap
    square_LN = unit_LNH.double().square().sum(-1)  # of each row; their sum is 1
    paired_LL = num_rows * square_LN @ square_LN.T  # rows with themselves, which make the bias
    hsic_LL = overlap_LL - (paired_LL - 1 / (num_rows - 1)) / (num_rows - 2)
    own_L = hsic_LL.diagonal().sqrt()
    return hsic_LL / (own_L[:, None] * own_L)


def _spread(batches: list[dict[str, Tensor]], max_rows: int) -> Iterator[dict[str, Tensor]]:
    """Yield every k-th row, so that at most max_rows are left, without empty batches."""
    num_rows = sum(len(batch["input_ids"]) for batch in batches)
    step = -(-num_rows // max_rows)
    first = 0  # number of the first row to take in the next batch
    for batch in batches:
        size = len(batch["input_ids"])
        if first < size:
            yield {name: values[first::step] for name, values in batch.items()}
        first = (first - size) % step


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode while the context lasts, then restore each part's mode (stage 2 mixes them)."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
