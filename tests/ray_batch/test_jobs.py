"""What a batch is asked for: the same requests as a plain run, or a file of jobs, read as a stream."""

from itertools import islice
from pathlib import Path

import pytest

from moeca_dist import Request, UserError
from moeca_dist.ray_batch.jobs import JobsFile, LabelCycle


def test_labels_take_turns_as_in_a_plain_run() -> None:
    source = LabelCycle(5, [range(3, 5), range(7, 8)], seed=9)
    assert list(source) == [Request(index, label, 9) for index, label in enumerate([3, 4, 7, 3, 4])]
    assert list(source) == list(source)
    assert source.identity() == {"labels": "3-4,7", "seed": 9}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("jobs.jsonl", '{"label": 1, "seed": 2, "count": 2}\n\n{"label": 0}\n'),
        ("jobs.csv", "label,seed,count\n1,2,2\n\n0,,\n"),
        ("jobs.csv", "count,label,seed\r\n2,1,2\r\n1,0,0\r\n"),
    ],
)
def test_jobs_are_numbered_through_the_file(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    source = JobsFile(path)
    assert source.count_images(num_classes=2) == 3
    assert list(source) == [Request(0, 1, 2), Request(1, 1, 2), Request(2, 0, 0)]


def test_jobs_are_read_as_they_are_wanted(tmp_path: Path) -> None:
    """The first requests of a huge job are there at once, and what is wrong further down is not yet seen."""
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"label": 0, "count": 4000000000}\nnonsense\n')
    assert [request.index for request in islice(JobsFile(path), 3)] == [0, 1, 2]


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"label": 1}\n')
    second.write_text('{"label": 2}\n')
    assert JobsFile(first).identity() != JobsFile(second).identity()


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("j.jsonl", '{"label": 1}\n{"label": 12}\n', "line 2: label 12 is out of range: this model has 10 classes"),
        ("j.jsonl", '{"label": 1}\n\n{"label": -1}\n', "line 3: label: must be greater than or equal to 0"),
        ("j.jsonl", '{"label": 1.5}\n', "line 1: label: must be a valid integer"),
        ("j.jsonl", '{"label": true}\n', "line 1: label: must be a valid integer"),
        ("j.jsonl", '{"label": "1"}\n', "line 1: label: must be a valid integer"),
        ("j.jsonl", '{"seed": 1}\n', "line 1: label: Field required"),
        ("j.jsonl", '{"label": 1, "sed": 1}\n', "line 1: sed: is not permitted"),
        ("j.jsonl", '{"label": 1, "count": 0}\n', "line 1: count: must be greater than or equal to 1"),
        ("j.jsonl", '{"label": 1, "seed": 4294967296}\n', "line 1: seed: must be less than 4294967296"),
        ("j.jsonl", '{"label": 1}\n{"label": 1\n', "line 2: Invalid JSON"),
        ("j.jsonl", '{"label": 1, "count": 4294967297}\n', "line 1: more than 4294967296 images"),
        ("j.jsonl", "\n", "holds no jobs"),
        ("j.csv", "", "line 1: the header must name the columns"),
        ("j.csv", "1,2,3\n", "line 1: the header must name the columns"),
        ("j.csv", "label,seed\n1,2\n1,2,3\n", "line 3: more cells"),
        ("j.csv", "label,seed\n1,2\nx,2\n", "line 3: label: must be a valid integer"),
        ("j.txt", "1\n", "neither a .jsonl nor a .csv file"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, name: str, text: str, problem: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        JobsFile(path).count_images(num_classes=10)
    assert problem in str(error.value) and str(path) in str(error.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the jobs file"):
        JobsFile(tmp_path / "none.jsonl").count_images(10)
    (tmp_path / "j.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        JobsFile(tmp_path / "j.jsonl").count_images(10)
