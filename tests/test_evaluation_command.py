"""``apex-fast eval`` on a benchmark: the table with intervals, its files, another model beside it, which benchmark."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from tiny_runs import keys, make_start

from apex_fast.cli import main
from apex_fast.evaluation.table import Column, Comparison, Row, compare, comparison_table, estimate, markdown, plot


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    assert main(["train", *keys(make_start(folder / "start"), folder / "run")]) == 0
    return folder / "run"


QUICK = ("--samples", "20", "--nfe", "1,2")


def error_of(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    capsys.readouterr()
    assert main(["eval", *words]) == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Traceback" not in error
    return error


# ---- numbers


def test_an_interval_is_students() -> None:
    # The quantile of three degrees of freedom at 0.975, from tables of the distribution.
    found = estimate([1.0, 2.0, 4.0, 5.0])
    deviation = math.sqrt(sum((v - 3) ** 2 for v in (1, 2, 4, 5)) / 3)
    assert found.mean == 3 and found.half == pytest.approx(3.182446 * deviation / 2, rel=1e-6)
    assert estimate([2.5]).half is None and estimate([2.5]).text() == "2.500" and "±" in found.text()
    assert estimate([2.0, 2.0]).half == 0
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def rows_for_comparison() -> tuple[Row, Row]:
    own = [{"accuracy": 0.9, "frechet": 2.0, "diversity": 0.8}, {"accuracy": 0.8, "frechet": 6.0, "diversity": 0.9}]
    other = [{"accuracy": 0.8, "frechet": 1.0, "diversity": 1.0}, {"accuracy": 0.6, "frechet": 2.0, "diversity": 1.0}]
    return (
        Row("run", 1, 1.0, own, {"network_seconds": 0.1, "seconds_per_picture": 0.2}),
        Row("teacher", 50, 3.0, other, {"network_seconds": 5.0, "seconds_per_picture": 5.2}),
    )


def test_rows_are_compared_seed_by_seed() -> None:
    found = compare(*rows_for_comparison()).values
    assert found["accuracy_difference"].mean == pytest.approx(0.15)
    assert found["accuracy_difference"].half == pytest.approx(estimate([0.1, 0.2]).half)
    # The mean of the ratios: that of the means would be 8 / 3.
    assert found["frechet_ratio"].mean == pytest.approx(2.5)
    assert found["network_speedup"].mean == pytest.approx(50) and found["end_to_end_speedup"].mean == pytest.approx(26)
    header, lines = comparison_table([Comparison(*rows_for_comparison(), found)])
    assert lines[0][0] == "run, 1 step / teacher, 50 steps, guidance 3"
    assert lines[0][header.index("accuracy, difference")].startswith("+0.150")
    assert lines[0][header.index("times as fast, network")] == "50.0"


def test_a_ratio_to_nothing_is_left_out() -> None:
    row, other = rows_for_comparison()
    other.by_seed[0]["frechet"] = 0.0
    assert "frechet_ratio" not in compare(row, other).values and "accuracy_difference" in compare(row, other).values


def test_units_of_columns() -> None:
    row = rows_for_comparison()[0]
    cells = row.cells([Column("network_seconds", "ms", 1, 1e-3), Column("frechet", "d", 1), Column("fid", "FID")])
    assert cells[0] == "run, 1 step" and cells[1] == "100.0" and cells[2].startswith("4.0 ±") and cells[3] == ""


def test_the_block_shows_what_there_is() -> None:
    text = markdown(
        "T", "lead", rows_for_comparison(), [Column("frechet", "d"), Column("fid", "FID")], [], [], ["n"], None
    )
    assert text.startswith("## T\n\nlead\n\n|") and "FID" not in text and "![" not in text and text.endswith("- n\n")


def test_the_plot_shows_every_model_and_guidance(tmp_path: Path) -> None:
    from PIL import Image

    row, other = rows_for_comparison()
    later = Row("run", 4, 1.0, row.by_seed, {})
    scores = (("accuracy", "a", False), ("frechet", "d", True))
    plot(tmp_path / "one.png", [row, later], scores)
    plot(tmp_path / "both.png", [row, later, other], scores, Row("real", None, None, other.by_seed))
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "both.png") as both:
        assert one.size == both.size and one.tobytes() != both.tobytes()


# ---- the command


def test_the_table_its_files_and_intervals(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "scores" / "mine.json"
    assert main(["eval", str(run), *QUICK, "--seeds", "2", "--guidance_scale", "1,2.5", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "digits, 8 x 8; seeds 0 to 1" in lines[0]
    labels = ["run, 1 step ", "run, 2 steps ", "run, 1 step, guidance 2.5", "run, 2 steps, guidance 2.5", "real data"]
    for label in labels:
        line = next(line for line in lines if line.startswith(label))
        assert line.count("±") == 5, f"an interval for every score: {line}"
    assert {Path(line).name for line in lines[-3:]} == {"mine.json", "mine.md", "mine.png"}

    result = json.loads(out.read_text())
    assert set(result["scores"]) == {"1", "2"} and result["seeds"] == [0, 1] and result["benchmark"] == "digits"
    assert len(result["rows"]) == 5 and result["environment"]["versions"]["torch"]
    row = result["rows"][0]
    by_seed = [scores["frechet"] for scores in row["by_seed"]]
    assert row["scores"]["frechet"]["mean"] == pytest.approx(sum(by_seed) / 2) and by_seed[0] != by_seed[1]
    assert row["cost"]["peak_bytes"] > 0 and "peak_bytes" not in row["by_seed"][0]
    assert row["accuracy_by_category"]["seven"]["mean"] <= 1
    assert all(isinstance(value, int | float) for value in result["scores"]["1"].values()), "what a report page shows"

    block = out.with_suffix(".md").read_text()
    assert f"`apex-fast eval {run} " in block and "seeds 0 to 1 (mean ± half of the 95 % interval" in block
    assert "apex_fast " in block and "(mine.png)" in block and block.count("| run, 1 step") == 4


def test_a_row_is_there_as_soon_as_it_is_done(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from apex_fast.evaluation import scorers

    true, seen = scorers.evaluate, []

    def evaluate(*args, **options):
        seen.append(capsys.readouterr().out)
        return true(*args, **options)

    monkeypatch.setattr(scorers, "evaluate", evaluate)
    assert main(["eval", str(run), *QUICK, "--no-real-data", "--out", str(run / "x.json")]) == 0
    assert "Frechet distance" in seen[0] and re.search(r"run, 1 step +0\.", seen[1])
    assert json.loads((run / "x.json").read_text())["floor"] is None
    assert not (run / "x.partial.json").exists()


def test_an_evaluation_that_is_stopped_leaves_its_rows(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from apex_fast.evaluation import scorers

    true, calls = scorers.evaluate, []

    def evaluate(*args, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(options)
        return true(*args, **options)

    monkeypatch.setattr(scorers, "evaluate", evaluate)
    try:
        assert main(["eval", str(run), *QUICK, "--out", str(tmp_path / "x.json")]) != 0
    except KeyboardInterrupt:
        pass
    kept = json.loads((tmp_path / "x.partial.json").read_text())
    assert len(kept["rows"]) == 1 and not (tmp_path / "x.json").exists()


def test_another_model_beside_it(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start = run.parent / "start"
    words = [*QUICK, "--against", str(start), "--out", str(tmp_path / "eval.json")]
    assert main(["eval", str(run), *words]) == 0
    text = capsys.readouterr().out
    assert re.search(r"teacher, 2 steps +\d", text) and f"teacher: the model in {start}" in text
    result = json.loads((tmp_path / "eval.json").read_text())
    assert [c["against"] for c in result["comparisons"]] == ["teacher, 2 steps"] * 2
    one, two = (next(r for r in result["rows"] if r["model"] == m) for m in ("run", "teacher"))
    assert one["by_seed"] != two["by_seed"], "the second is the model that was named"
    assert set(result["scores"]) == {"1", "2"} and result["scores"]["1"]["frechet"] == one["scores"]["frechet"]["mean"]


def test_stochasticity_reaches_the_sampler(run: Path, tmp_path: Path) -> None:
    found = []
    for eta in ("0", "1"):
        words = ["--nfe", "2", "--samples", "20", "--stochasticity", eta, "--out", str(tmp_path / f"{eta}.json")]
        assert main(["eval", str(run), *words]) == 0
        found.append(json.loads((tmp_path / f"{eta}.json").read_text())["scores"]["2"]["frechet"])
    assert found[0] != found[1]


def test_a_saved_model_and_a_checkpoint_are_scored_too(run: Path, tmp_path: Path) -> None:
    scores = []
    checkpoint = next(path for path in run.iterdir() if path.name.startswith("checkpoint-"))
    for model in (run, run / "model", checkpoint):
        words = ["--nfe", "1", "--samples", "20", "--no-real-data", "--out", str(tmp_path / "eval.json")]
        assert main(["eval", str(model), *words]) == 0
        scores.append(json.loads((tmp_path / "eval.json").read_text())["scores"]["1"]["frechet"])
    assert scores[0] == pytest.approx(scores[1]) and scores[0] == pytest.approx(scores[2])


# ---- which benchmark


def test_the_run_says_which_benchmark(run: Path, tmp_path: Path) -> None:
    from apex_fast.training.results import data_set_of

    assert data_set_of(str(run)) == data_set_of(str(run / "model")) == "digits"
    assert data_set_of("shapes_start") == "shapes" and data_set_of("nothing") is None
    assert data_set_of(str(tmp_path)) is None


def test_a_shape_that_two_benchmarks_have_needs_a_name(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from apex_fast.data.shipped import Shipped
    from apex_fast.evaluation import scorers

    copy = tmp_path / "model"
    shutil.copytree(run / "model", copy)
    # Pictures of the digits' shape, which a model alone does not tell apart.
    monkeypatch.setattr(scorers, "SHIPPED", {"digits": Shipped((8,), 1), "letters": Shipped((8, 16), 1)})
    error = error_of([str(copy), *QUICK], capsys)
    assert (
        "digits and letters have, and nothing says what it was trained on; name one of them with --benchmark" in error
    )
    assert main(["eval", str(copy), "--benchmark", "digits", *QUICK]) == 0
    error = error_of([str(run), "--benchmark", "digits", "--resolution", "16"], capsys)
    assert "--resolution 16: the finished model of" in error and "makes pictures of 8 pixels" in error


def test_another_benchmark_than_the_models_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of([str(run), "--benchmark", "shapes"], capsys)
    assert "pictures of the shape [1, 8, 8], and those of the benchmark shapes are others; it fits digits" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to score: a RUN, or --pictures FOLDER"),
        (["RUN", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["RUN", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["RUN", "--stochasticity", "3"], "--stochasticity must lie in [0, 1], got 3"),
        (["RUN", "--out", "card.md"], "--out card.md: expected the JSON file to write"),
        (["RUN", "--clip-model", "x"], "--clip-model is for --prompts FILE or --pictures FOLDER"),
        (["RUN", "--samples", "7"], "multiple of 10"),
        (["RUN", "--pictures", "x"], "leave one of them out"),
        (["RUN", "--prompts", "x"], "say what to score the pictures by"),
        (["RUN", "--prompts", "x", "--fid-real", "y"], "--fid-real FOLDER goes with --fid-weights FILE"),
        (["RUN", "--prompts", "x", "--clip-model", "y", "--fid-model", "z"], "--fid-real FOLDER goes with"),
        (["--pictures", "x", "--clip-model", "y", "--lora", "z"], "--lora is for drawing"),
        (["--pictures", "x", "--clip-model", "y", "--nfe", "4"], "--nfe is for drawing"),
        (["RUN", "--prompts", "x", "--clip-model", "y", "--samples", "60"], "--samples is for a benchmark"),
        (["RUN", "--prompts", "x", "--clip-model", "y", "--benchmark", "digits"], "--benchmark is for a benchmark"),
    ],
)
def test_what_does_not_go_together(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of([str(run) if word == "RUN" else word for word in words], capsys)


@pytest.mark.parametrize("words", [["--nfe", "1,1"], ["--nfe", "0"], ["--nfe", "x"], ["--guidance-scale", "nan"]])
def test_lists_that_are_none(words: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(run), *words])
    assert stop.value.code == 2 and "such as 1," in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs/nowhere: no such folder" in error_of(["runs/nowhere"], capsys, code=1)


def test_a_teacher_is_looked_at_before_anything_is_scored(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from apex_fast.evaluation import scorers

    monkeypatch.setattr(scorers, "evaluate", lambda *args, **options: pytest.fail("scored before the teacher was seen"))
    assert "runs/nowhere" in error_of([str(run), *QUICK, "--against", "runs/nowhere"], capsys, code=1)


# ---- validations


def test_validations_score_the_benchmark_of_the_run(run: Path, tmp_path: Path) -> None:
    words = keys(run.parent / "start", tmp_path / "run", "--validation_metrics", "true", "--validation_steps", "4")
    assert main(["train", *words, "--validation_samples", "60"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in lines if "validation/frechet" in line)
    out = tmp_path / "eval.json"
    assert main(["eval", str(tmp_path / "run"), "--nfe", "1", "--samples", "60", "--out", str(out)]) == 0
    scores = json.loads(out.read_text())["scores"]["1"]
    for name in ("frechet", "accuracy", "precision", "recall", "diversity"):
        assert found[f"validation/{name}"] == pytest.approx(scores[name], rel=1e-3), name


@pytest.mark.parametrize("count", ["59", "90", "660"])
def test_samples_of_a_validation_are_equal_shares(count: str, run: Path, tmp_path: Path, capsys) -> None:
    words = keys(run.parent / "start", tmp_path / "run", "--validation_samples", count, "--validation_metrics", "true")
    assert main(["train", *words]) == 2
    assert f"validation_samples must be a multiple of 60 (of the digits, which are 600, at most that), got {count}" in (
        capsys.readouterr().err
    )
