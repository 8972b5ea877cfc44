"""Names and texts that somebody else wrote: escaped, literal, and no path."""

from pathlib import Path

import pytest
import yaml
from conftest import TINY
from helpers.hostile_runs import SECRET, Content, Run, change, config

from deebert import EarlyExitClassifier
from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.export import onnx_folder
from deebert.reporting import markdown


def test_names_are_escaped_where_they_are_written(
    run: Run, stage2: Path, copy: Path, tmp_path: Path
) -> None:
    name = "<script>alert(1)</script> `a`|b [x](http://x)"
    labels = ["a\nlicense: evil", "<b>|[x](http://x)"]

    def spoil(content: Content) -> None:
        config(content)["backbone"] |= {"name": name, "path": "me/it\nlicense: evil"}
        config(content)["task"] |= {"labels": labels}

    file = change(copy, spoil)
    run("evaluate.py", f"ckpt={file}", "logger=csv", f"hydra.run.dir={tmp_path / 'out'}")
    written = (tmp_path / "out" / "results.md").read_text()
    assert "<script>" not in written
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\`a\\`\\|b [x\\](http://x)" in written
    classifier = EarlyExitClassifier.from_pretrained(file)
    classifier.save_pretrained(tmp_path / "saved")
    model_card = (tmp_path / "saved" / "README.md").read_text()
    _, header, text = model_card.split("---\n", 2)
    assert yaml.safe_load(header).keys() == {"library_name", "pipeline_tag", "tags", "base_model", "datasets", "metrics"}  # fmt: skip
    assert yaml.safe_load(header)["base_model"] == "me/it\nlicense: evil"
    assert "<" not in text
    assert "a license: evil, &lt;b&gt;\\|[x\\](http://x)." in text


def test_an_error_is_one_line_that_a_terminal_does_not_obey() -> None:
    assert str(UserError("a\nb\x1b[2J\u202ec café")) == "a\\nb\\x1b[2J\\u202ec café"


def test_a_sweep_s_table_shows_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deebert.reporting import sweep_rows

    monkeypatch.setenv("DEEBERT_SECRET", SECRET)
    file = tmp_path / "overrides.yaml"
    file.write_text("- data.root=${oc.env:DEEBERT_SECRET}\n")
    assert sweep_rows._overrides(file) == ("data.root=${oc.env:DEEBERT_SECRET}",)


@pytest.mark.parametrize("hub", ["json", "pandas", "/tmp/data", "../data"])
def test_a_hub_s_data_set_is_no_reader_and_no_path(fails: Run, tmp_path: Path, hub: str) -> None:
    line = fails("train.py", "task=mrpc", *TINY, f"task.hub=['{hub}',x]", f"hydra.run.dir={tmp_path}")  # fmt: skip
    assert f"hub={hub} is no data set of the hub" in line


def test_an_export_of_a_hostile_name(stage2: Path, tmp_path: Path) -> None:
    classifier = EarlyExitClassifier.from_pretrained(stage2)
    values = {"name": "mrpc", "columns": ["<script>`", "b"], "labels": ["<b>", "c|d"], "metrics": ["f1"]}  # fmt: skip
    classifier.task = Task.from_config(values)
    onnx_folder.export(classifier, tmp_path / "onnx")
    text = (tmp_path / "onnx" / "README.md").read_text()
    assert "`<script>'` and `b`" in text
    assert "one of: &lt;b&gt;, c\\|d" in text


def test_markdown() -> None:
    assert markdown.text("a\n b") == "a b"
    assert markdown.code("a`b\n|") == "`a'b \\|`"
