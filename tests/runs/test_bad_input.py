"""Bad input is one clear line that names the value, the choices and the flag."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, CommandFailed, mrpc_rows, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Run = Callable[..., str]


def bad_input(tmp_path: Path, glue: Path, stage1: Path, stage2: Path) -> dict[str, tuple]:
    (tmp_path / "x.ckpt").write_text("not-a-checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "conf" / "exit").mkdir(parents=True)
    (tmp_path / "conf" / "exit" / "former.yaml").write_text(
        "{name: mine, score: {_target_: my_rules.mine, _partial_: true}}"
    )
    write_rows(tmp_path / "no-validation" / "mrpc", "train", mrpc_rows("train", 8))
    write_rows(tmp_path / "no-column" / "mrpc", "train", [{"sentence1": "a", "label": 1}])
    (tmp_path / "empty" / "mrpc").mkdir(parents=True)
    (tmp_path / "empty" / "mrpc" / "train.csv").write_text("sentence1,sentence2,label\n")
    write_rows(tmp_path / "range" / "mrpc", "train", [mrpc_rows("train", 1)[0] | {"label": 5}])
    write_rows(tmp_path / "null" / "mrpc", "train", [mrpc_rows("train", 1)[0], {"sentence1": "a", "sentence2": None, "label": 1}])  # fmt: skip
    write_rows(tmp_path / "unlabelled" / "mrpc", "test", [row | {"label": -1} for row in mrpc_rows("test", 40)])  # fmt: skip
    source = stage2 / "records" / "validation.safetensors"
    for name, change in (
        ("labels", lambda columns: columns["labels_N"].fill_(7)),
        ("short", lambda columns: columns.update(index_N=columns["index_N"][:5])),
    ):
        (tmp_path / name).mkdir()
        with safe_open(source, "pt") as content:
            facts = json.loads(content.metadata()["deebert"])
        del facts["values"]  # as in a record of before
        header = {"deebert": json.dumps(facts)}
        columns = load_file(source)
        change(columns)
        save_file(columns, tmp_path / name / source.name, header)
    (tmp_path / "renamed").mkdir()
    shutil.copy(source, tmp_path / "renamed" / "test.safetensors")
    (tmp_path / "not-a-record").mkdir()
    (tmp_path / "not-a-record" / "validation.safetensors").write_text("nothing")
    train, evaluate = "train.py", "evaluate.py"
    mrpc = ("task=mrpc", *TINY)
    here = f"data.root={glue}"
    return {
        "no task": (train, TINY, "task= is missing: python train.py task=mrpc stage=1, or a file of your own: data.file=tickets.csv; choose one of: ax, cola, demo"),
        "stage 3": (train, (*mrpc, here, "stage=3"), "stage 3 is unknown; choose one of: 1, 2 (stage=...)"),
        "stage two": (train, (*mrpc, here, "stage=two"), "stage 'two' is unknown"),
        "stage 2 without ckpt": (train, ("stage=2",), "stage=2 needs ckpt=RUN"),
        "ckpt with stage 1": (train, (*mrpc, here, f"ckpt={stage1}"), "stage 1 starts from backbone="),
        "ckpt missing": (train, ("stage=2", "ckpt=missing.ckpt"), "ckpt=missing.ckpt: no such file"),
        "ckpt an empty folder": (train, ("stage=2", f"ckpt={tmp_path / 'folder'}"), "holds no checkpoints/best.ckpt"),
        "not a checkpoint": (train, ("stage=2", f"ckpt={tmp_path / 'x.ckpt'}"), "not a checkpoint of this program"),
        "of another program": (train, ("stage=2", f"ckpt={tmp_path / 'other.ckpt'}"), "not a checkpoint of this program"),
        "ckpt of stage 2": (train, ("stage=2", f"ckpt={stage2}"), "is of stage 2; stage=2 starts from a stage-1"),
        "ckpt of another task": (train, ("stage=2", f"ckpt={stage1}", "task=rte"), "task=rte contradicts"),
        "ckpt of another backbone": (train, ("stage=2", f"ckpt={stage1}", "backbone=minilm"), "backbone=minilm contradicts"),
        "resume with other values": (train, (f"resume={stage1}", "stages.1.lr=1"), "stages.1.lr=1 contradicts"),
        "resume and ckpt": (train, (f"resume={stage1}", f"ckpt={stage1}"), "give one of them"),
        "resume missing": (train, ("resume=none",), "resume=none: no such file or folder"),
        "evaluate without ckpt": (evaluate, (), "ckpt= is missing"),
        "evaluate another task": (evaluate, (f"ckpt={stage2}", "task=rte"), "task=rte contradicts"),
        "threshold below 0": (evaluate, (f"ckpt={stage2}", "threshold=-1"), "threshold=-1 is not a threshold"),
        "threshold a word": (evaluate, (f"ckpt={stage2}", "threshold=[0.1,low]"), "threshold=low is not"),
        "thresholds of the wrong length": (evaluate, (f"ckpt={stage2}", "threshold=[0.1,0.2,0.3]"), "has 3 values; give one for all ramps, or one for each ramp before the last (2)"),
        "two targets": (evaluate, (f"ckpt={stage2}", "target_saving=0.4", "max_drop=0.01"), "target_saving=0.4 and max_drop=0.01: ask for one of them"),
        "a target and a threshold": (evaluate, (f"ckpt={stage2}", "target_saving=0.4", "threshold=0.1"), "ask for one of them"),
        "all saved": (evaluate, (f"ckpt={stage2}", "target_saving=1"), "target_saving=1 must be in [0, 1)"),
        "saving below 0": (evaluate, (f"ckpt={stage2}", "target_saving=-0.1"), "target_saving=-0.1 must be in [0, 1)"),
        "saving in percent": (evaluate, (f"ckpt={stage2}", "target_saving=40"), "target_saving=40 must be in [0, 1)"),
        "saving a word": (evaluate, (f"ckpt={stage2}", "target_saving=much"), "target_saving='much' must be in [0, 1)"),
        "no drop": (evaluate, (f"ckpt={stage2}", "max_drop=0"), "max_drop=0 must be in (0, 1)"),
        "drop below 0": (evaluate, (f"ckpt={stage2}", "max_drop=-1"), "max_drop=-1 must be in (0, 1)"),
        "certainty": (evaluate, (f"ckpt={stage2}", "max_drop=0.1", "confidence=1"), "confidence=1 must be in (0, 1)"),
        "no confidence": (evaluate, (f"ckpt={stage2}", "max_drop=0.1", "confidence=0"), "confidence=0 must be in (0, 1)"),
        "another loss": (evaluate, (f"ckpt={stage2}", "max_drop=0.1", "loss=f1"), "choose one of: excess, disagreement"),
        "too few rows to promise": (evaluate, (f"ckpt={stage2}", "max_drop=0.01"), "cannot be promised by 40 calibration rows of split 'validation', even without a loss among them: the smallest is 0.0722"),
        "no held-out rows": (evaluate, (f"ckpt={stage2}", "target_saving=0.4", "calibration=heldout"), "calibration=heldout: there are no such rows"),
        "no held-out rows in a record": (evaluate, (f"record={stage2}", "target_saving=0.4", "calibration=heldout"), "calibration=heldout: there are no such rows"),
        "a target of an untrained model": (evaluate, (f"ckpt={stage1}", "target_saving=0.4"), "a target needs trained ramps"),
        "seconds of untrained ramps": (evaluate, (f"ckpt={stage1}", "timing=1", "threshold=0.1"), "timing= needs trained ramps"),
        "no held-out rows to report": (evaluate, (f"ckpt={stage2}", "split=calibration"), "no training row was held out (data.calibration_size=0)"),
        "calibration on the training rows": (evaluate, (f"ckpt={stage2}", "target_saving=0.4", "calibration=train"), "calibration 'train' is unknown; choose one of: auto, heldout, crossfit, validation, test"),
        "no patience": (evaluate, (f"ckpt={stage2}", "exit=confident_patience", "exit.patience=0"), "exit.patience=0 must be a whole number of 1 or more"),
        "half a patience": (evaluate, (f"ckpt={stage2}", "exit=confident_patience", "exit.patience=2.5"), "exit.patience=2.5 must be"),
        "a former option": (evaluate, (f"ckpt={stage2}", "exit=confident_patience", "exit.score.patience=3"), "exit.score.patience=3 is now exit.patience=3"),
        "a former function": (evaluate, (f"ckpt={stage2}", "exit=entropy", "exit.score._target_=os.getcwd"), "is now registered with @exit_rule(NAME), and named by exit=NAME modules=[MODULE]"),
        "a former file": (evaluate, (f"hydra.searchpath=[file://{tmp_path / 'conf'}]", f"ckpt={stage2}", "exit=former"), "is now registered with @exit_rule(NAME)"),
        "a fact of the function": (evaluate, (f"ckpt={stage2}", "exit=entropy", "+exit.looks_back=false"), "is now said where the rule is defined: @exit_rule(NAME, looks_back=...)"),
        "an unknown rule": (evaluate, (f"ckpt={stage2}", "+exit.name=mine"), "exit 'mine' is unknown; choose one of: entropy, relative_entropy"),
        "an option that a rule lacks": (evaluate, (f"ckpt={stage2}", "exit=entropy", "+exit.patience=2"), "exit.patience: exit=entropy has no such option; it has none"),
        "an option that is another": (evaluate, (f"ckpt={stage2}", "exit=confident_patience", "+exit.patient=2"), "exit.patient: exit=confident_patience has no such option; choose one of: patience"),
        "a module that is not there": (evaluate, (f"ckpt={stage2}", "exit=entropy", "+exit.module=no_such_rules"), "no_such_rules cannot be imported"),
        "a module that is a number": (evaluate, (f"ckpt={stage2}", "exit=entropy", "+exit.module=3"), "exit.module=3 must be the name of a Python module"),
        "a temperature too few": (evaluate, (f"ckpt={stage2}", "temperature=[1,2]"), "temperature=[1, 2] has 2 values; give one for each of the 3 ramps"),
        "a temperature of 0": (evaluate, (f"ckpt={stage2}", "temperature=[1,0,2]"), "temperature=[1, 0, 2] must be true"),
        "confidence a word without a promise": (evaluate, (f"ckpt={stage2}", "confidence=abc"), "confidence=abc does nothing without max_drop="),
        "confidence a word": (evaluate, (f"ckpt={stage2}", "max_drop=0.1", "confidence=abc"), "confidence='abc' must be in (0, 1)"),
        "more than can be saved": (evaluate, (f"record={stage2}", "target_saving=0.9"), "more than exit=entropy can save: 0.667"),
        "a target of untrained ramps": (evaluate, (f"record={stage1}", "target_saving=0.4"), "a target needs trained ramps"),
        "a record that was renamed": (evaluate, (f"record={tmp_path / 'renamed'}",), "the file was renamed"),
        "a record of other labels": (evaluate, (f"record={tmp_path / 'labels'}",), "its labels are not all between 0 and 1"),
        "a record cut short": (evaluate, (f"record={tmp_path / 'short'}",), "its columns are of different lengths"),
        "calibration on the reported split": (evaluate, (f"ckpt={stage2}", "target_saving=0.4", "calibration=validation"), "use calibration=crossfit"),
        "calibration on no split": (evaluate, (f"ckpt={stage2}", "target_saving=0.4", "calibration=dev2"), "calibration 'dev2' is unknown; choose one of: auto"),
        "thresholds without a target": (evaluate, (f"ckpt={stage2}", "per_ramp=true"), "per_ramp=true needs target_saving="),
        "temperature without a target": (evaluate, (f"ckpt={stage2}", "temperature=true"), "temperature=true needs target_saving= or max_drop="),
        "per_ramp a word": (evaluate, (f"ckpt={stage2}", "target_saving=0.4", "per_ramp=some"), "per_ramp=some must be true or false"),
        "a promise per ramp": (evaluate, (f"ckpt={stage2}", "max_drop=0.1", "per_ramp=true"), "leave per_ramp out"),
        "a promise without labels": (evaluate, (f"ckpt={stage2}", "max_drop=0.2", "split=test", f"data.root={tmp_path / 'unlabelled'}"), "max_drop with loss=excess needs labels, and split 'test' has none"),
        "a rule of regressions": (evaluate, (f"ckpt={stage2}", "exit=change"), "exit=change is for a regression"),
        "no record": (evaluate, (f"record={tmp_path / 'folder'}",), "no records there"),
        "not a record": (evaluate, (f"record={tmp_path / 'not-a-record'}",), "not a record of this program"),
        "a record of another checkpoint": (evaluate, (f"ckpt={stage1}", f"record={stage2}"), ": a record of other weights than "),
        "a record without that split": (evaluate, (f"record={stage2}", "split=test"), "has records of: validation"),
        "analysis of a record": (evaluate, (f"record={stage2}", "analysis=true"), "analysis=true runs the model"),
        "held-out rows in stage 2": (train, ("stage=2", f"ckpt={stage1}", "data.calibration_size=20"), "data.calibration_size=20 contradicts"),
        "all rows held out": (train, (*mrpc, here, "data.calibration_size=96"), "leaves nothing of the 96 training rows"),
        "held-out below 0": (train, (*mrpc, here, "data.calibration_size=-1"), "data.calibration_size=-1 must be a whole number"),
        "thresholds below 0": (train, (*mrpc, here, "thresholds=[-0.1]"), "thresholds=-0.1 is not"),
        "unknown split": (evaluate, (f"ckpt={stage2}", "split=dev2"), "no file for split 'dev2'"),
        "root missing": (train, (*mrpc, f"data.root={tmp_path / 'none'}"), "no such folder"),
        "root lacks a split": (train, (*mrpc, f"data.root={tmp_path / 'no-validation'}"), "no file for split 'validation'"),
        "root lacks a column": (train, (*mrpc, f"data.root={tmp_path / 'no-column'}"), "lacks the column 'sentence2'"),
        "empty split": (train, (*mrpc, f"data.root={tmp_path / 'empty'}"), "split 'train' is empty"),
        "label out of range": (train, (*mrpc, f"data.root={tmp_path / 'range'}"), "label 5 is out of range"),
        "null text": (train, (*mrpc, f"data.root={tmp_path / 'null'}"), "'sentence2' is null, not a text"),
        "no network for data": (train, mrpc, "use data.root=a local folder"),
        "no network for a backbone": (train, ("task=mrpc", "backbone=bert-base", here), "use backbone=minilm"),
        "too long": (train, (*mrpc, here, "data.max_length=4000"), "backbone tiny takes 130 tokens at most"),
        "no length": (train, (*mrpc, here, "data.max_length=2"), "data.max_length=2 must be a whole number of 8 or more"),
        "no rows": (train, (*mrpc, here, "data.limit_train=0"), "data.limit_train=0 must be a whole number of 1 or more"),
        "seed below 0": (train, (*mrpc, here, "seed=-1"), "seed=-1 must be a whole number from 0"),
        "seed a word": (train, (*mrpc, here, "seed=abc"), "seed=abc must be a whole number"),
        "stage a float": (train, (*mrpc, here, "stage=1.0"), "stage 1.0 is unknown"),
        "no recipe": (train, (*mrpc, here, "stages.1=null"), "stages.1=None must hold a recipe"),
        "warmup a word": (train, (*mrpc, here, "stages.1.warmup=x"), "stages.1.warmup=x must be a number"),
        "negative decay": (train, (*mrpc, here, "stages.1.weight_decay=-1"), "stages.1.weight_decay=-1 must be"),
        "cache a word": (train, ("stage=2", f"ckpt={stage1}", "stages.2.cache=maybe"), "stages.2.cache=maybe must be true or false"),
        "a monitor that cannot change": (train, ("stage=2", f"ckpt={stage1}", "callbacks.best.monitor=val/score"), "val/mean_ramp_score"),
        "max_epochs": (train, (*mrpc, here, "trainer.max_epochs=-1"), "set stages.1.epochs"),
        "root a number": (train, (*mrpc, "data.root=5"), "data.root=5 must be a folder"),
        "workers below 0": (evaluate, (f"ckpt={stage2}", "data.num_workers=-1"), "data.num_workers=-1 must be"),
        "no eval batch": (evaluate, (f"ckpt={stage2}", "data.eval_batch_size=0"), "data.eval_batch_size=0 must be"),
        "a glob for a split": (evaluate, (f"ckpt={stage2}", "split='*'"), "split=* is no name of a split"),
        "a path for a split": (evaluate, (f"ckpt={stage2}", "split=../rte/train"), "is no name of a split"),
        "two splits": (evaluate, (f"ckpt={stage2}", "split=[train,test]"), "must be the name of one split"),
        "backbone sizes that do not fit": (train, (*mrpc, here, "backbone.config.hidden_size=30"), "(backbone.config.*)"),
        "one layer": (train, (*mrpc, here, "backbone.config.num_hidden_layers=1", "objective=joint"), "has one layer: nothing to leave early (it can be trained with stage=1 objective=final)"),
        "a layer that is not there": (train, (*mrpc, here, "backbone.layers=[1,4]"), "backbone.layers=[1, 4] must be a list of layers from 1 to 3, in their order (every other one: backbone.layers=[1,3])"),
        "layers from 0": (train, (*mrpc, here, "backbone.layers=[0,1]"), "must be a list of layers from 1 to 3"),
        "layers upside down": (train, (*mrpc, here, "backbone.layers=[2,1]"), "in their order"),
        "a number of layers": (train, (*mrpc, here, "backbone.layers=2"), "backbone.layers=2 must be a list of layers"),
        "no layers": (train, (*mrpc, here, "backbone.layers=[]"), "backbone.layers=[] must be a list of layers"),
        "stage 2 cut anew": (train, ("stage=2", f"ckpt={stage1}", "backbone.layers=[1,2]"), "backbone.layers=[1, 2] contradicts"),
        "cut to a layer that is not there": (evaluate, (f"ckpt={stage2}", "layers=[1,4]"), "layers=[1, 4] must be a list of layers from 1 to 3"),
        "a record cut": (evaluate, (f"record={stage2}", "layers=[1,3]"), "layers=[1, 3] cuts the model, which a record has not"),
        "all layers dropped": (train, (*mrpc, here, "stages.1.layer_drop=1"), "stages.1.layer_drop=1 must be below 1"),
        "ramps never trained": (train, (*mrpc, here, "objective=mixed", "objective.final_share=1", "stages.1.epochs=1"), "objective=mixed: none of the 6 steps trains the ramps"),
        "resume as another stage": (train, (f"resume={stage1}", "stage=2"), "stage=2 contradicts"),
        "resume with another seed": (train, (f"resume={stage1}", "seed=5"), "seed=5 contradicts"),
        "resume with fewer rows": (train, (f"resume={stage1}", "data.limit_train=5"), "data.limit_train=5 contradicts"),
        "weights beyond float32": (train, (*mrpc, here, "objective=weighted", "objective.weights=[1e308,1e308,1]"), "must be a list of numbers from 0 to 1000000"),
        "layers dropped in percent": (train, (*mrpc, here, "stages.1.layer_drop=20"), "stages.1.layer_drop=20 must be a number between 0 and 1"),
        "teacher missing": (train, ("teacher=none", "backbone.layers=[1]"), "teacher=none: no such file or folder"),
        "a student of no layers": (train, (f"teacher={stage1}",), "needs backbone.layers=[...]: the layers of the teacher"),
        "a student of layers that are not there": (train, (f"teacher={stage1}", "backbone.layers=[4]"), "backbone.layers=[4] must be a list of layers from 1 to 3"),
        "a teacher of stage 2": (train, (f"teacher={stage2}", "backbone.layers=[1]"), "is of stage 2; a student learns from a stage-1 run"),
        "a teacher in stage 2": (train, (f"teacher={stage1}", "stage=2", f"ckpt={stage1}"), "with stage=2: a student learns in stage=1"),
        "a teacher of another task": (train, (f"teacher={stage1}", "task=rte", "backbone.layers=[1]"), "task=rte contradicts"),
        "a teacher of other labels": (train, (f"teacher={stage1}", "task=mrpc", "task.labels=[a,b,c]", "backbone.layers=[1]"), "task.labels=['a', 'b', 'c'] contradicts"),
        "a teacher of another backbone": (train, (f"teacher={stage1}", "backbone=minilm", "backbone.layers=[1]"), "backbone=minilm contradicts"),
        "a teacher unheard": (train, (f"teacher={stage1}", "backbone.layers=[1]", "objective=final"), "with objective=final: nothing would be learned from it; use objective=student"),
        "a student of nobody": (train, (*mrpc, here, "objective=student"), "objective=student needs teacher=RUN"),
        "unlabelled rows and labels alone": (train, (*mrpc, here, "data.unlabelled=[test]"), "data.unlabelled=['test'] with objective=final, which learns from labels alone; choose one of: distill, student"),
        "unlabelled a word": (train, (*mrpc, here, "objective=distill", "data.unlabelled=test"), "data.unlabelled=test must be a list of different splits"),
        "unlabelled validation rows": (train, (*mrpc, here, "objective=distill", "data.unlabelled=[validation]"), "data.unlabelled=[validation]: its rows are trained on with their labels, held out or reported; choose from: test"),
        "unlabelled rows that are not there": (train, (*mrpc, here, "objective=distill", "data.unlabelled=[web]"), "no file for split 'web'"),
        "a checkpoint mode": (train, (*mrpc, here, "callbacks.best.monitor=val/score", "callbacks.best.mode=up"), "callbacks.best"),
        "resume a finished run": (train, (f"resume={stage1}",), "has finished all of its 2 epochs"),
        "a used run folder": (train, (*mrpc, here, f"hydra.run.dir={stage2}"), "of another run, and a run folder"),
        "an evaluation into a run": (evaluate, (f"ckpt={stage2}", f"hydra.run.dir={stage2}"), "of another run, and a run folder"),
        "too few rows to standardize": (train, ("stage=2", f"ckpt={stage1}", "data.limit_train=1", "stages.2.standardize=true"), "does not vary over the 1 training rows"),
        "an experiment of another task": (train, ("stage=2", f"ckpt={stage1}", "experiment=demo"), "task=demo contradicts"),
        "no epochs": (train, (*mrpc, here, "stages.1.epochs=0"), "stages.1.epochs=0 must be a whole number"),
        "lr a word": (train, (*mrpc, here, "stages.1.lr=fast"), "stages.1.lr=fast must be a number"),
        "unknown objective": (train, (*mrpc, here, "objective.name=sum"), "objective 'sum' is unknown; choose one of: final, joint"),
        "an objective of stage 2": (train, (*mrpc, here, "objective=ramps"), "objective=ramps is for stage=2; in stage=1 choose one of: final, joint"),
        "an objective of stage 1": (train, ("stage=2", f"ckpt={stage1}", "objective=joint"), "objective=joint is for stage=1; in stage=2 choose one of: ramps, exit_weighted, distill"),
        "an option it lacks": (train, (*mrpc, here, "objective=joint", "+objective.temperature=2"), "objective.temperature: joint has no options"),
        "a share above 1": (train, (*mrpc, here, "objective=mixed", "objective.final_share=2"), "objective.final_share=2 must be a number between 0 and 1"),
        "weights of two ramps": (train, (*mrpc, here, "objective=weighted", "objective.weights=[1,2]"), "objective.weights=[1, 2] has 2 values; of 3 ramps each needs one"),
        "no temperature": (train, (*mrpc, here, "objective=distill", "objective.temperature=0"), "objective.temperature=0 must be a number between 0.01 and 100"),
        "unknown features": (train, (*mrpc, here, "ramp.reads=last"), "ramp.reads 'last' is unknown; choose one of: first, mean, pair, first_and_mean, attention"),
        "a pooler half shared": (train, (*mrpc, here, "ramp.shared_pooler=half"), "ramp.shared_pooler=half must be true or false"),
        "a ramp setting too many": (train, (*mrpc, here, "+ramp.depth=2"), "ramp setting 'depth' is unknown; choose one of: reads, shared_pooler, sees_previous"),
        "a regression has no classes": (train, ("task=stsb", "objective=exit_weighted"), "objective=exit_weighted needs classes"),
        "standardize without cache": (train, ("stage=2", f"ckpt={stage1}", "stages.2.cache=false", "stages.2.standardize=true"), "leave stages.2.cache=true"),
        "standardized in 8 bits": (train, ("stage=2", f"ckpt={stage1}", "stages.2.standardize=true", "trainer.precision=bf16-true"), "trainer.precision=bf16-true would round the faint differences that stages.2.standardize=true shows: use trainer.precision=bf16-mixed"),
        "values in 8 bits": (train, ("task=stsb", *TINY, here, "trainer.precision=16-true"), "trainer.precision=16-true would round the labels: use trainer.precision=16-mixed"),
        "a metric nobody logs": (train, (*mrpc, here, "callbacks.best.monitor=val/f2"), "val/f2"),
        "a precision nobody has": (train, (*mrpc, here, "trainer.precision=64-wide"), "64-wide"),
        "training ax": (train, ("task=ax", *TINY, here), "no training split"),
        "timing of nothing": (evaluate, (f"ckpt={stage2}", "timing=all"), "timing=all needs something to time: threshold= or thresholds="),
        "timing sometimes": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "timing=sometimes"), "timing=sometimes: sometimes is neither all nor a whole number"),
        "timing of 0 inputs": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "timing=[all,0]"), "0 is neither all nor a whole number of inputs a request"),
        "timing empty": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "timing=[]"), "timing=[] is empty"),
        "timing a record": (evaluate, (f"record={stage2}", "threshold=0.1", "timing=1"), "timing= and target_speedup= run the model"),
        "precision": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "timing=1", "precision=float8"), "precision 'float8' is unknown; choose one of: float32, bfloat16, int8"),
        "repeats": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "timing=1", "repeats=0"), "repeats=0 must be a whole number of 1 or more"),
        "threads": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "timing=1", "threads=two"), "threads=two must be a whole number of 1 or more, or null"),
        "speed-up below 1": (evaluate, (f"ckpt={stage2}", "target_speedup=0.5"), "target_speedup=0.5 must be in [1, inf)"),
        "speed-up and saving": (evaluate, (f"ckpt={stage2}", "target_speedup=2", "target_saving=0.4"), "target_saving=0.4 and target_speedup=2: ask for one of them"),
        "speed-up of a record": (evaluate, (f"record={stage2}", "target_speedup=2"), "timing= and target_speedup= run the model"),
        "speed-up per ramp": (evaluate, (f"ckpt={stage2}", "target_speedup=2", "per_ramp=true"), "per_ramp=true needs target_saving="),
        "speed-up too large": (evaluate, (f"ckpt={stage2}", "target_speedup=1000", "repeats=1"), "target_speedup=1000 is more than exit=entropy can reach: about"),
        "runtime": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "timing=1", "runtime=tvm"), "runtime 'tvm' is unknown; choose one of: auto, torch, onnx, openvino"),
        "a prior without its rule": (evaluate, (f"ckpt={stage2}", "+exit.prior=[0.5,0.5]", "threshold=0.3"), "exit.prior=[0.5, 0.5] without a rule: say exit=NAME, too (entropy, relative_entropy"),
        "a prior for entropy": (evaluate, (f"ckpt={stage2}", "exit=entropy", "+exit.prior=[0.5,0.5]", "threshold=0.3"), "exit.prior=[0.5, 0.5] is for exit=relative_entropy; exit=entropy has no prior"),
        "temperature of a learned score": (evaluate, (f"ckpt={stage2}", "exit=learned", "target_saving=0.3", "temperature=true"), "reads a learned score"),
        "best epoch by full depth": (train, (*mrpc, here, "objective=joint", "callbacks.best.monitor=val/score"), "use callbacks.best.monitor=val/mean_ramp_score"),
        "layer drop on two devices": (train, (*mrpc, here, "stages.1.layer_drop=0.2", "trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"), "trainer.strategy=ddp_find_unused_parameters_true"),
        "runtime of nothing": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "runtime=onnx"), "runtime=onnx is of int8 or of what is timed: add timing=all"),
        "precisions of nothing": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "precision=[float32,int8]"), "precision=['float32', 'int8']: several precisions are timed: add timing=all"),
        "analysis in int8": (evaluate, (f"ckpt={stage2}", "precision=int8", "analysis=true"), "analysis=true runs the model in float32: leave out precision=int8"),
        "int8 in torch": (evaluate, (f"ckpt={stage2}", "precision=int8", "runtime=torch"), "precision=int8 runs in ONNX Runtime or OpenVINO, not in torch"),
        "timing untrained ramps": (evaluate, (f"ckpt={stage1}", "threshold=0.1", "timing=all"), "timing= needs trained ramps"),
        "timing in another precision": (evaluate, (f"ckpt={stage2}", "threshold=0.1", "timing=all", "trainer.precision=bf16-mixed"), "trainer.precision=bf16-mixed with timing=: leave it out"),
    }  # fmt: skip


@pytest.mark.slow
def test_bad_input_is_one_line_with_value_choices_and_flag(
    fails: Run, glue: Path, stage1: Path, stage2: Path, tmp_path: Path
) -> None:
    wrong = {}
    for name, (script, overrides, says) in bad_input(tmp_path, glue, stage1, stage2).items():
        own = f"hydra.run.dir={tmp_path / 'runs' / name.replace(' ', '_')}"
        try:
            is_record = any(override.startswith("record=") for override in overrides)
            logger = () if is_record else ("logger=csv",)  # a record is not logged
            line = fails(script, own, *logger, *overrides)
        except pytest.fail.Exception:  # nothing was raised
            line = "was accepted"
        if says not in line:
            wrong[name] = line
    assert not wrong


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["task=nope"], "mrpc"),
        (["task=mrpc", "backbone=nope"], "roberta-base"),
        (["task=mrpc", "stagge=1"], "stagge"),
    ],
)
def test_hydra_s_own_errors_name_the_choices(run: Run, overrides: list[str], says: str) -> None:
    with pytest.raises(CommandFailed) as failure:
        run("train.py", *overrides)
    assert says in str(failure.value)
    assert "Traceback" not in str(failure.value)


def test_a_pickled_checkpoint_is_not_executed(fails: Run, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    assert "not a checkpoint of this program" in fails("train.py", "stage=2", f"ckpt={tmp_path / 'evil.ckpt'}")  # fmt: skip
    assert not (tmp_path / "owned").exists()
