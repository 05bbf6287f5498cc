"""Runs the code blocks of a documentation page and compares what comes out with what the page shows.

The blocks of a page run in order, Python ones in one fresh interpreter and one namespace, shell ones beside it, all in
one empty folder. What a page shows of their output stands in the next block of the page, as ``text`` or ``json``:

- ``SomeError: message`` after Python code, and ``error: message`` after a shell block, say that the block fails so;
  line breaks in the message are the page's own;
- ``…`` stands for anything within a line, a line that is only ``…`` for any number of lines;
- ``<!-- numbers vary -->`` in the line before the block: numbers may differ, everything else may not.

A ``pycon`` block is a session: what follows a ``>>>`` line is what that line prints, or how it fails.

``python tests/docs_blocks.py STEPS.json RESULTS.json`` is the interpreter's side.
"""

import io
import json
import os
import re
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,}) *(?P<language>[\w+-]*)[^`]*$")
CODE, SHOWN = ("python", "pycon", "bash"), ("text", "json")
LANGUAGES = (*CODE, *SHOWN, "yaml")
VARY = "<!-- numbers vary -->"
NUMBER = re.compile(r"[-−+]?\d+(\.\d+)?([eE][-+]?\d+)?")
PYTHON_ERROR = re.compile(r"^[A-Za-z_.]*(Error|Exception): ", re.MULTILINE)
SHELL_ERROR = re.compile(r"^error: ", re.MULTILINE)


class PageError(AssertionError):
    """A page that does not do what it shows: which page, which line, what came out."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line of content
    language: str
    source: str
    numbers_vary: bool = False

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Step:
    """A block to run, and the block with what it prints or how it fails, if the page shows that."""

    block: Block
    source: str
    shown: Block | None = None

    @property
    def fails(self) -> bool:
        shown = "" if self.shown is None else self.shown.source
        return bool(PYTHON_ERROR.match(shown)) or (self.block.language == "bash" and bool(SHELL_ERROR.match(shown)))


@dataclass(frozen=True)
class Result:
    printed: str = ""
    error: str | None = None  # what a failed block says, from the error's name on
    details: str = ""


def blocks_of(text: str, page: str) -> list[Block]:
    """Every fenced block. Raises :class:`PageError` for a fence that is not closed."""
    found: list[Block] = []
    lines = text.splitlines()
    opened: re.Match[str] | None = None
    first = 0
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if opened is None:
            opened, first = fence, number + 1
        elif fence and not fence["language"] and fence["marks"].startswith(opened["marks"]):
            indent = len(opened["indent"])
            source = "\n".join(row[indent:] for row in lines[first - 1 : number - 1])
            above = [row.strip() for row in lines[max(0, first - 4) : first - 2] if row.strip()]
            found.append(Block(page, first, opened["language"], source, VARY in above[-1:]))
            opened = None
    if opened is not None:
        raise PageError(f"{page}:{first - 1}: this code fence is not closed")
    return found


def shown_after(blocks: list[Block], index: int) -> Block | None:
    """The block that shows the output of ``blocks[index]``."""
    after = blocks[index + 1] if index + 1 < len(blocks) else None
    return after if after is not None and after.language in SHOWN else None


def steps_of(block: Block, shown: Block | None, source: str | None = None) -> list[Step]:
    """The steps of a block, one for each example of a session. ``source`` runs in the place of the block's own."""
    if block.language != "pycon":
        return [Step(block, block.source if source is None else source, shown)]
    steps: list[Step] = []
    code: list[str] = []
    wanted: list[str] = []
    first = block.line

    def flush() -> None:
        if code:
            here = replace(block, line=first, source="\n".join(code))
            want = replace(block, line=first + len(code), language="text", source="\n".join(wanted))
            steps.append(Step(here, here.source, want))

    for number, line in enumerate(block.source.splitlines(), block.line):
        if line.startswith(">>> "):
            flush()
            code, wanted, first = [line[4:]], [], number
        elif line.startswith("...") and code and not wanted:
            code.append(line[4:])
        elif not code:
            raise PageError(f"{block.page}:{number}: a session begins with >>>")
        else:
            wanted.append(line)
    flush()
    return steps


# -- running ----------------------------------------------------------------------------------------------------------


def run(steps: list[Step], folder: Path, timeout: float = 300.0) -> list[Result]:
    """Run the steps in ``folder``; as many results as steps were begun (the first unexpected failure is the last)."""
    folder.mkdir(parents=True, exist_ok=True)
    exchange = folder.parent / f"{folder.name}.exchange"
    exchange.mkdir(exist_ok=True)
    asked, answered = exchange / "steps.json", exchange / "results.json"
    fields = [{"where": s.block.where, "line": s.block.line, "language": s.block.language} for s in steps]
    asked.write_text(
        json.dumps([f | {"source": s.source, "fails": s.fails} for f, s in zip(fields, steps, strict=True)])
    )
    environment = {name: value for name, value in os.environ.items() if name != "OFFPRINCIPAL_CACHE"} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "XDG_CACHE_HOME": str(exchange / "cache"),
        "COLUMNS": "120",
    }
    command = [sys.executable, str(Path(__file__)), str(asked), str(answered)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise PageError(
            f"the interpreter of {steps[0].block.page} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return [Result(**values) for values in json.loads(answered.read_text())]


def _serve(asked: Path, answered: Path) -> None:
    _stay_offline()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    results: list[Result] = []
    for step in json.loads(asked.read_text()):
        result = _run_shell(step) if step["language"] == "bash" else _run_python(step, namespace)
        results.append(result)
        if result.error is not None and not step["fails"]:
            break
    answered.write_text(json.dumps([asdict(result) for result in results]))


def _stay_offline() -> None:
    import socket

    from loopback import is_loopback

    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> Any:
        if not is_loopback(address):
            raise RuntimeError(f"a documentation page tried to reach the network: {address!r}")
        return real(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign]


def _run_python(step: dict[str, Any], namespace: dict[str, Any]) -> Result:
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            mode = "single" if step["language"] == "pycon" else "exec"  # a session prints values
            exec(compile("\n" * (step["line"] - 1) + step["source"] + "\n", step["where"], mode), namespace)
    except Exception as error:
        said = "".join(traceback.format_exception_only(error)).strip()
        name = type(error).__name__  # without its module, as a reader sees it first
        said = name + said[said.index(name) + len(name) :]
        return Result(printed.getvalue(), said, "".join(traceback.format_exception(error)))
    return Result(printed.getvalue())


def _run_shell(step: dict[str, Any]) -> Result:
    command = ["bash", "-euo", "pipefail", "-c", step["source"]]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return Result(done.stdout)
    said = [*SHELL_ERROR.finditer(done.stderr), *PYTHON_ERROR.finditer(done.stderr)]
    error = done.stderr[said[0].start() :] if said else f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return Result(done.stdout, error, done.stderr)


# -- comparing --------------------------------------------------------------------------------------------------------


def check(steps: list[Step], results: list[Result]) -> None:
    """Raises :class:`PageError` for the first step that did not do what its page shows."""
    for step, result in zip(steps, results, strict=False):
        where = step.block.where
        if result.error is not None and not step.fails:
            raise PageError(f"{where}: this block failed\n{result.details or result.error}")
        if step.fails and result.error is None:
            raise PageError(f"{where}: the page shows that this block fails, and it did not")
        if step.shown is not None:
            _compare(step, result)
    if len(results) < len(steps):
        raise PageError(f"{steps[len(results)].block.where}: this block was not run")


def _compare(step: Step, result: Result) -> None:
    shown = step.shown
    assert shown is not None
    if shown.language == "json" and not step.fails:
        same = json.loads(shown.source) == json.loads(result.printed)
        expected, actual = shown.source, result.printed
    elif step.fails:
        expected, actual = " ".join(shown.source.split()), " ".join((result.error or "").split())
        same = _matches(expected, actual, shown.numbers_vary)
    else:
        expected, actual = _trimmed(shown.source), _trimmed(result.printed)
        same = _matches(expected, actual, shown.numbers_vary)
    if not same:
        raise PageError(f"{shown.where}: the page shows\n{expected}\nbut what came out is\n{actual}")


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def _matches(shown: str, actual: str, numbers_vary: bool) -> bool:
    if numbers_vary:
        shown, actual = NUMBER.sub("#", shown), NUMBER.sub("#", actual)
    pattern = ""
    for line in shown.split("\n"):
        if line.strip() == "…":
            pattern += r"(?:[^\n]*\n)*?"
        else:
            pattern += r"[^\n]*?".join(map(re.escape, line.split("…"))) + r"\n"
    return re.fullmatch(pattern, f"{actual}\n") is not None


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
