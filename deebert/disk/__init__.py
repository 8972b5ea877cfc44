"""Writing on a disk that other processes share and that may be full.

`whole_files` (files that are whole or missing, also after a kill) and `locks` (outputs that one
process writes at a time). The package does not know what the files hold.
"""
