"""Tasks and their rows, from files or the hub to batches of token ids.

`tasks` (columns, labels, splits), `metrics` (scores), `demo` (made-up rows), `loading` (read rows),
`texts` (inputs from Python), `tokenization` (texts to ids), `batching` (batches by length),
`datamodule` (for Lightning). The package does not know models, exit rules, training or runs.
"""
