"""Rows in files and their answers: what `python -m deebert.predict` is made of.

`work` is one run of the command; `rows_in` (with `lines`, `parquet_in`) reads, `answers` answers,
`rows_out` writes, `parts` (with `disk`) keeps what is done, `progress` shows it. `on_ray` does the
same with many processes: `folder_in` reads a folder of files, `folder_out` keeps a folder of parts.
"""
