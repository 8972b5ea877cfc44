"""Hooks of mkdocs.yml: pages of benchmarks/, links out of docs/, and the options of the commands.

The pages of docs/ are also read in the repository, so their links are those of the repository.
"""

import re
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = r"\[([^\]]+)\]\((?:\.\./)+(?!benchmarks/)[^)]*\)"  # a link to code has no page


def on_files(files: Files, config: Any) -> Files:
    """Add the tables and pictures of benchmarks/, and the pictures that pages show."""
    for file in sorted((ROOT / "benchmarks").glob("*")):
        if file.suffix in (".md", ".png"):
            files.append(File.generated(config, f"benchmarks/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Mend the links of a page, and fill in what is generated."""
    markdown = re.sub(OUTSIDE, r"\1", markdown).replace("(../benchmarks/", "(benchmarks/")
    if page.file.src_uri.startswith("benchmarks/"):
        markdown = re.sub(r"\]\((?:\.\./docs/)", "](../", markdown)
    markdown = re.sub(r"<!-- options: (\S+)\.(\w+) -->", _options, markdown)
    return re.sub(r"<!-- file: (\S+) -->", _file, markdown)


def _file(match: re.Match[str]) -> str:
    return f"```yaml\n{(ROOT / match[1]).read_text()}```"


def _options(match: re.Match[str]) -> str:
    """Return the table of the options of a command."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for each in fields(getattr(import_module(match[1]), match[2])):
        default = each.default if each.default is not MISSING else each.default_factory()
        shown = {"???": "needed", None: ""}.get(default, f"`{default}`")
        meaning = each.metadata.get("meaning", "").replace("|", "\\|")
        lines.append(f"| `{each.name}` | {shown} | {meaning} |")
    return "\n".join(lines)
