"""Checkpoints that somebody else wrote: refused in one line, and nothing in them is executed."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, CommandFailed, results
from helpers.hostile_runs import SECRET, Content, Evil, Reserve, Run, change, config, rewrite

from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.hub import checkpoint_config, locate, run_config
from deebert.untrusted import plain_files


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["resume", "stage=2", "evaluate", "record", "teacher"])
def test_a_text_of_a_checkpoint_is_literal(
    run: Run, copy: Path, stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv("DEEBERT_SECRET", SECRET)
    name = "${oc.env:DEEBERT_SECRET}\\${stage}"

    def spoil(content: Content) -> None:
        config(content)["backbone"]["name"] = name
        config(content)["task"]["labels"] = ["${oc.env:DEEBERT_SECRET}", "b"]
        config(content)["data"]["calibration_rows"] = None

    change(copy, spoil)
    overrides = ["logger=csv", f"hydra.run.dir={tmp_path / 'out'}"]
    if flag == "resume":
        printed = run("train.py", f"resume={copy}", *overrides)
    elif flag == "stage=2":
        printed = run("train.py", "stage=2", f"ckpt={copy}/checkpoints/last.ckpt", *overrides, "stages.2.epochs=1")  # fmt: skip
    elif flag == "teacher":
        printed = run("train.py", f"teacher={copy}/checkpoints/last.ckpt", *overrides, "backbone.layers=[1,2]", "stages.1.epochs=1")  # fmt: skip
    elif flag == "evaluate":
        printed = run("evaluate.py", f"ckpt={copy}/checkpoints/last.ckpt", *overrides)
    else:
        shutil.copytree(stage2 / "records", tmp_path / "records")
        [file] = (tmp_path / "records").iterdir()
        rewrite(file, lambda header, _: header["config"]["backbone"].update(name=name))
        printed = run("evaluate.py", f"record={tmp_path}", *overrides[1:])
    assert results(tmp_path / "out")["backbone"] == name
    assert SECRET not in printed
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def spoiled(copy: Path, tmp_path: Path) -> dict[str, tuple[Callable[[Content], object], str]]:
    """What a checkpoint may say -> what is said of it."""
    repeated = torch.zeros(1).expand(10**8, 32)
    words = "model.backbone.encoder.embeddings.word_embeddings.weight"
    loop: list[Any] = []
    loop.append(loop)
    wide: Any = ["x"]
    for _ in range(40):
        wide = [wide, wide]

    def shape(**values: object) -> Callable[[Content], object]:
        return lambda content: content["hyper_parameters"]["architecture"].update(values)

    def setting(block: str, **values: object) -> Callable[[Content], object]:
        return lambda content: config(content)[block].update(values)

    def huge(content: Content) -> None:
        shape(vocab_size=10**8)(content)
        content["state_dict"][words] = repeated

    def weight(value: Any) -> Callable[[Content], object]:
        return lambda content: content["state_dict"].update({words: value})

    return {
        "a million layers": (shape(num_hidden_layers=10**6), "num_hidden_layers=1000000 must be a whole number from 1 to 128"),
        "a vocabulary of one number": (huge, "holds a tensor that is larger than its numbers"),
        "a huge vocabulary": (shape(vocab_size=10**12), "word_embeddings.weight is (141, 32), not (1000000000000, 32)"),
        "no heads": (shape(num_attention_heads=0), "its shape is that of no model (integer modulo by zero)"),
        "heads that do not divide": (shape(num_attention_heads=5), "its shape is that of no model (The hidden size (32) is not a multiple"),
        "a model type of its own": (shape(model_type="evil/model"), "backbone of type 'evil/model' is not supported"),
        "memory": (lambda content: content.update(x=Reserve()), "it names '__builtin__ bytearray'"),
        "a loop": (setting("stages", x=loop, **{"1": {"x": loop}}), "too many values, or values too deep"),
        "a thousand million values": (setting("stages", **{"1": {"x": wide}}), "too deep inside others"),
        "a callable": (setting("task", _target_="os.system"), "its task._target_ is no setting"),
        "a task outside": (setting("task", name=".."), "'..': its name must be a word"),
        "a folder outside": (setting("task", tsv={"folder": "../../etc"}), "'../../etc': its folder must be a word"),
        "a split outside": (setting("task", validation=["../../x"]), "'../../x': its validation must be a word"),
        "a path for a hub": (setting("task", hub=["/tmp/evil", "x"]), "its task.hub must be a data set of the hub"),
        "a million processes": (setting("data", num_workers=10**6), "its data.num_workers must be a whole number from 0 to 64"),
        "a batch of everything": (setting("data", eval_batch_size=10**9), "its data.eval_batch_size must be a whole number from 1 to 65536"),
        "a name of two lines": (setting("backbone", name="a\nb"), "its backbone.name must be a name of at most 200 printable characters"),
        "a number for a name": (setting("backbone", name=7), "its backbone.name must be a name"),
        "a stage of its own": (lambda content: config(content).update(stage="1"), "its stage must be a whole number from 1 to 2"),
        "half a character": (setting("backbone", path="\ud800"), "half a character"),
        "no backbone": (lambda content: config(content).pop("backbone"), "its configuration says no backbone"),
        "not a number": (weight(torch.full((141, 32), float("nan"))), "holds numbers that are not finite: training diverged"),
        "numbers near the largest": (weight(torch.full((141, 32), 3e38)), "its logits are not finite"),
        "whole numbers": (weight(torch.zeros(141, 32, dtype=torch.long)), "is no array of real numbers"),
        "a text for a weight": (weight("x"), "something else than weights by name"),
        "no weights": (lambda content: content.update(state_dict={}), "it holds no weights"),
        "another shape": (weight(torch.zeros(3)), "is (3,), not (141, 32)"),
        "a tokenizer that is a number": (lambda content: content["hyper_parameters"].update(tokenizer={"tokenizer.json": 1}), "its tokenizer.json is no text"),
        "ids beyond the vocabulary": (lambda content: word(content, 9999), "its tokenizer has input_ids up to 9999, and its model 141 of them"),
    }  # fmt: skip


def word(content: Content, number: int) -> None:
    """Give a tokenizer a word whose id the model has not."""
    files = content["hyper_parameters"]["tokenizer"]
    values = json.loads(files["tokenizer.json"])
    values["model"]["vocab"]["film"] = number
    files["tokenizer.json"] = json.dumps(values)


@pytest.mark.slow
def test_a_spoiled_checkpoint_is_refused_in_one_line(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "records")  # which say what weights they are of
    file, wrong = copy / "checkpoints" / "last.ckpt", {}
    original = file.read_bytes()
    for name, (what, says) in spoiled(copy, tmp_path).items():
        file.write_bytes(original)
        change(copy, what)
        start = time.perf_counter()
        try:
            EarlyExitClassifier.from_pretrained(file)
            message = "was accepted"
        except UserError as error:
            message = str(error)
        if says not in message or "\n" in message or time.perf_counter() - start > 5:
            wrong[name] = message
    assert not wrong


USES = {
    "stage=2": ("train.py", "stage=2", "ckpt={}"),
    "teacher": ("train.py", "backbone.layers=[1]", "teacher={}"),
    "resume": ("train.py", "resume={}"),
    "evaluate": ("evaluate.py", "ckpt={}"),
    "predict": ("-m", "deebert", "predict", "model={}", "input=rows.jsonl", "output=x.csv"),
    "serve": ("-m", "deebert", "serve", "model={}", "port=18237"),
    "export": ("-m", "deebert", "export", "model={}", "output=x"),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_a_pickle_with_code_is_refused_whoever_reads_it(
    run: Run, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    file = change(copy, lambda content: content.update(callbacks=Evil(tmp_path / "owned")))
    (tmp_path / "rows.jsonl").write_text('{"sentence1": "a", "sentence2": "b"}\n')
    script, *overrides = [each.format(file) for each in USES[use]]
    if script.endswith(".py"):
        overrides.append(f"hydra.run.dir={tmp_path / 'out'}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandFailed) as failure:
        run(script, *overrides)
    printed = str(failure.value)
    [line] = [line for line in printed.splitlines() if line.startswith("Error: ")]
    assert "(it names 'posix mkdir'); nothing in it was executed" in line
    assert "Traceback" not in printed
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "x").exists()


def test_what_reaches_the_library_of_kernels_is_passed_over(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """attn_implementation may name a repository of code."""
    kernels = {"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels"}
    more = {**kernels, "auto_map": {"AutoModel": "x.Y"}, "dtype": "float16", "num_labels": 10**9}
    file = change(copy, lambda content: content["hyper_parameters"]["architecture"].update(more))
    checkpoint = locate.checkpoint(file, "ckpt")
    assert "evil" not in str(checkpoint.architecture)
    assert checkpoint.architecture["dtype"] is None
    assert checkpoint.model().backbone.encoder.config._attn_implementation == "sdpa"


def test_what_is_named_in_a_file_is_not_fetched(
    fails: Run, stage2: Path, tmp_path: Path, copy: Path
) -> None:
    """The user may name a hub's repository; a checkpoint or results.json may not."""
    folder = tmp_path / "scored"
    shutil.copytree(stage2 / "records", folder / "records")
    (folder / "results.json").write_text(json.dumps({"ckpt": "evil/model"}))
    with pytest.raises(UserError, match="it is named in a file, so it is not fetched"):
        EarlyExitClassifier.from_pretrained(folder)

    def spoil(content: Content) -> None:
        config(content).update(teacher="evil/model", objective={"name": "student"})

    change(copy, spoil)
    line = fails("train.py", f"resume={copy}", f"hydra.run.dir={tmp_path / 'out'}")
    assert "teacher=evil/model: no such file or folder here, and it is named in a file" in line


def test_the_table_takes_what_today_s_runs_say(stage1: Path, stage2: Path) -> None:
    """Nothing of a run of ours is refused, and all but what names code or files is taken."""
    for run in (stage1, stage2):
        content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        values = config(content)
        config_of_run, rest = checkpoint_config.accepted(plain_files.plain(values, "it"))
        accepted = config_of_run.plain()
        for key in run_config.KEYS:
            if key != "callbacks":
                gone = set(values[key] or ()) - set(accepted[key] or ()) if isinstance(values[key], dict) else set()  # fmt: skip
                assert gone <= {"_target_", "devices", "strategy"}, key
        assert checkpoint_config.left_out(rest, values) == []
        assert content["weights_fingerprint"] == locate.checkpoint(run, "ckpt").fingerprint


@pytest.mark.slow
def test_rows_are_where_the_user_or_glue_says(
    run: Run, fails: Run, glue: Path, copy: Path, stage2: Path, tmp_path: Path
) -> None:
    """A checkpoint names the folder of its rows, but no file elsewhere, and nothing to fetch."""
    root = Path(shutil.copytree(glue, tmp_path / "rows"))
    change(copy, lambda content: config(content)["data"].update(root=str(root)))
    file = root / "mrpc" / "validation.jsonl"
    shutil.move(file, tmp_path / "secret.jsonl")
    file.symlink_to(tmp_path / "secret.jsonl")
    overrides = [f"ckpt={copy}/checkpoints/last.ckpt", "logger=csv"]
    line = fails("evaluate.py", *overrides, f"hydra.run.dir={tmp_path / 'a'}")
    assert "mrpc/validation.jsonl is a link that leads out of the folder" in line
    run("evaluate.py", *overrides, f"data.root={root}", f"hydra.run.dir={tmp_path / 'b'}")
    file.unlink()
    os.mkfifo(file)
    line = fails("evaluate.py", *overrides, f"hydra.run.dir={tmp_path / 'c'}")
    assert "mrpc/validation.jsonl is no regular file" in line

    def elsewhere(content: Content) -> None:
        config(content)["data"]["root"] = None
        config(content)["task"] |= {"name": "mine", "hub": ["evil/dataset", "x"]}

    change(copy, elsewhere)
    line = fails("evaluate.py", *overrides, f"hydra.run.dir={tmp_path / 'd'}")
    assert "task mine: no data; give data.file=the file of its rows, data.root=a folder" in line
    (tmp_path / "evil" / "dataset").mkdir(parents=True)
    line = fails("train.py", "task=mrpc", *TINY, f"task.hub=['{tmp_path.name}',x]", f"hydra.run.dir={tmp_path / 'e'}")  # fmt: skip
    assert "mrpc" in line
