"""Exit rules, and the thresholds that meet a target: arithmetic on arrays (paper, section 3.3).

`rules` (logits to exit scores), `registry` (rules by name), `records` (the logits of a split),
`curves` (thresholds to score and saving), `target` (what the user wants), `calibration` (target to
thresholds), `per_ramp_thresholds`, `fitting` (temperatures, priors), `risk_control` (guarantees),
`drift` (whether new rows are like the calibration rows), `drift_monitor` (what a program does with
it).
The package does not know models, files or runs.
"""
