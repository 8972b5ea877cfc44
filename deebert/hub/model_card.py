"""Write the model card: what a saved model is, its scores and their cost, and how to use it.

Everything in the card comes from the run's configuration and records. This module knows no weights
and writes no files.
"""

import json

from huggingface_hub import ModelCardData

from deebert.data.tasks import HELD_OUT, Task
from deebert.exits import curves, fitting, rules
from deebert.exits.records import Record
from deebert.hub.run_config import RunConfig
from deebert.hub.saved_folder import Saved
from deebert.reporting.markdown import code, text

SAVINGS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)
HUB_METRICS = {
    "matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr",
    "f1_macro": "f1", "f1_weighted": "f1",
}  # fmt: skip


def render(saved: Saved, task: Task) -> str:
    """Return the model card as Markdown, with the header that the hub reads."""
    config = saved.checkpoint.config.public()
    title = f"# {text(config.backbone.name)} on {text(task.name)}, early exit"
    lines = [_header(config, task), title, ""]
    lines += [_what_it_is(task), "", "## Use it", "", _use(task, saved), ""]
    for record in saved.records.values():
        if record.split != HELD_OUT and record.labels_N is not None:
            lines += _scores(record, task, saved)
    lines += ["## How it was trained", "", _training(config, saved.checkpoint.epochs_done)]
    return "\n".join(lines)


def _header(config: RunConfig, task: Task) -> str:
    """Return the header, by which the hub sorts and filters models."""
    data = ModelCardData(
        library_name="deebert",
        pipeline_tag="text-classification",
        tags=["deebert", "early-exit"],
        base_model=config.backbone.path,
        datasets=[task.hub[0]] if task.hub else None,
        metrics=list(dict.fromkeys(HUB_METRICS.get(name, name) for name in task.metrics)),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _what_it_is(task: Task) -> str:
    classes = "a number" if task.labels is None else f"one of: {', '.join(map(text, task.labels))}"
    reads = " and ".join(map(code, task.columns))
    return (
        "A classifier with an off-ramp after each layer (DeeBERT, Xin et al., ACL 2020): easy "
        "inputs leave after a few layers, hard ones run them all, and the caller sets how much "
        f"is to be saved. It reads {reads} and answers with {classes}."
    )


def _use(task: Task, saved: Saved) -> str:
    # Thresholds fit the precision that they were chosen in.
    of_records = {record.precision for record in saved.records.values()} - {"float32"}
    precision = "".join(f', precision="{each}"' for each in of_records)
    options: dict[str, object] = {"target_saving": 0.4}
    options |= zip(["precision"], of_records, strict=False)
    pair = len(task.columns) == 2
    example = '("a text", "and another")' if pair else '"a text"'
    as_dict = '{"text": "a text", "text_pair": "and another"}' if pair else '"a text"'
    return f"""```python
from deebert import EarlyExitClassifier

classifier = EarlyExitClassifier.from_pretrained("THIS_FOLDER_OR_REPOSITORY"{precision})
for answer in classifier.predict([{example}], target_saving=0.4):
    print(answer)
```

The same in transformers, without `trust_remote_code`:

```python
import deebert.transformers
from transformers import pipeline

classify = pipeline(
    "text-classification", model="THIS_FOLDER_OR_REPOSITORY", model_kwargs={json.dumps(options)}
)
print(classify([{as_dict}]))
```"""


def _scores(record: Record, task: Task, saved: Saved) -> list[str]:
    metric, num_layers = task.metrics[0], record.num_layers
    precision = "" if record.precision == "float32" else f", {text(record.precision)}"
    title = f"## Scores on {text(record.split)} ({len(record)} rows{precision}), {metric}"
    ramps = curves.ramp_table(record, task)
    lines = [title, "", f"| ramp | {' | '.join(str(each.layer) for each in ramps)} |"]
    lines += [f"|{'---|' * (num_layers + 1)}"]
    lines += [f"| {metric} | {' | '.join(_points(each.score) for each in ramps)} |", ""]
    if not saved.checkpoint.ramps_trained:
        return [*lines, "The ramps before the last are not trained.", ""]
    num_labels = task.num_labels
    rule = rules.named(saved.exit, num_labels) if saved.exit else rules.default(num_labels)
    parameters, columns = "thresholds", ["layers saved", metric, "threshold"]
    if rule.needs_prior:  # each saving has its own prior, and a threshold has no meaning without it
        parameters, columns = "prior and thresholds", columns[:2]
    lines += [f"Exit rule `{rule.name}`; {parameters} chosen on these very rows:", ""]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    rows = []
    for saving in SAVINGS:
        fitted = fitting.with_prior(record, task, rule, saving) if rule.needs_prior else rule
        [threshold] = curves.thresholds_for(
            curves.exit_scores_of(fitted, record).score_NL, [saving]
        )
        [point] = curves.curve(record, task, fitted, [threshold])
        row = [f"{point.expected_saving:.1%}", _points(point.score), f"{threshold:.4g}"]
        rows.append(f"| {' | '.join(row[: len(columns)])} |")
    return [*lines, *dict.fromkeys(rows), ""]


def _points(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"


def _training(config: RunConfig, epochs_done: int) -> str:
    backbone = config.backbone.path or config.backbone.name
    if not epochs_done:  # somebody else trained it
        return f"Published: {text(backbone)}\n"
    recipe = config.recipe
    stated = {"epochs": recipe.epochs, "batch_size": recipe.batch_size, "lr": recipe.lr}
    rows = {
        "backbone": backbone,
        "stage": config.stage,
        "objective": config.objective.name,
        "ramp": ", ".join(f"{k}={v}" for k, v in config.ramp.items() if v) or "the paper's",
        "seed": config.seed,
        **{name: value for name, value in stated.items() if value},
        "longest input": f"{config.data.max_length} tokens",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {text(value)} |" for name, value in rows.items())]
    commands = ["`python train.py stage=1`", "`python train.py stage=2 ckpt=RUN`"]
    how = ", then ".join(commands[: config.stage])
    where = "[DeeBERT](https://aclanthology.org/2020.acl-main.204/)"
    return "\n".join([*lines, "", f"After {where}, with {how} of `deebert`.", ""])
