"""The README.md of an exported folder: what the model is, and how to use it with its runner.

This module knows the content of deebert.json only: no model and no files.
"""

import json
from collections.abc import Mapping
from typing import Any

from deebert.reporting import markdown
from deebert.reporting.markdown import code


def text(about: Mapping[str, Any]) -> str:
    """Return the text of README.md.

    Args:
        about: the content of deebert.json.
    """
    task = about["task"]
    example = '"a text"' if len(task["columns"]) == 1 else '["a text", "and another"]'
    reads = " and ".join(map(code, task["columns"]))
    classes = task["labels"]
    answer = "a number" if classes is None else f"one of: {', '.join(map(markdown.text, classes))}"
    savings = [each["target_saving"] for each in about["savings"]]
    target = "threshold=0.1" if not savings else f"target_saving={savings[len(savings) // 2]}"
    lines = [
        f"# An early-exit {about['model_type']} for {task['name']}, in ONNX",
        "",
        f"Written by `deebert export`. It reads {reads} and answers",
        f"with {answer}. Easy inputs leave after a few of its {about['num_layers']} layers.",
        "",
        "    pip install numpy onnxruntime tokenizers",
        f"    echo '{example}' | python runner.py . {target}",
        "",
        "Each line of the input is a text (or a pair of texts) in JSON. Each line of the output is",
        "an answer. To answer from Python, copy `runner.py` beside your own program:",
        "",
        "    from runner import Runner",
        f'    Runner("THIS_FOLDER").predict([{example}], {target})',
        "",
        "Without a target the runner uses the one that the model was exported with: "
        f"`{json.dumps(about['operating_point']['target'] or 'full depth')}`.",
    ]
    if savings:
        lines += [
            "",
            "| target_saving | expected saving of layers | expected score |",
            "|---|---|---|",
        ]
    for each in about["savings"]:
        score = f"{each['score']:.4f}" if "score" in each else ""
        lines.append(f"| {each['target_saving']} | {each['expected_saving']:.3f} | {score} |")
    return "\n".join(lines) + "\n"
