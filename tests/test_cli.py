"""The command line as a new user meets it: what a mistake is answered with, and which code it exits with."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import saved_bundle, score_in_process

from mmray.bundle_info import read_info
from mmray.cli import build_parser, main
from mmray.options import ScoreConfig
from mmray.preprocess.header import read_header
from mmray.score.commit import Output

COMMANDS = next(action for action in build_parser()._actions if isinstance(action.choices, dict)).choices


def fails(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2) -> str:
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mmray: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def write_config(folder: Path, text: str) -> str:
    (folder / "run.toml").write_text(text)
    return str(folder / "run.toml")


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_help_of_each_command_fits_a_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert 3 < len(capsys.readouterr().out.splitlines()) <= 40


def test_a_shell_completes_commands_and_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--completion", "bash"])
    (tmp_path / "completion").write_text(capsys.readouterr().out)

    def completed(*words: str) -> set[str]:
        script = 'source completion; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_mmray; echo "${COMPREPLY[@]}"'
        command = ["bash", "-c", script, "bash", "mmray", *words]
        return set(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split())

    assert completed("ve") == {"verify"}
    assert {"--precision", "--probabilities", "--placement"} <= completed("score", "--p")
    assert completed("score", "compl") == {"completion"}, "a file of this folder"


def test_a_bundle_says_what_it_is(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", bundle]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^task +multiclass, 3 labels: blue, green, red$", said, re.MULTILINE)
    assert re.search(r"^image +cnn on \d+ x \d+ pixels; column 'image_path'$", said, re.MULTILINE)
    assert main(["inspect", bundle, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fingerprint"] == read_info(bundle).fingerprint
    assert found["bytes"].keys() == {path.name for path in Path(bundle).iterdir()}
    assert "no bundle at" in fails(capsys, ["inspect", "nowhere"])


def test_a_finished_run_becomes_a_page_that_names_its_rows_and_shows_no_cell(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(rows / "part-0.parquet")
    paths = ["secret/place.jpg", *table["image_path"].to_pylist()[1:]]
    pq.write_table(table.set_column(1, "image_path", pa.array(paths)), tmp_path / "rows.parquet")
    options, output = ScoreConfig(image_roots=(str(rows),)), tmp_path / "out"
    score_in_process(bundle, str(tmp_path / "rows.parquet"), str(output), options, stop_after=0)
    assert "holds no complete run" in fails(capsys, ["report", str(output)])
    score_in_process(bundle, str(tmp_path / "rows.parquet"), str(output), options)
    assert main(["report", str(output), "--before", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}/report.html\n"
    report, page = json.loads((output / "report.json").read_text()), (output / "report.html").read_text()
    assert report["scoring"]["ledger"] == {"rows": 20, "ok": 19, "degraded": 1, "failed": 0}
    assert report["scoring"]["verify"]["passed"]
    (missing,) = report["scoring"]["reasons"]
    assert re.fullmatch(r"data/part-0+-\w+\.parquet:0  image: MISSING: .*", missing["examples"][0])
    assert missing["examples"][0] in page
    assert "stability index, scores before" in page
    assert "secret" not in page + (output / "report.json").read_text()
    assert "command" not in report["provenance"], "that of the report made no score"
    speed = {"seconds": 4.0, "stages": {"prepare": 1.0, "forward": 3.0}, "rows_over_time": [[1.0, 10], [3.0, 20]]}
    Output(str(output)).note_pace(speed)
    shown = ["--by", "label", "--samples", "3", "--to", str(tmp_path / "more")]
    assert main(["report", str(output), *shown]) == 0
    more, page = ((tmp_path / "more" / name).read_text() for name in ("report.json", "report.html"))
    scoring = json.loads(more)["scoring"]
    assert sum(group["rows"] for group in scoring["groups"]["label"]) == 20
    assert {group["name"] for group in scoring["groups"]["label"]} == {"blue", "green", "red"}
    assert scoring["speed"]["rate"] == [[0.75, 8.3], [2.25, 5.0]]
    scores = [sample["score"] for sample in scoring["samples"]]
    assert len(scores) == 3
    assert scores == sorted(scores)
    assert page.count("data:image/jpeg;base64,") >= 2
    assert "secret" not in more + page, "which is a path"
    capsys.readouterr()
    assert "which makes no groups" in fails(capsys, ["report", str(output), "--by", "both"])
    other = saved_bundle(tmp_path / "other", rows, seed=1)
    capsys.readouterr()
    assert "is not the one that scored this" in fails(capsys, ["report", str(output), "--bundle", other])
    same = ["score", bundle, str(tmp_path / "rows.parquet"), str(output), "--image-root", str(rows)]
    capsys.readouterr()
    assert main([*same, "--report", str(tmp_path / "at once")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"{output}/data", f"{tmp_path}/at once/report.html"]
    assert json.loads((tmp_path / "at once" / "report.json").read_text())["scoring"]["speed"] == scoring["speed"]
    assert (tmp_path / "at once" / "report.html").exists()
    assert main([*same, "--report", str(tmp_path / "at once"), "--json"]) == 0
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert events[-2:] == ["done", "report"], "what was scored is said before anything else can go wrong"
    shutil.copytree(output, tmp_path / "broken")
    (part,) = (tmp_path / "broken" / "data").iterdir()
    part.write_bytes(part.read_bytes()[:-1])
    assert main(["report", str(tmp_path / "broken")]) == 0
    broken = json.loads((tmp_path / "broken" / "report.json").read_text())
    assert not broken["scoring"]["verify"]["passed"]
    assert main(["verify", str(output), "--level", "2"]) == 0, "the page is no part of the run"
    capsys.readouterr()
    assert "name one with --to" in fails(capsys, ["report", "s3://bucket/out"])
    for folder, told in (("s3://bucket/out", "name one with --report"), ("", "name one"), ("/proc/x", "cannot make")):
        assert told in fails(capsys, ["score", "b", "t", "o", "--report", folder])


def test_a_row_is_explained_stage_by_stage(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(rows / "part-0.parquet").slice(0, 2)
    paths = pa.array(["gone.jpg", table["image_path"][1].as_py()])
    texts = pa.array(["the red \x1b[2J zyzzyva", "a green one"])
    table = table.set_column(1, "image_path", paths).set_column(2, "text", texts)
    pq.write_table(table, tmp_path / "two.parquet")
    score_in_process(
        bundle, str(tmp_path / "two.parquet"), str(tmp_path / "out"), ScoreConfig(image_roots=(str(rows),))
    )
    (part,) = (tmp_path / "out" / "data").iterdir()
    explained = []
    picture = tmp_path / "seen.jpg"
    for row in range(2):
        assert not picture.exists(), "of the first there is none"
        words = ["explain-row", str(tmp_path / "out"), f"data/{part.name}:{row}", "--picture", str(picture)]
        assert main(words) == 0
        said = capsys.readouterr().out
        explained.append([(line[:12].strip(), line[13:]) for line in said.splitlines()])
    broken, whole = explained
    assert ("image read", "MISSING: no such file") in broken
    assert ("image alone", "no score") in broken
    assert ("model sees", r"the red [\x1b] [[] [2j] [zyzzyva]  (6 tokens, 4 unknown in brackets)") in broken
    assert dict(broken)["stored"] == dict(broken)["again"]
    assert ("model sees", "16 x 16 pixels") in whole
    seen = read_header(picture.read_bytes())
    assert seen is not None
    assert (seen.format.lower(), seen.width, seen.height) == ("jpeg", 16, 16)
    assert dict(whole)["stored"] == dict(whole)["again"]
    assert dict(whole)["stored"].endswith("; ok")
    assert len({dict(whole)[name] for name in ("again", "image alone", "text alone")}) > 1
    assert "no row 'x:1'" in fails(capsys, ["explain-row", str(tmp_path / "out"), "x:1"])
    assert "which has 2" in fails(capsys, ["explain-row", str(tmp_path / "out"), f"data/{part.name}:2"])


def test_wrong_paths_are_named(rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "no bundle at 'nowhere'" in fails(capsys, ["score", "nowhere", str(rows), out])
    assert "no such table: 'nowhere'" in fails(capsys, ["score", bundle, "nowhere", out])
    assert "no configuration file at 'nowhere.toml'" in fails(capsys, ["train", "nowhere.toml"])
    assert "it is not" not in fails(capsys, ["verify", "nowhere"], code=4)
    assert "no scored rows in 'nowhere'" in fails(capsys, ["errors", "nowhere"])
    assert not Path(out).exists()


def test_a_wrong_option_is_named_as_it_was_typed(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, value in (("--actors", "0"), ("--gpus", "-1"), ("--batch-size", "0"), ("--max-error-rate", "2")):
        assert flag in fails(capsys, ["score", bundle, str(rows), str(tmp_path / "out"), flag, value])


def test_a_training_table_without_what_it_needs_is_refused_at_once(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(table: str) -> str:
        toml = f'[table]\n{table}\n[task]\nkind = "multiclass"\n'
        return fails(capsys, ["train", write_config(tmp_path, toml)])

    assert "no such table" in error('train = "nowhere"')
    assert "did you mean 'label'?" in error(f'train = "{rows}"\nlabel_column = "labl"')
    assert "is of type double" not in error(f'train = "{rows}"\ntext_column = "id"')
    multilabel = f'train = "{rows}"\nlabel_column = "both"'
    assert "use task.kind = 'multilabel'" in error(multilabel)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    assert "1 of 1 files are not readable parquet" in error(f'train = "{tmp_path / "bad.parquet"}"')
    assert "did you mean 'train'?" in error('trian = "x"')


def test_errors_and_verify_speak_of_a_scored_table(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(rows / "part-0.parquet")
    paths = ["images/none.jpg", *table["image_path"].to_pylist()[1:]]
    broken = table.set_column(table.schema.get_field_index("image_path"), "image_path", pa.array(paths))
    (tmp_path / "rows").mkdir()
    pq.write_table(broken, tmp_path / "rows" / "part.parquet")
    output = str(tmp_path / "out")
    options = ScoreConfig(image_roots=(str(rows),), precision="fp32")
    score_in_process(bundle, str(tmp_path / "rows"), output, options)
    capsys.readouterr()
    assert main(["errors", output, "--column", "id"]) == 0
    text = capsys.readouterr().out
    assert "degraded  image: MISSING: no such file  id=0" in text
    assert "1  degraded  MISSING" in text
    assert main(["errors", output, "--reason", "TRUNCATED"]) == 0
    assert "no row has the reason TRUNCATED" in capsys.readouterr().out
    assert main(["verify", output, "--level", "2"]) == 0
    assert "20 rows in 1 slices: verified at level 2" in capsys.readouterr().out
    assert main(["verify", output, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    next(Path(output, "data").iterdir()).unlink()
    assert "1 files missing" in fails(capsys, ["verify", output], code=4)


def test_a_run_of_another_model_exits_3(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    score_in_process(bundle, str(rows), output, ScoreConfig())
    saved_bundle(tmp_path / "other", rows, seed=1)
    assert "another model" in fails(capsys, ["score", str(tmp_path / "other"), str(rows), output], code=3)
