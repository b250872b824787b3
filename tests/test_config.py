"""Settings: keys, types, YAML as people write it, overrides, and the errors that name the right key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from apex_fast.objective import ApexObjective
from apex_fast.shift import ConditionShift
from apex_fast.training.config import REAL_BRANCH, TrainConfig, load_config
from apex_fast.training.foreign_keys import FOREIGN_KEYS
from apex_fast.training.settings import SettingsError, as_mapping, help_text, keys_of, read_yaml, write_yaml

ROOT = Path(__file__).parent.parent
LEAST = ["--output_dir", "runs/x", "--pretrained_model_name_or_path", "digits_start"]


def from_text(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: runs/x\npretrained_model_name_or_path: digits_start\n" + text)
    return load_config(path, overrides)


def test_the_keys_of_the_diffusers_scripts_are_all_there() -> None:
    named = (
        "pretrained_model_name_or_path output_dir train_batch_size gradient_accumulation_steps gradient_checkpointing "
        "learning_rate max_train_steps mixed_precision rank lora_alpha validation_prompts validation_steps "
        "checkpointing_steps "
        "checkpoints_total_limit resume_from_checkpoint report_to seed"
    ).split()
    assert set(named) <= set(keys_of(TrainConfig))


def test_every_key_is_documented_and_shown_by_help() -> None:
    text = help_text(TrainConfig)
    for name, (_, field) in keys_of(TrainConfig).items():
        assert f"--{name}" in text
        assert (
            field.name in ("low", "high", "mean", "std", "kind", "value", "values", "constant_share")
            or (len(field.metadata.get("help", "")) > 10)
            or name.startswith(("objective.", "flow_matching_times."))
            or name.startswith(("peer.fake_times.", "peer.query_times.", "peer.base_times."))
        ), f"{name} has no documentation"
    for name in ("objective.clip", "objective.warmup_steps", "objective.correction_weight"):
        assert len(keys_of(TrainConfig)[name][1].metadata["help"]) > 10, f"{name}: its docstring entry was not found"


def test_the_objective_section_has_every_field_of_the_objective() -> None:
    section = {name.split(".")[1] for name in keys_of(TrainConfig) if name.startswith("objective.")}
    fields = {f.name for f in dataclasses.fields(ApexObjective)}
    # guidance is the model's own unless the run says otherwise: a key of the run
    assert section == fields - {"shift", "loss", "total_steps", "guidance_scale"}


def test_a_config_makes_the_objective_that_it_describes(tmp_path: Path) -> None:
    config = from_text(tmp_path, "objective:\n  clip: null\n  supervised_times: {high: 0.9}\n  warmup_steps: 7\n")
    objective = ApexObjective(ConditionShift(), loss=config.loss, **vars(config.objective))
    assert objective.clip is None and objective.warmup_steps == 7
    # what the section leaves out keeps the objective's default (low 0.02), not the class's (low 0)
    assert (objective.supervised_times.low, objective.supervised_times.high) == (0.02, 0.9)


def test_numbers_and_words_mean_what_they_say(tmp_path: Path) -> None:
    config = from_text(tmp_path, "learning_rate: 1e-4\nmixed_precision: no\nadam_epsilon: 1E-9\nadam_weight_decay: 1\n")
    assert (config.learning_rate, config.mixed_precision) == (1e-4, "no")
    assert (config.adam_epsilon, config.adam_weight_decay) == (1e-9, 1.0)


def test_overrides_win_in_both_spellings_and_reach_into_sections(tmp_path: Path) -> None:
    config = from_text(
        tmp_path,
        "learning_rate: 1e-4\nshift: {scale: 0.5}\n",
        "--learning-rate=2e-4",
        "--gradient_checkpointing",
        "--shift.bias",
        "-1.5",
        "--validation-prompts",
        "a handwritten three",
        "the digit 7",
        "--validation_steps=5",
        "--max_grad_norm",
        "null",
        "--mixed_precision",
        "no",
    )
    assert (config.learning_rate, config.gradient_checkpointing, config.max_grad_norm) == (2e-4, True, None)
    assert (config.shift.scale, config.shift.bias) == (0.5, -1.5)
    assert (config.validation_prompts, config.mixed_precision) == (["a handwritten three", "the digit 7"], "no")


@pytest.mark.parametrize("listed", [["a three", "a 7"], ["[a three, a 7]"]])
def test_lists_on_the_command_line(listed: list[str]) -> None:
    assert load_config(None, [*LEAST, "--validation_prompts", *listed]).validation_prompts == ["a three", "a 7"]


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("learning_rat", "learning_rate"),
        ("train_batchsize", "train_batch_size"),
        ("checkpoint_steps", "checkpointing_steps"),
        ("corection_weight", "objective.correction_weight"),
        ("clip", "objective.clip"),
        ("shift.scal", "shift.scale"),
        ("mix_precision", "mixed_precision"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_near_one(key: str, right: str) -> None:
    with pytest.raises(SettingsError, match=f"unknown key '{key}'.*'{right}'"):
        load_config(None, [*LEAST, f"--{key}", "1"])


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("network_dim", "'rank'"),
        ("network_alpha", "'lora_alpha'"),
        ("unet_lr", "'learning_rate'"),
        ("batch_size", "'train_batch_size'"),
        ("save_every", "'checkpointing_steps'"),
        ("name_or_path", "'pretrained_model_name_or_path'"),
        ("validation_prompt", "'validation_prompts'"),
        ("num_train_epochs", "'max_train_steps'"),
    ],
)
def test_a_foreign_key_is_refused_with_the_right_one(tmp_path: Path, key: str, right: str) -> None:
    with pytest.raises(SettingsError, match=rf"run\.yaml: unknown key '{key}': write {right}"):
        from_text(tmp_path, f"{key}: 4\n")


def test_the_guidance_moved_out_of_the_objective(tmp_path: Path) -> None:
    message = "unknown key 'objective.guidance_scale': write 'guidance_scale' at the top level"
    with pytest.raises(SettingsError, match=message):
        from_text(tmp_path, "objective: {guidance_scale: 2.0}\n")
    with pytest.raises(SettingsError, match=message):
        from_text(tmp_path, "", "--objective.guidance_scale", "2.0")
    assert from_text(tmp_path, "guidance_scale: 2\n").guidance_scale == 2.0


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("resolution: 512\n", [], (512, 512)),
        ("resolution: [768, 512]\n", [], (768, 512)),
        ("", ["--resolution", "512"], (512, 512)),
        ("", ["--resolution", "768", "512"], (768, 512)),
        ("", ["--resolution", "[768, 512]"], (768, 512)),
        ("resolution: 64\n", ["--resolution", "null"], None),
    ],
)
def test_resolutions(tmp_path: Path, text: str, words: list[str], expected: tuple[int, int] | None) -> None:
    assert from_text(tmp_path, "dataset_name: pictures\n" + text, *words).image_size == expected


def test_the_real_branch_of_each_way_of_tuning(tmp_path: Path) -> None:
    assert from_text(tmp_path, "").real_branch_in_use == REAL_BRANCH["full"]
    assert from_text(tmp_path, "rank: 4\n").real_branch_in_use == REAL_BRANCH["lora"]
    assert from_text(tmp_path, "real_branch: ema\n").real_branch_in_use == "ema"
    # where the loss has none, no copy is held
    assert from_text(tmp_path, "loss: paper\n").real_branch_in_use == "live"
    assert from_text(tmp_path, "objective: {correction_weight: 0.0}\n").real_branch_in_use == "live"
    # a live branch is held by the data alone
    assert from_text(tmp_path, "real_branch: live\n").real_branch_in_use == "live"


def test_no_foreign_key_hides_one_of_ours_and_all_point_to_keys_that_exist() -> None:
    keys = keys_of(TrainConfig)
    sections = {k.split(".")[0] for k in keys if "." in k}
    assert not set(FOREIGN_KEYS) & (set(keys) | sections)
    for key, advice in FOREIGN_KEYS.items():
        if advice.startswith("write '"):
            assert advice.split("'")[1].split(":")[0] in set(keys) | sections, f"{key}: {advice}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: fast\n", "learning_rate must be a number, got the text 'fast'"),
        ("max_train_steps: 10.5\n", "max_train_steps must be a whole number, got the number 10.5"),
        ("max_train_steps: true\n", "max_train_steps must be a whole number, got the truth value True"),
        ("compile: 1\n", "compile must be true or false, got the number 1"),
        ("compile: yes\n", "compile must be true or false, got the text 'yes'"),
        ("validation_prompts: a three\n", "validation_prompts must be a list .a text each., got the text"),
        (
            "loss: corection\n",
            "loss must be one of: correction, paper, flow_matching, dmd2, dmd2_lora, twinflow, rcgm, got the text "
            "'corection'",
        ),
        ("shift: 3\n", "shift must be a section with the keys mode, scale"),
        ("shift: {scale: big}\n", "shift.scale must be a number, got the text 'big'"),
        ("report_to: mlflow\n", "report_to must be one of: tensorboard, wandb, none, got the text 'mlflow'"),
        ("seed: null\n", "seed must be a whole number, got null"),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_what_came(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_text(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 0\n", "rank must be at least 1, got 0"),
        ("rank: 4\nlora_alpha: 0\n", "lora_alpha must be above 0"),
        ("rank: 4\nlora_dropout: 1.0\n", "lora_dropout must be at least 0 and below 1"),
        ("rank: 4\nlora_target_modules: []\n", "lora_target_modules is empty"),
        ("lora_alpha: 8\n", "lora_alpha belongs to LoRA, and all parameters are tuned .rank: null.; write rank"),
        ("use_dora: true\n", "use_dora belongs to LoRA"),
        ("lora_target_modules: [to_q]\n", "lora_target_modules belongs to LoRA"),
        ("quantization: int8\n", "quantised weights cannot be trained, and all parameters are tuned"),
        (
            "weight_dtype: bf16\n",
            "most updates of AdamW would be rounded away. Write weight_dtype: fp32 with mixed_pre",
        ),
        ("start_lora: x\nstart_lora_mode: frozen\n", "start_lora_mode: frozen needs a LoRA to train"),
        (
            "rank: 4\nstart_lora_mode: frozen\n",
            "start_lora_mode: frozen says how to start from a LoRA, and there is no",
        ),
        ("max_sequence_length: 0\n", "max_sequence_length must be at least 1, got 0"),
        ("guidance_scale: -1\n", "guidance_scale must be at least 0, got -1"),
        ("text_encoder_lr: 1e-4\n", "leave it out: the text encoder stays as it is"),
        ("rank: 4\nquantization: int8\nstart_lora: x\n", "merge cannot add a LoRA to quantised weights"),
        (
            "real_branch: live\nobjective: {supervised_weight: 0.0}\n",
            "real_branch: live needs objective.supervised_weight above 0: nothing else holds",
        ),
        (
            "rank: 4\nuse_dora: true\nlora_dropout: 0.1\nweight_dtype: bf16\n",
            "use_dora with lora_dropout needs lora_dtype .fp32. to be weight_dtype .bf16., or mixed_precision: bf16",
        ),
        ("loss: paper\nguidance_scale: 2.0\n", "guidance_scale: the paper loss has no real branch to guide"),
        ("resolution: 64\n", "pictures of digits have 8 x 8 pixels"),
        ("max_train_samples: 0\n", "max_train_samples"),
        ("dataset_name: pictures\nmax_train_samples: 5\n", "max_train_samples is for digits"),
        ("dataset_name: shapes\nresolution: 48\n", "32 x 32 or 64 x 64 pixels, got 48"),
        ("dataset_name: x\nresolution: [1, 2, 3]\n", "resolution must be one edge in pixels or .height, width."),
        ("dataset_name: x\nresolution: 0\n", "resolution must be one edge in pixels"),
        ("dataset_name: x\nvalidation_metrics: true\n", "validation_metrics scores digits"),
        ("dataset_name: x\nmax_bad_share: 1.5\n", "max_bad_share must lie in .0, 1., got 1.5"),
        ("dataset_name: x\nmax_aspect_ratio: 0.5\n", "max_aspect_ratio must be at least 1, got 0.5"),
        ("dataset_name: x\naspect_bucket_step: 0\n", "aspect_bucket_step must be at least 1, got 0"),
        ("aspect_buckets: true\n", "aspect_buckets: digits has nothing of the kind"),
        ("caption_column: text\n", "caption_column: digits has nothing of the kind"),
        ("trust_remote_code: true\n", "trust_remote_code.*leave it out: code that comes with a data set or a model is"),
        ("enable_bucket: true\n", "enable_bucket.*write 'aspect_buckets: true'"),
        ("family: sdxl\n", "family must be one of: sana, qwen_image, flux"),
        ("distributed_timeout: 0\n", "distributed_timeout must be above 0 seconds"),
        (
            "best_metric: validation/frechet\n",
            "best_metric: validation/frechet is a number of the validations, and this",
        ),
        ("train_text_encoder: true\n", "train_text_encoder is for loss: flow_matching"),
        ("max_train_steps: 0\n", "max_train_steps must be at least 1, got 0"),
        ("checkpoints_total_limit: 0\n", "checkpoints_total_limit must be at least 1"),
        ("learning_rate: 0\n", "learning_rate must be above 0"),
        ("ema_decay: 1.0\n", "ema_decay must be at least 0 and below 1"),
        ("validation_steps: 5\n", "nothing to validate"),
        ("objective: {supervised_times: {low: 2.0}}\n", "objective.supervised_times: TimeDistribution: 0 <= low"),
        ("objective: {clip: -1.0}\n", "objective: ApexObjective: clip must be above 0"),
        ("loss: paper\nschedule: sequential\n", "schedule: sequential cannot serve loss: paper.*schedule: retain"),
        ("seed: 1\nseed: 2\n", "line 4: the key 'seed' stands there twice"),
        ("shift: {scale: 1.0, scale: 2.0}\n", "the key 'scale' stands there twice"),
        ("loss: [\n", "not valid YAML in line"),
        ("seed: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_text(tmp_path, text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed"], "--seed needs a value: a whole number"),
        (["--seed", "1", "2"], "--seed takes one value"),
        (["--seed", "1", "--seed", "2"], "--seed stands there twice"),
        (["seed", "1"], "expected --key, got 'seed'"),
        (["--shift", "1"], "'shift' is a section; write one of its keys: shift.mode"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_config(None, [*words, *LEAST] if words[0].startswith("--") else words)


def test_tuning_without_a_model_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match="set pretrained_model_name_or_path.*digits_start.*or write loss: flow_matching"
    ):
        load_config(None, ["--output_dir", "x"])
    with pytest.raises(SettingsError, match="output_dir is required"):
        load_config(None, ["--pretrained_model_name_or_path", "digits_start"])
    with pytest.raises(SettingsError, match="no such config file"):
        load_config(tmp_path / "none.yaml")


def test_a_written_config_reads_back_as_the_same_run(tmp_path: Path) -> None:
    config = load_config(
        None, [*LEAST, "--mixed_precision", "no", "--validation_prompts", "null", "a: b", "--adam_epsilon", "1e-9"]
    )
    write_yaml(tmp_path / "again.yaml", as_mapping(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert read_yaml(tmp_path / "again.yaml")["validation_prompts"] == ["null", "a: b"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_the_examples_are_valid(path: Path) -> None:
    load_config(path)


def test_the_demo_runs_the_example_that_people_read() -> None:
    assert (ROOT / "examples" / "digits_demo.yaml").read_bytes() == (
        ROOT / "apex_fast" / "assets" / "digits_demo.yaml"
    ).read_bytes()
