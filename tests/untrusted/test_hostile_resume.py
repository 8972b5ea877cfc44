"""`resume=` of a run that somebody else wrote: it starts, fetches and overwrites nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hostile_runs import Content, Evil, Run, change, config, last_epoch
from lightning.pytorch.strategies import SingleDeviceStrategy

from deebert.hub import locate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("block", ["trainer", "callbacks", "best"])
def test_resume_takes_nothing_that_can_be_called(
    resume: Callable[..., str], copy: Path, tmp_path: Path, block: str
) -> None:
    owned = tmp_path / "owned"
    torch.save({"x": Evil(owned)}, tmp_path / "evil.pt")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(f"import os\ndef x(): os.mkdir({str(owned)!r})\n")
    calls = {
        "torch.load": {"f": str(tmp_path / "evil.pt"), "weights_only": False},
        "torch.hub.load": {"repo_or_dir": str(tmp_path / "hub"), "model": "x", "source": "local"},
    }
    call = [{"_target_": target, **values} for target, values in calls.items()]

    def spoil(content: Content) -> None:
        values = config(content)
        if block == "trainer":
            values["trainer"] |= {"plugins": call, "callbacks": call, "_target_": "os.mkdir"}
        elif block == "callbacks":
            values["callbacks"] |= {
                "evil": call[0],
                "other": call[1],
                "more": call,
                "x": {"y": call},
            }
        else:
            values["callbacks"]["best"] |= {
                "x": call,
                "_target_": "torch.hub.load",
                "dirpath": call,
            }

    change(copy, spoil)
    printed = resume()
    assert not owned.exists()
    assert "not taken from the checkpoint" in printed
    first = {
        "trainer": "trainer.plugins",
        "callbacks": "callbacks.evil",
        "best": "callbacks.best.x",
    }
    assert first[block] in printed
    assert last_epoch(tmp_path / "rest") == 1, "it went on"


@pytest.mark.parametrize("where", ["http", "a pickle here", "a link", "a run elsewhere"])
def test_the_best_checkpoint_is_one_of_the_run_s_own(
    resume: Callable[..., str], copy: Path, broken: Path, server: tuple[str, list[str]],
    tmp_path: Path, where: str,
) -> None:  # fmt: skip
    address, requests = server
    path = {
        "http": address, "a pickle here": str(tmp_path / "evil.pt"), "a link": "link.ckpt",
        "a run elsewhere": str(broken / "checkpoints" / "last.ckpt"),
    }[where]  # fmt: skip
    (copy / "checkpoints" / "link.ckpt").symlink_to(tmp_path / "evil.pt")
    (copy / "checkpoints" / "best.ckpt").unlink()
    kept = tmp_path / "kept.ckpt"
    kept.write_text("a file that is none of its business")

    def spoil(content: Content) -> None:
        for state in content["callbacks"].values():
            state |= {
                "best_model_path": path, "kth_best_model_path": str(kept), "dirpath": str(tmp_path),
                "last_model_path": str(kept), "best_k_models": {str(kept): torch.tensor(9.0)},
                "best_model_score": torch.tensor(9.0),  # no epoch to come is better
            }  # fmt: skip

    change(copy, spoil)
    resume()
    assert not requests, "nothing is fetched"
    assert not (tmp_path / "owned").exists()
    assert kept.exists(), "nothing is removed"
    assert last_epoch(tmp_path / "rest") == 1, "it went on"


def test_a_run_that_was_moved_keeps_its_best_checkpoint(
    resume: Callable[..., str], copy: Path, tmp_path: Path
) -> None:
    """Its state names the folder that it was written in."""

    def better(content: Content) -> None:
        for state in content["callbacks"].values():
            state["best_model_score"] = torch.tensor(9.0)

    change(copy, better)
    shutil.move(copy, copy := tmp_path / "elsewhere")
    (tmp_path / "theirs").symlink_to(copy)  # what `resume` names
    resume()
    best = torch.load(tmp_path / "rest" / "checkpoints" / "best.ckpt", weights_only=True)
    assert (best["epoch"], last_epoch(tmp_path / "rest")) == (0, 1)


def test_resume_writes_into_its_own_folder_alone(
    resume: Callable[..., str], copy: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"

    def spoil(content: Content) -> None:
        callbacks = config(content)["callbacks"]
        callbacks["last"] |= {"dirpath": str(outside), "filename": "../../x", "save_last": True}
        callbacks["best"] |= {"dirpath": str(outside), "filename": str(outside / "y")}
        config(content)["trainer"] |= {"default_root_dir": str(outside), "profiler": "simple"}

    change(copy, spoil)
    printed = resume()
    assert not outside.exists()
    files = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")}
    assert files == {"theirs", "rest"}
    assert {p.name for p in (tmp_path / "rest" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}  # fmt: skip
    assert "callbacks.last.dirpath" in printed


def test_a_link_does_not_lead_out_of_a_run(fails: Run, copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")
    (copy / "checkpoints" / "last.ckpt").symlink_to(tmp_path / "last.ckpt")
    for words in (["train.py", f"resume={copy}"], ["evaluate.py", f"ckpt={copy}/checkpoints/none"]):
        line = fails(*words, f"hydra.run.dir={tmp_path / 'out'}")
    line = fails("train.py", f"resume={copy}", f"hydra.run.dir={tmp_path / 'out'}")
    assert "checkpoints/last.ckpt is a link that leads out of the folder" in line
    locate.checkpoint(copy / "checkpoints" / "last.ckpt", "ckpt")  # the user names the link itself


def test_a_training_state_that_does_not_fit_is_one_line(
    fails: Run, copy: Path, tmp_path: Path
) -> None:
    original = (copy / "checkpoints" / "last.ckpt").read_bytes()

    def moment(content: Content) -> None:
        state = content["optimizer_states"][0]["state"]
        state[next(iter(state))]["exp_avg"] = torch.zeros(3)

    cases: list[Callable[[Content], object]] = [
        lambda content: content.update(optimizer_states=[]),
        lambda content: content.update(optimizer_states=[{"state": {}, "param_groups": 7}]),
        lambda content: content.update(loops="x"),
        lambda content: content.update(callbacks=7),
        lambda content: content.update(lr_schedulers=[{"optimizer": 1}]),
        moment,
    ]
    for number, what in enumerate(cases):
        (copy / "checkpoints" / "last.ckpt").write_bytes(original)
        change(copy, what)
        line = fails("train.py", f"resume={copy}", "logger=csv", f"hydra.run.dir={tmp_path / str(number)}")  # fmt: skip
        assert "the run cannot be gone on with from this checkpoint" in line


def test_a_checkpoint_starts_no_processes(
    fails: Run, resume: Callable[..., str], copy: Path, tmp_path: Path
) -> None:
    """They would listen for others on all addresses, and some strategies unpickle checkpoints."""
    file = copy / "checkpoints" / "last.ckpt"
    original = file.read_bytes()
    cases = ({"devices": 64}, {"strategy": "fsdp"}, {"strategy": "ddp", "num_nodes": 2})
    for number, values in enumerate(cases):
        file.write_bytes(original)
        change(copy, lambda content, values=values: config(content)["trainer"].update(values))
        line = fails("train.py", f"resume={copy}", f"hydra.run.dir={tmp_path / str(number)}")
        named = " ".join(f"trainer.{key}={value}" for key, value in values.items())
        assert f"was trained with {named}: say so again" in line
    resume("trainer.devices=1", "trainer.strategy=auto", "+trainer.num_nodes=1")
    assert last_epoch(tmp_path / "rest") == 1


def test_a_strategy_that_reads_checkpoints_itself_is_refused(
    fails: Run, copy: Path, tmp_path: Path
) -> None:
    strategy = "{_target_: test_hostile_resume.Reader}"
    line = fails("train.py", f"resume={copy}", f"trainer.strategy={strategy}", "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path / 'out'}")  # fmt: skip
    assert "which reads checkpoints in a way of its own" in line


class Reader(SingleDeviceStrategy):
    """As FSDP, whose own way is a full unpickler."""

    def load_checkpoint(self, *_: object, **__: object) -> dict[str, Any]:
        raise AssertionError("it was asked")


@pytest.mark.parametrize("form", ["one", "a list"])
def test_a_plugin_of_the_user_s_own_reads_as_safely(
    resume: Callable[..., str], copy: Path, server: tuple[str, list[str]], tmp_path: Path, form: str
) -> None:
    address, requests = server

    def spoil(content: Content) -> None:
        for state in content["callbacks"].values():
            state |= {"best_model_path": address, "best_model_score": torch.tensor(9.0)}

    change(copy, spoil)
    plugin = "{_target_: lightning.pytorch.plugins.io.AsyncCheckpointIO}"
    resume(f"+trainer.plugins={plugin if form == 'one' else f'[{plugin}]'}")
    assert not requests
    assert "weights_fingerprint" in torch.load(tmp_path / "rest" / "checkpoints" / "last.ckpt", weights_only=True)  # fmt: skip


def test_a_best_checkpoint_of_another_model_is_refused(
    fails: Run, copy: Path, tmp_path: Path
) -> None:
    def better(content: Content) -> None:
        for state in content["callbacks"].values():
            state["best_model_score"] = torch.tensor(9.0)

    change(copy, better)
    change(copy, lambda content: content["state_dict"].popitem(), "best")
    line = fails("train.py", f"resume={copy}", "logger=csv", f"hydra.run.dir={tmp_path / 'out'}")
    assert "best.ckpt holds the weights of another model" in line


def test_unusual_runs_of_before_still_load(resume: Callable[..., str], copy: Path, tmp_path: Path) -> None:  # fmt: skip
    """What the table does not take of trainer and callbacks is told, not refused."""

    def unusual(content: Content) -> None:
        config(content)["trainer"] |= {
            "max_time": {"hours": 2}, "gradient_clip_val": float("inf"), "devices": 1,
            "limit_predict_batches": 3, "logger": {"_target_": "x"},
        }  # fmt: skip
        config(content)["callbacks"] |= {
            "mine": {"_target_": "x", "limit": float("inf")},
            "best": None,
        }
        config(content)["task"] |= {"hub": ["nyu-mll/glue", None], "tsv": {"folder": "GLUE/MRPC"}}
        config(content)["backbone"]["config"] |= {"rope_parameters": {"a": {"b": 1}}}
        content["callbacks"]["mine"] = {"losses": [0.5] * 600_000}

    change(copy, unusual)
    printed = resume()
    for flag in ("trainer.max_time.hours", "trainer.limit_predict_batches", "callbacks.mine.limit"):
        assert flag in printed
    assert not (tmp_path / "rest" / "checkpoints" / "best.ckpt").exists(), "it was taken out"
