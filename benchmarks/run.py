"""Benchmarks of apex_fast on this machine: ``python benchmarks/run.py --suite all --json FILE``.

ops      every op beside plain torch and torch.compile of the same, and every fusion beside torch.utils.checkpoint. The
         first run compiles for many minutes; torch keeps what it compiled for the next.
step     a training step of a diffusers transformer: time, peak memory
sampler  latency and images per second

Providers run side by side in one process. With --json plots are written beside the file. Exit code 1: a provider was
wrong or failed, or with --gate a promise was not kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# The profiler that reads torch's allocator announces itself on stderr otherwise; it reads this when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import machine, plots, report, timing
from benchmarks.allocator import keep_freed_memory
from benchmarks.suites import fusions, networks, ops, sampler, step

SUITES = ("ops", "step", "sampler")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="ops")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=(*ops.DTYPES, "all"),
        default="all",
        help="of the tensors; all (the default) is every one for ops, and for step and sampler the usual one of the "
        "device: fp32 on a CPU, bf16 on a GPU",
    )
    parser.add_argument("--providers", default=",".join(ops.PROVIDERS), help="of suite ops, comma-separated (all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases, or networks, whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: as many as torch takes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header, rows and gates here")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="compare with an earlier --json")
    parser.add_argument("--gate", action="store_true", help="exit with 1 if a promise is not kept")
    options = parser.parse_args(arguments)
    options.providers = tuple(options.providers.split(","))
    for provider in options.providers:
        if provider not in ops.PROVIDERS:
            parser.error(f"argument --providers: no provider {provider!r}; there are {', '.join(ops.PROVIDERS)}")
    options.suites = SUITES if options.suite == "all" else (options.suite,)
    names = []
    if "ops" in options.suites:
        names += [*(case.name for case in ops.CASES), *fusions.CASES]
    if set(options.suites) != {"ops"}:
        names += [network.name for network in networks.networks(options.device, options.quick)]
    if not any(options.only in name for name in names):
        parser.error(f"argument --only: no case contains {options.only!r}; there are {', '.join(names)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    if options.threads < 1:
        parser.error(f"argument --threads: expected at least 1, got {options.threads}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Before the run: a report that cannot be read should not cost an hour.
    earlier = report.read_json(options.compare) if options.compare else None
    allocator = keep_freed_memory()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _run(options, allocator, earlier)
    finally:
        torch.set_num_threads(threads_before)


def _run(options: argparse.Namespace, allocator: str, earlier: tuple | None) -> int:
    header = machine.header(threads=options.threads, allocator=allocator, quick=options.quick, device=options.device)
    # Before the run, so that it does not count itself.
    header["busy"] = header["load_average"] > 0.5
    result = report.SuiteResult()
    for suite in options.suites:
        found = _suite(suite, options, header)
        result.rows += found.rows
        result.gates += found.gates
    if header["copy_gbps"] is None:
        header["copy_gbps"] = _copy_gbps(options)

    print(report.header_text(header))
    print(report.table(result.rows))
    if earlier:
        print("\n" + report.comparison(*earlier, header, result.rows))
    print("\nGates")
    print("\n".join(f"  {gate}" for gate in result.gates) or "  none of these cases has one")
    slow = report.slow_cases(result.rows)
    print("\nWhere apex_fast is not the fastest")
    print("\n".join(f"  {line}" for line in slow) or "  nowhere in this run")
    failed = report.failures(result.rows)
    if failed:
        print("\nWithout a time\n" + "\n".join(f"  {line}" for line in failed))
    if options.json:
        report.write_json(options.json, header, result.rows, result.gates)
        print(f"\nWritten: {options.json}")
        try:
            for path in plots.draw(options.json, result.rows):
                print(f"Written: {path}")
        except ImportError as error:
            print(f"No plots: {error}")
    return int(bool(failed) or (options.gate and any(gate.passed is False for gate in result.gates)))


def _suite(suite: str, options: argparse.Namespace, header: dict) -> report.SuiteResult:
    if suite == "ops":
        large = _large(options)
        settings = ops.Settings(
            dtypes=tuple(ops.DTYPES) if options.dtype == "all" else (options.dtype,),
            providers=options.providers,
            only=options.only,
            quick=options.quick,
            beyond_cache_bytes=large,
            device=options.device,
        )
        return ops.run_suite(settings, header, machine.CopyProbe(large, options.device))
    usual = "bf16" if options.device == "cuda" else "fp32"
    dtype = usual if options.dtype == "all" else options.dtype
    module = {"step": step, "sampler": sampler}[suite]
    settings = module.Settings(dtype=dtype, device=options.device, quick=options.quick, only=options.only)
    return module.run_suite(settings, header)


def _large(options: argparse.Namespace) -> int:
    return machine.MIB if options.quick else machine.beyond_cache_bytes(options.device)


def _copy_gbps(options: argparse.Namespace) -> float:
    """For suites that move no bytes worth a copy between their calls."""
    probe = machine.CopyProbe(_large(options), options.device)
    rounds = 2 if options.quick else 11
    timings = timing.interleave({"copy": probe}, rounds=rounds, block_ms=1.0, device=options.device)
    return probe.moved_bytes / timings["copy"].p50 / 1e6


if __name__ == "__main__":
    sys.exit(main())
