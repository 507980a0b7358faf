"""What a notebook imports: the examples of the package's own docstring, as they stand there."""

import doctest
from pathlib import Path

import mmray


def test_the_examples_of_the_package_do_what_they_say(rows: Path, bundle: str, tmp_path: Path) -> None:
    given = {"bundle": bundle, "table": str(rows), "output": str(tmp_path / "out")}
    (examples,) = doctest.DocTestFinder(recurse=False).find(mmray, "mmray", extraglobs=given)
    runner = doctest.DocTestRunner()
    runner.run(examples)
    assert runner.summarize() == (0, 8)


def test_each_name_is_there_and_says_what_it_does() -> None:
    for name in mmray.__all__:
        assert getattr(mmray, name).__doc__
        assert name in dir(mmray)
    assert repr(mmray.ScoreConfig(probabilities=True)).startswith("ScoreConfig(")
