"""The libraries that run ONNX graphs on the processor: ONNX Runtime and OpenVINO.

The module knows nothing of layers or models. Both libraries get as many threads as torch has, and
torch must not use threads of its own between two calls (`one_torch_thread`).
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deebert.errors import UserError

Run = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


class GraphRuntime:
    """A library that runs graphs, with as many threads as torch has now.

    Args:
        name: onnx or openvino.

    Raises:
        UserError: a package is missing, or the threads were started in another number.
    """

    def __init__(self, name: str) -> None:
        check(name, f"runtime={name}")
        self.name, self.threads = name, torch.get_num_threads()
        if name == "onnx" and (started := _share_threads()) != self.threads:
            raise UserError(
                f"runtime=onnx: its {started} threads were started in this process for an earlier "
                f"run, and cannot become {self.threads}; use threads={started}, or a process of "
                "its own"
            )

    def load(self, graph: bytes) -> "Block":
        """Load a graph, the content of an ONNX file."""
        return _onnx(graph) if self.name == "onnx" else _openvino(graph, self.threads)


@dataclass(frozen=True)
class Block:
    """A loaded graph.

    Attributes:
        inputs: the names of the inputs, in the order in which the graph takes them.
        outputs: the names of the outputs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Run

    def __call__(self, *arrays: np.ndarray) -> dict[str, Tensor]:
        """Run the graph on arrays, and return its outputs by their names."""
        outputs = map(torch.from_numpy, self.run(arrays))
        return dict(zip(self.outputs, outputs, strict=True))


def check(runtime: str, flag: str) -> None:
    """Check that the packages that make and run graphs are installed.

    Args:
        runtime: onnx or openvino.
        flag: the flag that needs them, for the message.

    Raises:
        UserError: one of them is missing.
    """
    try:
        import onnx  # noqa: F401  makes the graphs

        if runtime == "openvino":
            import_openvino()
        else:
            import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f'{flag}: {error}; pip install "deebert[{runtime}]"') from error


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread while the context lasts.

    The threads of torch and of a runtime spin while they wait for work, so both together take twice
    as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _share_threads() -> int:
    """Create the pool of threads that all graphs of ONNX Runtime share, once in a process.

    Without it each graph would have spinning threads of its own.

    Returns:
        The number of threads of the pool.
    """
    import onnxruntime

    threads = torch.get_num_threads()
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    return threads


def session(model: Path | bytes) -> Any:
    """Load a graph in ONNX Runtime, with all optimizations.

    After the first call ONNX Runtime refuses sessions in this process that do not share the pool.

    Args:
        model: a file, or the content of one.
    """
    import onnxruntime

    _share_threads()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _onnx(graph: bytes) -> Block:
    loaded = session(graph)
    inputs = tuple(each.name for each in loaded.get_inputs())
    outputs = tuple(each.name for each in loaded.get_outputs())

    def run(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        values: list[np.ndarray] = loaded.run(outputs, dict(zip(inputs, arrays, strict=True)))
        return values

    return Block(inputs, outputs, run)


def _openvino(graph: bytes, threads: int) -> Block:
    import onnx

    # OpenVINO keeps the order of inputs and outputs, but an output may have other names, too.
    named = onnx.load_model_from_string(graph).graph
    inputs, outputs = (tuple(each.name for each in ports) for ports in (named.input, named.output))
    request = openvino_request(_core().read_model(graph), threads)

    def run(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        # The outputs are copies, since groups of inputs wait while the graph runs again.
        return list(request.infer(list(arrays), share_inputs=True, share_outputs=False).values())

    return Block(inputs, outputs, run)


def openvino_request(model: Any, threads: int, precision: str = "f32") -> Any:
    """Compile a model of OpenVINO for the processor, and return what runs it.

    Args:
        model: the model.
        threads: the number of threads.
        precision: f32 or bf16. Without it OpenVINO takes bfloat16 where the processor has it.
    """
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    return _core().compile_model(model, "CPU", config).create_infer_request()


@cache
def _core() -> Any:
    return import_openvino().Core()


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    The import alone would start a process that sends usage data, and write to the home folder.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # no such package
    return importlib.import_module("openvino")
