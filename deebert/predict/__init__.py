"""Answers for the rows of files: `deebert predict`.

Inside: `command` (the command), `work` (options and one job), `on_ray` (many processes), `answers`
(rows to results), `rows_out` (writing), `parts` and `folder_out` (outputs of jobs that can be
killed), `long_job` (safe files, progress). `data.rows` reads. Knows nothing of training.
"""
