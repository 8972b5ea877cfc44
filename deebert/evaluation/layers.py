"""What each layer does to the states, and what is lost without it: from a model and token batches.

Knows nothing of training, exit rules or files.
Shapes: N rows, B rows of a batch, S tokens, H hidden, L layers, C labels.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deebert.data.tasks import Task
from deebert.models.early_exit import INPUTS, EarlyExitModel


@torch.no_grad()
def layer_table(
    model: EarlyExitModel, batches: Iterable[dict[str, Tensor]], task: Task, max_rows: int = 2000
) -> dict[str, Any]:
    """How much each layer changes, how alike the layers are, and the score without each.

    Block influence and CKA describe states, and both are poor proxies for what removing a layer
    costs: a small turn may be all that the next layers needed (Hinostroza et al. 2026, "Rethinking
    Layer Relevance in Large Language Models Beyond Cosine Similarity"; for CKA, Davari et al. 2022,
    "Reliability of CKA as a Similarity Measure in Deep Learning"). So `score_without` stands beside
    them: the score when that one layer is really skipped, and nothing retrained.

    Costs the work of 1 + (L-1)/2 forward passes, and keeps one state a batch and layer.

    Args:
        model: run on its own device, in eval mode; its mode is restored.
        batches: token batches of a split, as `TextDataModule.loader` gives them.
        task: what scores are.
        max_rows: rows looked at; evenly spread over the split where it has more, as its batches
            are sorted by length.

    Returns:
        Plain values for JSON; None where undefined (scores without labels, CKA of constant states).

        - `num_rows` looked at, and their `score` at full depth (the last ramp).
        - `layers`, a dict each: `layer`; `block_influence`, 1 - cosine of a layer's input and
          output, the mean over real tokens, padding left out (Men et al. 2024, ShortGPT);
          `cka_with_last`; `score_without`; `score_drop` = score - score_without.
        - `cka`: L x L, see `linear_cka`.
    """
    device = next(model.parameters()).device
    backbone, num_layers = model.backbone, len(model.ramps)
    last_ramp = model.ramps[-1]
    influence = [0.0] * num_layers
    num_tokens = 0
    states: list[Tensor] = []
    logits: list[Tensor] = []  # (B, 1 + L, C) a batch: at full depth, then without each layer
    labels: list[Tensor] = []
    with _eval_mode(model):
        for batch in _spread(list(batches), max_rows):
            inputs = {name: batch[name].to(device) for name in INPUTS if name in batch}
            real_BS = inputs["attention_mask"].bool()
            hidden_BSH, context = backbone.embed(**inputs)
            states_BH, without_BC = [], []
            for layer in range(num_layers):
                # Layers before the skipped one are shared: start from their state.
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
    return {
        "num_rows": sum(map(len, states)),
        "score": full,
        "layers": [
            {
                "layer": layer + 1,
                "block_influence": influence[layer] / num_tokens,
                "cka_with_last": cka[layer][-1],
                "score_without": without,
                "score_drop": None if full is None or without is None else full - without,
            }
            for layer, without in enumerate(scores[1:])
        ],
        "cka": cka,
    }


def linear_cka(states_NLH: Tensor) -> Tensor:
    """Linear centred kernel alignment between layers: (N, L, H) -> (L, L), 1 for what differs by a
    rotation, a scale and a shift alone, about 0 for what is unrelated.

    HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)), where HSIC is ||X'Y||² of the centred states (N, H)
    (Kornblith et al. 2019, section 3) less its bias (Song et al. 2012; computed from features as in
    Kornblith's code). The bias matters: 2000 rows of unrelated noise with H = 768 have a plain CKA
    of 0.28, 200 rows of 0.79. NaN where states are constant or rows too few (under 4).
    """
    num_rows, num_layers, _ = states_NLH.shape
    if num_rows < 4:
        return torch.full((num_layers, num_layers), math.nan, dtype=torch.float64)
    # Centred in float64: early layers' first tokens differ by a thousandth of their size.
    centred_LNH = states_NLH.transpose(0, 1).double()
    centred_LNH = centred_LNH - centred_LNH.mean(1, keepdim=True)
    centred_LNH[states_NLH.amin(0).eq(states_NLH.amax(0)).all(-1)] = math.nan
    # Of norm 1, so that float32 does for the products, where the time goes.
    unit_LNH = (centred_LNH / centred_LNH.norm(dim=(1, 2), keepdim=True)).float()
    overlap_LL = torch.empty(num_layers, num_layers, dtype=torch.float64)
    for i in range(num_layers):
        for j in range(i, num_layers):
            overlap = (unit_LNH[i].T @ unit_LNH[j]).double().square().sum()
            overlap_LL[i, j] = overlap_LL[j, i] = overlap
    square_LN = unit_LNH.double().square().sum(-1)  # of each row; they add up to 1
    paired_LL = num_rows * square_LN @ square_LN.T  # rows with themselves: where the bias is
    hsic_LL = overlap_LL - (paired_LL - 1 / (num_rows - 1)) / (num_rows - 2)
    own_L = hsic_LL.diagonal().sqrt()
    return hsic_LL / (own_L[:, None] * own_L)


def _spread(batches: list[dict[str, Tensor]], max_rows: int) -> Iterator[dict[str, Tensor]]:
    """Every k-th row, so that at most max_rows are left; batches without any are left out."""
    num_rows = sum(len(batch["input_ids"]) for batch in batches)
    step = -(-num_rows // max_rows)
    first = 0  # of the next batch's rows, the first to take
    for batch in batches:
        size = len(batch["input_ids"])
        if first < size:
            yield {name: values[first::step] for name, values in batch.items()}
        first = (first - size) % step


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards each part is in the mode it was in (stage 2 mixes them)."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
