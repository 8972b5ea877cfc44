"""Running inputs through a trained model until they exit.

- `engine`: the only code of the package that skips layers; `operating_points`: its exit rules and
  thresholds; `survivors`: its groups of inputs; `predictions`: labels and exit layers of inputs.
- `settings`: runtimes, sizes by device, checks; `quantize`: the ranges of int8.
- `stretches`: consecutive layers, what the engine runs between two decisions, and their torch code
  with `split_layer` (a layer in parts) and `kernels`; `onnx_stretches`, `onnx_graphs`,
  `onnx_nodes` and `graph_runtimes`: the same in ONNX Runtime and OpenVINO.
- `exit_graphs`: all layers, ramps and decisions as one graph, for one input at a time.

The package knows nothing of texts, tasks, training, checkpoints, targets or command lines.
"""
