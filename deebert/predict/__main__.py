"""The command `python -m deebert.predict`."""

from deebert.options import main
from deebert.predict.command import PredictOptions, predict

if __name__ == "__main__":  # a worker process imports this file, too
    main(
        PredictOptions,
        predict,
        "python -m deebert.predict",
        "python -m deebert.predict model=RUN input=reviews.csv output=out.csv target_saving=0.4",
    )
