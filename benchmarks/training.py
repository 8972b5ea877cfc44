"""An epoch of stage 1 against the original's loop, in turns: seconds and scores.

    python benchmarks/training.py --root DIR [--turns 3] [--epochs 1] [--train "OVERRIDES"]

The original (castorini/DeeBERT, run_highway_glue.py): every input padded to 128 tokens, attention
step by step, all ramps evaluated in each step although only the final classifier learns, AdamW
parameter by parameter, 8 rows a step, float32. Ours is `python train.py stage=1` with the same
learning rate and epochs and 8 rows a step, and then with 16; none writes weights. Each is a process
of its own; who begins changes from turn to turn. The seconds are those of training and of the
validation at its end, without start-up and tokenizing.
Writes benchmarks/training.json and training.md.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LR, BATCH_SIZE, PADDED = 8e-5, 8, 128
OURS = {"deebert": BATCH_SIZE, "deebert, 16 rows a step": 16}


def original(root: str, epochs: int, seed: int) -> dict[str, Any]:
    """The original's loop on MRPC with the packaged MiniLM: seconds, and the score."""
    import torch
    from omegaconf import OmegaConf
    from torch.nn.functional import cross_entropy
    from transformers import get_linear_schedule_with_warmup

    from deebert.data import loading
    from deebert.data.tasks import Task
    from deebert.models import backbones
    from deebert.models.ramps import Ramp

    def plain(group: str, name: str) -> Any:
        return OmegaConf.to_container(OmegaConf.load(HERE.parent / "conf" / group / f"{name}.yaml"))

    torch.manual_seed(seed)
    task, spec = Task.from_config(plain("task", "mrpc")), plain("backbone", "minilm")
    tokenizer, (backbone, pooler) = backbones.tokenizer(spec), backbones.pretrained(spec)
    encoder = backbone.encoder
    encoder.set_attn_implementation("eager")
    ramps = torch.nn.ModuleList(
        Ramp(backbone.hidden_size, 2, backbone.classifier_dropout)
        for _ in range(len(backbone.layers) + 1)  # the original has one after the last layer, too
    )
    for ramp in ramps:
        ramp.pooler.load_state_dict(pooler.state_dict())

    def tensors(split: str) -> torch.utils.data.TensorDataset:
        rows = loading.load(task, split, root)
        encoded = tokenizer(
            rows["text_a"][:], rows["text_b"][:], truncation="longest_first", max_length=PADDED,
            padding="max_length", return_tensors="pt",
        )  # fmt: skip
        names = ("input_ids", "attention_mask", "token_type_ids")
        labels = torch.tensor(rows["label"][:])
        return torch.utils.data.TensorDataset(*(encoded[name] for name in names), labels)

    def logits_of(ids: Any, mask: Any, types: Any) -> list[Any]:
        states = encoder(ids, mask, types, output_hidden_states=True).hidden_states[1:]
        return [ramp(state[:, 0]) for ramp, state in zip(ramps, [*states, states[-1]], strict=True)]

    train = torch.utils.data.DataLoader(tensors("train"), BATCH_SIZE, shuffle=True)
    validation = torch.utils.data.DataLoader(tensors("validation"), BATCH_SIZE)
    trained = [*encoder.parameters(), *ramps[-1].parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, foreach=False, fused=False)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, epochs * len(train))
    start = time.perf_counter()
    for _ in range(epochs):
        encoder.train()
        ramps.train()
        for ids, mask, types, labels_B in train:
            cross_entropy(logits_of(ids, mask, types)[-1], labels_B).backward()
            torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *ramps.parameters()], 1.0)
            optimizer.step()
            schedule.step()
            encoder.zero_grad()
            ramps.zero_grad()
    encoder.eval()
    ramps.eval()
    with torch.no_grad():
        right = [
            logits_of(ids, mask, types)[-1].argmax(-1) == labels_B
            for ids, mask, types, labels_B in validation
        ]
    seconds = time.perf_counter() - start
    return {"seed": seed, "seconds": seconds, "accuracy": torch.cat(right).double().mean().item()}


def ours(root: str, epochs: int, seed: int, batch_size: int, more: list[str]) -> dict[str, Any]:
    """The same through `python train.py`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "train.py", "task=mrpc", "stage=1", "backbone=minilm", "logger=csv",
            f"data.root={root}", "data.calibration_size=0", f"seed={seed}",
            f"stages.1.epochs={epochs}", f"stages.1.batch_size={batch_size}", f"stages.1.lr={LR}",
            "stages.1.warmup=0",
            "~callbacks.best", "~callbacks.last", "+trainer.enable_checkpointing=false",
            f"hydra.run.dir={folder}/run", *more,
        ]  # fmt: skip
        subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True)
        assert not list(Path(folder).rglob("*.ckpt"))
        results = json.loads(Path(folder, "run", "results.json").read_text())
        match = re.search(r"trained in ([\d.]+) s", Path(folder, "run", "train.log").read_text())
    assert match
    return {
        "seed": seed,
        "seconds": float(match[1]),
        "accuracy": results["exits"][-1]["scores"]["accuracy"],
        "environment": results["environment"],
    }


def report(turns: dict[str, list[dict[str, Any]]], epochs: int, train: str = "") -> str:
    """The Markdown table."""
    about = turns["deebert"][0]["environment"]
    command = f"--turns {len(turns['original'])} --epochs {epochs}"
    if train:
        command += f' --train "{train}"'
    lines = [
        "# An epoch of stage 1 against the original's loop",
        "",
        f"MRPC (3,668 rows), packaged MiniLM, {BATCH_SIZE} rows a step unless said, lr {LR}, "
        f"{epochs} epoch(s) and a validation, float32, {about['threads']} CPU threads; a turn a "
        f"seed, from 1. Command: `python benchmarks/training.py --root DIR {command}`",
        "",
        "| | seconds, median | accuracy | times faster, turn by turn |",
        "|---|---:|---:|---:|",
    ]
    for name, rows in turns.items():
        seconds = statistics.median(row["seconds"] for row in rows)
        scores = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
        pairs = zip(turns["original"], rows, strict=True)
        faster = ", ".join(f"{slow['seconds'] / fast['seconds']:.2f}" for slow, fast in pairs)
        lines.append(f"| {name} | {seconds:.1f} | {scores} | {faster} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder with the GLUE files (data.root)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--train", default="", help="more overrides for train.py")
    parser.add_argument("--original", type=int, help=argparse.SUPPRESS)  # a turn of it: its seed
    given = parser.parse_args()
    root = str(Path(given.root).absolute())
    if given.original is not None:
        print(json.dumps(original(root, given.epochs, given.original)))
        return
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ("original", *OURS)}
    for seed in range(1, given.turns + 1):
        order = list(turns)
        for name in order[seed % 3 :] + order[: seed % 3]:
            if name in OURS:
                measures = ours(root, given.epochs, seed, OURS[name], given.train.split())
            else:
                command = [sys.executable, __file__, "--root", root, "--epochs", str(given.epochs)]
                command += ["--original", str(seed)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measures = json.loads(done.stdout.splitlines()[-1])
            turns[name].append(measures)
            print(name, measures["seconds"], flush=True)
    (HERE / "training.json").write_text(json.dumps(turns, indent=1) + "\n")
    text = report(turns, given.epochs, given.train)
    (HERE / "training.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
