"""Commands in processes of their own, forked from a server that has imported the libraries.

A new process imports torch, transformers and Lightning for several seconds first. A fork does not,
and is a process all the same: it has signals, an exit code, streams and children of its own.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["deebert.runs.train", "deebert.runs.evaluate", "deebert.predict.command"]
)


def start(
    *words: object, stdin: str | Path = os.devnull, out: str | Path = os.devnull,
    err: str | Path = os.devnull, env: dict[str, str] | None = None,
) -> ForkServerProcess:  # fmt: skip
    """Start `python WORDS`, a script of the repository or `-m` and a module, in its top folder.

    Args:
        words: the command line after `python`.
        stdin: the file, or the named pipe, for stdin.
        out: the file for stdout.
        err: the file for stderr.
        env: the environment; None for that of this process.
    """
    variables = dict(os.environ if env is None else env)
    streams = [*map(str, (stdin, out, err))]
    process = SERVER.Process(target=_run, args=(list(map(str, words)), streams, variables))
    process.start()
    return process


def run(*words: object, env: dict[str, str] | None = None) -> CompletedProcess[str]:
    """Run the same to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        process = start(*words, out=out, err=err, env=env)
        process.join(280)
        assert process.exitcode is not None, "it hangs"
        return CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _run(words: list[str], streams: list[str], env: dict[str, str]) -> None:
    for stream, name in enumerate(streams):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if stream else os.O_RDONLY
        os.dup2(os.open(name, flags, 0o644), stream)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
