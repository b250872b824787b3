"""The demo from end to end at a few steps, its verdict, and the pictures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml")

from tiny_runs import make_start

from apex_fast.cli import main
from apex_fast.condition import Condition
from apex_fast.demo import MARKER, Results
from apex_fast.evaluation import report

SCORES = {"frechet", "accuracy", "diversity"}


@pytest.fixture(scope="module")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("tiny") / "start")


@pytest.fixture(scope="module")
def demo(tiny_start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of ``apex-fast demo --quick`` on the tiny start."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("demo") / "demo"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["demo", "--quick", "--output-dir", str(folder), "--start", str(tiny_start)]) == 0
    return folder, output.getvalue()


def test_metrics_have_exactly_the_promised_shape(demo: tuple[Path, str]) -> None:
    metrics = json.loads((demo[0] / "metrics.json").read_text())
    assert list(metrics) == ["start", "tuned", "control", "floor", "speedup", "seconds"]
    assert list(metrics["start"]) == ["1", "4", "50"] and list(metrics["tuned"]) == list(metrics["control"]) == ["1"]
    for scores in (*metrics["start"].values(), metrics["tuned"]["1"], metrics["control"]["1"], metrics["floor"]):
        assert set(scores) == SCORES and all(isinstance(v, float) for v in scores.values())
    assert metrics["speedup"] > 1 and metrics["seconds"] > 0
    assert metrics["tuned"]["1"] != metrics["control"]["1"] != metrics["start"]["1"]


def test_the_output_has_the_table_the_warning_and_what_to_type_next(demo: tuple[Path, str]) -> None:
    folder, text = demo
    for line in (
        "start  .* 50 ",
        "control: no shift, after 3 ",
        "tuned, after the same 3 ",
        "tuned, after 6 ",
        "real data",
    ):
        assert re.search(line, text), f"no row {line!r} in\n{text}"
    assert "worse before they get better" in text and "targets are not checked" in text
    end = text[text.index("what to type next") :]
    assert f'apex-fast generate {folder} --prompt "a handwritten three"' in end
    assert "examples/digits_full.yaml" in end and "report.html" in end
    assert 'apex-fast generate demo --prompt "three blue squares"' in end


def test_the_sizes_of_both_parts_are_told(demo: tuple[Path, str], tiny_start: Path) -> None:
    from apex_fast.training.models import load_generator

    network, _ = load_generator(tiny_start)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (network.transformer, network.text)]
    assert f"({sizes[0]:.2f} M parameter transformer, {sizes[1]:.2f} M text encoder)" in demo[1]


@pytest.mark.parametrize("trace", ["details.json", MARKER])
@pytest.mark.parametrize("own", ["metrics.jsonl", "control/metrics.jsonl"])
def test_only_the_folder_of_a_demo_is_overwritten(
    tiny_start: Path,
    tmp_path: Path,
    own: str,
    trace: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from apex_fast import demo as module

    def scored(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "digit_floor", scored)  # the first work: whoever gets there has claimed the folder
    command = ["demo", "--quick", "--output-dir", str(tmp_path), "--start", str(tiny_start)]
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text('{"step": 1}\n')
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()] == [Path(own)]
    (tmp_path / trace).write_text("{}")
    assert main(command) == 130
    assert not (tmp_path / own).exists()
    assert (tmp_path / MARKER).is_file(), "the marker must be there before any work is done"


def test_the_command_that_is_printed_works(demo: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(demo[0]), "--prompt", "a handwritten three"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_what_ships_is_told_apart_and_is_what_the_stock_pipeline_draws(demo: tuple[Path, str]) -> None:
    told = re.search(
        r"shapes_one_step, shipped: (.*) ms a picture in one step, its start (.*) ms in 50 guided", demo[1]
    )
    assert told is not None and float(told[1]) < float(told[2])
    difference = re.search(r"the stock pipeline of diffusers draws the same: at most (\S+) of 255 levels off", demo[1])
    assert difference is not None and float(difference[1]) < 0.1
    page = (demo[0] / "report.html").read_text()
    assert "trained just now" in page and "Shipped, trained before" in page and told[0] in page


def test_a_shift_that_is_not_seen_is_refused_and_the_default_is_not(demo: tuple[Path, str]) -> None:
    text = " ".join(demo[1].split())
    assert (
        "scale 0.5, bias 0: refused; shift: scale 0.5 and bias 0 at the site raw is invisible to this network" in text
    )
    assert "scale -1, bias 0.5: would be trained with; probe: visible" in text
    page = (demo[0] / "report.html").read_text()
    assert "bias 0: refused" in page and "bias 0.5: would be trained with" in page


def test_the_refusal_is_of_the_network_and_not_of_the_shift() -> None:
    """The same shift of a network whose text is not normalised first is trained with."""
    from apex_fast.demo.seen import ask

    assert ask(0.5, 0.0).refusal is not None
    other = ask(0.5, 0.0, "digits_start")
    assert other.refusal is None and "would be trained with" in other.told


@pytest.mark.parametrize("changed", ["scheduler", "mask"])
def test_another_pipeline_would_be_seen(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference is one between two computations, not of a picture with itself."""
    from apex_fast.demo import shown

    if changed == "scheduler":
        import diffusers

        other = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)
        monkeypatch.setattr(shown, "scheduler", lambda: other)
    else:
        plain = shown.stock_pictures
        whole = lambda c: Condition(c.prompt_embeds, torch.ones_like(c.prompt_embeds_mask))  # noqa: E731
        monkeypatch.setattr(shown, "stock_pictures", lambda n, x, c: plain(n, x, whole(c)))
    few = shown.Shown(prompts=("a red circle",), seeds=1, num_inference_steps=1)
    assert shown.look(few).difference > 5


def test_generate_demo_is_what_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "demo", "--prompt", "two cyan triangles", "--n", "1"]) == 0
    said = capsys.readouterr()
    assert Path(said.out.strip()).is_file() and "the one-step generator that ships" in said.err
    assert main(["generate", "demo", "--prompt", "two cats on green"]) == 2
    assert "no prompt of the shapes: 'two cats on green'; expected such as 'a red circle'" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("two triangles\ntwo cats on green\n")
    assert main(["generate", "demo", "--prompts", "prompts.txt", "--out", "drawn"]) == 2
    assert "no prompt of the shapes: 'two cats on green'" in capsys.readouterr().err
    (tmp_path / "demo").mkdir()
    assert main(["generate", "demo", "--prompt", "a red circle"]) == 2
    assert "write ./demo for the folder, or shapes_one_step" in capsys.readouterr().err


def test_pictures_are_there_and_hold_ink(demo: tuple[Path, str]) -> None:
    from PIL import Image

    for name in ("samples.png", "training.png", "losses.png", "shipped.png"):
        with Image.open(demo[0] / name) as picture:
            assert picture.width > 500 and len(picture.convert("L").getcolors() or []) > 50, name


def test_the_report_needs_no_other_file(demo: tuple[Path, str]) -> None:
    sources: list[str] = []
    text: list[str] = []

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            sources.extend(v or "" for k, v in attributes if k in ("src", "href"))

        def handle_data(self, data: str) -> None:
            text.append(data)

    Page().feed((demo[0] / "report.html").read_text())
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "tuned, after 6 training steps" in "".join(text)


def test_the_control_has_no_shift_and_is_otherwise_the_same_run(demo: tuple[Path, str]) -> None:
    from apex_fast.training.settings import read_yaml

    tuned, control = read_yaml(demo[0] / "config.yaml"), read_yaml(demo[0] / "control" / "config.yaml")
    different = {k for k in tuned if tuned[k] != control[k]}
    assert different == {"shift", "probe", "output_dir", "checkpointing_steps"}
    assert (control["shift"]["scale"], control["shift"]["bias"], control["shift"]["trainable"]) == (1.0, 0.0, False)


def results(frechet: float, accuracy: float, diversity: float) -> Results:
    start = {n: {"frechet": 12.0, "accuracy": 1.0, "diversity": 0.1, "images_per_second": 1000.0 / n} for n in (1, 50)}
    return Results(
        start=start,
        tuned={"frechet": frechet, "accuracy": accuracy, "diversity": diversity, "images_per_second": 900.0},
    )


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((3.0, 0.95, 0.8), [True, True, True]),
        ((3.01, 0.99, 0.9), [False, True, True]),
        ((1.0, 0.949, 0.9), [True, False, True]),
        ((1.0, 0.99, 0.79), [True, True, False]),
    ],
)
def test_the_verdict_is_by_the_three_targets(scores: tuple[float, float, float], expected: list[bool]) -> None:
    assert [reached for _, reached in results(*scores).targets()] == expected
    assert results(*scores).speedup == pytest.approx(45.0)


def test_a_missed_target_is_said_and_ends_with_code_1(
    tiny_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    from apex_fast import demo as module

    monkeypatch.setattr(
        module, "QUICK", dataclasses.replace(module.QUICK, check_targets=True, steps=(1, 2), max_train_steps=5)
    )
    assert main(["demo", "--quick", "--output-dir", str(tmp_path), "--start", str(tiny_start)]) == 1
    text = capsys.readouterr().out
    assert "NOT REACHED  one-step Frechet distance" in text and "exit code 1" in text
    assert "not reached" in (tmp_path / "report.html").read_text()


# ---- drawing


def test_a_sample_picture_puts_every_image_in_its_cell() -> None:
    white, black = torch.full((1, 8, 8), -1.0), torch.full((1, 8, 8), 1.0)
    rows = [report.Row("a", "", torch.stack(images)) for images in ([white] * 4, [white, white, black, white])]
    plain = report.sample_picture(rows[:1] * 2, ["x", "y"], per_column=2, title="t", tile=16)
    marked = report.sample_picture(rows, ["x", "y"], per_column=2, title="t", tile=16)
    assert plain.size == marked.size
    from PIL import ImageChops

    left, top, right, bottom = ImageChops.difference(
        plain.crop((60, 0, *plain.size)), marked.crop((60, 0, *marked.size))
    ).getbbox()
    assert right - left <= 16 and bottom - top <= 16 and top > plain.height // 2
    with pytest.raises(ValueError, match="row 'a' has 4 images, expected 3 x 2"):
        report.sample_picture(rows, ["x", "y"], per_column=3, title="")


def test_the_head_of_a_column_may_have_lines() -> None:
    row = report.Row("a", "", torch.full((2, 1, 8, 8), -1.0))
    one, two = (report.sample_picture([row], [head, "y"], per_column=1, title="t") for head in ("x x", "x\nx"))
    assert two.height - one.height == report.HEAD_LINE


def test_pixels_are_ink_on_paper_or_colour() -> None:
    paper, ink = report.pixels(torch.full((1, 8, 8), -1.0), 40), report.pixels(torch.full((1, 8, 8), 1.0), 40)
    assert paper.shape == (40, 40, 3) and paper.min() > 240
    assert ink[20, 20].max() < 70 and ink[0, 0].min() > 200, "ink in the middle, a rim of paper around"
    red = report.pixels(torch.stack([torch.ones(4, 4), -torch.ones(4, 4), -torch.ones(4, 4)]), 12)
    assert (red == [255, 0, 0]).all()
    with pytest.raises(ValueError, match="1 or 3 channels"):
        report.pixels(torch.zeros(4, 8, 8), 40)


def test_tables() -> None:
    header, rows = ["model", "x"], [["a long name", "1.5"], ["b", "10.25"]]
    assert report.text_table(header, rows).splitlines() == [
        "model            x",
        "-----------  -----",
        "a long name    1.5",
        "b            10.25",
    ]
    assert report.markdown_table(header, rows).splitlines()[1:] == [
        "| --- | ---: |",
        "| a long name | 1.5 |",
        "| b | 10.25 |",
    ]


def test_loss_curves_are_drawn_where_there_are_values(tmp_path: Path) -> None:
    from PIL import Image

    records = [{"step": s, "a": 1.0 / s, "b": 0.0, "c": "text"} for s in range(1, 50)]
    report.loss_curves(
        tmp_path / "one.png", records, {"a": "A", "b": "B", "c": "C"}, phases=[(0, "warm-up"), (10, "full")]
    )
    report.loss_curves(tmp_path / "none.png", [], {"a": "A"})
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "none.png") as none:
        blue = [sum(n for n, c in p.convert("RGB").getcolors(1 << 24) if c[2] > c[0] + 60) for p in (one, none)]
    assert blue[0] > 200 and blue[1] == 0
