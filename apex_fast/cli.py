"""The command ``apex-fast``: init, plan, probe, doctor, cache, train, report, generate, export, eval, env, demo."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apex_fast.shipped import TO_TRY
from apex_fast.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 wrong usage, 4 if an alarm stopped a run, 128 +
    signal if a signal did.

    Mistakes of the user (keys, paths, missing extras) are told in one line on stderr, not as a traceback;
    APEX_FAST_TRACEBACK=1 shows it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["train"]:
            # The keys of a run are too many and too nested for argparse; the config parses them itself.
            return _train(arguments[1:])
        if arguments[:1] == ["plan"]:
            from apex_fast.planning import report

            return report.main(arguments[1:])
        if arguments[:1] == ["probe"]:
            from apex_fast.probing import command as probe_command

            return probe_command.main(arguments[1:])
        if arguments[:1] == ["export"]:
            from apex_fast.export import command as export_command

            return export_command.main(arguments[1:])
        if arguments[:1] == ["cache"]:
            from apex_fast.caching import command as cache_command

            return cache_command.main(arguments[1:], offline=_stay_offline_for)
        if arguments[:1] == ["doctor"]:
            from apex_fast import doctor

            _stay_offline()
            return doctor.main(arguments[1:])
        if arguments[:1] == ["eval"]:
            from apex_fast.evaluation import command as evaluation_command

            return evaluation_command.main(arguments[1:], offline=_stay_offline_for)
        if arguments[:1] == ["report"]:
            from apex_fast.reporting import command as report_command

            return report_command.main(arguments[1:])
        if arguments[:1] == ["env"]:
            from apex_fast import info

            return info.main(arguments[1:])
        options = _parser().parse_args([arguments[0], *map(_hyphens, arguments[1:])] if arguments else ["--help"])
        return options.run(options)
    except KeyboardInterrupt:
        print("\napex-fast: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except _user_errors() as error:
        if os.environ.get("APEX_FAST_TRACEBACK"):
            raise
        # Of an error that several processes of a run have met, one tells.
        if not getattr(error, "told_elsewhere", False):
            print(f"apex-fast: {_told(error, arguments)}", file=sys.stderr)
        return 2 if type(error).__name__ == "SettingsError" else 1


def _user_errors() -> tuple[type[BaseException], ...]:
    import json

    import torch
    from safetensors import SafetensorError

    from apex_fast.finite import NonFiniteLossError
    from apex_fast.training.checkpoint import CheckpointError
    from apex_fast.training.processes import ProcessLostError
    from apex_fast.training.settings import SettingsError

    mistakes = (SettingsError, CheckpointError, ProcessLostError, FileNotFoundError, ImportError)
    return *mistakes, NonFiniteLossError, torch.OutOfMemoryError, SafetensorError, json.JSONDecodeError


def _told(error: BaseException, arguments: Sequence[str]) -> str:
    """``error`` as one line for the user."""
    import json

    import torch
    from safetensors import SafetensorError

    if isinstance(error, torch.OutOfMemoryError):
        from apex_fast.command import command_name
        from apex_fast.training.memory import explain

        if arguments[:1] == ["train"]:
            # The same keys: those of the command line count for the memory too.
            words = [word for word in arguments[1:] if word not in ("--smoke", "--config")]
            return explain(error, shlex.join([command_name(), "plan", *words]), "")
        return explain(
            error, "", "take smaller pictures (--resolution, or --height and --width), or another device (--device cpu)"
        )
    if isinstance(error, SafetensorError | json.JSONDecodeError):
        kind = "JSON" if isinstance(error, json.JSONDecodeError) else "safetensors"
        return (
            f"a file of the model or of the run is no whole {kind} file: {error}; it was cut off or changed, so copy "
            "or download it again (APEX_FAST_TRACEBACK=1 shows where it was read)"
        )
    return str(error)


def _hyphens(word: str) -> str:
    """``--num_inference_steps`` as ``--num-inference-steps``: both spellings are accepted everywhere."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apex-fast",
        description="One-step text-to-image generators from pretrained flow models by condition shifting.",
    )
    parser.add_argument("--version", action="version", version=f"apex_fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    # `train` and `env` are only listed here; main() hands them over before this parser sees them.
    commands.add_parser(
        "train", help="train or tune: apex-fast train CONFIG.yaml [--key value ...]; train --help lists all keys"
    )

    starting = commands.add_parser(
        "init",
        help="write a commented config to start from",
        description="Writes a commented config for a family of models and says what to type next.",
    )
    starting.add_argument(
        "family", metavar="FAMILY", help="sana, qwen_image, flux, z_image, stable_diffusion_3 or lumina2"
    )
    starting.add_argument("--mode", choices=("lora", "full"), required=True, help="a LoRA, or all parameters")
    starting.add_argument("--model", help="folder or hub id (default: the family's best-known one)")
    starting.add_argument("-o", "--output", default="run.yaml", help="file to write (default run.yaml); never replaced")
    starting.set_defaults(run=_init)

    commands.add_parser(
        "plan", help="memory, passes and hours of a run: apex-fast plan CONFIG.yaml [--gpu 24GB]; plan --help"
    )

    generate = commands.add_parser(
        "generate", help="draw pictures from prompts", description="Draws pictures from prompts."
    )
    generate.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a run, a checkpoint or a saved model; one that ships (digits_start, shapes_one_step, ...; demo "
        "is the one that the demo shows); a hub id; the model that --lora adapts",
    )
    texts = generate.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", nargs="+", help="one or several texts, each in quotes")
    texts.add_argument(
        "--prompts",
        metavar="FILE",
        help="many texts: a file with one a line, JSON lines, or a folder of text files; needs --out, a folder, and "
        "goes on where it was stopped",
    )
    generate.add_argument(
        "--layout",
        choices=("plain", "geneval", "dpg"),
        default="plain",
        help="how --prompts names its pictures: as the scorers of GenEval and DPG-Bench read them (default plain)",
    )
    generate.add_argument("--batch-size", type=int, default=1, help="pictures of --prompts made together (default 1)")
    generate.add_argument("--lora", help="a LoRA: a .safetensors file, or the folder of a run or an export of one")
    generate.add_argument(
        "--weight-dtype",
        choices=("fp32", "bf16"),
        help="of a model that is no run (default: as the LoRA was trained, or fp32)",
    )
    generate.add_argument("--base", help="where the model that the run started from is now, if it was moved")
    generate.add_argument("--height", type=int, help="in pixels (default: as trained)")
    generate.add_argument("--width", type=int, help="in pixels (default: as trained)")
    generate.add_argument("--resolution", type=int, help="height and width of square pictures")
    generate.add_argument("--num-inference-steps", "--steps", type=int, default=1, help="sampling steps (default 1)")
    generate.add_argument("--n", type=int, default=4, help="images of each prompt (default 4)")
    generate.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    generate.add_argument(
        "--guidance-scale",
        type=float,
        help="classifier-free guidance as the model's own pipeline counts it (default: none)",
    )
    generate.add_argument("--negative-prompt", help="what guidance leads away from (default: the model's own)")
    generate.add_argument("--out", type=Path, help="PNG to write (default: RUN/generated/...), or folder for --prompts")
    generate.add_argument(
        "--size", type=int, help="edge at which a picture is drawn (default: 256 for small ones, else their own)"
    )
    generate.add_argument(
        "--device", default="auto", help="auto (default: cuda if there is one, else cpu), cpu, cuda or cuda:N"
    )
    generate.set_defaults(run=_generate)

    commands.add_parser(
        "eval", help="score a run, on a benchmark or by its pictures: apex-fast eval RUN --nfe 1,4,50; eval --help"
    )

    commands.add_parser(
        "probe",
        help="whether a network sees a condition shift, before training: apex-fast probe MODEL; probe --help",
    )
    commands.add_parser(
        "doctor", help="check a run before it begins, with the mend for what is wrong: apex-fast doctor CONFIG.yaml"
    )
    commands.add_parser(
        "cache", help="encode a run's prompts and pictures once, into files: apex-fast cache CONFIG.yaml; cache --help"
    )
    commands.add_parser("report", help="one HTML page of a run: apex-fast report RUN; report --help")
    commands.add_parser(
        "export", help="a run as files that stock diffusers or ComfyUI loads: apex-fast export RUN; export --help"
    )
    commands.add_parser("env", help="versions, how the library was built, what runs where; --json for programs")

    demo = commands.add_parser(
        "demo",
        help="tune a small network to one step on real scans, with table and pictures",
        description="Tunes a small network to one step on real scans: a table, pictures and a report page, in at "
        "most 8 minutes on two cores.",
    )
    demo.add_argument(
        "--output-dir", type=Path, default=Path("runs/demo"), help="folder of the results (default runs/demo)"
    )
    demo.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    demo.add_argument("--start", help="another start than the one that ships: the folder of a model or a run")
    demo.add_argument("--seed", type=int, help="another seed than the recipe's")
    demo.set_defaults(run=_demo)
    return parser


# ---- commands

_TRAIN_USAGE = """usage: apex-fast train CONFIG.yaml [--key value ...]
       apex-fast train CONFIG.yaml --smoke       (the same on a tiny random model, in a minute)
       apex-fast train RUN/config.yaml --resume_from_checkpoint latest
       apex-fast train --model PATH_OR_ID --prompts prompts.txt [--key value ...]
                                                 (a LoRA from prompts alone, no pictures, no config file)

Every key of the config file can be set on the command line, as --learning_rate or --learning-rate; keys of a section
with a dot: --shift.scale -1. A list takes several values, each in quotes.
"""


def _train(arguments: list[str]) -> int:
    from apex_fast.training.config import TrainConfig, load_config
    from apex_fast.training.settings import SettingsError, help_text

    if "--help" in arguments or "-h" in arguments:
        print(_TRAIN_USAGE + "\n" + help_text(TrainConfig))
        return 0
    smoke = "--smoke" in arguments
    arguments = [word for word in arguments if word != "--smoke"]
    path: str | None = None
    if arguments and not arguments[0].startswith("--"):
        path, arguments = arguments[0], arguments[1:]
    elif arguments[:1] == ["--config"]:
        if len(arguments) < 2:
            raise SettingsError("--config needs a file")
        path, arguments = arguments[1], arguments[2:]
    if path is None and not arguments:
        raise SettingsError(
            "train needs a config: apex-fast train CONFIG.yaml [--key value ...]; `apex-fast train --help` lists the "
            "keys"
        )
    from apex_fast.training import prompts_only

    if path is None and prompts_only.is_front_door(arguments):
        config = prompts_only.config_from(arguments)
    else:
        config = load_config(path, prompts_only.with_model(arguments))
    if smoke:
        _stay_offline()
        from apex_fast.training.smoke import smoke_run

        named = any(word.split("=")[0] in ("--output_dir", "--output-dir") for word in arguments)
        return smoke_run(config, output_dir=config.output_dir if named else None)
    _stay_offline_for(config.pretrained_model_name_or_path or "")
    from apex_fast.training.loop import Trainer

    trainer = Trainer(config)
    result = trainer.run()
    if result.finished and config.prompts is not None and trainer.is_main:
        prompts_only.export_results(config, lambda line: print(line, file=sys.stderr, flush=True))
    trainer.processes.leave(result.exit_code)
    return result.exit_code


def _stay_offline() -> None:
    """For models in local folders: some tokenizers would ask a hub about themselves first, and wait for its answer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _stay_offline_for(*models: str) -> None:
    if not any(map(_needs_hub, models)):
        _stay_offline()


def _init(options: argparse.Namespace) -> int:
    from apex_fast.starting import write_starting_config

    print(write_starting_config(options.family, options.mode, options.output, model=options.model))
    return 0


def _generate(options: argparse.Namespace) -> int:
    if (mistake := _generate_mistake(options)) is not None:
        print(f"apex-fast generate: {mistake}", file=sys.stderr)
        return 2
    from apex_fast.generate import exported_base
    from apex_fast.training.models import device_of

    try:
        if options.model == TO_TRY:
            from apex_fast.demo.shown import model_to_try
            from apex_fast.evaluation.layouts import read_prompts

            texts = options.prompt or [prompt.text for prompt in read_prompts(options.prompts)]
            options.model = model_to_try(texts)
        if not _needs_hub(options.base or exported_base(options.model) or options.model):
            _stay_offline()
        settings = {
            "images_per_prompt": options.n,
            "num_inference_steps": options.num_inference_steps,
            "guidance_scale": options.guidance_scale,
            "negative_prompt": options.negative_prompt,
            "height": options.height or options.resolution,
            "width": options.width or options.resolution,
            "seed": options.seed,
            "device": device_of(options.device),
            "base": options.base,
            "lora": options.lora,
            "weight_dtype": options.weight_dtype,
        }
        many = options.prompts is not None
        said, path = _generate_files(options, settings) if many else _generate_picture(options, settings)
    except ValueError as error:
        print(f"apex-fast generate: {error}", file=sys.stderr)
        return 2
    print(f"{said}, on {settings['device']}", file=sys.stderr)
    print(path)
    return 0


def _generate_mistake(options: argparse.Namespace) -> str | None:
    if options.resolution is not None and (options.height is not None or options.width is not None):
        return "write --resolution, or --height and --width"
    if options.prompts is not None:
        if options.out is None:
            return "--prompts needs --out, the folder to write the pictures to"
        return "--size is for --prompt; pictures of --prompts keep their size" if options.size is not None else None
    if options.out is not None and options.out.is_dir():
        return f"--out {options.out} is a folder; for --prompt name the PNG to write, or give --prompts FILE"
    for name, default in (("layout", "plain"), ("batch_size", 1)):
        if getattr(options, name) != default:
            return f"--{name.replace('_', '-')} is for --prompts FILE"
    return None


def _generate_picture(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[str, Path]:
    from apex_fast.generate import generate, picture_path, write_picture

    images, which = generate(options.model, options.prompt, **settings)
    name = options.prompt[0] + (f" and {len(options.prompt) - 1} more" if len(options.prompt) > 1 else "")
    path = options.out or picture_path(options.model, name, options.num_inference_steps, options.seed)
    write_picture(images, options.prompt, path, size=options.size)
    return _drawn(len(images), options.num_inference_steps, which), path


def _generate_files(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[str, Path]:
    from apex_fast.evaluation.layouts import read_prompts
    from apex_fast.generate import generate_files

    drawn = generate_files(
        options.model,
        read_prompts(options.prompts),
        options.out,
        layout=options.layout,
        batch_size=options.batch_size,
        **settings,
    )
    kept = f" ({drawn.kept} more were there)" if drawn.kept else ""
    return _drawn(drawn.new, options.num_inference_steps, drawn.phrase) + kept, options.out


def _drawn(count: int, steps: int, phrase: str) -> str:
    return f"{count} picture{'s' if count != 1 else ''} in {steps} step{'s' if steps > 1 else ''} by {phrase}"


def _needs_hub(model: str) -> bool:
    """Whether ``model`` is on the hub, or a run that was trained on one that is."""
    from apex_fast.training.models import is_hub_id
    from apex_fast.training.results import Record, find_result

    while not is_hub_id(model):
        try:
            record = Record.read(find_result(model).folder)
        except (FileNotFoundError, RuntimeError):
            return False
        if record is None:
            return False
        model = record.base
    return True


def _demo(options: argparse.Namespace) -> int:
    from apex_fast.demo import run_demo

    _stay_offline()
    return run_demo(options.output_dir, quick=options.quick, start=options.start, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
