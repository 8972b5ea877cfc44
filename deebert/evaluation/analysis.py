"""Why layers look redundant: what a record says about its ramps beyond their scores.

Two ramps of the same score may be right on different rows (an exit rule could gain), or be wrong on
the same ones (an ensemble cannot gain). Arithmetic on the logits of every ramp: knows nothing of
models, files or exit thresholds. Shapes: N rows, L layers (= ramps), C labels.
"""

import math
from typing import Any

import torch
from torch import Tensor

from deebert.data.tasks import Task
from deebert.exits import curves, rules
from deebert.exits.records import Record

NUM_BINS = 15  # of a reliability diagram; Guo et al. 2017


def analysis(record: Record, task: Task) -> dict[str, Any]:
    """Oracle, overthinking, and how the ramps agree, err and know what they know.

    Returns:
        Plain values for JSON; None where a value is undefined. Without labels only `agreement` is
        defined; for a regression `agreement`, `error_correlation` and, but for its vote,
        `ensemble`.

        - `oracle`: `score`, `expected_saving` and `exit_counts` (L numbers) if each row left at
          the first ramp that is right, and ran to full depth where none is. Hindsight, so a bound
          on what an exit rule can reach and not a goal: it counts guesses too (of two classes, two
          ramps that always answer one each are a perfect oracle).
        - `overthinking_rate`: share of rows that some ramp gets right and the last one does not
          (Kaya et al. 2019, Shallow-Deep Networks).
        - `ramps`, a dict each: `layer`; `agreement`, the share of rows where it predicts what the
          last ramp does (regression: Pearson correlation with the last ramp's values); `auroc` of
          its confidence, the largest probability, for being right; `ece` and `reliability`, see
          `calibration`; `share_right_where_last_is_wrong`.
        - `error_correlation`: L x L Pearson correlation of the ramps' errors, 0 or 1 a row (so
          phi); signed differences from the label for a regression.
        - `ensemble`, see `ensemble`.
    """
    predictions_NL = task.predict(record.logits_NLC)
    if task.is_regression:
        agreement_L = correlation(predictions_NL.double())[-1]
    else:
        agreement_L = (predictions_NL == predictions_NL[:, -1:]).double().mean(0)
    ramps: list[dict[str, Any]] = [
        {
            "layer": layer,
            "agreement": agreement,
            "auroc": None,
            "ece": None,
            "reliability": None,
            "share_right_where_last_is_wrong": None,
        }
        for layer, agreement in enumerate(_plain(agreement_L), 1)
    ]
    found: dict[str, Any] = {
        "oracle": None,
        "overthinking_rate": None,
        "ramps": ramps,
        "error_correlation": None,
        "ensemble": None,
    }
    if record.labels_N is None:
        return found

    labels_N = record.labels_N.to(task.target_dtype())
    found["ensemble"] = ensemble(record.logits_NLC, labels_N, task)
    if task.is_regression:
        errors_NL = predictions_NL.double() - labels_N[:, None].double()
    else:
        right_NL = predictions_NL == labels_N[:, None]
        errors_NL = (~right_NL).double()
        found["oracle"] = _oracle(record, predictions_NL, labels_N, task)
        found["overthinking_rate"] = (right_NL.any(1) & ~right_NL[:, -1]).double().mean().item()
        confidence_NL = record.logits_NLC.double().softmax(-1).amax(-1)
        columns = zip(
            ramps,
            confidence_NL.unbind(1),
            right_NL.unbind(1),
            _plain(auroc(confidence_NL, right_NL)),
            _plain(right_NL[~right_NL[:, -1]].double().mean(0)),  # NaN if the last is never wrong
            strict=True,
        )
        for ramp, confidence_N, right_N, area, share in columns:
            ramp |= calibration(confidence_N, right_N)
            ramp |= {"auroc": area, "share_right_where_last_is_wrong": share}
    found["error_correlation"] = [_plain(row) for row in correlation(errors_NL)]
    return found


def correlation(values_NL: Tensor) -> Tensor:
    """Pearson correlation between columns: (N, L) -> (L, L), NaN where a column is constant."""
    centred_NL = values_NL - values_NL.mean(0)
    unit_NL = centred_NL / centred_NL.norm(dim=0)
    # The mean of equal numbers may be off by a rounding, which would then be all that is left.
    unit_NL[:, values_NL.amin(0) == values_NL.amax(0)] = math.nan
    return (unit_NL.T @ unit_NL).clamp(-1, 1)


def auroc(confidence_NL: Tensor, right_NL: Tensor) -> Tensor:
    """How well confidence ranks right above wrong, for each ramp: (N, L), (N, L) -> (L,).

    The probability that a right row has a higher confidence than a wrong one, ties counting half
    (Mann and Whitney's U from ranks); NaN for a ramp that is always or never right. Unlike `ece`
    it does not change with the temperature of the logits for two classes, and it is what an exit
    by confidence lives on.
    """
    confidence_LN, right_LN = confidence_NL.T.contiguous(), right_NL.T.contiguous()
    sorted_LN = confidence_LN.sort(dim=1).values
    # Equal values share the mean of their ranks: (first + last) / 2, counted from 1.
    below_LN = torch.searchsorted(sorted_LN, confidence_LN)
    up_to_LN = torch.searchsorted(sorted_LN, confidence_LN, right=True)
    rank_LN = (below_LN + 1 + up_to_LN).double() / 2
    num_right_L = right_LN.sum(1).double()
    num_wrong_L = len(right_NL) - num_right_L
    lowest_L = num_right_L * (num_right_L + 1) / 2  # their rank sum if all wrong ones were above
    return ((rank_LN * right_LN).sum(1) - lowest_L) / (num_right_L * num_wrong_L)


def calibration(confidence_N: Tensor, right_N: Tensor) -> dict[str, Any]:
    """Is a ramp right as often as it says? (Guo et al. 2017, section 2)

    Returns:
        `reliability`: mean `confidence`, `accuracy` and `count` of each non-empty one of 15 bins
        of equal width (each without its lower end, with its upper end); `ece`, the expected
        calibration error: the mean of |accuracy - confidence| over the bins, weighted by count.
    """
    inner_edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=confidence_N.dtype)[1:-1]
    bin_N = torch.bucketize(confidence_N.contiguous(), inner_edges)
    counts = bin_N.bincount(minlength=NUM_BINS)
    filled = counts > 0
    confidences = (bin_N.bincount(confidence_N, minlength=NUM_BINS) / counts)[filled]
    accuracies = (bin_N.bincount(right_N.double(), minlength=NUM_BINS) / counts)[filled]
    gaps = (accuracies - confidences).abs()
    return {
        "ece": ((gaps * counts[filled]).sum() / len(bin_N)).item(),
        "reliability": [
            {"confidence": confidence, "accuracy": accuracy, "count": count}
            for confidence, accuracy, count in zip(
                confidences.tolist(), accuracies.tolist(), counts[filled].tolist(), strict=True
            )
        ],
    }


def ensemble(logits_NLC: Tensor, labels_N: Tensor, task: Task) -> list[dict[str, Any]]:
    """Would asking all ramps so far help? Scores of ramp l alone and of ramps 1 to l together.

    Returns:
        A dict a layer: `layer`, `single` (the ramp alone), `mean` (of the ramps' probabilities;
        of their values for a regression), `vote` (of the majority, where a draw goes to the class
        of the higher mean probability; None for a regression).
    """
    num_ramps_L1 = torch.arange(1, logits_NLC.shape[1] + 1)[:, None]
    single_NL = task.predict(logits_NLC)
    if task.is_regression:
        mean_NL = logits_NLC.double().squeeze(-1).cumsum(1) / num_ramps_L1.squeeze(1)
        vote_NL = None
    else:
        mean_NLC = logits_NLC.double().softmax(-1).cumsum(1) / num_ramps_L1
        votes_NLC = torch.nn.functional.one_hot(single_NL, logits_NLC.shape[-1]).cumsum(1)
        mean_NL = mean_NLC.argmax(-1)
        vote_NL = (votes_NLC + mean_NLC / 2).argmax(-1)  # less than a vote: decides only a draw
    return [
        {
            "layer": layer + 1,
            "single": task.score(single_NL[:, layer], labels_N),
            "mean": task.score(mean_NL[:, layer], labels_N),
            "vote": None if vote_NL is None else task.score(vote_NL[:, layer], labels_N),
        }
        for layer in range(logits_NLC.shape[1])
    ]


def _oracle(record: Record, predictions_NL: Tensor, labels_N: Tensor, task: Task) -> dict[str, Any]:
    wrong_NL = (predictions_NL != labels_N[:, None]).float()
    layer_N = rules.exit_layer(wrong_NL, 0.5)  # leaves where it is not wrong
    chosen_N = predictions_NL.gather(1, layer_N[:, None] - 1).squeeze(1)
    found = curves.outcome(record, task, layer_N, chosen_N)
    return {name: found[name] for name in ("score", "expected_saving", "exit_counts")}


def _plain(values: Tensor) -> list[float | None]:
    """A 1-d tensor for JSON, which knows no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]
