"""Early-exit transformer classifiers: train, calibrate, measure and run them (DeeBERT, ACL 2020).

Importing this package has no side effect and pulls in nothing heavy.
"""
