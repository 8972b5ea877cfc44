"""An HTTP service that answers texts: `deebert serve`.

Inside: `command` (options), `server` (application and processes), `request_limits` (token, sizes,
load), `requests` (JSON in and out), `replies` (requests run together), `predictor` (the process
with the model), `metrics` (counts for Prometheus). Knows nothing of training and of files of rows.
"""
