"""Safe readers for files that somebody else may have written.

`plain_files` (paths, texts and JSON), `tensor_files` (torch.save and safetensors, fingerprints),
`tokenizer_files` (the content of a tokenizer's files that is safe to load).
Nothing in such a file is executed, and nothing that it names is opened outside its folder.
The package does not know what the values mean: models, data and configurations.
"""
