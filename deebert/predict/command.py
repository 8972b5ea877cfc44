"""`python -m deebert.predict model=RUN input=FILE output=FILE ...`: answers for the rows of a file.

Who does it: this process, or with `engine=ray` many. `files` has what does it.
"""

from deebert.errors import UserError, unknown
from deebert.predict.work import PredictOptions, locally, run

ENGINES = ("local", "ray")


def predict(options: PredictOptions) -> None:
    """The command.

    Raises:
        UserError: something that was asked for is not there, or cannot be done.
    """
    if options.engine not in ENGINES:
        raise unknown("engine", options.engine, ENGINES, "engine")
    if options.engine == "ray":
        from deebert.predict import on_ray

        on_ray.predict(options)
        return
    default = PredictOptions()
    for name in ("workers", "threads", "parts"):
        if getattr(options, name) != getattr(default, name):
            raise UserError(f"{name}={getattr(options, name)} needs engine=ray")
    run(options, locally)
