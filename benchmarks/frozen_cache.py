"""Stage 2 on cached frozen states against stage 2 to the letter: the ramps, and the time.

    python benchmarks/frozen_cache.py --root DIR --stage1 RUN [RUN ...]

RUN: stage-1 runs on MRPC, one a seed. Both variants take turns, seed by seed, in processes of their
own; the seconds are those of `Trainer.fit` (with the computing of the states, without start-up).
Writes benchmarks/frozen_cache.json and .md, with --rows 800 frozen_cache_800_rows.json and .md.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPE = (
    "ramp=first stages.2.epochs=4 stages.2.batch_size=16 stages.2.lr=1e-3 "
    "stages.2.standardize=false"
)
VARIANTS = {"faithful": f"{RECIPE} stages.2.cache=false", "cached": RECIPE}


def measure(ckpt: Path, recipe: str, folder: Path) -> dict[str, Any]:
    """One stage 2: seconds of fit, and the accuracy of every ramp."""
    command = [sys.executable, "train.py", "stage=2", f"ckpt={ckpt}", *recipe.split()]
    command += ["logger=csv", f"hydra.run.dir={folder}"]
    subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True)
    results = json.loads((folder / "results.json").read_text())
    match = re.search(r"trained in ([\d.]+) s", (folder / "train.log").read_text())
    assert match
    return {
        "seed": results["seed"],
        "seconds": float(match[1]),
        "accuracy": [ramp["scores"]["accuracy"] for ramp in results["exits"]],
        "environment": results["environment"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder with the GLUE files (data.root)")
    parser.add_argument("--stage1", nargs="+", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="training rows of stage 2 (all unless said)")
    given = parser.parse_args()
    common = f" data.root={Path(given.root).absolute()}"
    if given.rows:
        common += f" data.limit_train={given.rows}"
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for i, ckpt in enumerate(given.stage1):
            for name, recipe in VARIANTS.items():
                run = measure(ckpt.absolute(), recipe + common, Path(folder) / f"{name}-{i}")
                runs[name].append(run)
                print(name, run["seed"], f"{run['seconds']:.1f} s", run["accuracy"], flush=True)
    ratios = [
        slow["seconds"] / fast["seconds"]
        for slow, fast in zip(runs["faithful"], runs["cached"], strict=True)
    ]
    means = {
        name: [statistics.mean(ramp) for ramp in zip(*(r["accuracy"] for r in rows), strict=True)]
        for name, rows in runs.items()
    }
    lines = [
        "# Frozen states computed once, against every step through the network",
        "",
        f"MRPC, packaged MiniLM, {given.rows or 'all'} training rows in stage 2, `{RECIPE}`, mean "
        f"of {len(ratios)} seeds, float32, 2 CPU threads. "
        f"Command: `python benchmarks/frozen_cache.py --root DIR --stage1{' RUN' * len(ratios)}"
        + (f" --rows {given.rows}`" if given.rows else "`"),
        "",
        "| stage 2 | seconds | " + " | ".join(f"ramp {i}" for i in range(1, 7)) + " |",
        "|---|---:|" + "---:|" * 6,
    ]
    for name, rows in runs.items():
        seconds = statistics.mean(row["seconds"] for row in rows)
        accuracies = " | ".join(f"{value:.3f}" for value in means[name])
        lines.append(f"| {name} | {seconds:.1f} | {accuracies} |")
    largest = max(abs(a - b) for a, b in zip(*means.values(), strict=True))
    lines += [
        "",
        f"Times faster, seed by seed: {', '.join(f'{ratio:.1f}' for ratio in ratios)}. "
        f"Largest difference of a ramp's mean accuracy: {100 * largest:.2f} points.",
    ]
    name = f"frozen_cache_{given.rows}_rows" if given.rows else "frozen_cache"
    (HERE / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n")
    (HERE / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[4:]))


if __name__ == "__main__":
    main()
