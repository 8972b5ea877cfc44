"""Running inputs through a trained model until they exit.

- `engine`: the only code of the package that skips layers; `survivors`: its groups of inputs;
  `predictions`: labels and exit layers of inputs.
- `settings`: runtimes, sizes by device, checks; `quantize`: the ranges of int8.
- `split_layer` and `kernels` (torch), `onnx_layer`, `onnx_graphs` and `graph_runtimes` (ONNX
  Runtime and OpenVINO): one layer, in parts.

The package knows nothing of texts, tasks, training, checkpoints, targets or command lines.
"""
