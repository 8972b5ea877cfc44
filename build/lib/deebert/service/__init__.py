"""What `python -m deebert.serve` is made of, from the network inwards.

`server` starts and stops it, `door` lets a request in, `requests` is what one may say, `predictor`
is the process that holds the model, `replies` has it answer, `metrics` counts.
"""
