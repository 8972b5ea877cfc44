"""The command `deebert serve model=RUN`: an HTTP service that answers texts.

Defines the options of the service and checks them. Knows nothing of HTTP and of models: `server`
runs the service.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec

from deebert.errors import UserError, unknown
from deebert.options import ModelOptions, TargetOptions, option, refuse_rule_alone

HERE = ("127.0.0.1", "::1", "localhost")  # addresses that only this machine reaches
TOKEN = "DEEBERT_TOKEN"


@dataclass
class ServeOptions(TargetOptions, ModelOptions):
    """The options of the service. The target is for requests that state none themselves."""

    host: str = option(HERE[0], "address to listen at; 0.0.0.0 for all, which needs a token")
    port: int = option(8000, "port to listen at")
    token: str | None = option(None, f"the secret of all requests; safer in {TOKEN}=")
    no_token: bool = option(False, "listen beyond this machine without a token")
    batch_window_ms: float = option(5.0, "how long a request waits for others to be run with it")
    max_batch: int = option(32, "most requests that are run together")
    workers: int = option(1, "processes that hold the model")
    threads: int | None = option(None, "threads of torch in each of these processes")
    max_texts: int = option(256, "most texts of a request")
    max_length_chars: int = option(20_000, "most characters of a text")
    max_body_bytes: int = option(2**20, "most bytes of a request")
    max_waiting: int = option(1000, "most requests under way; further ones get status 503")
    max_waiting_bytes: int = option(
        2**25, "most bytes of the requests under way; further ones get status 503"
    )
    recalibrate: str | None = option(
        None, "saving: keep a target_saving after a drift, without labels"
    )
    speedups: bool = option(
        False, "measure the cost of layers at the start; requests may then set target_speedup"
    )
    answer_s: float = option(300.0, "seconds that an answer may take")
    stop_s: float = option(30.0, "seconds that a stop waits for accepted requests")


def checked(options: ServeOptions) -> ServeOptions:
    """Check the options, and take the token from the environment if there is none among them.

    Returns:
        The same object, with its token.

    Raises:
        UserError: a number is out of its range, or the service would be open to the network.
    """
    for name in ("max_batch", "workers", "max_texts", "max_length_chars", "max_body_bytes",
                 "max_waiting", "max_waiting_bytes", "threads", "answer_s", "stop_s"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"{name}={value} must be more than 0")
    if options.recalibrate not in (None, "saving"):
        raise unknown("recalibrate", options.recalibrate, ("saving",), "recalibrate")
    if not 0 <= options.batch_window_ms <= 10_000:
        raise UserError(
            f"batch_window_ms={options.batch_window_ms} must be in [0, 10000]: milliseconds"
        )
    if not 1 <= options.port <= 65535:
        raise UserError(f"port={options.port} must be in 1..65535")
    refuse_rule_alone(options)
    if options.no_token and options.token is not None:
        raise UserError("no_token=true and token=: give one of them")
    if options.max_batch == 1 and options.batch_window_ms != ServeOptions.batch_window_ms:
        raise UserError(
            f"batch_window_ms={options.batch_window_ms} does nothing with max_batch=1: no request "
            "waits for others"
        )
    if options.token is None:
        options.token = os.environ.get(TOKEN)
    if options.token is not None:
        options.token = options.token.strip()  # files with a secret end in a newline
    if options.token == "":
        raise UserError(f"the token is empty; give token=SECRET or {TOKEN}=SECRET, or none")
    if options.token is None and options.host not in HERE and not options.no_token:
        raise UserError(
            f"host={options.host} would let anyone in who reaches this machine: set {TOKEN}=SECRET "
            "in the environment, or say no_token=true"
        )
    return options


def run(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        UserError: an option, the model or the default target is wrong, or the extra is missing.
    """
    options = checked(options)
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise UserError(
                f'the service needs {package}, which is not installed: pip install "deebert[serve]"'
            )
    from deebert.serve import server

    server.serve(options)
