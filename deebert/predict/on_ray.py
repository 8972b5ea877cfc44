"""Answers from many processes or machines for the files of an input, on Ray Data.

Ray reads the files in blocks of rows and hands the blocks to long-lived workers, which hold the
model and write the parts. The same rows are always in one block, so they get the same answers as
from one process. Knows nothing of how rows are read (`data.rows`), answered (`answers`) or written
(`folder_out`).
"""

import logging
import os
import pickle
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deebert.data.rows import reader
from deebert.data.rows.source import Row, blocks
from deebert.errors import UserError, first_line
from deebert.options import engine_of, import_modules
from deebert.predict import answers
from deebert.predict.answers import Columns
from deebert.predict.folder_out import Folder
from deebert.predict.long_job import GOES_ON
from deebert.predict.rows_out import Layout
from deebert.predict.work import PredictOptions

if TYPE_CHECKING:
    from deebert.exits.calibration import CalibratedPoint
    from deebert.hub.saved_folder import Saved

COUNTED = (*answers.COUNTED, "bytes")  # the counts of a block
RETRIES = 3  # of a block whose worker has died
FILE = "file"  # the column of the output that names a row's file, beside its number there


@dataclass(frozen=True)
class File:
    """A file of the input and the work on its rows, in values that can be sent to other machines.

    Attributes:
        number: its place among the files, in the order of their names.
        name: its path inside the input.
        path: its absolute path.
        kind: its format.
        size: its size in bytes.
        wanted: the columns that are read.
        columns: the columns that are read as texts, and those that are written.
        layout: how its rows are written.
        known: the columns that can be kept, if rows may have others; else None.
        done: the blocks that were answered before.
    """

    number: int
    name: str
    path: str
    kind: str
    size: int
    wanted: frozenset[str]
    columns: Columns
    layout: Layout
    known: frozenset[str] | None
    done: frozenset[int] = frozenset()

    def blocks(self, part_rows: int) -> Iterator[tuple[int, list[Row], int]]:
        """Yield the blocks that are not done: their number, rows and share of the file's size."""
        with reader.opened(self.path, self.kind) as source:
            rows, before = source.rows(self.wanted), 0
            for number, block in enumerate(blocks(rows, part_rows)):
                position = source.position()
                share = (position - before) * self.size // (source.size or 1)
                before = position
                if number not in self.done:
                    yield number, block, share

    def named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row of the output with the name of the file."""
        return {FILE: self.name, **{renamed(name, row): value for name, value in row.items()}}


def renamed(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the name of a column, or another name if it is that of the column `file`.

    Args:
        name: the name of the column.
        names: the names of all columns, which are taken.
    """
    if name == FILE:
        while name in names:
            name = f"input_{name}"
    return name


def load_ray() -> Any:
    """Import Ray, and quiet its log.

    Raises:
        UserError: Ray is not installed.
    """
    # Without this, Ray sends usage statistics over the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            f'engine=ray needs Ray ({error}): pip install "deebert[ray]", or use engine=local'
        ) from None
    # Ray has log files for the details. Only warnings are shown here.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return ray


@contextmanager
def session(ray: Any, options: PredictOptions) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start processes that end with this one.

    Raises:
        UserError: no cluster answers at RAY_ADDRESS.
    """
    if ray.is_initialized():  # the program that calls this one has done it
        yield
        return
    address = _address()
    here: dict[str, Any] = {}
    if address == "local":
        # The cores that the workers need, whether or not this machine has as many.
        cores = options.workers * _threads(options)
        here = {"num_cpus": cores, "include_dashboard": False}
        # Without this, Ray leaves a token in the user's home for ever.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **here)
    except (ConnectionError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({reason})") from None
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:  # Ray's own handler ends the process at once, with a core dump
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
    """Return the threads of each worker. On this machine alone, its cores are shared equally."""
    if options.threads is not None:
        return options.threads
    return max(1, (os.cpu_count() or 1) // options.workers) if _address() == "local" else 1


def answer_blocks(
    ray: Any,
    options: PredictOptions,
    files: Sequence[File],
    saved: "Saved",
    point: "CalibratedPoint",
    folder: Folder,
) -> Iterator[dict[str, int]]:
    """Have all blocks answered that are not done.

    Args:
        ray: the module of `load_ray`, inside a `session`.
        options: the options of the command.
        files: the files of the input.
        saved: the model.
        point: the exit rule and the thresholds.
        folder: the output.

    Yields:
        The counts of each block as soon as it is done.

    Raises:
        UserError: a worker met a mistake of the user, or died again and again.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # every block of rows is handed out by itself
    packed = [{"file": pickle.dumps(file)} for file in files]
    threads = _threads(options)
    blocks = ray.data.from_items(packed, override_num_blocks=len(packed)).map_batches(
        _blocks,
        fn_kwargs={"part_rows": options.part_rows},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,  # they mostly wait for the workers, which may have taken all cores
        compute=ray.data.TaskPoolStrategy(size=options.workers),
    )
    done = blocks.map_batches(
        Worker,
        fn_constructor_args=(ray.put(saved), point, folder, threads),
        fn_constructor_kwargs={"engine": engine_of(options), "modules": options.modules},
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
                f"for workers={options.workers} and part_rows={options.part_rows}?); {GOES_ON}"
            )
        raise mistake or error from None


def _mistake(error: BaseException | None) -> UserError | None:
    """Return the user's mistake that caused an error of Ray, or None."""
    while error is not None:
        if type(error) is UserError:
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _blocks(batch: Any, part_rows: int) -> Iterator[Any]:
    """Yield the blocks of a file's rows; the work of Ray's tasks that read."""
    import pyarrow as pa

    [packed] = batch["file"].to_pylist()
    for number, rows, share in pickle.loads(packed).blocks(part_rows):
        values = {"file": packed, "block": number, "rows": pickle.dumps(rows), "bytes": share}
        yield pa.table({name: [value] for name, value in values.items()})


class Worker:
    """A process of Ray that holds the model, answers blocks and writes their parts.

    Args:
        saved: the model in Ray's object store: this machine needs no copy of its folder.
        point: the exit rule and the thresholds.
        folder: the output.
        threads: the number of threads that it may use.
        engine: the precision, runtime and device, as `EarlyExitClassifier` takes them.
        modules: the user's modules to import first.
    """

    def __init__(
        self,
        saved: Any,
        point: "CalibratedPoint",
        folder: Folder,
        threads: int,
        engine: dict[str, Any],
        modules: Any,
    ) -> None:
        import ray
        import torch

        from deebert.classifier import EarlyExitClassifier

        torch.set_num_threads(threads)
        import_modules(modules)
        self.key = folder.key()
        if self.key is None:
            raise UserError(
                f"output={folder.path} cannot be seen on {socket.gethostname()}: input and output "
                "must lie on a file system that all machines share"
            )
        self.point, self.folder = point, folder
        self.classifier = EarlyExitClassifier(ray.get(saved), **engine)

    def __call__(self, batch: Any) -> Any:
        """Answer a block and write its part; return its counts."""
        import pyarrow as pa

        [block] = batch.to_pylist()
        file: File = pickle.loads(block["file"])
        rows = pickle.loads(block["rows"])
        result = answers.answered(self.classifier, self.point, rows, file.columns)
        cut = answers.num_cut_rows(rows, file.known)
        values = (len(rows), len(result.bad), result.layers, cut, block["bytes"])
        counts = dict(zip(COUNTED, values, strict=True))
        written, bad = [*map(file.named, result.rows)], [*map(file.named, result.bad)]
        number = block["block"]
        self.folder.keep(file.number, number, file.layout, written, bad, counts, self.key)
        return pa.table({name: [value] for name, value in counts.items()})
