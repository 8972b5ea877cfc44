"""The model card: what a saved model is, what it scores at which cost, and how to use it.

Everything in it comes from the run's configuration and records. Knows no weights.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from deebert.data.tasks import HELD_OUT, Task
from deebert.exits import curves, priors, rules
from deebert.exits.records import Record
from deebert.hub.saved_folder import Saved, public
from deebert.reporting.markdown import code, text

SAVINGS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)
HUB_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}


def card(what: Saved, task: Task) -> str:
    """Markdown with the hub's header."""
    config = public(what.checkpoint.config)
    title = f"# {text(config['backbone']['name'])} on {text(task.name)}, early exit"
    lines = [_header(config, task), title, ""]
    lines += [_what_it_is(task), "", "## Use it", "", _use(task), ""]
    for record in what.records.values():
        if record.split != HELD_OUT and record.labels_N is not None:
            lines += _scores(record, task, what)
    lines += ["## How it was trained", "", _training(config, what.checkpoint.epochs_done)]
    return "\n".join(lines)


def _header(config: Mapping[str, Any], task: Task) -> str:
    """What the hub sorts models by."""
    data = ModelCardData(
        library_name="deebert",
        pipeline_tag="text-classification",
        tags=["deebert", "early-exit"],
        base_model=config["backbone"].get("path"),
        datasets=[task.hub[0]] if task.hub else None,
        metrics=[HUB_METRICS.get(name, name) for name in task.metrics],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _what_it_is(task: Task) -> str:
    classes = "a number" if task.labels is None else f"one of: {', '.join(map(text, task.labels))}"
    reads = " and ".join(map(code, task.columns))
    return (
        "A classifier with an off-ramp after each layer (DeeBERT, Xin et al., ACL 2020): easy "
        "inputs leave after a few layers, hard ones run them all, and whoever asks says how much "
        f"is to be saved. It reads {reads} and answers with {classes}."
    )


def _use(task: Task) -> str:
    example = '"a text"' if len(task.columns) == 1 else '("a text", "and another")'
    return f"""```python
from deebert import EarlyExitClassifier

classifier = EarlyExitClassifier.from_pretrained("THIS_FOLDER_OR_REPOSITORY")
for answer in classifier.predict([{example}], target_saving=0.4):
    print(answer)
```"""


def _scores(record: Record, task: Task, what: Saved) -> list[str]:
    metric, num_layers = task.metrics[0], record.num_layers
    title = f"## Scores on {text(record.split)} ({len(record)} rows), {metric}"
    ramps = curves.ramp_table(record, task)
    lines = [title, "", f"| ramp | {' | '.join(str(each['layer']) for each in ramps)} |"]
    lines += [f"|{'---|' * (num_layers + 1)}"]
    lines += [f"| {metric} | {' | '.join(_points(each['score']) for each in ramps)} |", ""]
    if not what.checkpoint.ramps_trained:
        return [*lines, "The ramps before the last are not trained.", ""]
    num_labels = task.num_labels
    rule = rules.named(what.exit, num_labels) if what.exit else rules.default(num_labels)
    found, columns = "thresholds", ["layers saved", metric, "threshold"]
    if rule.needs_prior:  # it goes with the saving, and what a threshold means goes with it
        found, columns = "prior and thresholds", columns[:2]
    lines += [f"Exit rule `{rule.name}`; {found} chosen on these very rows:", ""]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    rows = []
    for saving in SAVINGS:
        fitted = priors.search(record, task, rule, saving) if rule.needs_prior else rule
        [threshold] = curves.thresholds_for(
            curves.exit_scores_of(fitted, record).score_NL, [saving]
        )
        [point] = curves.curve(record, task, fitted, [threshold])
        row = [f"{point['expected_saving']:.1%}", _points(point["score"]), f"{threshold:.4g}"]
        rows.append(f"| {' | '.join(row[: len(columns)])} |")
    return [*lines, *dict.fromkeys(rows), ""]


def _points(score: float) -> str:
    return f"{score:.4f}"


def _training(config: Mapping[str, Any], epochs_done: int) -> str:
    recipe = config["stages"][str(config["stage"])]
    if not epochs_done:  # trained by somebody else
        named = config["backbone"].get("path") or config["backbone"]["name"]
        return f"Published: {text(named)}\n"
    told = {
        "backbone": config["backbone"].get("path") or config["backbone"]["name"],
        "stage": config["stage"],
        "objective": config["objective"]["name"],
        "ramp": ", ".join(f"{k}={v}" for k, v in config["ramp"].items() if v) or "the paper's",
        "seed": config["seed"],
        **{name: recipe[name] for name in ("epochs", "batch_size", "lr") if name in recipe},
        "longest input": f"{config['data']['max_length']} tokens",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {text(value)} |" for name, value in told.items())]
    commands = ["`python train.py stage=1`", "`python train.py stage=2 ckpt=RUN`"]
    how = ", then ".join(commands[: config["stage"]])
    where = "[DeeBERT](https://aclanthology.org/2020.acl-main.204/)"
    return "\n".join([*lines, "", f"After {where}, with {how} of `deebert`.", ""])
