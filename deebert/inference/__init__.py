"""Running inputs through a trained model until they exit.

- `engine`: the only code of the package that skips layers; `survivors`: its groups of inputs;
  `predictions`: labels and exit layers of inputs.
- `settings`: runtimes, sizes by device, checks; `kernels`: linear maps in each precision.
- `split_layer` (torch), `onnx_layer` and `onnx_graphs` (ONNX Runtime): one layer, in parts.

The package knows nothing of texts, tasks, training, checkpoints, targets or command lines.
"""
