"""``apex-fast report``: one page of a run, whatever state it is in, looked at in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("yaml")
pytest.importorskip("PIL")

from PIL import Image as pil
from tiny_runs import keys, make_start

from apex_fast.cli import main
from apex_fast.reporting import curves
from apex_fast.reporting.command import write_report
from apex_fast.reporting.curves import Chart, Curve, draw
from apex_fast.reporting.page import evenly, render
from apex_fast.reporting.run_files import read_run
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer

MARK = (255, 0, 200)
"""A colour that nothing on the page has but the pictures of these tests."""

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


class Page(HTMLParser):
    """What a page names, says and holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def line(step: int, **values: Any) -> str:
    numbers = {
        "loss_fake": 0.5 / step,
        "loss_supervised": 0.4,
        "dv_relative": 0.5,
        "clipped_share": 0.1,
        "grad_norm": 1.0 + step % 3,
        "learning_rate": 1e-4,
        "seconds/forward": 0.1,
        "seconds/backward": 0.2,
        "seconds/step": 0.4,
        "images_per_second": 20.0,
        "peak_bytes": 21_400_000_000,
        "phase": "warm-up" if step <= 20 else "ramp" if step <= 40 else "full",
    }
    return json.dumps({"step": step, **numbers, **values}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of a hundred steps, written by hand: 60 steps done."""
    folder = tmp_path / "my run <b>"
    (folder / "samples").mkdir(parents=True)
    lines = [line(step) for step in range(1, 61)]
    alarm = {"name": "gradient_explosion", "saw": "norm 80 <script>", "did": "skipped the step", "see": "docs#x"}
    lines.insert(30, json.dumps({"step": 30, "alarm": alarm}) + "\n")
    lines.insert(20, json.dumps({"step": 20, "validation/frechet": 9.5}) + "\n")
    lines.append(json.dumps({"step": 60, "validation/frechet": 3.25}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 61, "loss_f')
    (folder / "config.yaml").write_text('max_train_steps: 100\nvalidation_prompts: ["a <cat> & a dog"]\n')
    (folder / "environment.json").write_text(
        json.dumps([{"versions": {"torch": "2.13.0"}, "device": "cuda:0", "device_name": "H100", "visibility": 0.31}])
    )
    for step in (20, 40, 60):
        pil.new("RGB", (400, 120), MARK).save(folder / "samples" / f"step-{step:06d}.png")
    return folder


def page_of(folder: Path, **options: Any) -> Page:
    return Page(write_report(folder, folder.parent / "page.html", **options).read_text(encoding="utf-8"))


def test_everything_of_the_run_is_on_the_page(run: Path) -> None:
    page = page_of(run)
    assert "my run <b>" in page.text and "not finished : step 60 of 100; last written" in page.text
    for part in ("a <cat> & a dog", "3.25", "H100", "torch 2.13.0", "21.4 GB", "0.31", "norm 80 <script>"):
        assert part in page.text, part
    assert "warm-up from step 0, then ramp from step 20, then correction on from step 40" in page.text
    assert page.tags.count("img") == 3 and page.tags.count("svg") >= 7
    for title in ("losses", "dv, healthy 0.1 to 1", "validation: frechet", "milliseconds of a step, by role"):
        assert title in page.text, title


def test_the_page_needs_nothing_else(run: Path) -> None:
    page = page_of(run)
    assert page.addresses and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    text = (run.parent / "page.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?://", text)


def test_pictures_are_thinned_out_and_half_written_ones_left_out(run: Path) -> None:
    assert evenly(list(range(50)), 4) == [0, 16, 33, 49] and evenly([1, 2], 4) == [1, 2] and evenly([1, 2], 1) == [2]
    page = page_of(run, grids=2)
    assert page.tags.count("img") == 2 and "2 of 3, the first and the last among them" in page.text
    whole = (run / "samples" / "step-000060.png").read_bytes()
    (run / "samples" / "step-000060.png").write_bytes(whole[: len(whole) // 2])
    assert page_of(run).tags.count("img") == 2


@pytest.mark.parametrize("left", ["config alone", "metrics alone", "nothing whole", "not finite", "flow matching"])
def test_a_run_in_any_state(run: Path, left: str) -> None:
    if left == "config alone":
        (run / "metrics.jsonl").unlink()
        assert "No step has been written" in page_of(run).text
    elif left == "metrics alone":
        for name in ("config.yaml", "environment.json"):
            (run / name).unlink()
        shutil.rmtree(run / "samples")
        assert "step 60" in page_of(run).text
    elif left == "nothing whole":
        (run / "metrics.jsonl").write_bytes(b'{"step": 1, "lo\xff\n[1]\n{"step": "x"}\n')
        (run / "config.yaml").write_text("a: [")
        (run / "environment.json").write_text("[{")
        (run / "eval.json").write_text("{")
        assert "step 0" in page_of(run).text
    elif left == "not finite":
        (run / "metrics.jsonl").write_text(line(1, loss_fake=float("nan"), grad_norm=float("inf"), dv_relative=None))
        page = page_of(run)
        assert "nan" not in page.text.lower().replace("finance", "") and "svg" in page.tags
    else:
        lines = [json.dumps({"step": s, "loss_total": 1 / s, "phase": "flow"}) + "\n" for s in range(1, 30)]
        (run / "metrics.jsonl").write_text("".join(lines))
        page = page_of(run)
        assert "losses" in page.text and "dv, healthy" not in page.text


def test_the_state_is_told_by_what_is_there(run: Path) -> None:
    state = read_run(run)
    assert not state.finished and state.step == 60 and state.total == 100
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + line(100))
    (run / "model").mkdir()
    (run / "model" / "apex_fast.json").write_text("{}")
    assert read_run(run).finished
    # A resumed run with more steps keeps the older model until it ends.
    (run / "config.yaml").write_text("max_train_steps: 200\n")
    assert not read_run(run).finished
    assert "apex-fast generate" not in render(read_run(run))


def test_where_there_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "is no run: it has neither metrics.jsonl nor config.yaml" in capsys.readouterr().err


def test_the_page_of_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = make_start(tmp_path / "start")
    more = ("--validation_prompts", "a 7", "--validation_steps", "2", "--validation_base_inference_steps", "3")
    Trainer(load_config(None, keys(start, tmp_path / "run", *more))).run(until=3)
    assert main(["report", str(tmp_path / "run")]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "not finished : step 3 of 4" in page.text and "checkpoint-3" in page.text and page.tags.count("img") == 1
    (tmp_path / "run" / "best.json").write_text(
        json.dumps({"checkpoint": "checkpoint-3", "metric": "validation/frechet", "value": 2.5})
    )
    assert "best validation/frechet: 2.5" in page_of(tmp_path / "run").text
    assert "train_batch_size: 8" in page.text and "warm-up from step 0, then ramp from step 1" in page.text
    Trainer(load_config(tmp_path / "run" / "config.yaml", ["--resume_from_checkpoint", "latest"])).run()
    assert "finished at step 4 of 4" in page_of(tmp_path / "run").text


# ---- curves


def test_curves_lie_where_their_values_are() -> None:
    points = [(float(s), 10.0 ** (s / 25)) for s in range(101)]
    picture = draw(Chart("x", [Curve("a", points, exact=True)], log=True), last=100)
    (drawn,) = re.findall(r'polyline points="([^"]+)"', picture)
    places = np.array([[float(v) for v in pair.split(",")] for pair in drawn.split()])
    assert len(places) == 101
    # A power is a straight line on a logarithmic axis, rising to the right.
    slope = np.diff(places[:, 1]) / np.diff(places[:, 0])
    assert slope.max() < 0 and slope.std() < 0.1 * abs(slope.mean())


def test_long_curves_are_thinned_out_to_their_means() -> None:
    points = [(float(s), float(s % 2)) for s in range(10_000)]
    thin = curves.thin(points)
    assert len(thin) <= curves.POINTS and thin[-1] == points[-1]
    assert all(abs(v - 0.5) < 0.05 for _, v in thin[:-1])
    assert curves.thin(points[:5]) == points[:5]


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0, 0.0], [-1.0, 1.0], [1e-9, 1e9]])
@pytest.mark.parametrize("log", [False, True])
def test_curves_of_odd_values(values: list[float], log: bool) -> None:
    picture = draw(Chart("x", [Curve("a", list(enumerate(values)))], log=log), last=0)
    assert "nan" not in picture and "inf" not in picture.replace("information", "")
    assert bool(picture) == (not log or max(values) > 0)


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> str:
    for name in BROWSERS:
        if (path := shutil.which(name)) is not None:
            return path
    pytest.skip(f"no browser on this machine ({', '.join(BROWSERS)}); on Debian: apt install chromium-headless-shell")


def look(browser: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Opens ``page`` without a network: every name leads nowhere."""
    words = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1180,3600", "--disable-dev-shm-usage"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}"]
    command = [browser, *(["--headless"] if "headless" not in browser else []), *words, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_a_browser_shows_pictures_and_curves_of_a_copied_page(run: Path, tmp_path: Path, browser: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    page = Path(shutil.copy(write_report(run), elsewhere / "copy.html"))
    shutil.rmtree(run)
    shot = elsewhere / "shot.png"
    look(browser, page, f"--screenshot={shot}")
    seen = np.asarray(pil.open(shot).convert("RGB")).astype(int)

    def pixels(colour: tuple[int, int, int], tolerance: int = 6) -> int:
        return int((np.abs(seen - np.array(colour)).max(-1) <= tolerance).sum())

    # Three pictures of 400 x 120 in a colour of their own; corners are rounded.
    assert 0.97 * 3 * 400 * 120 < pixels(MARK) <= 3 * 400 * 120
    first, second = ((27, 79, 138), (176, 66, 28))
    assert pixels(first) > 1500 and pixels(second) > 300, "the curves are not drawn"
    assert pixels((238, 236, 229)) > 0.3 * seen.shape[0] * seen.shape[1], "the page has no style"
    dump = look(browser, page, "--dump-dom").stdout
    assert "not finished" in dump and dump.count("<svg") >= 7
    # What a prompt or an alarm says is text, and nothing of it runs.
    assert "norm 80 &lt;script&gt;" in dump and "<script" not in dump
