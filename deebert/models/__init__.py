"""The early-exit model: a backbone with a ramp after each layer (paper, section 3.1).

`architectures` has the structure of Hugging Face encoders, `backbones` an encoder that runs layer
by layer, `readers` what a ramp reads, `ramps` the classifiers after the layers, `early_exit` all of
it, and `trained_ramps` which ramps an objective trains. Knows no exit rule, task, training or run.
"""
