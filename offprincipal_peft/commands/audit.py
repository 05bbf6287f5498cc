"""``offprincipal audit``: what training did to a model's weights, from two or more checkpoints."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from . import DONE, Refused, words

if TYPE_CHECKING:
    from ..audit import Checkpoint


def add_options(parser: argparse.ArgumentParser) -> None:
    from ..audit import PROBES

    parser.add_argument("base", type=Path, metavar="BASE", help="the model before training")
    parser.add_argument("tuned", type=Path, nargs="+", metavar="TUNED", help="after training, or an adapter of BASE")
    parser.add_argument("--probes", type=words, metavar="A,B", help=f"all by default: {', '.join(PROBES)}")
    parser.add_argument(
        "--layers", action="append", default=[], metavar="REGEX", help="only weights whose name has this; repeatable"
    )
    parser.add_argument(
        "--rank",
        type=_rank,
        default=1 / 16,
        metavar="K",
        help="of the principal subspaces: K, or a fraction of min(shape)",
    )
    parser.add_argument("--mode", choices=["fast", "exact"], default="fast", help="exact: fp64 SVDs of both sides")
    parser.add_argument("--device", default="cpu", metavar="X", help="to decompose on (default cpu)")
    parser.add_argument("--principal-density", type=float, default=0.5, metavar="X", help="of the mask (default 0.5)")
    parser.add_argument("--low-density", type=float, default=0.5859, metavar="X", help="of the mask (default 0.5859)")
    parser.add_argument(
        "--adapter-name", default="default", metavar="NAME", help="where an adapter folder holds several"
    )
    parser.add_argument("--per-layer", action="store_true", help="a row for each layer in the terminal's table too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..audit import audit, open_checkpoint
    from ..audit.page import write_page
    from ..audit.storing import write_json
    from ..audit.terminal import terminal_report

    for path in (options.json, options.html):
        if path is not None and not path.absolute().parent.is_dir():
            raise Refused(f"{path}: there is no folder {path.absolute().parent}")
        if path is not None and path.is_dir():
            raise Refused(f"{path} is a folder; give a file's name")
    if options.json is not None and options.html is not None and options.json.absolute() == options.html.absolute():
        raise Refused(f"--json and --html would both write {options.json}; give each a file of its own")
    with ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(options.base))
        tuned = [stack.enter_context(_opened(path, base, options.adapter_name)) for path in options.tuned]
        report = audit(
            base,
            *tuned,
            probes=options.probes,
            layers=options.layers,
            rank=options.rank,
            mode=options.mode,
            device=options.device,
            principal_density=options.principal_density,
            low_density=options.low_density,
            progress=_shown if sys.stderr.isatty() else None,
        )
    out = sys.stdout
    print(terminal_report(report, color=out.isatty(), layers=options.per_layer, encoding=out.encoding or "ascii"))
    for path, write in ((options.json, write_json), (options.html, write_page)):
        if path is not None:
            try:
                write(report, path)
            except OSError as error:
                raise Refused(f"{path} cannot be written: {error.strerror or error}") from error
            print(f"\nwritten: {path}")
    return DONE


def _opened(path: Path, base: Checkpoint, adapter_name: str) -> Checkpoint:
    """A checkpoint, or ``base`` with the adapter at ``path`` merged into it."""
    from ..audit import AdapterFolder, CheckpointError, open_checkpoint

    try:
        return open_checkpoint(path)
    except AdapterFolder as found:
        folder = found.path
    except CheckpointError:
        # PEFT saves an adapter that is not called default into a subfolder, and may leave nothing beside it.
        if any(path.glob("*.safetensors*")) or not any(path.glob("*/adapter_config.json")):
            raise
        folder = path
    from ..interop.audit_source import open_adapter  # imports much that checkpoints do not need

    return open_adapter(folder, base, adapter_name=adapter_name)


def _shown(done: int, total: int, name: str) -> None:
    """One line that is written over."""
    end = "\n" if done == total else ""
    name = "".join(c if c.isprintable() else "�" for c in name)
    print(f"\r{100 * done // max(total, 1):3d} %  {name[:70]:70s}", end=end, file=sys.stderr, flush=True)


def _rank(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of directions nor a fraction") from None
