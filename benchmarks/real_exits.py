"""Is the curve from a record what really leaving gives? Layer by layer, survivors only, 13 times.

    python benchmarks/real_exits.py RUN [RUN ...]

RUN is a stage-2 run. Its validation split is recorded in one pass (all ramps of all rows); then,
for each of the paper's thresholds, every batch is run layer by layer, and only the rows that no
ramp has let go run the next layer. Score and exits must be equal. Writes real_exits.json and .md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import rivals
import torch

from deebert.data.datamodule import TextDataModule
from deebert.exits import curves, records, rules
from deebert.hub import checkpoints
from deebert.models.early_exit import INPUTS, EarlyExitModel
from deebert.reporting import report

HERE = Path(__file__).parent


@torch.no_grad()
def leave(model: EarlyExitModel, batch: dict[str, Any], threshold: float) -> tuple[Any, Any]:
    """Exit layer and prediction of each row of a batch; no layer is run for rows that have left."""
    hidden, context = model.backbone.embed(*(batch.get(name) for name in INPUTS))
    mask = batch["attention_mask"]
    rows = torch.arange(len(hidden))
    layers = torch.empty(len(rows), dtype=torch.long)
    predictions = torch.empty(len(rows), dtype=torch.long)
    for number, ramp in enumerate(model.ramps, 1):
        hidden = model.backbone.run_layer(number - 1, hidden, context)
        logits = ramp(hidden[:, 0])
        go = rules.entropy(logits) < threshold
        if number == len(model.ramps):
            go[:] = True
        layers[rows[go]], predictions[rows[go]] = number, logits[go].argmax(-1)
        rows, hidden, mask = rows[~go], hidden[~go], mask[~go]
        if not len(rows):
            break
        context = model.backbone.context(hidden, mask)
    return layers, predictions


def compare(run: Path) -> list[dict[str, Any]]:
    source = checkpoints.read(checkpoints.find(str(run), "RUN", "best.ckpt"), "RUN")
    task = source.config.task
    model, values = source.model(), source.config.data
    rivals.check_paper(model)
    data = TextDataModule(
        task, source.tokenizer(), root=values.root, max_length=values.max_length,
        limit_train=None, calibration_size=0, batch_size=1, num_workers=0, seed=0,
        eval_batch_size=values.eval_batch_size,
    )  # fmt: skip
    batches = list(data.loader("validation"))
    with torch.no_grad():
        outputs = [
            {"logits": model(*(b.get(name) for name in INPUTS))}
            | {name: b[name] for name in ("labels", "index", "length")}
            for b in batches
        ]
    record = records.Record.from_batches("validation", outputs)
    rule = rules.default(task.num_labels)
    rows = []
    for point in curves.curve(record, task, rule, list(curves.PAPER_THRESHOLDS)):
        layers = torch.empty(len(record), dtype=torch.long)
        predictions = torch.empty(len(record), dtype=torch.long)
        for batch in batches:
            layers[batch["index"]], predictions[batch["index"]] = leave(
                model, batch, point.threshold
            )
        assert record.labels_N is not None
        rows.append(
            {
                "task": task.name,
                "threshold": point.threshold,
                "score from the record": point.score,
                "score of real exits": task.score(predictions, record.labels_N),
                "exits from the record": point.exit_counts,
                "real exits": layers.bincount(minlength=record.num_layers + 1)[1:].tolist(),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    rows = [row for run in parser.parse_args().runs for row in compare(run)]
    content = {"environment": vars(report.environment()), "rows": rows}
    (HERE / "real_exits.json").write_text(json.dumps(content, indent=1) + "\n")
    equal = sum(
        row["score from the record"] == row["score of real exits"]
        and row["exits from the record"] == row["real exits"]
        for row in rows
    )
    lines = [
        "# A curve from a record against really leaving",
        "",
        "Command: `python benchmarks/real_exits.py RUN RUN` on the stage-2 runs of calibration.md.",
        f"Score and exit counts are equal at {equal} of {len(rows)} thresholds.",
        "",
        f"| {' | '.join(rows[0])} |",
        f"|{'---|' * len(rows[0])}",
        *(f"| {' | '.join(str(value) for value in row.values())} |" for row in rows),
    ]
    (HERE / "real_exits.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
