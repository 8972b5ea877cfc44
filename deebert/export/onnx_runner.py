"""Answer texts with an exported early-exit model. Needs numpy, onnxruntime and tokenizers only.

    python runner.py FOLDER [target_saving=0.4 | threshold=0.1] [threads=2] < texts.jsonl

    from runner import Runner
    Runner("FOLDER").predict(["a fine film"], target_saving=0.4)

Each line of the input is a text in JSON, or a pair of texts as a list. Blank lines are skipped.
Each line of the output is an answer. `deebert export` writes FOLDER and puts a copy of this file
into it. The file imports nothing of deebert, and answers as deebert's engine does: batches of
similar length are cut to their longest input, and after each layer's ramp only the inputs that stay
go on.
Shapes: N inputs, B of them in a batch, S tokens, H hidden, L layers (= ramps), K ramps so far,
C labels.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

FORMAT, SCHEMA = "deebert-onnx", 3  # of deebert.json; schema 3 added exit_rule.onnx
TOKEN_BUDGET = 2048  # tokens of a batch, padding included; a longer input is a batch of its own
WINDOW = 8192  # inputs that are sorted by length together
LONGEST_TEXT = 1_000_000  # characters
AT_ONCE = 250_000  # characters that are tokenized together: their cut-off tokens use memory, too


class RunnerError(ValueError):
    """Bad input. The message is one line."""


def _shares(logits: np.ndarray) -> np.ndarray:
    """Compute softmax(logits): (..., C) -> (..., C)."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


class Answers(NamedTuple):
    """The answers, in the order of the inputs.

    Attributes:
        logits_NC: the logits that the exit rule answers with at each input's exit layer.
        layer_N: the exit layer of each input, from 1.
        ramps_NLC: the logits of every ramp up to an input's exit, NaN after it.
    """

    logits_NC: np.ndarray
    layer_N: np.ndarray
    ramps_NLC: np.ndarray


class Runner:
    """An exported model, ready to answer.

    Args:
        folder: a folder that `deebert export` wrote.
        threads: the number of the processor's threads; None: one for each core.

    Raises:
        RunnerError: there is no such export, or it is damaged.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.about = _about(self.folder)
        self.columns, self.labels = (self.about["task"][name] for name in ("columns", "labels"))
        self.num_layers, self.num_labels = self.about["num_layers"], self.about["num_labels"]
        names = [f"layer_{layer + 1}" for layer in range(self.num_layers)]
        rule, self.embeddings, *self.layers = [
            Block(self.folder / f"{name}.onnx", threads)
            for name in ("exit_rule", "embeddings", *names)
        ]
        self.rule = ExitRule(rule)

    def predict(
        self,
        texts: Any,
        *,
        threshold: float | Sequence[float] | None = None,
        target_saving: float | None = None,
    ) -> list[dict[str, Any]]:
        """Answer texts.

        Args:
            texts: one text or many. For a task of two columns each is a pair of texts; a single
                pair is a tuple. A text or pair may be a mapping with the task's columns.
            threshold: one number for all ramps, or one for each ramp but the last; 0 runs all
                layers.
            target_saving: the share of the layers to save, one of those in deebert.json. Without
                it and without a threshold, the exported operating point is used.

        Returns:
            A dict for each text: `label`, `probability` (of that label; not for a regression) and
            `exit_layer`.

        Raises:
            RunnerError: there are no texts, one is not a text (or pair), or there is no such
                saving.
        """
        pair = isinstance(texts, tuple) and len(self.columns) == 2
        one = isinstance(texts, str | Mapping) or (pair and all(isinstance(t, str) for t in texts))
        rows = [self.checked(text) for text in ([texts] if one else texts)]
        if not rows:
            raise RunnerError("there are no texts to answer; give at least one")
        point = self.operating_point(threshold=threshold, target_saving=target_saving)
        answers = self.run(self.encode(rows), **point)
        predictions: list[dict[str, Any]] = []
        for logits_C, layer in zip(answers.logits_NC, answers.layer_N.tolist(), strict=True):
            if self.labels is None:
                predictions.append({"label": float(logits_C[0]), "exit_layer": layer})
            else:
                best = int(logits_C.argmax())
                share = float(_shares(logits_C)[best])
                predictions.append(
                    {"label": self.labels[best], "probability": share, "exit_layer": layer}
                )
        return predictions

    def checked(self, text: Any) -> tuple[str, ...]:
        """Check a text or a pair, and return its texts in the order of the task's columns.

        Raises:
            RunnerError: it is no text or pair.
        """
        parts = (text,) if isinstance(text, str) else text
        if isinstance(parts, Mapping):
            parts = tuple(parts.get(name) for name in self.columns)
        listed = isinstance(parts, list | tuple) and all(isinstance(each, str) for each in parts)
        if not listed or len(parts) != len(self.columns):
            kind = "a pair of texts" if len(self.columns) == 2 else "a text"
            raise RunnerError(f"{_short(text)} is not {kind} ({', '.join(self.columns)})")
        for part in parts:
            if fault := _fault(part):
                raise RunnerError(f"{_short(text)}: a text of it {fault}")
        return tuple(parts)

    def encode(self, rows: Sequence[tuple[str, ...]]) -> list[dict[str, list[int]]]:
        """Tokenize texts.

        Args:
            rows: texts or pairs, as `checked` returns them.

        Returns:
            The tokens of each row, as `run` takes them.
        """
        encoded: list[tuple[list[int], list[int]]] = []
        for portion in _portions(rows):
            if len(self.columns) == 2:
                encoded += self._pairs(portion)
            else:
                single = self._tokenizer.encode_batch([text for (text,) in portion])
                encoded += [(each.ids, each.type_ids) for each in single]
        if not self.about["token_type_ids"]:
            return [{"input_ids": ids} for ids, _ in encoded]
        return [{"input_ids": ids, "token_type_ids": types} for ids, types in encoded]

    def operating_point(
        self,
        *,
        threshold: float | Sequence[float] | None = None,
        target_saving: float | None = None,
    ) -> dict[str, Any]:
        """Return the thresholds, temperatures and prior of a target, as `run` takes them.

        Raises:
            RunnerError: there is no such saving, or the threshold does not fit.
        """
        if threshold is not None and target_saving is not None:
            raise RunnerError("threshold= and target_saving=: ask for one of them")
        if threshold is not None:
            if self._limits(threshold).any() and self.rule.relative:
                raise RunnerError(
                    f"threshold={_short(threshold)}: the exit rule {self.about['rule']['name']} "
                    "needs a prior, which goes with a target; use target_saving="
                )
            return {"thresholds": threshold}
        point = self.about["operating_point"]
        if target_saving is not None:
            known = {each["target_saving"]: each for each in self.about["savings"]}
            if target_saving not in known:
                raise RunnerError(
                    f"target_saving={target_saving} is not in this export, which has: "
                    f"{', '.join(map(str, known)) or 'none'}; give threshold=, or "
                    "export it with the saving that you want"
                )
            point = known[target_saving]
        return {name: point.get(name) for name in ("thresholds", "temperatures", "prior")}

    def run(
        self,
        inputs: Sequence[Mapping[str, Sequence[int]]],
        thresholds: float | Sequence[float],
        temperatures: Sequence[float] | None = None,
        prior: Sequence[float] | None = None,
    ) -> Answers:
        """Answer inputs that are given as tokens.

        Args:
            inputs: the tokens of each input: `input_ids` and, if the model knows them,
                `token_type_ids`. They are whole numbers, unpadded.
            thresholds: one number for all ramps, or L-1. An input leaves at the first ramp whose
                score is strictly under its threshold.
            temperatures: one number for each ramp. The logits are divided by it before the exit
                rule.
            prior: the shares of the classes, if the exit rule is relative to them.

        Raises:
            RunnerError: an input has no tokens, or the thresholds do not fit.
        """
        inputs = [self._cut(tokens) for tokens in inputs]
        limits_L = self._limits(thresholds)
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
                    self._run(rows, inputs, limits_L, temperatures, prior, out)
        return out

    def _run(
        self,
        rows: list[int],
        inputs: Sequence[Mapping[str, Sequence[int]]],
        limits_L: np.ndarray,
        temperatures: Sequence[float] | None,
        prior: Sequence[float] | None,
        out: Answers,
    ) -> None:
        """Run a batch until all inputs have left, and write their answers into `out`."""
        rows_B = np.array(rows)
        length_B = np.array([len(inputs[row]["input_ids"]) for row in rows])
        batch = [inputs[row] for row in rows]
        ids_BS = _padded(batch, "input_ids", self.about["pad_token_id"])
        second_B = _second_text(ids_BS, self.about.get("sep_token_id"))
        embedded = self.embeddings(
            input_ids=ids_BS,
            token_type_ids=_padded(batch, "token_type_ids", 0),
        )
        hidden_BSH = embedded["hidden"]
        bias_1ASS = embedded.get("attention_bias")  # of models whose layers take one
        previous_BC = np.zeros((len(rows), self.num_labels), np.float32)  # for the first ramp
        for index, layer in enumerate(self.layers):
            mask_BS = np.arange(hidden_BSH.shape[1]) < length_B[:, None]
            outputs = layer(
                hidden=hidden_BSH,
                mask=mask_BS.astype(np.int32),
                second=second_B,
                previous=previous_BC,
                attention_bias=bias_1ASS,
            )
            previous_BC = out.ramps_NLC[rows_B, index] = outputs["logits"]
            if index == self.num_layers - 1:  # the final classifier answers all inputs, by no rule
                out.logits_NC[rows_B], out.layer_N[rows_B] = previous_BC, self.num_layers
                return
            hidden_BSH = outputs["new"]
            if not limits_L[index] > 0:
                continue
            ramps_BKC = out.ramps_NLC[rows_B, : index + 1]
            if temperatures is not None:
                ramps_BKC = ramps_BKC / np.array(temperatures[: index + 1], np.float32)[:, None]
            learned_score_B = outputs["learned_score"][:, 0] if "learned_score" in outputs else None
            score_B, answer_BC = self.rule(ramps_BKC, learned_score_B, prior)
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
            longest = length_B.max()
            hidden_BSH = hidden_BSH[~leave_B, :longest]
            bias_1ASS = None if bias_1ASS is None else bias_1ASS[..., :longest, :longest]

    def _limits(self, thresholds: Any) -> np.ndarray:
        """Return the threshold of each ramp but the last: (L-1,).

        Raises:
            RunnerError: they are not as many, or one is no number >= 0.
        """
        try:
            limits = np.array(thresholds, np.float32)
            fits = limits.shape in ((), (self.num_layers - 1,)) and bool((limits >= 0).all())
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise RunnerError(
                f"threshold={_short(thresholds)} must be a number >= 0 (0 never exits), or a list "
                f"of {self.num_layers - 1}, one for each ramp but the last"
            )
        return np.broadcast_to(limits, (self.num_layers - 1,))

    def _cut(self, tokens: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
        """Cut an input that is too long, as the tokenizer does: the closing token stays.

        Raises:
            RunnerError: the input has no tokens.
        """
        longest = self.about["longest_input"]
        if not tokens["input_ids"]:
            raise RunnerError("an input has no tokens (input_ids=[])")
        if len(tokens["input_ids"]) <= longest:
            return tokens
        return {name: [*values[: longest - 1], values[-1]] for name, values in tokens.items()}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer, with the length that it cuts texts to."""
        file = self.folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no more special class
            raise RunnerError(f"{file} cannot be read: {_first_line(error)}") from error
        if tokenizer.truncation is None:
            raise RunnerError(f"{file} does not say how texts are cut; export the model again")
        return tokenizer

    @cached_property
    def _pairs(self) -> "_Pairs":
        """The tokenizer of pairs."""
        return _Pairs(self._tokenizer)


class _Pairs:
    """A tokenizer of pairs of texts, which cuts the longer text of a pair first.

    The library can cut pairs, too. But it keeps every combination of the tokens that it cuts off,
    so that time and memory grow with the square of the texts' length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        cut = tokenizer.truncation or {}
        self.at_the_left = cut["direction"] == "left"
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.room = cut["max_length"] - self.tokenizer.num_special_tokens_to_add(is_pair=True)
        pair = self.tokenizer.encode("a", "a")
        tokens = list(zip(pair.ids, pair.type_ids, pair.sequence_ids, strict=True))
        # The special tokens around the texts, and one entry for each text.
        self.layout = [
            (token, kind, part)
            for i, (token, kind, part) in enumerate(tokens)
            if part is None or i == 0 or part != tokens[i - 1][2]
        ]

    def __call__(self, rows: Sequence[tuple[str, ...]]) -> list[tuple[list[int], list[int]]]:
        """Return the ids and the type ids of each pair."""
        columns = [
            [each.ids for each in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
            for texts in map(list, zip(*rows, strict=True))
        ]
        return [self._joined(first, second) for first, second in zip(*columns, strict=True)]

    def _joined(self, first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
        """Cut the ids of two texts, and join them with the special tokens."""
        stay = _longest_first(len(first), len(second), self.room)
        texts = [
            text[len(text) - most :] if self.at_the_left else text[:most]
            for text, most in zip((first, second), stay, strict=True)
        ]
        ids: list[int] = []
        types: list[int] = []
        for token, kind, part in self.layout:
            tokens = [token] if part is None else texts[part]
            ids += tokens
            types += [kind] * len(tokens)
        return ids, types


class Block:
    """A loaded graph. It takes and returns arrays by name.

    Args:
        file: the file of the graph, or its content.
        threads: the number of the processor's threads; None: one for each core.

    Raises:
        RunnerError: it cannot be loaded.
    """

    def __init__(self, file: Path | bytes, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Each graph has threads of its own. Threads that spin while they wait take the processor
        # from the others. With one input at a time on a busy machine of 2 cores that was 15 times
        # slower.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = self._session(file, options)
        except Exception as error:  # the errors of ONNX Runtime have no class in common
            name = "a graph" if isinstance(file, bytes) else file
            raise RunnerError(f"{name} cannot be loaded: {_first_line(error)}") from error
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]

    def _session(self, file: Path | bytes, options: Any) -> Any:
        """Load a graph."""
        # The fallback would only try the same again, and print a message.
        how = {"providers": ["CPUExecutionProvider"], "enable_fallback": False}
        try:
            return onnxruntime.InferenceSession(file, options, **how)
        except RuntimeError as error:
            if "global thread pool" not in str(error):
                raise
            # This process has such a pool already (deebert's engine makes one with runtime=onnx).
            options.use_per_session_threads, options.intra_op_num_threads = False, 0
            return onnxruntime.InferenceSession(file, options, **how)

    def __call__(self, **arrays: np.ndarray | None) -> dict[str, np.ndarray]:
        """Run the graph. Arrays that it does not take are left out."""
        inputs = {name: arrays[name] for name in self.inputs}
        return dict(zip(self.outputs, self.session.run(None, inputs), strict=True))


class ExitRule:
    """The exit rule of an export.

    Args:
        graph: the graph of the rule. It reads the last ramp alone, or all ramps of the model.
    """

    def __init__(self, graph: Block) -> None:
        self.graph, self.relative = graph, "prior" in graph.inputs
        self.num_ramps: int = graph.session.get_inputs()[0].shape[1]

    def __call__(
        self,
        ramps_BKC: np.ndarray,
        learned_score_B: np.ndarray | None,
        prior: Sequence[float] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute the exit scores of the last ramp.

        Args:
            ramps_BKC: the logits of the ramps so far.
            learned_score_B: the learned exit scores of the last ramp, if the ramps have them.
            prior: the shares of the classes, if the rule is relative to them.

        Returns:
            The exit scores (B,), and the logits (B, C) that answer an input which leaves here.
        """
        last_BC = ramps_BKC[:, -1]
        size, num_ramps = ramps_BKC.shape, min(ramps_BKC.shape[1], self.num_ramps)
        # The score of a ramp depends on no later ramp, whose logits may be any numbers.
        logits_BLC = np.zeros((size[0], self.num_ramps, size[2]), np.float32)
        logits_BLC[:, :num_ramps] = ramps_BKC[:, -num_ramps:]
        outputs = self.graph(
            logits=logits_BLC,
            learned_score=None if learned_score_B is None else learned_score_B[:, None],
            prior=None if prior is None else np.array(prior, np.float64),
        )
        answer_BC = outputs["answer"][:, num_ramps - 1] if "answer" in outputs else last_BC
        return outputs["score"][:, num_ramps - 1], answer_BC


def _about(folder: Path) -> dict[str, Any]:
    """Read deebert.json.

    Raises:
        RunnerError: it is missing or damaged, or this runner cannot read its schema.
    """
    file = folder / "deebert.json"
    try:
        about = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise RunnerError(f"{file} {why}; write one with deebert export") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise RunnerError(f"{file} is of no export; write one with deebert export")
    if about.get("schema") != SCHEMA:
        raise RunnerError(
            f"{file} has schema {about.get('schema')}, this runner reads {SCHEMA}: use the "
            "runner.py that lies beside it"
        )
    return about


def _fault(text: str) -> str | None:
    """Return the reason why deebert does not read a text, or None. An empty text is read."""
    if "\0" in text:
        return "holds a NUL character"
    if len(text) > LONGEST_TEXT:
        return f"has {len(text):,} characters, more than {LONGEST_TEXT:,}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character"
    return None


def _portions(rows: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Yield the rows in portions of about as many characters as are tokenized together."""
    portion: list[tuple[str, ...]] = []
    size = 0
    for row in rows:
        portion.append(row)
        size += sum(map(len, row))
        if size >= AT_ONCE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _second_text(ids_BS: np.ndarray, separator: int | None) -> np.ndarray:
    """Return where each second text begins: after the first separator, or at the end."""
    separates_BS = ids_BS == separator
    first_B = separates_BS.argmax(1) + 1
    return np.where(separates_BS.any(1), first_B, ids_BS.shape[1])


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of two texts stay, as `tokenizers` cuts them."""
    if first + second <= room:
        return first, second
    if first > second:
        return _longest_first(second, first, room)[::-1]
    if 2 * first <= room:
        return first, room - first
    return room // 2, room - room // 2


def _by_length(rows: Iterable[int], inputs: Sequence[Any]) -> Iterator[list[int]]:
    """Yield batches of rows of similar length, shortest first, under the token budget."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: len(inputs[row]["input_ids"])):
        if batch and (len(batch) + 1) * len(inputs[row]["input_ids"]) > TOKEN_BUDGET:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(batch: Sequence[Mapping[str, Sequence[int]]], name: str, fill: int) -> np.ndarray:
    """Return whole numbers of a batch as (B, S), with `fill` where an input has none."""
    longest = max(len(tokens["input_ids"]) for tokens in batch)
    padded = np.full((len(batch), longest), fill, np.int64)
    for row, tokens in zip(padded, batch, strict=True):
        values = tokens.get(name, ())
        row[: len(values)] = values
    return padded


def _short(value: Any) -> str:
    """Return a value for a message, in 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _option(argument: str) -> tuple[str, Any]:
    """Read a `name=value` of the command line.

    Raises:
        RunnerError: the name is unknown, or the value does not fit.
    """
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
        RunnerError: an option, the folder or a line is wrong. The lines before it are answered.
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
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text or text.isspace():
                    continue
                rows.append(runner.checked(json.loads(text)))
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
    except BrokenPipeError:  # the reader of the answers has closed its end of the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
