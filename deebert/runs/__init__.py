"""The runs of train.py and evaluate.py: from Hydra's configuration to results in a run folder.

`train` and `evaluate` run one job, `job` describes it, `run_folder` locks its folder, `keys`
refuses keys that nothing reads, `sources` finds the checkpoint that a job starts from,
`inheritance` takes values from it, `config` checks all values and gives them types,
`engine_settings` those of precision, runtime and timing, `build` makes the Trainer, `signals`
handles early ends, `sweep_callback` sums up a multirun, `from_python` runs both jobs from Python.
This package does not know losses, exit rules, or the inside of models.
"""
