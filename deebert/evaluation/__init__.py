"""Measuring a trained model: its scores, its savings and its seconds.

- `evaluate_records`: the results of an evaluation; `analysis`: the ramps compared with each other;
  `class_scores`: the scores of each class.
- `layers`: what each layer does to the states; `timing`: systems that are timed in turns.
- `engine_latency`: the engine against full depth; `split_latency`: the same on rows of a split.
- `engine_records`: the record of the engine in another precision, compared with float32.

The package knows nothing of training, configuration files, run folders, plots or tables.
"""
