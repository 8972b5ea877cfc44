"""Answers for a folder of rows from many processes or machines: `engine=ray`, on Ray Data.

Ray reads files in blocks of rows and deals the blocks out to long-lived workers, which hold the
model and write what they have answered. A block is the unit of everything: the same rows go through
the engine together wherever that is, so they are answered as by one process; and a job that was
killed goes on with the blocks that are not done. Knows nothing of how rows are read (`folder_in`),
answered (`answers`) or written (`folder_out`).
"""

import logging
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert.errors import UserError, first_line
from deebert.options import engine_of
from deebert.predict import answers, disk, folder_in
from deebert.predict.folder_in import File
from deebert.predict.folder_out import ERRORS, Folder
from deebert.predict.progress import Progress
from deebert.predict.work import COUNTED as OF_A_PART
from deebert.predict.work import PredictOptions, Work, about, more, told

if TYPE_CHECKING:
    from deebert.classifier import CalibratedPoint, EarlyExitClassifier
    from deebert.hub.saved_folder import Saved

COUNTED = (*OF_A_PART, "bytes")
RETRIES = 3  # of a block whose worker has died


def predict(options: PredictOptions) -> None:
    """The command.

    Raises:
        UserError: something that was asked for is not there, or cannot be done.
    """
    ray = _ray()
    for name in ("workers", "threads", "part_rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be 1 or more")
    inputs = folder_in.files_of(options)
    folder = Folder(Path(options.output).absolute(), folder_in.kind_of(options, inputs))
    if folder.path.resolve().is_relative_to(Path(options.input).resolve()):
        raise UserError(f"output={options.output} lies in the input; name another folder")
    folder.check()
    classifier = _classifier(options)
    files, work = folder_in.looked_into(options, inputs, classifier, folder.kind)
    with folder.alone():
        job = _job(work, options, inputs)
        asked = work.asked(folder.begin(job, options.overwrite, work.find))
        done = folder.done()
        files = [replace(f, done=frozenset(b for n, b in done if n == f.number)) for f in files]
        sums = {name: sum(part[name] for part in done.values()) for name in COUNTED}
        began, before = time.monotonic(), sums["rows"]
        if before:
            print(f"{before:,} rows were done before; going on with the rest", file=sys.stderr)

        def now() -> dict[str, Any]:
            rate = (sums["rows"] - before) / (time.monotonic() - began)
            return told(sums, classifier.num_layers, rate)

        try:
            size = sum(file.size for file in files)
            with _session(ray, options), Progress(size, sums["bytes"]) as progress:
                for part in _answers(ray, options, files, classifier.saved, asked, folder):
                    sums = {name: sums[name] + part[name] for name in COUNTED}
                    progress.show(sums["bytes"], about(now()))
        except KeyboardInterrupt:
            print(f"\nStopped at {about(now())}; {disk.GOES_ON}", file=sys.stderr)
            sys.exit(130)
        folder.finish(now())
    errors = f"; the bad ones: {Path(options.output, ERRORS)}" if sums["bad"] else ""
    print(f"{about(now())}: {options.output}{errors}")


def _ray() -> Any:
    # Or Ray would send statistics of its use to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            f'engine=ray needs Ray ({error}): pip install "deebert[ray]", or use engine=local'
        ) from None
    # What it does goes to its log files; here only what may be wrong.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return ray


def _classifier(options: PredictOptions) -> "EarlyExitClassifier":
    """The model as this process needs it: to meet the target, and to be handed to the workers."""
    from deebert.classifier import EarlyExitClassifier

    # Where commands are given there may be no GPU; a target for a speed is met by measuring here.
    here = options.device == "cpu" or options.target_speedup is not None
    engine = engine_of(options) if here else {}
    return EarlyExitClassifier.from_pretrained(options.model, task=options.task, **engine)


def _job(work: Work, options: PredictOptions, inputs: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """What a job that goes on must have in common with the one that was begun."""
    stats = [(name, path.stat()) for name, path in inputs]
    return work.job | {
        "input": str(Path(options.input).resolve()),
        "parts": options.parts,
        "size": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


@contextmanager
def _session(ray: Any, options: PredictOptions) -> Iterator[None]:
    """A cluster: the one of RAY_ADDRESS, or processes of this machine that end with this one."""
    if ray.is_initialized():  # by the program that this is called from
        yield
        return
    address = _address()
    here: dict[str, Any] = {}
    if address == "local":
        # Counted, not measured: as many as the workers take.
        cores = options.workers * _threads(options)
        here = {"num_cpus": cores, "include_dashboard": False}
        # Or it would keep one for all times in the user's home.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **here)
    except (ConnectionError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({reason})") from None
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:  # Ray would end this process in the middle of whatever it does, with a core dump
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


def _threads(options: PredictOptions) -> int:
    """Of each worker: on this machine alone, its cores are shared out."""
    if options.threads is not None:
        return options.threads
    return max(1, (os.cpu_count() or 1) // options.workers) if _address() == "local" else 1


def _answers(
    ray: Any,
    options: PredictOptions,
    files: Sequence[File],
    saved: "Saved",
    asked: "CalibratedPoint",
    folder: Folder,
) -> Iterator[dict[str, int]]:
    """Have all blocks answered that are not done; what is to be counted of each as it comes."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # every block of rows is dealt out by itself
    packed = [{"file": pickle.dumps(file)} for file in files]
    threads = _threads(options)
    blocks = ray.data.from_items(packed, override_num_blocks=len(packed)).map_batches(
        _blocks,
        fn_kwargs={"part_rows": options.part_rows},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,  # they mostly wait for the workers, which may have taken all that there are
        compute=ray.data.TaskPoolStrategy(size=options.workers),
    )
    done = blocks.map_batches(
        Worker,
        fn_constructor_args=(ray.put(saved), asked, folder, threads, engine_of(options)),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=threads,
        num_gpus=int(options.device.startswith("cuda")),
        max_task_retries=RETRIES,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
    )
    try:
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()
    except ray.exceptions.RayError as error:
        mistake = _mistake(error)
        died = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
        if mistake is None and isinstance(error, died):
            mistake = UserError(
                f"a worker has died {RETRIES + 1} times over the same rows (is there memory enough "
                f"for workers={options.workers} and part_rows={options.part_rows}?); {disk.GOES_ON}"
            )
        raise mistake or error from None


def _mistake(error: BaseException | None) -> UserError | None:
    """The user's mistake behind what Ray says, if it is one."""
    while error is not None:
        if type(error) is UserError:
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _blocks(batch: Any, part_rows: int) -> Iterator[Any]:
    """A file -> blocks of its rows: what a reading task of Ray's does."""
    import pyarrow as pa

    [packed] = batch["file"].to_pylist()
    for number, rows, share in pickle.loads(packed).blocks(part_rows):
        given = {"file": packed, "block": number, "rows": pickle.dumps(rows), "bytes": share}
        yield pa.table({name: [value] for name, value in given.items()})


class Worker:
    """A process of Ray's that holds the model, answers blocks and writes their parts.

    Args:
        saved: the model, in Ray's object store: this machine needs no copy of its folder.
        threads: of the processor that it may use.
        engine: as `EarlyExitClassifier` takes it.
    """

    def __init__(
        self,
        saved: Any,
        asked: "CalibratedPoint",
        folder: Folder,
        threads: int,
        engine: dict[str, Any],
    ) -> None:
        import ray
        import torch

        from deebert.classifier import EarlyExitClassifier

        torch.set_num_threads(threads)
        self.key = folder.key()
        if self.key is None:
            raise UserError(
                f"output={folder.path} cannot be seen on {socket.gethostname()}: input and output "
                "must lie on a file system that all machines share"
            )
        self.asked, self.folder = asked, folder
        self.classifier = EarlyExitClassifier(ray.get(saved), **engine)

    def __call__(self, batch: Any) -> Any:
        """A block -> what is to be counted of it."""
        import pyarrow as pa

        [given] = batch.to_pylist()
        file: File = pickle.loads(given["file"])
        rows = pickle.loads(given["rows"])
        found = answers.answered(self.classifier, self.asked, rows, file.columns)
        counts = (len(rows), len(found.bad), found.layers, more(rows, file.known), given["bytes"])
        counted = dict(zip(COUNTED, counts, strict=True))
        said, bad = map(file.named, found.rows), map(file.named, found.bad)
        block = given["block"]
        self.folder.keep(file.number, block, file.layout, [*said], [*bad], counted, self.key)
        return pa.table({name: [value] for name, value in counted.items()})
