"""Random models, inputs and exits for growth.py; and its peak memory, in a process of its own.

    python benchmarks/synthetic.py NUM

runs NUM short inputs through a tiny model and prints seconds and memory as JSON.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deebert.exits.rules import Rule
from deebert.inference.engine import Engine
from deebert.models.early_exit import EarlyExitModel

VOCABULARY, NUM_LABELS = 1000, 2
MIB = 2**20


def model_of(layers: int, width: int) -> EarlyExitModel:
    """A BERT with random weights, in the usual proportions."""
    torch.manual_seed(0)
    return EarlyExitModel(
        {
            "model_type": "bert",
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "intermediate_size": 4 * width,
            "max_position_embeddings": 512,
        },
        NUM_LABELS,
    ).eval()


def made(num: int, low: int, high: int) -> Iterator[dict[str, list[int]]]:
    """Inputs of random tokens; their lengths lie between these."""
    source = random.Random(0)
    for _ in range(num):
        length = source.randint(low, high)
        ids = source.choices(range(VOCABULARY), k=length)
        yield {"input_ids": ids, "token_type_ids": [0] * length}


def mixed() -> Rule:
    """A rule whose scores are as good as drawn: far digits of the logits, evenly in [0, 1)."""
    return Rule(
        "mixed",
        lambda logits_NLC: (logits_NLC[..., 0].abs() * 1e4).frac(),
        NUM_LABELS,
        looks_back=False,
    )


def evenly(num_layers: int) -> list[float]:
    """Thresholds at which `mixed` lets as many leave at each layer."""
    return [1 / (num_layers - layer) for layer in range(num_layers - 1)]


def counted(num: int) -> dict[str, Any]:
    """Run so many short inputs through a tiny model in this process: seconds and peak memory."""
    engine = Engine(model_of(2, 64), mixed(), evenly(2))
    engine.run(made(100, 5, 30))
    before = _peak()
    start = time.perf_counter()
    # Kept, as whoever asks for answers keeps them; counted apart, as they must grow.
    kept = [(part.logits_NC, part.layer_N) for part in engine.stream(made(num, 5, 30))]
    seconds = time.perf_counter() - start
    results = sum(t.numel() * t.element_size() for part in kept for t in part)
    return {
        "num_inputs": num,
        "seconds": seconds,
        "before_mib": before / MIB,
        "results_mib": results / MIB,
        "peak_mib": _peak() / MIB,
    }


def _peak() -> int:
    """Peak memory of this process in bytes.

    Not getrusage's ru_maxrss: that of a new process starts at its parent's (Linux keeps it across
    exec).
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no VmHWM")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("num", type=int, help="number of inputs")
    print(json.dumps(counted(parser.parse_args().num)))
