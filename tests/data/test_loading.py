import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, write_rows
from omegaconf import OmegaConf

from deebert.data import demo, labels, loading
from deebert.data.tasks import Task
from deebert.errors import UserError

CONF = ROOT / "conf" / "task"


def task(name: str) -> Task:
    return Task.from_config(OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")))


ROWS = [
    {"sentence1": 'He said "no.', "sentence2": "NA", "label": 1},
    {"sentence1": "b", "sentence2": "null", "label": 0},
    {"sentence1": "c", "sentence2": "d", "label": 1},
]


def columns(data: object) -> dict:
    return {name: data[name][:] for name in data.column_names}


EXPECTED = {
    "text_a": ['He said "no.', "b", "c"],
    "text_b": ["NA", "null", "d"],
    "index": [0, 1, 2],
    "label": [1, 0, 1],
}


@pytest.mark.parametrize("place", ["mrpc", "."])
def test_json_lines(tmp_path: Path, place: str) -> None:
    write_rows(tmp_path / place, "train", ROWS)
    assert columns(loading.load(task("mrpc"), "train", str(tmp_path))) == EXPECTED


def test_parquet_and_the_hub_s_shards(tmp_path: Path) -> None:
    (tmp_path / "mrpc").mkdir()
    for shard, rows in enumerate((ROWS[:2], ROWS[2:])):
        file = tmp_path / "mrpc" / f"validation-0000{shard}-of-00002.parquet"
        datasets.Dataset.from_list(rows).to_parquet(file)
    assert columns(loading.load(task("mrpc"), "validation", str(tmp_path))) == EXPECTED


def test_csv_with_label_names(tmp_path: Path) -> None:
    text = (
        'sentence1,sentence2,label\n"He said ""no.",NA,equivalent\nb,null,not_equivalent\nc,d,1\n'
    )
    (tmp_path / "train.csv").write_text(text)
    assert columns(loading.load(task("mrpc"), "train", str(tmp_path))) == EXPECTED


CLASSIC = {
    "mrpc": ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tHe said "no.\tNA', (['He said "no.'], ["NA"], [1])),
    "cola": ("CoLA", None, "gj04\t0\t*\tThey drank the pub.", (["They drank the pub."], None, [0])),
    "sst2": ("SST-2", "sentence\tlabel", 'a "smart\t1', (['a "smart'], None, [1])),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "0\tWhen?\tNow.\tnot_entailment", (["When?"], ["Now."], [1])),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tentailment", (["A."], ["B."], [0])),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1", (["A."], ["B."], [1])),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tA?\tB?\t1", (["A?"], ["B?"], [1])),
    "stsb": ("STS-B", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore", "0\tg\tf\t2012\t1\tx\ty\tA.\tB.\t2.500", (["A."], ["B."], [2.5])),
    "mnli": ("MNLI", "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label", "0\t9\tA.\tB.\tneutral\tcontradiction", (["A."], ["B."], [2])),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSIC)
def test_glue_s_classic_tsv_files(tmp_path: Path, name: str) -> None:
    folder, header, line, (first, second, ids) = CLASSIC[name]
    (tmp_path / folder).mkdir()
    split = task(name).validation[0]
    file = tmp_path / folder / f"{split.replace('validation', 'dev')}.tsv"
    file.write_text("\n".join(filter(None, [header, line])) + "\n")
    data = loading.load(task(name), split, str(tmp_path))
    assert data["text_a"][:] == first
    assert (data["text_b"][:] if second else None) == second
    assert data["label"][:] == ids


def test_cola_s_files_with_and_without_a_header(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its training file has none, its test file has one, and so may a file of the user's. Some of
    GLUE's files have broken rows."""
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "test.tsv").write_text("index\tsentence\n0\tBill fell.\n")
    (tmp_path / "CoLA" / "dev.tsv").write_text('sentence\tlabel\nA "fine one.\t1\n\tacceptable\n')
    assert columns(loading.load(task("cola"), "test", str(tmp_path))) == {"text_a": ["Bill fell."], "index": [0]}  # fmt: skip
    data = loading.load(task("cola"), "validation", str(tmp_path))
    assert (data["text_a"][:], data["label"][:]) == (['A "fine one.', ""], [1, 1])
    (tmp_path / "CoLA" / "train.tsv").write_text("gj04\t1\t\tBill fell.\ngj04\t1\tBill\n")
    assert loading.load(task("cola"), "train", str(tmp_path))["text_a"][:] == ["Bill fell."]
    assert "train.tsv: 1 rows have another number of fields than the header: left out" in (
        caplog.text
    )


def test_the_hub_s_own_names_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    names = datasets.ClassLabel(names=["acceptable", "unacceptable"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})
    rows = {"sentence": ["a", "b", "c"], "label": [0, 1, -1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)  # no network here
    assert loading.load(task("cola"), "train", None)["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("group", "says"),
    [(1.5, "is 1.5, not a whole number"), (None, "is null"), (True, "is True"), ("x", "is 'x'"), (2**63, "is 9223372036854775808"), ("\u2460", "not a whole number")],
)  # fmt: skip
def test_groups_are_whole_numbers(tmp_path: Path, group: object, says: str) -> None:
    kind = replace(task("sst2"), group="group")
    rows = [{"sentence": "a", "label": 1, "group": each} for each in (1, "2", 3.0)]
    write_rows(tmp_path, "train", rows)
    assert loading.load(kind, "train", str(tmp_path))["group"][:] == [1, 2, 3]
    write_rows(tmp_path, "train", [*rows, rows[0] | {"group": group}])
    with pytest.raises(UserError, match="line 4: its 'group' ") as error:
        loading.load(kind, "train", str(tmp_path))
    assert says in str(error.value)


def test_another_file_of_the_split_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path, "train", ROWS)
    (tmp_path / "train.csv").write_text("sentence1,sentence2,label\nother,rows,1\n")
    assert columns(loading.load(task("mrpc"), "train", str(tmp_path))) == EXPECTED
    assert "split 'train' is read from train.jsonl, and not from train.csv" in caplog.text


def test_a_regression_s_numbers(tmp_path: Path) -> None:
    kind = task("stsb")
    assert labels.ids([1, 2.5, "3", " -.5 ", "1e1"], kind, str) == [1, 2.5, 3, -0.5, 10]
    for wrong in (True, None, "1_0", "\u0663", "nan", "inf", float("nan"), 10**400, [1], "", "1,5"):
        with pytest.raises(UserError, match=r"0: label .* is a regression and needs a number"):
            labels.ids([wrong], kind, str)


@pytest.mark.parametrize(
    ("names", "values", "ids"),
    [
        (["1", "2", "3", "4", "5"], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4]),
        (["1", "2", "3"], ["3", "1", 2.0], [2, 0, 1]),
        (["1", "0"], [0, 1, "1"], [1, 0, 0]),
        (["-1", "1"], [-1, 1, "-1"], [0, 1, 0]),
        (["bad", "good"], ["good", 0, "1"], [1, 0, 1]),
        (["bad", "good"], [1.0, "0.0", "1"], [1, 0, 1]),
    ],
)
def test_label_names_that_look_like_numbers_are_names(names: list, values: list, ids: list) -> None:
    kind = replace(task("sst2"), labels=tuple(names))
    assert labels.ids(values, kind, str) == ids


def test_a_line_of_one_field_too_many_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("sentence1,sentence2,label\na,b,1,9\nc,d,0,9\n")
    with pytest.raises(UserError, match=r"train.csv, line 2: it has 4 fields, the header has 3"):
        loading.load(task("mrpc"), "train", str(tmp_path))


def test_all_shards_of_a_csv(tmp_path: Path) -> None:
    for shard, text in enumerate(("a,b,1", "c,d,0")):
        file = tmp_path / f"train-0000{shard}-of-00002.csv"
        file.write_text(f"\ufeffsentence1,sentence2,label\r\n{text}\r\n", encoding="utf-8")
    data = loading.load(task("mrpc"), "train", str(tmp_path))
    assert data["text_a"][:] == ["a", "c"]
    assert data["label"][:] == [1, 0]


def test_a_training_split_without_labels_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path, "train", [row | {"label": -1} for row in ROWS])
    with pytest.raises(UserError, match="no row of split 'train' has a label"):
        loading.load(task("mrpc"), "train", str(tmp_path))


def test_unlabelled_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path, "test", [row | {"label": -1} for row in ROWS])
    assert "label" not in loading.load(task("mrpc"), "test", str(tmp_path)).column_names
    write_rows(tmp_path, "train", [ROWS[0] | {"label": -1}, *ROWS[1:]])
    data = loading.load(task("mrpc"), "train", str(tmp_path))
    assert data["label"][:] == [0, 1]
    assert data["index"][:] == [1, 2]
    assert "1 rows of split 'train' have no label" in caplog.text


def test_regression_keeps_minus_one_among_other_values(tmp_path: Path) -> None:
    write_rows(tmp_path, "train", [row | {"label": v} for row, v in zip(ROWS, (-1, 0.5, 3), strict=True)])  # fmt: skip
    assert loading.load(task("stsb"), "train", str(tmp_path))["label"][:] == [-1, 0.5, 3]


BROKEN = {
    "missing column": ([{"sentence1": "a", "label": 1}], "lacks the column 'sentence2'; it has: sentence1, label"),
    "missing label": ([{"sentence1": "a", "sentence2": "b"}], "lacks the column 'label'"),
    "label too large": ([ROWS[1], ROWS[0] | {"label": 2}], "line 2: label 2 is out of range; task mrpc has: 0 not_equivalent, 1 equivalent"),
    "label of another task": ([ROWS[0] | {"label": "entailment"}], "label 'entailment' is out of range"),
    "label a list": ([ROWS[0] | {"label": [1]}], "label [1] is out of range"),
    "null text": ([ROWS[0], ROWS[1] | {"sentence2": None}], "line 2: its 'sentence2' is null, not a text"),
    "number for text": ([ROWS[0] | {"sentence1": 3}], "'sentence1' is 3, not a text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_one_clear_line(tmp_path: Path, case: str) -> None:
    rows, says = BROKEN[case]
    write_rows(tmp_path, "train", rows)
    with pytest.raises(UserError) as error:
        loading.load(task("mrpc"), "train", str(tmp_path))
    assert says in str(error.value)
    assert str(tmp_path / "train.jsonl") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", json.dumps({"sentence1": "a"})[:-4]])
def test_an_unreadable_or_empty_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"train\.jsonl") as error:
        loading.load(task("mrpc"), "train", str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_empty_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("sentence1,sentence2,label\n")
    with pytest.raises(UserError, match="split 'train' is empty"):
        loading.load(task("mrpc"), "train", str(tmp_path))


def test_regression_needs_numbers(tmp_path: Path) -> None:
    write_rows(tmp_path, "train", [ROWS[0] | {"label": "high"}])
    with pytest.raises(UserError, match="'high' is out of range; task stsb is a regression"):
        loading.load(task("stsb"), "train", str(tmp_path))


def test_missing_folder_and_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        loading.load(task("mrpc"), "train", str(tmp_path / "none"))
    write_rows(tmp_path / "mrpc", "train", ROWS)
    with pytest.raises(UserError, match=r"no file for split 'validation' .*there: train"):
        loading.load(task("mrpc"), "validation", str(tmp_path))


def test_no_network_names_data_root() -> None:
    with pytest.raises(UserError, match=r"cannot reach nyu-mll/glue.*data\.root=") as error:
        loading.load(task("mrpc"), "train", None)
    assert "\n" not in str(error.value)


def test_the_demo_is_fixed_balanced_and_without_overlap() -> None:
    seen: set = set()
    for split, size in demo.SPLIT_SIZES.items():
        rows = demo.rows(split)
        assert rows == demo.rows(split)
        assert len(rows) == size
        keys = {(row["product"], row["review"]) for row in rows}
        assert len(keys) == size
        assert not keys & seen
        seen |= keys
        for grade in (1, 2, 3):
            labels = [row["label"] for row in rows if row["grade"] == grade]
            assert 0.4 < sum(labels) / len(labels) < 0.6
            assert len(labels) > 0.2 * size
    with pytest.raises(UserError, match="choose one of: train, validation, test"):
        loading.load(task("demo"), "dev", None)


def test_the_demo_s_grades_are_what_they_say() -> None:
    rows = demo.rows("validation")
    cues = {word: label for label, words in enumerate((demo.BAD, demo.GOOD)) for word in words}

    def votes(row: dict) -> set[int]:
        words = row["review"].lower().replace(",", " ").replace(".", " ").split()
        return {cues[word] for word in words if word in cues}

    for row in rows:
        if row["grade"] == 1:
            assert votes(row) == {row["label"]}, "a cue word decides"
        elif row["grade"] == 2:
            assert votes(row) != {row["label"]}, "cue words alone mislead or contradict each other"
        else:
            assert votes(row) == set(), "no cue word at all"
