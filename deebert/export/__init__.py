"""Exporting a trained model as a folder of ONNX graphs that needs no torch.

- `rule_graph`: translates an exit rule to an ONNX graph.
- `onnx_folder`: writes the folder; `trial`: compares its answers with the engine's.
- `readme`: the text of the folder's README.md, from the content of its deebert.json.
- `onnx_runner`: answers texts with a folder. It is copied there, and imports nothing of deebert.

The package knows nothing of training. The runner knows only the targets that its folder holds.
"""
