"""The command `python -m deebert.serve`."""

from deebert.options import main
from deebert.serve.command import ServeOptions, run

if __name__ == "__main__":  # a worker process imports this file, too
    main(
        ServeOptions,
        run,
        "python -m deebert.serve",
        "python -m deebert.serve model=RUN target_saving=0.4 port=8000",
    )
