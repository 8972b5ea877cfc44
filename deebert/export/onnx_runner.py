"""Answers texts with an exported early-exit model; needs numpy, onnxruntime and tokenizers alone.

    python runner.py FOLDER [target_saving=0.4 | threshold=0.1] [threads=2] < texts.jsonl

    from runner import Runner
    Runner("FOLDER").predict(["a fine film"], target_saving=0.4)

A line of input is a text in JSON, or a pair of texts as a list; a line of output is an answer.
`python -m deebert.export` wrote FOLDER, and put a copy of this file into it. It knows nothing of
deebert, and gives what its engine gives: batches of similar length are cut to their longest, and
after each layer's ramp only the inputs that stay go on.
Shapes: N inputs, B of them in a batch, S tokens, H hidden, L layers (= ramps), K ramps so far,
C labels.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(f"Error: {missing}; pip install numpy onnxruntime tokenizers", file=sys.stderr)
    sys.exit(2)

FORMAT, SCHEMAS = "deebert-onnx", (1, 2, 3)  # of deebert.json; 2: also pairs and priors
TOKEN_BUDGET = 2048  # of a batch, padding included; a longer input is a batch of its own
WINDOW = 8192  # inputs that are sorted by length together
AT_ONCE = 250_000  # characters that are tokenized together: what is cut off is held, too


class RunnerError(ValueError):
    """Bad input: the message is one line."""


# Exit rules, as deebert.exits has them: the logits of the ramps so far (B, K, C) and the last one's
# learned exit score (B,), where it has one -> how unsure it is (B,), and the logits that an input
# leaving there is answered with (B, C).
LearnedScore = np.ndarray | None
ExitScores = tuple[np.ndarray, np.ndarray]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _shares(logits: np.ndarray) -> np.ndarray:
    return np.exp(_log_softmax(logits))


def _entropy(logits: np.ndarray) -> np.ndarray:
    log_shares = _log_softmax(logits)
    return -(np.exp(log_shares) * log_shares).sum(-1)


def entropy(logits_BKC: np.ndarray, learned_score_B: LearnedScore) -> ExitScores:
    return _entropy(logits_BKC[:, -1]), logits_BKC[:, -1]


def relative_entropy(
    logits_BKC: np.ndarray, learned_score_B: LearnedScore, prior: Sequence[float]
) -> ExitScores:
    logits_BC, share_C = logits_BKC[:, -1], np.array(prior)
    excess_C = np.log(share_C / share_C.min()).astype(np.float32)
    return _entropy(logits_BC) + (_shares(logits_BC) * excess_C).sum(-1), logits_BC


def probability(logits_BKC: np.ndarray, learned_score_B: LearnedScore) -> ExitScores:
    ordered_BC = np.sort(_shares(logits_BKC[:, -1]), -1)
    return ordered_BC[:, :-1].sum(-1), logits_BKC[:, -1]


def margin(logits_BKC: np.ndarray, learned_score_B: LearnedScore) -> ExitScores:
    ordered_BC = np.sort(_shares(logits_BKC[:, -1]), -1)
    return ordered_BC[:, :-1].sum(-1) + ordered_BC[:, -2], logits_BKC[:, -1]


def patience(logits_BKC: np.ndarray, learned_score_B: LearnedScore) -> ExitScores:
    labels_BK = logits_BKC.argmax(-1)
    agrees_BK = labels_BK[:, 1:] == labels_BK[:, :-1]
    in_a_row_B = agrees_BK[:, ::-1].cumprod(1).sum(1)
    return 1 / (1 + in_a_row_B).astype(np.float32), logits_BKC[:, -1]


def confident_patience(
    logits_BKC: np.ndarray, learned_score_B: LearnedScore, patience: int = 2
) -> ExitScores:
    last_BKC = logits_BKC[:, -patience:]
    labels_BK = last_BKC.argmax(-1)
    together_B = (labels_BK == labels_BK[:, :1]).all(1) & (last_BKC.shape[1] == patience)
    return np.where(together_B, _entropy(last_BKC).max(1), np.inf), logits_BKC[:, -1]


def change(values_BK1: np.ndarray, learned_score_B: LearnedScore, patience: int = 1) -> ExitScores:
    steps_BK = np.abs(np.diff(values_BK1[..., 0], axis=1))[:, -patience:]
    if steps_BK.shape[1] < patience:
        return np.full(len(values_BK1), np.inf), values_BK1[:, -1]
    return steps_BK.max(1), values_BK1[:, -1]


def ensemble(logits_BKC: np.ndarray, learned_score_B: LearnedScore) -> ExitScores:
    mean_BC = _shares(logits_BKC.astype(np.float64)).mean(1)
    logits_BC = np.log(np.maximum(mean_BC, np.finfo(np.float64).tiny)).astype(np.float32)
    return _entropy(logits_BC), logits_BC


def vote(logits_BKC: np.ndarray, learned_score_B: LearnedScore) -> ExitScores:
    num_ramps, num_labels = logits_BKC.shape[1:]
    votes_BC = (logits_BKC.argmax(-1)[..., None] == np.arange(num_labels)).sum(1)
    tie_break_BC = _shares(logits_BKC).sum(1) / (2 * num_ramps)
    return 1 / votes_BC.max(-1).astype(np.float32), (votes_BC + tie_break_BC).astype(np.float32)


def learned(logits_BKC: np.ndarray, learned_score_B: LearnedScore) -> ExitScores:
    assert learned_score_B is not None  # refused at export
    return learned_score_B, logits_BKC[:, -1]


RULES: dict[str, Callable[..., ExitScores]] = {
    rule.__name__: rule
    for rule in (
        entropy, relative_entropy, probability, margin, patience, confident_patience, change,
        ensemble, vote, learned,
    )
}  # fmt: skip


class Answers(NamedTuple):
    """What came out, in the order of the inputs.

    Attributes:
        logits_NC: of the ramp that each input left at, as the exit rule answers with them.
        layer_N: where it left, from 1.
        ramps_NLC: the logits of every ramp that it came by, NaN elsewhere.
    """

    logits_NC: np.ndarray
    layer_N: np.ndarray
    ramps_NLC: np.ndarray


class Runner:
    """An exported model, ready to answer.

    Args:
        folder: what `python -m deebert.export` wrote.
        threads: of the processor; None: as many as it has cores.

    Raises:
        RunnerError: there is no such export, or it is damaged.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.about = _about(self.folder)
        self.columns, self.labels = (self.about["task"][name] for name in ("columns", "labels"))
        self.num_layers, self.num_labels = self.about["num_layers"], self.about["num_labels"]
        rule = self.about["rule"]
        if rule["name"] not in RULES:
            raise RunnerError(f"{folder}: exit rule {rule['name']!r} is unknown to this runner")
        self.rule, self.options = RULES[rule["name"]], rule["options"]
        names = ["embeddings", *(f"layer_{layer + 1}" for layer in range(self.num_layers))]
        self.embeddings, *self.layers = [
            _Block(self.folder / f"{name}.onnx", threads) for name in names
        ]

    def predict(
        self,
        texts: Any,
        *,
        threshold: float | Sequence[float] | None = None,
        target_saving: float | None = None,
    ) -> list[dict[str, Any]]:
        """Answer texts.

        Args:
            texts: one or many; each a text, or for a task of two columns a pair (one alone as a
                tuple). Both may be mappings with the task's columns.
            threshold: one for all ramps, or one for each but the last; 0 runs all layers.
            target_saving: share of the layers to save, one of those in deebert.json. Nothing at
                all: as the model was exported.

        Returns:
            A dict for each: `label`, `probability` (of that label; not for a regression) and
            `exit_layer`.

        Raises:
            RunnerError: there are none, one is not a text (or pair), or there is no such saving.
        """
        pair = isinstance(texts, tuple) and len(self.columns) == 2
        one = isinstance(texts, str | Mapping) or (pair and all(isinstance(t, str) for t in texts))
        rows = [self.checked(text) for text in ([texts] if one else texts)]
        if not rows:
            raise RunnerError("there are no texts to answer; give at least one")
        asked = self.operating_point(threshold=threshold, target_saving=target_saving)
        found = self.run(self.encode(rows), **asked)
        answers: list[dict[str, Any]] = []
        for logits_C, layer in zip(found.logits_NC, found.layer_N.tolist(), strict=True):
            if self.labels is None:
                answers.append({"label": float(logits_C[0]), "exit_layer": layer})
            else:
                best = int(logits_C.argmax())
                share = float(_shares(logits_C)[best])
                answers.append(
                    {"label": self.labels[best], "probability": share, "exit_layer": layer}
                )
        return answers

    def checked(self, text: Any) -> tuple[str, ...]:
        """A text, or a pair, in the order of the task's columns.

        Raises:
            RunnerError: it is none.
        """
        given = (text,) if isinstance(text, str) else text
        if isinstance(given, Mapping):
            given = tuple(given.get(name) for name in self.columns)
        listed = isinstance(given, list | tuple) and all(isinstance(each, str) for each in given)
        if not listed or len(given) != len(self.columns):
            wanted = "a pair of texts" if len(self.columns) == 2 else "a text"
            raise RunnerError(f"{_short(text)} is not {wanted} ({', '.join(self.columns)})")
        try:
            "".join(given).encode()
        except UnicodeEncodeError as error:
            raise RunnerError(f"{_short(text)} is not Unicode: half a surrogate pair") from error
        return tuple(given)

    def encode(self, rows: Sequence[tuple[str, ...]]) -> list[dict[str, list[int]]]:
        """What `checked` gave -> what `run` takes, one for each."""
        found: list[tuple[list[int], list[int]]] = []
        for some in _portions(rows):
            if len(self.columns) == 2:
                found += self._pairs(some)
            else:
                single = self._tokenizer.encode_batch([text for (text,) in some])
                found += [(each.ids, each.type_ids) for each in single]
        if not self.about["token_type_ids"]:
            return [{"input_ids": ids} for ids, _ in found]
        return [{"input_ids": ids, "token_type_ids": types} for ids, types in found]

    def operating_point(
        self,
        *,
        threshold: float | Sequence[float] | None = None,
        target_saving: float | None = None,
    ) -> dict[str, Any]:
        """Thresholds, temperatures and prior of a target, as `run` takes them."""
        if threshold is not None and target_saving is not None:
            raise RunnerError("threshold= and target_saving=: ask for one of them")
        if threshold is not None:
            if self._limits(threshold).any() and self.rule is relative_entropy:
                raise RunnerError(
                    f"threshold={_short(threshold)}: the exit rule relative_entropy needs a prior, "
                    "which goes with a target; use target_saving="
                )
            return {"thresholds": threshold}
        found = self.about["operating_point" if self.about["schema"] > 2 else "asked"]
        if target_saving is not None:
            known = {each["target_saving"]: each for each in self.about["savings"]}
            if target_saving not in known:
                raise RunnerError(
                    f"target_saving={target_saving} is not in this export, which has: "
                    f"{', '.join(map(str, known)) or 'none'}; give threshold=, or "
                    "export it with the saving that you want"
                )
            found = known[target_saving]
        return {name: found.get(name) for name in ("thresholds", "temperatures", "prior")}

    def run(
        self,
        inputs: Sequence[Mapping[str, Sequence[int]]],
        thresholds: float | Sequence[float],
        temperatures: Sequence[float] | None = None,
        prior: Sequence[float] | None = None,
    ) -> Answers:
        """Answer tokens.

        Args:
            inputs: each with `input_ids` and, where the model knows them, `token_type_ids`: whole
                numbers, unpadded.
            thresholds: one for all ramps, or L-1; an input leaves at the first ramp whose score is
                strictly under its threshold.
            temperatures: they divide the logits of each ramp first.
            prior: for the exit rule `relative_entropy`.
        """
        inputs = [self._cut(given) for given in inputs]
        limits_L = self._limits(thresholds)
        options = self.options if prior is None else {**self.options, "prior": prior}
        size = (len(inputs), self.num_layers, self.num_labels)
        out = Answers(
            np.empty((size[0], size[2]), np.float32),
            np.empty(size[0], np.int64),
            np.full(size, np.nan, np.float32),
        )
        with np.errstate(invalid="ignore"):  # NaN never leaves early
            for start in range(0, len(inputs), WINDOW):
                window = range(start, min(start + WINDOW, len(inputs)))
                for rows in _by_length(window, inputs):
                    self._run(rows, inputs, limits_L, temperatures, options, out)
        return out

    def _run(
        self,
        rows: list[int],
        inputs: Sequence[Mapping[str, Sequence[int]]],
        limits_L: np.ndarray,
        temperatures: Sequence[float] | None,
        options: Mapping[str, Any],
        out: Answers,
    ) -> None:
        """Run a batch until all have left, and write their answers down."""
        rows_B = np.array(rows)
        length_B = np.array([len(inputs[row]["input_ids"]) for row in rows])
        batch = [inputs[row] for row in rows]
        ids_BS = _padded(batch, "input_ids", self.about["pad_token_id"])
        second_B = _second_text(ids_BS, self.about.get("sep_token_id"))
        hidden_BSH = self.embeddings(
            input_ids=ids_BS,
            token_type_ids=_padded(batch, "token_type_ids", 0),
        )["hidden"]
        previous_BC = np.zeros((len(rows), self.num_labels), np.float32)  # what the first ramp sees
        for index, layer in enumerate(self.layers):
            mask_BS = np.arange(hidden_BSH.shape[1]) < length_B[:, None]
            found = layer(
                hidden=hidden_BSH,
                mask=mask_BS.astype(np.int32),
                second=second_B,
                previous=previous_BC,
            )
            previous_BC = out.ramps_NLC[rows_B, index] = found["logits"]
            if index == self.num_layers - 1:  # the final classifier answers, alone
                out.logits_NC[rows_B], out.layer_N[rows_B] = previous_BC, self.num_layers
                return
            hidden_BSH = found["new"]
            if not limits_L[index] > 0:
                continue
            ramps_BKC = out.ramps_NLC[rows_B, : index + 1]
            if temperatures is not None:
                ramps_BKC = ramps_BKC / np.array(temperatures[: index + 1], np.float32)[:, None]
            learned_score_B = found["learned_score"][:, 0] if "learned_score" in found else None
            score_B, answer_BC = self.rule(ramps_BKC, learned_score_B, **options)
            leave_B = (score_B < limits_L[index]) & np.isfinite(answer_BC).all(1)
            if not leave_B.any():
                continue
            left_B = rows_B[leave_B]
            out.logits_NC[left_B], out.layer_N[left_B] = answer_BC[leave_B], index + 1
            if leave_B.all():
                return
            rows_B, length_B, second_B, previous_BC = (
                x[~leave_B] for x in (rows_B, length_B, second_B, previous_BC)
            )
            hidden_BSH = hidden_BSH[~leave_B, : length_B.max()]

    def _limits(self, thresholds: Any) -> np.ndarray:
        """The threshold of each ramp but the last."""
        try:
            found = np.array(thresholds, np.float32)
            fits = found.shape in ((), (self.num_layers - 1,)) and bool((found >= 0).all())
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise RunnerError(
                f"threshold={_short(thresholds)} must be a number >= 0 (0 never exits), or a list "
                f"of {self.num_layers - 1}, one for each ramp but the last"
            )
        return np.broadcast_to(found, (self.num_layers - 1,))

    def _cut(self, given: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
        """As the tokenizer does: the text is cut, the token that closes it stays."""
        most = self.about["longest_input"]
        if not given["input_ids"]:
            raise RunnerError("an input has no tokens (input_ids=[])")
        if len(given["input_ids"]) <= most:
            return given
        return {name: [*values[: most - 1], values[-1]] for name, values in given.items()}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        file = self.folder / "tokenizer.json"
        try:
            found = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more special
            raise RunnerError(f"{file} cannot be read: {_line(error)}") from error
        if found.truncation is None:
            raise RunnerError(f"{file} does not say how texts are cut; export the model again")
        return found

    @cached_property
    def _pairs(self) -> "_Pairs":
        return _Pairs(self._tokenizer)


class _Pairs:
    """Pairs of texts -> their ids and types; the longer text of a pair is cut first.

    By hand: the library's own cutting keeps every combination of what it cuts off, in time and
    memory that grow with the square of the texts.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        cut = tokenizer.truncation or {}
        self.at_the_left = cut["direction"] == "left"
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.room = cut["max_length"] - self.tokenizer.num_special_tokens_to_add(is_pair=True)
        found = self.tokenizer.encode("a", "a")
        around = list(zip(found.ids, found.type_ids, found.sequence_ids, strict=True))
        # What stands around and between the texts; a text of several tokens stands there once.
        self.layout = [
            (token, kind, part)
            for i, (token, kind, part) in enumerate(around)
            if part is None or i == 0 or part != around[i - 1][2]
        ]

    def __call__(self, rows: Sequence[tuple[str, ...]]) -> list[tuple[list[int], list[int]]]:
        columns = [
            [found.ids for found in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
            for texts in map(list, zip(*rows, strict=True))
        ]
        return [self._joined(first, second) for first, second in zip(*columns, strict=True)]

    def _joined(self, first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
        stay = _longest_first(len(first), len(second), self.room)
        texts = [
            text[len(text) - most :] if self.at_the_left else text[:most]
            for text, most in zip((first, second), stay, strict=True)
        ]
        ids: list[int] = []
        types: list[int] = []
        for token, kind, part in self.layout:
            there = [token] if part is None else texts[part]
            ids += there
            types += [kind] * len(there)
        return ids, types


class _Block:
    """A graph that ONNX Runtime has made ready: arrays in and out by name."""

    def __init__(self, file: Path, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Each graph has threads of its own. Those that wait by spinning take the processor from the
        # others: 15 times slower for one input at a time on a busy machine of 2 cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = self._made(file, options)
        except Exception as error:  # ONNX Runtime's have no class in common
            raise RunnerError(f"{file} cannot be loaded: {_line(error)}") from error
        self.inputs = [given.name for given in self.session.get_inputs()]
        self.outputs = [found.name for found in self.session.get_outputs()]

    def _made(self, file: Path, options: Any) -> Any:
        # Its fallback would only try the same again, and print about it.
        how = {"providers": ["CPUExecutionProvider"], "enable_fallback": False}
        try:
            return onnxruntime.InferenceSession(file, options, **how)
        except RuntimeError as error:
            if "global thread pool" not in str(error):
                raise
            # Somebody has made one for this process (deebert's engine, with runtime=onnx).
            options.use_per_session_threads, options.intra_op_num_threads = False, 0
            return onnxruntime.InferenceSession(file, options, **how)

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays that the graph does not take are left out."""
        given = {name: arrays[name] for name in self.inputs}
        return dict(zip(self.outputs, self.session.run(None, given), strict=True))


def _about(folder: Path) -> dict[str, Any]:
    file = folder / "deebert.json"
    try:
        about = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise RunnerError(f"{file} {why}; write one with python -m deebert.export") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise RunnerError(f"{file} is of no export; write one with python -m deebert.export")
    if about.get("schema") not in SCHEMAS:
        raise RunnerError(
            f"{file} has schema {about.get('schema')}, this runner reads {SCHEMAS}: use the "
            "runner.py that lies beside it"
        )
    return about


def _portions(rows: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    chosen: list[tuple[str, ...]] = []
    size = 0
    for row in rows:
        chosen.append(row)
        size += sum(map(len, row))
        if size >= AT_ONCE:
            yield chosen
            chosen, size = [], 0
    if chosen:
        yield chosen


def _second_text(ids_BS: np.ndarray, separator: int | None) -> np.ndarray:
    """Where the second texts begin: behind the first separator, or at the end."""
    separates_BS = ids_BS == separator
    first_B = separates_BS.argmax(1) + 1
    return np.where(separates_BS.any(1), first_B, ids_BS.shape[1])


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts stay, as `tokenizers` has it."""
    if first + second <= room:
        return first, second
    if first > second:
        return _longest_first(second, first, room)[::-1]
    if 2 * first <= room:
        return first, room - first
    return room // 2, room - room // 2


def _by_length(rows: Iterable[int], inputs: Sequence[Any]) -> Iterator[list[int]]:
    """Rows of similar length, shortest first, under the token budget."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: len(inputs[row]["input_ids"])):
        if batch and (len(batch) + 1) * len(inputs[row]["input_ids"]) > TOKEN_BUDGET:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(batch: Sequence[Mapping[str, Sequence[int]]], name: str, fill: int) -> np.ndarray:
    """(B, S) whole numbers; `fill` where an input has none."""
    longest = max(len(given["input_ids"]) for given in batch)
    found = np.full((len(batch), longest), fill, np.int64)
    for row, given in zip(found, batch, strict=True):
        values = given.get(name, ())
        row[: len(values)] = values
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _option(argument: str) -> tuple[str, Any]:
    """A `name=value` of the command line."""
    kinds = {"threshold": (int, float, list), "target_saving": (int, float), "threads": (int,)}
    name, _, text = argument.partition("=")
    if name not in kinds:
        raise RunnerError(f"option {argument!r} is unknown; choose one of: {', '.join(kinds)}")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if type(value) not in kinds[name] or (name == "threads" and value < 1):
        raise RunnerError(f"{argument}: {_short(text)} is no number that fits; see --help")
    return name, value


def main(arguments: Sequence[str]) -> None:
    """Answer standard input on standard output.

    Raises:
        RunnerError: an option, the folder or a line is wrong; what came before is answered first.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    target = dict(map(_option, arguments[1:]))
    runner = Runner(arguments[0], target.pop("threads", None))
    runner.operating_point(**target)
    lines = enumerate(sys.stdin.buffer, 1)
    wrong: RunnerError | None = None
    while wrong is None:
        rows = []
        for number, line in lines:
            try:
                rows.append(runner.checked(json.loads(line)))
            except RunnerError as error:
                wrong = RunnerError(f"line {number}: {error}")
            except (ValueError, RecursionError):
                wrong = RunnerError(f"line {number} is no JSON: {_short(line)}")
            if wrong or len(rows) == WINDOW:
                break
        if not rows:
            break
        for answer in runner.predict(rows, **target):
            sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    if wrong:
        raise wrong


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunnerError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the answers has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
