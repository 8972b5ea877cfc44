"""Tasks and their rows, from files or the hub to batches of token ids.

`tasks` (columns, labels, splits), `own_task` (a task made from one file), `file_split` (the two
parts of that file), `metrics` (scores), `demo` (made-up rows), `rows` (read files row by row),
`loading` (the rows of a split), `memory` (rows in memory to files), `labels` (label values to ids),
`texts` (what a text is), `tokenization` (texts to ids), `batching` (batches by length),
`datamodule` (for Lightning). The package does not know models, exit rules, training or runs.
"""
