"""Exit rules, and the thresholds that meet a target: arithmetic on arrays (paper, section 3.3).

rules: logits -> exit scores. records: logits of a split. curves: thresholds -> score and saving.
target: what the user wants. calibration: target -> thresholds. fitting: temperatures and priors.
threshold_search: a threshold per ramp. risk_control: guarantees. Knows no model, file or run.
"""
