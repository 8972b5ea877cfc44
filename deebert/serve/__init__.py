"""An HTTP service that answers texts: `deebert serve`.

Inside: `command` (options), `server` (application, start and stop), `connections` (limits before a
request is complete), `request_limits` (token and sizes), `requests` (JSON in and out), `pool` (the
processes with the model), `predictor` (such a process), `replies` (requests run together),
`metrics` (counts for Prometheus), `watch` (drift). Knows nothing of training and of files of rows.
"""
