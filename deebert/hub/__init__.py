"""Trained models as files and folders, on this machine and on the hub.

`checkpoints` (find and read them), `checkpoint_config` (the accepted keys), `run_config` (the typed
configuration), `saved_folder` (write and read one), `record_files` (the same for records),
`model_card` (its text), `transformers_config` (config.json for other tools), `conversion`
(published classifiers), `transformers_folder` (their files), `locate` (find what a user names).
The package does not know training, runs or evaluation; it never imports Lightning or Hydra.
"""
