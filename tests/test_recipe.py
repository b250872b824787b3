"""benchmarks/recipe.py: that a queue goes on after any end with the same numbers, runs nothing twice, and shows what it
has."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny_runs import make_start

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'apex_fast[data]'")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apex_fast.training.settings import SettingsError  # noqa: E402
from benchmarks import recipe  # noqa: E402
from benchmarks.search import pictures, rows, runner, tables, trials, worker  # noqa: E402

BASE = """
  pretrained_model_name_or_path: {start}
  device: cpu
  schedule: joint
  train_batch_size: 8
  max_train_steps: 60
  validation_base_inference_steps: null
  objective: {{warmup_steps: 2, ramp_steps: 2}}
"""


def write(folder: Path, text: str, start: Path | str = "nowhere") -> Path:
    """A trials file of the suite ``tiny`` with the trials in ``text``."""
    head = (
        f"suite: tiny\nbenchmark: digits\nnfe: [1, 2]\nsamples: 20\ncurve_samples: 20\nseeds: [0]\nbase:{BASE}trials:\n"
    )
    path = folder / "tiny.yaml"
    path.write_text(head.format(start=start) + textwrap.indent(textwrap.dedent(text), "  "))
    return path


def command(folder: Path, *more: str) -> list[str]:
    words = ["run", "--trials", str(folder / "tiny.yaml"), "--device", "cpu", "--threads", "1"]
    return [*words, "--runs", str(folder / "runs"), "--results", str(folder / "results"), *more]


def results(folder: Path) -> rows.Results:
    return rows.Results(runner.results_path("tiny", "cpu", folder / "results"))


def measured(row: dict) -> dict:
    """What of a row may not depend on how often its run was interrupted, nor on the clock."""
    timed = {"images_per_second", "seconds_per_picture", "network_seconds", "peak_bytes", "seconds"}
    scores = {label: {k: v for k, v in values.items() if k not in timed} for label, values in row["scores"].items()}
    return {"scores": scores, "curve": [{k: v for k, v in point.items() if k != "seconds"} for point in row["curve"]]}


def worked(folder: Path, path: Path) -> dict:
    """The row of the first job of a trials file, run in this process."""
    queue = runner.Queue([trials.load_suite(path)], device="cpu", runs=folder, results=folder)
    folder.mkdir()
    (folder / trials.TRIAL).write_text(json.dumps(queue.asked(queue.jobs[0])))
    assert worker.work(folder) == 0
    return json.loads((folder / trials.ROW).read_text())


# ---- real runs


def test_a_killed_queue_goes_on_with_the_same_numbers(tmp_path, one_thread):
    """The queue is killed while it trains, and its process with it; the second queue goes on with that run. Its twin is
    trained without a break."""
    start = make_start(tmp_path / "start")
    path = write(tmp_path, "- {name: broken, why: killed on the way}", start)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "recipe.py"), *command(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    folder, end = tmp_path / "runs" / "tiny" / "broken-seed-0", time.monotonic() + 600
    while not list(folder.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < end, (folder / runner.LOG).read_text()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert results(tmp_path).rows == {} and not (folder / "model").exists()
    assert recipe.main(command(tmp_path)) == 0
    assert "going on from step" in (folder / runner.LOG).read_text()

    twin = worked(tmp_path / "twin", path)
    broken = results(tmp_path).rows["broken", 0]
    assert measured(broken) == measured(twin)
    assert [point["step"] for point in twin["curve"]] == list(range(0, 61, 6))
    assert set(twin["scores"]) == {"1", "2", "2 renoise"}
    assert twin["scores"]["2"]["frechet"] != twin["scores"]["2 renoise"]["frechet"]
    # Generator without gradient, real branch, and three stacked roles with gradient.
    assert (broken["passes"], twin["passes"], twin["copies"]) == (11.0, 11.0, 2.0)
    assert twin["peak_bytes"] > 0 and 0 < twin["seconds"] <= twin["wall_seconds"]
    assert (twin["steps"], twin["batch"], twin["threads"]) == (60, 8, 1)


def test_a_trial_that_is_refused_or_diverges_is_a_row(tmp_path, one_thread):
    start = make_start(tmp_path / "start")
    unseen = write(tmp_path, "- {name: unseen, why: refused, set: {shift.scale: 1.0, shift.bias: 0.0}}", start)
    assert "invisible" in worked(tmp_path / "unseen", unseen)["failed"]
    text = "- {name: wild, why: diverges, set: {learning_rate: 1.0e+30, alarms.enabled: false, max_train_steps: 20}}"
    row = worked(tmp_path / "wild", write(tmp_path, text, start))
    # Whether the loss or the pictures of a score on the way show it first.
    assert "nan" in row["failed"].lower() and "scores" not in row
    assert row["curve"][0]["step"] == 0 and row["set"]["learning_rate"] == 1e30


def test_a_start_that_is_not_there_is_no_failure_of_the_trial(tmp_path, one_thread, capsys):
    """It may be made later; a row would keep the trial from ever running."""
    path = write(tmp_path, "- {name: early, why: its start comes later}", tmp_path / "start")
    assert recipe.main(command(tmp_path)) == 3
    assert "could not be run: FileNotFoundError" in capsys.readouterr().out
    assert results(tmp_path).rows == {} and path.exists()


def test_passes_are_counted_with_what_some_steps_leave_out(tmp_path, one_thread):
    text = """
    - name: every
      why: "sequential: 11 F where the generator learns, 7 where it does not"
      set: {schedule: sequential, objective.generator_every: 3, max_train_steps: 20, real_branch: live}
    """
    row = worked(tmp_path / "every", write(tmp_path, text, make_start(tmp_path / "start")))
    assert row["passes"] == pytest.approx((11 + 7 + 7) / 3, abs=1e-3) and row["copies"] == 1.0


# ---- the queue, with a process that trains nothing

WORKER = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
asked = json.loads((folder / "trial.json").read_text())
with (folder / "calls").open("a") as file:
    file.write("called\\n")
if asked["trial"] == "slow":
    (folder / "checkpoint-10").mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(60)
if asked["trial"] == "crash":
    print("it broke here", flush=True)
    os.abort()
if asked["trial"] == "unable":
    import nothing_of_this_name
if asked["trial"] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
keys = ("suite", "trial", "seed", "why", "set", "evaluation")
score = {"frechet": 1.0 + asked["seed"], "accuracy": 1.0, "diversity": 0.9, "precision": 0.5, "recall": 0.5}
row = {key: asked[key] for key in keys} | {"steps": 10, "batch": 8, "seconds": 4.0, "wall_seconds": 5.0}
row |= {"passes": 11.0, "copies": 2.0, "peak_bytes": 10**7, "scores": {"1": score, "2": score, "2 renoise": score}}
row["curve"] = [{"step": s, "seconds": s / 2, "frechet": 9.0 - s, "accuracy": 1, "diversity": 1} for s in (1, 5)]
(folder / "row.json").write_text(json.dumps(row))
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Trials end at once, with made-up numbers; returns how often each folder was run."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(runner, "WORKER", (sys.executable, str(tmp_path / "worker.py")))
    monkeypatch.setattr(runner, "POLL", 0.01)

    def calls(name: str) -> int:
        path = tmp_path / "runs" / "tiny" / name / "calls"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    return calls


def test_what_has_a_row_is_not_run_again_and_what_has_changed_is(tmp_path, quick, capsys):
    write(tmp_path, "- {name: one, why: first}\n- {name: two, why: second, seeds: [0, 5]}")
    assert recipe.main(command(tmp_path)) == 0
    assert recipe.main(command(tmp_path)) == 0
    assert [quick(name) for name in ("one-seed-0", "two-seed-0", "two-seed-5")] == [1, 1, 1]
    # A changed word of the prediction is no other trial, a changed weight is.
    changed = "- {name: one, why: other words}\n- {name: two, why: second, set: {learning_rate: 1.0e-4}}"
    write(tmp_path, changed)
    assert recipe.main(command(tmp_path, "--only", "tw*")) == 0
    assert (quick("one-seed-0"), quick("two-seed-0")) == (1, 1)
    found = results(tmp_path)
    assert found.rows["two", 0]["set"] == {"learning_rate": 1e-4} and found.outdated == 1
    lines = rows.read_lines(found.path)
    assert len([line for line in lines if line.get("trial") == "two" and line["seed"] == 0]) == 3
    # More sampling steps: scored again in the folder of the run, which is kept.
    text = (tmp_path / "tiny.yaml").read_text().replace("nfe: [1, 2]", "nfe: [1, 2, 4]")
    (tmp_path / "tiny.yaml").write_text(text)
    assert recipe.main(command(tmp_path, "--only", "tiny/one")) == 0
    assert quick("one-seed-0") == 2


def test_a_new_key_of_the_library_changes_no_trial(tmp_path, quick):
    suite = trials.load_suite(write(tmp_path, "- {name: one, why: first}"))
    assert recipe.main(command(tmp_path)) == 0
    [job], found = suite.jobs(), results(tmp_path)
    [settings] = found.bases.values()
    del settings["objective.clip_mode"]
    assert found.current(job) is not None
    settings["objective.clip"] = 0.25
    assert found.current(job) is None


def test_a_failed_trial_is_a_row_and_is_run_again_when_asked(tmp_path, quick):
    write(tmp_path, "- {name: crash, why: breaks}\n- {name: after, why: runs}")
    assert recipe.main(command(tmp_path)) == 0
    found = results(tmp_path).rows
    assert found["crash", 0]["failed"].endswith("it broke here") and "failed" not in found["after", 0]
    assert recipe.main(command(tmp_path)) == 0
    assert quick("crash-seed-0") == 1
    (tmp_path / "worker.py").write_text(WORKER.replace('== "crash"', '== "never"'))
    # A second try that is stopped is a run that has begun: it is left, and the next one goes on with it.
    (tmp_path / "worker.py").write_text(WORKER.replace('== "crash"', '== "never"').replace('"slow"', '"crash"'))
    assert recipe.main(command(tmp_path, "--retry", "--max-minutes", "0.03")) == 3
    assert results(tmp_path).rows.keys() == {("after", 0)}
    checkpoint = tmp_path / "runs" / "tiny" / "crash-seed-0" / "checkpoint-10"
    assert checkpoint.exists()
    (tmp_path / "worker.py").write_text(WORKER.replace('== "crash"', '== "never"'))
    assert recipe.main(command(tmp_path, "--retry")) == 0 and checkpoint.exists()
    assert "failed" not in results(tmp_path).rows["crash", 0] and quick("after-seed-0") == 1


def test_a_trial_that_was_killed_from_outside_has_not_failed(tmp_path, quick, capsys):
    text = "- {name: killed, why: by somebody}\n- {name: unable, why: a package is missing}\n- {name: after, why: runs}"
    write(tmp_path, text)
    assert recipe.main(command(tmp_path)) == 3
    assert set(results(tmp_path).rows) == {("after", 0)}
    out = capsys.readouterr().out
    assert "2 of 3 left" in out and "unable-seed-0: could not be run: ModuleNotFoundError" in out


def test_the_time_is_up(tmp_path, quick, capsys):
    write(tmp_path, "- {name: slow, why: never ends}\n- {name: after, why: not begun}")
    begun = time.monotonic()
    assert recipe.main(command(tmp_path, "--max-minutes", "0.03")) == 3
    assert time.monotonic() - begun < 30 and quick("slow-seed-0") == 1
    out = capsys.readouterr().out
    assert "the time is up" in out and "stopped (exit code 143)" in out and results(tmp_path).rows == {}
    assert recipe.main(command(tmp_path, "--dry-run")) == 0
    assert "tiny/slow-seed-0: ?, begun: step 10" in capsys.readouterr().out


def test_a_signal_stops_the_queue(tmp_path, quick, monkeypatch):
    write(tmp_path, "- {name: slow, why: never ends}")
    sleep = time.sleep

    def asked_to_stop(seconds: float) -> None:
        sleep(seconds)
        if list((tmp_path / "runs").glob("tiny/*/checkpoint-10")):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner.time, "sleep", asked_to_stop)
    assert recipe.main(command(tmp_path)) == 128 + signal.SIGINT


def test_a_row_that_a_dead_queue_did_not_take_is_taken(tmp_path, quick):
    write(tmp_path, "- {name: one, why: first}")
    assert recipe.main(command(tmp_path)) == 0
    results(tmp_path).path.unlink()
    assert recipe.main(command(tmp_path)) == 0
    assert ("one", 0) in results(tmp_path).rows and quick("one-seed-0") == 1


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, quick, capsys):
    write(tmp_path, "- {name: one, why: first}")
    theirs = tmp_path / "runs" / "tiny" / "one-seed-0" / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years")
    assert recipe.main(command(tmp_path)) == 2
    assert theirs.exists() and "move it away" in capsys.readouterr().err


def test_the_estimate_is_that_of_finished_rows(tmp_path, quick, capsys):
    text = "- {name: one, why: first}\n- {name: two, why: second, set: {train_batch_size: 32, max_train_steps: 400}}"
    write(tmp_path, text)
    assert recipe.main(command(tmp_path, "--only", "one")) == 0
    capsys.readouterr()
    assert recipe.main(command(tmp_path, "--dry-run")) == 0
    # 5 s for 10 steps of 8 pictures: 800 s for 400 of 32.
    assert "tiny/two-seed-0: about 13 min\n1 of 2 left; about 13 min" in capsys.readouterr().out


# ---- the results


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.append(path, [{"trial": "a", "seed": 0, "value": 1}])
    with path.open("a") as file:
        file.write('{"trial": "b", "se')
    assert rows.Results(path).damaged == 1
    rows.append(path, [{"trial": "a", "seed": 0, "value": 2}, {"trial": "c", "seed": 1}])
    found = rows.Results(path)
    assert found.damaged == 1 and set(found.rows) == {("a", 0), ("c", 1)} and found.rows["a", 0]["value"] == 2
    mark = {"outdated": trials.digest(found.rows["a", 0]), "trial": "a", "seed": 0}
    rows.append(path, [mark])
    assert set(rows.Results(path).rows) == {("c", 1)}
    rows.append(path, [{"trial": "a", "seed": 0, "value": 3}, mark])  # of the row before this one
    assert rows.Results(path).rows["a", 0]["value"] == 3


# ---- tables and plots


def test_the_table_shows_what_the_rows_say(tmp_path, quick, capsys):
    text = """
    - {name: one, why: "the first | of them", seeds: [0, 1, 4]}
    - {name: none, why: at the level of one, control: true}
    - {name: crash, why: breaks}
    - {name: later, why: not yet}
    - {name: larger, why: a batch, set: {train_batch_size: 16}}
    """
    write(tmp_path, text)
    for only in ("one", "none", "crash", "larger"):
        assert recipe.main(command(tmp_path, "--only", only)) == 0
    docs = tmp_path / "recipe.md"
    docs.write_text("# Words\n\n<!-- table: tiny -->\nold\n<!-- end -->\n\nMore words.\n")
    shared = ["--trials", str(tmp_path / "tiny.yaml"), "--device", "cpu", "--results", str(tmp_path / "results")]
    check = ["table", *shared, "--docs", str(docs), "--check"]
    assert recipe.main(check) == 1
    assert recipe.main(check[:-1]) == 0
    assert recipe.main(check) == 0
    written = docs.read_text()
    assert written.startswith("# Words\n\n<!-- table: tiny -->\n\n|") and written.endswith("-->\n\nMore words.\n")
    lines = [line for line in written.splitlines() if line.startswith("|")]
    header, one = lines[0].split("|"), next(line for line in lines if line.startswith("| one "))
    # Distances 1, 2 and 5: t(0.975, 2) = 4.303 times 2.082 / sqrt(3).
    assert one.split("|")[2:4] == [" 0, 1, 4 ", " 2.67 ± 5.17 "]
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["*control:* none", "larger", "one", "crash"]
    assert {len(line.split("|")) for line in lines[:6]} == {len(header)}
    assert "failed: its process crashed with signal 6" in lines[5] and "Not run yet (seeds): later (0)." in written
    assert "the first / of them" in written and "`train_batch_size: 16`" in written
    # One more row, and the document is out of date.
    assert recipe.main(command(tmp_path, "--only", "later")) == 0
    assert recipe.main(check) == 1

    assert recipe.main(["plot", *shared, "--images", str(tmp_path)]) == 0
    suite = trials.load_suite(tmp_path / "tiny.yaml")
    one = tables.entries(suite, results(tmp_path))[0]
    assert pictures.curve(one, "seconds", 2.0) == [(1.0, 8.0), (5.0, 4.0)]
    for name in ("recipe_tiny_steps.png", "recipe_tiny_batch.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_interval_is_students():
    assert tables.interval([1.0]) is None
    assert tables.interval([1.0, 3.0]) == pytest.approx(12.7062 * statistics.stdev([1, 3]) / 2**0.5, rel=1e-4)


def test_a_mark_that_nothing_ends_is_refused():
    with pytest.raises(ValueError, match="has no <!-- end -->"):
        tables.with_tables("<!-- table: tiny -->\n", {"tiny": "| |"})


# ---- trials files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: one}", r"trial 1 \(one\): why is missing"),
        ("- {name: one, why: ' '}", "why is missing"),
        ("- {why: nameless}", "trial 1: name must be a name"),
        ("- {name: a b, why: x}", "name must be a name"),
        ("- {name: start, why: x}", "the name of the untuned model"),
        ("- {name: one, why: x}\n- {name: one, why: y}", "two trials have the name 'one'"),
        ("- {name: one, why: x, sets: {}}", "unknown key 'sets': did you mean 'set'"),
        ("- {name: one, why: x, set: {seed: 3}}", "seed is set by the queue; write seeds"),
        ("- {name: one, why: x, set: {output_dir: here}}", "output_dir is set by the queue"),
        ("- {name: one, why: x, seeds: [1, 1]}", "has a number twice"),
        ("- {name: one, why: x, seeds: []}", "must be a list of whole numbers"),
        ("- {name: one, why: x, control: maybe}", "control must be true or false"),
        ("- just words", "must have the keys name, why and set"),
    ],
)
def test_bad_trials_are_refused(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        trials.load_suite(write(tmp_path, text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("suite: tiny", "suit: tiny", "unknown key 'suit': did you mean 'suite'"),
        ("suite: tiny\n", "", "suite is missing"),
        ("benchmark: digits", "benchmark: letters", "benchmark must be one of digits, shapes"),
        ("benchmark: digits", "benchmark: digits\nresolution: 9", "resolution must be 8 for digits"),
        ("samples: 20", "samples: many", "samples must be a whole number from 2"),
        ("nfe: [1, 2]", "nfe: [0]", "must be a whole number from 1"),
        ("train_batch_size", "train_bath_size", "unknown key 'train_bath_size'"),
        ("seeds: [0]", "seeds: [0]\nstart: {nfe: [1], guidance_scale: [-1]}", "numbers from 0"),
        ("trials:\n", "trials: none\nx:\n", "unknown key 'x'"),
    ],
)
def test_bad_files_are_refused(tmp_path, old, new, message):
    path = write(tmp_path, "- {name: one, why: x}")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SettingsError, match=message):
        trials.load_suite(path)


def test_all_mistakes_in_settings_are_told_before_anything_runs(tmp_path, quick, capsys):
    text = """
    - {name: one, why: x, set: {objective.warmup: 3}}
    - {name: two, why: x, set: {learning_rate: fast}}
    - {name: three, why: x}
    """
    write(tmp_path, text)
    assert recipe.main(command(tmp_path)) == 2
    told = capsys.readouterr().err
    assert (
        "suite tiny, trial one: unknown key 'objective.warmup'" in told and "trial two: learning_rate must be" in told
    )
    assert quick("three-seed-0") == 0
    # Mistakes of trials that are not asked for hold nothing up.
    assert recipe.main(command(tmp_path, "--only", "three")) == 0
    assert recipe.main(command(tmp_path, "--only", "four")) == 2


def test_the_trials_that_ship_can_be_run():
    suites = trials.load_suites(sorted(trials.TRIALS.glob("*.yaml")))
    assert {suite.name for suite in suites} >= {"digits_sana", "digits_qwen", "shapes_sana"}
    for suite in suites:
        assert [trial.name for trial in suite.trials if trial.control], suite.name
        changes = [json.dumps(job.changes, sort_keys=True) for job in suite.jobs() if job.seed == 0 and job.trains]
        assert len(set(changes)) == len(changes), suite.name


def test_the_document_is_what_the_results_say():
    document = recipe.DOCS / "recipe.md"
    have = {path.stem for path in (runner.RESULTS / "cpu" / "recipe").glob("*.jsonl")}
    files = [str(path) for path in trials.TRIALS.glob("*.yaml") if trials.load_suite(path).name in have]
    if not (document.is_file() and files):
        pytest.skip("there are no results yet")
    assert recipe.main(["table", "--check", "--device", "cpu", "--trials", *files]) == 0
