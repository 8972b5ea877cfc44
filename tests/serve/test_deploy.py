"""The files in deploy/: they name metrics, options and variables that exist, and systemd takes the unit."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families

from deebert.exits.drift import cells
from deebert.options import parse
from deebert.serve.command import TOKEN, ServeOptions, checked
from deebert.serve.metrics import Metrics
from deebert.serve.requests import Work
from deebert.serve.watch import Watch

DEPLOY = ROOT / "deploy"


def samples() -> set[tuple[str, frozenset[str]]]:
    """Each metric of the service with its labels."""
    metrics = Metrics(3)
    metrics.request("/predict", 200, 0.1)
    metrics.batch(1, 2)
    metrics.left([1, 3])
    watch = Watch(3, follows=True)
    work = Work([], {"target_saving": 0.4})
    watch.expect(work.name, cells([1] * 100, [0.1] * 100))
    watch.seen(work, [3] * 400, cells([3] * 400, [0.5] * 400).tolist())
    assert str(watch).startswith(
        "guarantee no longer holds (at ramp 1 by 100% of the rows); target_"
    )
    content, _ = metrics.collected(watch)
    return {
        (sample.name, frozenset(sample.labels))
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def test_the_dashboard_names_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    labels = dict(samples())
    named = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            names = re.findall(r"deebert_\w+", expression)
            used = {*re.findall(r"by \((\w+)\)", expression), *re.findall(r"(\w+)=", expression)}
            assert names
            for name in names:
                assert name in labels, expression
                assert used - {"le"} <= labels[name] | {"le"}, expression
                assert ("le" in used) <= name.endswith("_bucket"), expression
            named |= {*names}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    kinds = {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} == kinds, "all are shown"


def test_the_commands_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    unit = (DEPLOY / "deebert.service").read_text()
    [entry] = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.M)
    [start] = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    monkeypatch.setenv("DEEBERT_TOKEN", "secret")
    for words in (json.loads(entry), shlex.split(start)):
        assert (Path(words[0]).name, words[1]) == ("deebert", "serve")
        options = checked(parse(ServeOptions, words[2:]))
        assert (options.host, options.port, options.token) == ("0.0.0.0", 8000, "secret")
    for text in (dockerfile, unit):
        assert f"{TOKEN}=SECRET" in text
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    [of_docker] = re.findall(r"--stop-timeout (\d+) ", dockerfile)
    for each in (seconds, of_docker):
        assert int(each) > options.stop_s + 20, "the last batch has its time, too"
    assert "--restart=on-failure" in dockerfile
    [check] = re.findall(r'CMD \["python", "-c", "(.*)"\]', dockerfile)
    compile(check, "HEALTHCHECK", "exec")
    assert f"127.0.0.1:{options.port}/health" in check
    assert f"EXPOSE {options.port}" in dockerfile


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "deebert.service").read_text()
    unit = unit.replace("/opt/deebert/bin/deebert", sys.executable)
    for text, code in ((unit, 0), (unit.replace("KillMode=mixed", "KillMode=some"), 1)):
        (tmp_path / "deebert.service").write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--recursive-errors=no", tmp_path / "deebert.service"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        about_it = [line for line in done.stderr.splitlines() if "deebert.service" in line]
        assert bool(about_it) == bool(code), done.stderr
