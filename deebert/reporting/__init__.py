"""Results of a run as tables, plots, an HTML report, W&B logs and the summary of a sweep.

`results`, `split_results` and `class_results` (results.json as dataclasses), `blocks` (how they are
written and read), `report` (writes all files of a run), `tables` and `class_tables` (tables and
notes), `useless` (ramps that are no better than a constant answer), `markdown` (safe texts),
`plots` (PNG files), `wandb` (values of a W&B run, and the view of them), `trackers` (the same for
TensorBoard and MLflow), `sweep_rows` and `sweep` (a folder of jobs). The package does not know
data, training or the engine.
"""
