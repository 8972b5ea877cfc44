"""A task made from a user's own file: which columns, which labels, which rows in which part."""

import json
from pathlib import Path

import datasets
import pytest

from deebert.data import file_split, loading
from deebert.data.file_split import SplitFile
from deebert.data.own_task import Columns, task_values
from deebert.data.tasks import DataConfig, Task
from deebert.errors import UserError

WORDS = ("a fine film", "no good at all", "who knows", "well made, I say")


def rows(number: int = 12, **columns: object) -> list[dict]:
    """Rows with a text and the given columns: a value for all rows, or a list to go through."""
    return [
        {"id": f"r{n}", "body": f"{WORDS[n % 4]} number {n}"}
        | {
            key: value[n % len(value)] if isinstance(value, list) else value
            for key, value in columns.items()
        }
        for n in range(number)
    ]


def write(file: Path, given: list[dict]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(given).to_parquet(str(file))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
    else:
        lines = [list(given[0]), *(row.values() for row in given)]
        file.write_text("".join(",".join(f'"{v}"' for v in line) + "\n" for line in lines))
    return str(file)


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    cases = [
        # columns, what the user says -> texts, label
        ({"kind": ["x", "y"]}, {}, ["body"], "kind"),
        ({"Label": ["x", "y"], "lang": ["en", "de"]}, {}, ["body"], "Label"),
        ({"category": ["x", "y"], "text": ["one", "two", "three"]}, {"text": "text"}, ["text"], "category"),
        ({"kind": ["not spam", "real spam"]}, {}, ["body"], "kind"),  # labels of several words
        ({"kind": ["x", "y"], "city": ["a", "b", "c"]}, {"label": "city"}, ["body"], "city"),
        ({"kind": ["x", "y"], "title": "a b"}, {"text": ["title", "body"]}, ["title", "body"], "kind"),
        ({"kind": ["x", "y"]}, {"text": "id", "label": "kind"}, ["id"], "kind"),
        ({"price": [n + 0.5 for n in range(12)]}, {"regression": True}, ["body"], "price"),
    ]  # fmt: skip
    for number, (columns, options, texts, label) in enumerate(cases):
        for suffix in ("csv", "jsonl", "parquet"):
            file = write(tmp_path / f"{number}.{suffix}", rows(**columns))
            values = task_values(file, Columns(**options))
            assert (values["columns"], values["label"]) == (texts, label), (
                columns,
                options,
                suffix,
            )
            assert Task.from_config(values).is_regression == ("regression" in options)
    japanese = [{"body": f"素晴らしい映画{n}", "kind": "xy"[n % 2]} for n in range(8)]
    assert task_values(write(tmp_path / "j.csv", japanese), Columns())["columns"] == ["body"]


def test_labels_have_a_stable_order(tmp_path: Path) -> None:
    cases = [
        (["b", "a", "C"], ["C", "a", "b"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["2.0", "2", "-3"], ["-3", "2"]),
        ([" x", "y ", "x"], ["x", "y"]),  # spaces around a label are none of it
        ([True, False], ["false", "true"]),
        ([3, 1, 2], ["1", "2", "3"]),
        ([1.0, 0.0], ["0", "1"]),
    ]
    for values, expected in cases:
        for given in (rows(label=values), rows(label=values)[::-1]):
            file = write(tmp_path / "rows.jsonl", given)
            task = Task.from_config(task_values(file, Columns()))
            assert list(task.labels or ()) == expected
            loaded = loading.load(task, "train", SplitFile(file, 0.5, 0))
            assert set(loaded["label"][:]) == set(range(len(expected)))
    named = datasets.ClassLabel(names=["z", "a"])  # a file that states its classes is followed
    features = datasets.Features({"body": datasets.Value("string"), "label": named})
    given = [{"body": f"a text {n}", "label": n % 2} for n in range(8)]
    datasets.Dataset.from_list(given, features).to_parquet(str(tmp_path / "named.parquet"))
    assert task_values(str(tmp_path / "named.parquet"), Columns())["labels"] == ["z", "a"]


def test_labels_of_a_model_are_not_guessed_from_numbers(tmp_path: Path) -> None:
    names = ("NEGATIVE", "NEUTRAL", "POSITIVE")
    cases = [
        ([0, 1, 2], list(names)),
        (["2", "1", "0"], list(names)),
        (["positive", "Neutral", "negative"], ["negative", "Neutral", "positive"]),
        (
            [1, 2, 3],
            "has 1, 2, 3, and the model's labels are NEGATIVE, NEUTRAL, POSITIVE: .*0 to 2",
        ),
        ([1, 2], "has 1, 2, and the model's labels are"),
        ([-1, 0, 1], "has -1, 0, 1, and the model's labels are"),
    ]
    for values, expected in cases:
        file = write(tmp_path / "rows.jsonl", rows(label=values))
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                task_values(file, Columns(), names)
        else:
            assert task_values(file, Columns(), names)["labels"] == expected, values
    # A model whose names are numbers has them compared by value; a file may state its names.
    file = write(tmp_path / "rows.jsonl", rows(label=[1, 2]))
    assert task_values(file, Columns(), ("2", "1"))["labels"] == ["2", "1"]
    features = datasets.Features(
        {"body": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes", "?"])}
    )
    given = [{"body": f"a text {n}", "label": 1 + n % 2} for n in range(8)]
    datasets.Dataset.from_list(given, features).to_parquet(str(tmp_path / "named.parquet"))
    values = task_values(str(tmp_path / "named.parquet"), Columns(), ("YES", "NO", "?"))
    assert values["labels"] == ["yes", "no", "?"]


def test_labels_that_differ_in_case_alone_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "rows.csv", rows(label=["Good", "good", "bad"]))
    assert task_values(file, Columns())["labels"] == ["Good", "bad", "good"]
    [warning] = caplog.messages
    assert warning.endswith("differ only in case, and each is a class of its own: Good, good")


def test_a_folder_in_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for place, number in ((folder, 12), (folder / "set", 6)):
        write(place / "train.csv", rows(number, label=["x", "y"]))
        write(place / "validation.csv", rows(number // 2, label=["x", "y"]))
    task = Task.from_config(task_values(str(folder), Columns()))
    assert task.name == "set"
    root = DataConfig(file=str(folder)).source(task)
    assert [len(loading.load(task, split, root)) for split in ("train", "validation")] == [12, 6]
    (folder / "validation.csv").unlink()
    assert not loading.exists(task, "validation", root)
    with pytest.raises(UserError, match=r"^data.file=.*set: it holds no file validation or dev"):
        loading.load(task, "validation", root)
    assert len(loading.load(task, "validation", str(folder))) == 3, "data.root= has other places"


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    numbers = [n / 3 for n in range(60)]
    cases = [
        (rows(kind=["x", "y"], city=["a", "b"]), {}, "may be the label: kind, city; name one: data.label=kind"),
        (rows(kind=["x", "y"], title=[f"some title {n}" for n in range(12)]), {}, "may be the text: body, title; .*'data.text=\\[body,title\\]'"),
        (rows(), {}, "no column looks like a label .*: data.label=COLUMN; it has: id, body"),
        (rows(label="x"), {}, "one value alone"),
        (rows(label=[f"x{n}" for n in range(12)]), {}, "12 different values in 12 rows, which are no labels"),
        (rows(60, label=numbers), {}, r"60 different numbers \(0.0, 0.33.*\): say data.regression=true .* or data.regression=false"),
        (rows(120, label=list(range(60))), {}, "60 different numbers"),
        (rows(label=["x", "y"]), {"text": "none"}, "data.text=none: .* has no such column; it has: id, body, label"),
        (rows(label=["x", "y"]), {"text": "label", "label": "label"}, "is one of the texts"),
        (rows(label=["x", "y"]), {"text": ["a", "b", "c"]}, "a list of two"),
        (rows(label=["x", "y"]), {"regression": 1}, "must be true or false"),
        ([{"a;label": "x;y"}] * 4, {}, "';' looks like its separator"),
        ([{"a fine film": f"a text {n}", "good": ("bad", "good")[n % 2]} for n in range(8)], {}, "its first line calls a column 'good', .*: has it no line of column names"),
        ([{"a fine film": f"a text {n}", "1": n % 2} for n in range(8)], {"label": "1"}, "calls a column '1'"),
        (rows(label=["x", "y"], text=[f"some text {n}" for n in range(12)]), {}, "may be the text: text, body; .*'data.text=\\[text,body\\]'"),
        (rows(label=["x", "y"], text=["one", "two", "three"]), {}, "may be the text: text, body"),
        (rows(category=["x", "y"], verdict=["a", "b"]), {}, "may be the label: category, verdict"),
        (rows(label=[1.5, 2.5, 3.0]), {}, r"3 different numbers \(1.5, 2.5, 3.0, ...\): say data.regression=true"),
        (rows(label=["x", "y"]), {"text": ["body", "body"]}, r"data.text=\[body,body\] names a column twice"),
        (rows(label=["x", "???"]), {}, "'\\?\\?\\?' can be no name"),
    ]  # fmt: skip
    for given, options, message in cases:
        with pytest.raises(UserError, match=message):
            task_values(write(tmp_path / "rows.csv", given), Columns(**options))
    for nested in (["x"], {"a": 1}):
        file = write(tmp_path / "rows.jsonl", rows(label=[nested, ["y"]]))
        with pytest.raises(UserError, match="column 'label' holds lists or objects"):
            task_values(file, Columns())
    # JSON always names its columns.
    file = write(tmp_path / "rows.jsonl", rows(spam=["spam", "ham"]))
    assert task_values(file, Columns())["labels"] == ["ham", "spam"]
    # Said to be classes, numbers are classes.
    file = write(tmp_path / "rows.csv", rows(label=[1.5, 2.5]))
    assert task_values(file, Columns(regression=False))["labels"] == ["1.5", "2.5"]
    file = write(tmp_path / "rows.csv", rows(120, label=list(range(60))))
    assert task_values(file, Columns(regression=False))["labels"][:3] == ["0", "1", "2"]
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    for name, message in (
        ("rows.xlsx", "its ending is none of .csv"),
        ("gone.csv", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            task_values(str(tmp_path / name), Columns())
    (tmp_path / "bad.csv").write_text("body,label\na b,x\na b\n")
    with pytest.raises(UserError, match=r"bad\.csv, line 3: it has 1 fields"):
        task_values(str(tmp_path / "bad.csv"), Columns())


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    for name in ("validation", "dev", "valid", "val"):
        folder = tmp_path / name / "my set"
        write(folder / "train.csv", rows(label=["x", "y"]))
        with pytest.raises(UserError, match="no file validation or dev or valid or val"):
            task_values(str(folder), Columns())
        write(folder / f"{name}.csv", rows(4, label=["y", "x"]))
        values = task_values(str(folder), Columns())
        assert (values["name"], values["test"]) == ("my_set", [])
        task = Task.from_config(values)
        root = DataConfig(file=str(folder)).source(task)
        assert loading.load(task, "validation", root)["label"][:] == [1, 0, 1, 0]
        assert len(loading.load(task, "train", root)) == 12


def test_the_split_is_stratified_and_seeded(tmp_path: Path) -> None:
    labels = ["x"] * 60 + ["y"] * 38 + ["z"] * 2 + ["lonely"]
    file = write(tmp_path / "rows.csv", rows(101, label=labels))
    task = Task.from_config(task_values(file, Columns()))

    def parts(share: float = 0.2, seed: int = 0) -> list[datasets.Dataset]:
        source = SplitFile(file, share, seed)
        return [loading.load(task, split, source) for split in ("train", "validation")]

    train, validation = parts()
    assert sorted(train["index"][:] + validation["index"][:]) == list(range(101))
    assert train["index"][:] == sorted(train["index"][:])
    names = list(task.labels or ())
    counts = {name: validation["label"][:].count(names.index(name)) for name in names}
    assert counts == {"lonely": 0, "x": 12, "y": 8, "z": 1}
    assert parts()[1]["index"][:] == validation["index"][:]
    assert parts(seed=1)[1]["index"][:] != validation["index"][:]
    assert len(parts(share=0.5)[1]) == 50
    with pytest.raises(UserError, match=r"no split 'test'; choose one of: train, validation"):
        loading.load(task, "test", SplitFile(file, 0.2, 0))
    line = file_split.summary(train["label"][:], len(validation), task.labels)
    assert line == "80 rows to train on, 21 to validate on; labels: lonely 1, x 48, y 30, z 1"
    [oddity] = file_split.oddities(train, validation, task.labels)
    assert "uneven: 1 training rows of 'lonely', 48 of 'x'" in oddity
    assert oddity.endswith("accuracy says little of rare labels, and f1_macro says more")


def test_texts_in_both_parts_are_told(tmp_path: Path) -> None:
    given = rows(100, label=["x", "y"])
    for row in given[:60]:
        row["body"] = "the same text" if row["label"] == "x" else "the  same\ttext"
    file = write(tmp_path / "rows.jsonl", given)
    task = Task.from_config(task_values(file, Columns(text="body")))
    source = SplitFile(file, 0.2, 0)
    train, validation = (loading.load(task, split, source) for split in ("train", "validation"))
    again = sum("same" in text for text in validation["text_a"][:])
    [oddity] = file_split.oddities(train, validation, task.labels)
    assert again > 5
    assert f"stand again in {again} of 20 validation rows" in oddity


def test_the_score_is_named(tmp_path: Path) -> None:
    two, three = (
        write(tmp_path / f"{len(labels)}.csv", rows(30, label=labels))
        for labels in (["x", "y"], ["x", "y", "z"])
    )
    numbers = write(tmp_path / "numbers.csv", rows(30, label=[n + 0.5 for n in range(30)]))
    cases = [
        (two, {}, ("accuracy", "matthews")),
        (two, {"metric": "f1"}, ("f1", "accuracy", "matthews")),
        (two, {"metric": "matthews"}, ("matthews", "accuracy")),
        (three, {"metric": "f1_macro"}, ("f1_macro", "accuracy")),
        (three, {"metric": "f1_weighted"}, ("f1_weighted", "accuracy")),
        (three, {"metric": "accuracy"}, ("accuracy",)),
        (numbers, {"metric": "pearson", "regression": True}, ("pearson", "spearman")),
    ]
    for file, given, expected in cases:
        task = Task.from_config(task_values(file, Columns(**given)))
        assert task.metrics == expected, given
    of_classes = "accuracy, f1_macro, f1_weighted, matthews"
    for file, given, says in [
        (three, {"metric": "f1"}, f"data.metric=f1 is no score of 3 labels; choose one of: {of_classes}"),
        (two, {"metric": "F1"}, "data.metric=F1 is no score of 2 labels; choose one of: accuracy, f1, f1_macro, f1_weighted, matthews"),
        (three, {"metric": ["f1_macro"]}, "data.metric=['f1_macro'] is no score"),
        (numbers, {"metric": "f1_macro", "regression": True}, "is no score of numbers; choose one of: pearson, spearman"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as error:
            task_values(file, Columns(**given))
        assert says in str(error.value)


def test_two_rows_of_a_regression(tmp_path: Path) -> None:
    given = rows(30, price=[n + 0.5 for n in range(30)])
    file = write(tmp_path / "rows.csv", given)
    task = Task.from_config(task_values(file, Columns(regression=True, label="price")))
    assert task.metrics == ("spearman", "pearson")
    validation = loading.load(task, "validation", SplitFile(file, 0.2, 0))
    assert len(validation) == 6
    assert set(validation["label"][:]) <= {n + 0.5 for n in range(30)}
    with pytest.raises(UserError, match="too few to train and validate on"):
        loading.load(task, "train", SplitFile(write(tmp_path / "one.csv", given[:1]), 0.2, 0))
