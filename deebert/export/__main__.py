"""The command `python -m deebert.export`."""

from deebert.export.onnx_folder import ExportOptions, run
from deebert.options import main

if __name__ == "__main__":  # a worker process imports this file, too
    main(
        ExportOptions,
        run,
        "python -m deebert.export",
        "python -m deebert.export model=runs/RUN output=exported target_saving=0.4",
    )
