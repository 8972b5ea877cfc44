"""The rows of files and of stdin: one reader for training, evaluation and prediction.

`source` (a row, an open input), `lines` (records of CSV, TSV and JSON), `parquet` (rows of
Parquet), `reader` (open an input of any format), `split_files` (find the files of a split). The
package does not know tasks, tokens or models.
"""
