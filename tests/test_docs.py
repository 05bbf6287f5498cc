"""Every code block of the README and of docs/ runs as it is shown, and prints or raises what is shown.

What is not run as it stands is in ``OTHERWISE``, with the reason and with what is done instead.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import docs_api
import docs_blocks
from docs_blocks import CODE, LANGUAGES, SHOWN, Block, PageError, Step, blocks_of, shown_after, steps_of
from offprincipal_peft import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))

# What the README's fragments leave out: a model, a reward, prompts.
FRAGMENT = """
from datasets import Dataset
from grpo import tokenizer
from helpers import tiny_llama
from trl import GRPOConfig, GRPOTrainer

model = tiny_llama()
def reward(completions, **columns):
    return [float(len(set(completion))) for completion in completions]
rest = {
    "args": GRPOConfig("out", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8),
    "train_dataset": Dataset.from_dict({"prompt": ["w1 w2"] * 8}),
    "processing_class": tokenizer(),
}
"""


@dataclass(frozen=True)
class Otherwise:
    """A block that is not run as it stands.

    Attributes:
        holds: text that the block holds, and no other of its page.
        reason: why.
        before: Python code that runs before it.
        replace: pairs of text in the block and what stands there when it runs.
        commands: the block's shell commands are read and not run: see :func:`read_command`.
        checked_by: the test that compares an output.
    """

    page: str
    holds: str
    reason: str
    before: str = ""
    replace: tuple[tuple[str, str], ...] = ()
    commands: bool = False
    checked_by: str = ""


OTHERWISE = [
    Otherwise("README.md", "make demo", "clones, builds an environment and trains for ten minutes", commands=True),
    Otherwise("README.md", "smollm2-135m, sums, grpo", "made from committed results", checked_by="test_tables.py"),
    Otherwise("README.md", "pip install -c constraints.txt .", "clones and installs packages", commands=True),
    Otherwise(
        "README.md",
        'trainer = GRPOTrainer(model="...", reward_funcs=reward',
        "a fragment: the model and the trainer's other arguments are the reader's",
        before=FRAGMENT,
        replace=(('model="..."', "model=tiny_llama()"), (", ...)", ", **rest)")),
    ),
    Otherwise(
        "README.md",
        "callbacks=[GeometryCallback()]",
        "a fragment: the trainer's other arguments are the reader's",
        replace=(("GRPOTrainer(..., ", "GRPOTrainer(tiny_llama(), reward, **rest, "),),
    ),
    Otherwise("README.md", "offprincipal compare --methods", "trains for hours, one of them on a GPU", commands=True),
    Otherwise("README.md", "examples/safe_mask.py", "test_examples.py runs them with fewer steps", commands=True),
    Otherwise("docs/getting-started.md", "git clone", "clones and installs packages", commands=True),
]


def page_blocks(page: str) -> list[Block]:
    return blocks_of((ROOT / page).read_text(encoding="utf-8"), page)


def otherwise(block: Block) -> Otherwise | None:
    return next((entry for entry in OTHERWISE if entry.page == block.page and entry.holds in block.source), None)


def plan(blocks: list[Block]) -> Iterator[Step]:
    """The steps of a page. Raises :class:`PageError` for a block that nothing would run or check."""
    for index, block in enumerate(blocks):
        entry = otherwise(block)
        if block.language not in LANGUAGES:
            raise PageError(f"{block.where}: a block in {block.language or 'no language'!r} is neither run nor checked")
        if block.language == "yaml":
            read_yaml(block)
        elif block.language in SHOWN:
            before = blocks[index - 1] if index else None
            shows = before is not None and before.language in CODE and before.language != "pycon"
            listed = entry is not None and (ROOT / "tests" / entry.checked_by).is_file()
            if not shows and not listed:
                raise PageError(f"{block.where}: no code block stands before this output")
        elif entry is not None and entry.commands:
            for command in commands_of(block):
                read_command(command, block)
        else:
            yield from _steps(block, shown_after(blocks, index), entry)


def _steps(block: Block, shown: Block | None, entry: Otherwise | None) -> Iterator[Step]:
    source = block.source
    if entry is not None and entry.before:
        yield Step(Block(block.page, block.line, "python", entry.before), entry.before)
    for old, new in () if entry is None else entry.replace:
        if source.count(old) != 1:
            raise PageError(f"{block.where}: {old!r} stands {source.count(old)} times in this block, not once")
        source = source.replace(old, new)
    yield from steps_of(block, shown, source)


def read_yaml(block: Block) -> None:
    """A sweep's file by the sweep's parser. Raises :class:`PageError` for anything that it refuses."""
    from offprincipal_peft.rlvr.sweep_spec import SpecError, SweepSpec

    try:
        SweepSpec.from_yaml(block.source + "\n")
    except SpecError as error:
        raise PageError(f"{block.where}: not a sweep: {error}") from None


# -- commands that are read and not run ---------------------------------------------------------------------------


def commands_of(block: Block) -> list[list[str]]:
    lines = [part.strip() for line in block.source.splitlines() for part in line.split("&&")]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def read_command(words: list[str], block: Block) -> None:
    """Check a command as far as that goes without running it. Raises :class:`PageError`."""
    program, *rest = words
    try:
        {
            "offprincipal": _read_offprincipal,
            "pip": _read_pip,
            "make": _read_make,
            "python": _read_python,
            "git": lambda words: words == ["clone", "<this", "repository>"] or _refuse(words),
            "cd": lambda words: words == ["offprincipal_peft"] or _refuse(words),
        }[program](rest)
    except (KeyError, SystemExit, ValueError, AssertionError) as error:
        raise PageError(f"{block.where}: `{shlex.join(words)}` would not run: {error!r}") from None


def _refuse(words: list[str]) -> None:
    raise ValueError(f"unexpected {shlex.join(words)}")


def _read_offprincipal(words: list[str]) -> None:
    """By the command line's own parser; for ``compare`` up to the checked trials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_run", lambda spec, options: len(spec.trials()))
        options = cli._parser().parse_args(words)
        if options.run is cli._compare:
            assert cli._compare(options) > 0


def _read_pip(words: list[str]) -> None:
    from offprincipal_peft.rlvr.models import INSTALL

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for word in words[1:]:
        if found := re.fullmatch(r"\.(?:\[(.*)\])?", word):
            assert set(filter(None, (found[1] or "").split(","))) <= set(extras), word
        elif not word.startswith("-"):
            assert (ROOT / word).is_file() or word in INSTALL, word


def _read_make(words: list[str]) -> None:
    rules = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{re.escape(word)}:", rules, re.MULTILINE) for word in words), words


def _read_python(words: list[str]) -> None:
    from test_examples import EXAMPLES

    assert ROOT / words[0] in EXAMPLES, words[0]


# -- the pages ----------------------------------------------------------------------------------------------------


def run_page(blocks: list[Block], folder: Path) -> None:
    steps = list(plan(blocks))
    if steps:
        docs_blocks.check(steps, docs_blocks.run(steps, folder / "page"))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_page_does_what_it_shows(page: str, tmp_path: Path) -> None:
    run_page(page_blocks(page), tmp_path)


@pytest.mark.parametrize("entry", OTHERWISE, ids=lambda entry: f"{entry.page}: {entry.holds[:30]}")
def test_what_is_run_otherwise_is_one_block(entry: Otherwise) -> None:
    assert sum(entry.holds in block.source for block in page_blocks(entry.page)) == 1
    assert entry.reason


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in anchors(path.read_text()), f"{page}: {target}"


def anchors(text: str) -> set[str]:
    """As the usual renderers make them of headings."""
    code = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", code.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# -- the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", docs_api.packages())
def test_every_public_name_is_in_the_reference(package: str) -> None:
    found = docs_api.entries((ROOT / "docs/api.md").read_text())
    elsewhere = {id(docs_api.find(module, name)) for module, names in found.items() for name in names}
    missing = [
        name
        for name in docs_api.exported(package)
        if name not in found.get(package, {}) and id(docs_api.find(package, name)) not in elsewhere
    ]
    assert not missing


def test_signatures_of_the_reference_are_those_of_the_code() -> None:
    found = docs_api.entries((ROOT / "docs/api.md").read_text())
    assert sum(map(len, found.values())) > 100
    for module, names in found.items():
        for name, text in names.items():
            written = docs_api.written(name, docs_api.find(module, name))
            assert text in (name, written), f"docs/api.md: {module}"  # without parentheses: not made by users


def test_every_option_of_the_command_line_is_in_the_reference() -> None:
    section = (ROOT / "docs/api.md").read_text().partition("## Command line")[2]
    actions = next(action for action in cli._parser()._actions if isinstance(action.choices, dict))
    for name, parser in actions.choices.items():
        row = next(line for line in section.splitlines() if line.startswith(f"| `{name}"))
        options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        assert set(re.findall(r"--[a-z-]+", row)) == options, name


# -- troubleshooting ----------------------------------------------------------------------------------------------


def test_headings_of_the_troubleshooting_are_the_messages_that_its_sessions_raise() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    parts = re.split(r"^(?:### (.*)|## .*)$", text, flags=re.MULTILINE)
    documented = 0
    for heading, section in zip(parts[1::2], parts[2::2], strict=True):
        blocks = blocks_of(section, heading or "")
        steps = [s for i, b in enumerate(blocks) if b.language in CODE for s in steps_of(b, shown_after(blocks, i))]
        messages = [" ".join(step.shown.source.split()) for step in steps if step.shown is not None and step.fails]
        stable = [".*?".join(map(re.escape, part.split("…"))) for part in re.findall(r"`([^`]+)`", heading or "")]
        assert all(any(re.search(part, message) for message in messages) for part in stable), heading
        assert all(any(re.search(part, message) for part in stable) for message in messages), heading
        documented += len(messages)
    assert documented >= 25


# -- the runner: each kind of broken page is seen ----------------------------------------------------------------------

RIGHT = {
    "python": "```python\nprint(1)\n```\n```text\n1\n```",
    "wildcards": "```python\nfor i in range(9): print(i, 'x')\n```\n```text\n0 …\n…\n8 x\n```",
    "numbers": "```python\nprint('about', 2.5e-3)\n```\n<!-- numbers vary -->\n```text\nabout 7\n```",
    "one namespace": "```python\na = 1\n```\n\n```pycon\n>>> a\n1\n>>> for i in (a,):\n...     print(i)\n1\n```",
    "error": "```python\n[][0]\n```\n\n```text\nIndexError: list index\nout of range\n```",
    "shell": "```bash\necho a > file\ncat file\n```\n```text\na\n```",
    "shell's error": "```bash\necho error: no >&2; exit 2\n```\n```text\nerror: no\n```",
    "json": '```bash\necho \'{"a": [1]}\'\n```\n```json\n{"a":\n  [1]}\n```',
    "yaml": "```yaml\nmethods: [{method: lora, learning_rate: 1e-4}]\n```",
}
BROKEN = {
    "fails": ("```python\n1 / 0\n```", "page:2: this block failed\n.*ZeroDivisionError"),
    "fails in a shell": ("```bash\nfalse\ntrue\n```", "page:2: this block failed"),
    "prints something else": ("```python\nprint(1)\n```\n```text\n2\n```", "page:5: the page shows\n2\nbut .*\n1"),
    "prints more": ("```python\nprint('a b')\n```\n```text\na\n```", "but what came out is\na b"),
    "number varies": ("```python\nprint('a', 1)\n```\n```text\na 2\n```", "but what came out is"),
    "more than numbers vary": (
        "```python\nprint('a', 1)\n```\n<!-- numbers vary -->\n```text\nb 2\n```",
        "but what came out is",
    ),
    "value in a session": ("```pycon\n>>> 1 + 1\n3\n```", "page:3: the page shows\n3"),
    "silent session": ("```pycon\n>>> 1 + 1\n```", "but what came out is\n2"),
    "does not fail": ("```pycon\n>>> 1\nIndexError: no\n```", "this block fails, and it did not"),
    "fails otherwise": ("```pycon\n>>> [][0]\nKeyError: 0\n```", "but what came out is\nIndexError"),
    "shell fails otherwise": ("```bash\necho error: b >&2; exit 1\n```\n```text\nerror: a\n```", "is\nerror: b"),
    "after a failure": ("```python\n1 / 0\n```\n```python\nprint(1)\n```", "page:2"),
    "network": ("```python\nimport socket\nsocket.create_connection(('192.0.2.1', 9))\n```", "reach the network"),
    "ends its interpreter": ("```python\nimport os\nos._exit(3)\n```", "ended with 3"),
    "not closed": ("```python\nprint(1)", "page:1: this code fence is not closed"),
    "unknown language": ("```toml\na = 1\n```", "'toml' is neither run nor checked"),
    "no language": ("```\na = 1\n```", "'no language' is neither run nor checked"),
    "output of nothing": ("```text\n1\n```", "no code block stands before"),
    "json": ('```bash\necho \'{"a": [1]}\'\n```\n```json\n{"a": [2]}\n```', "but what came out is"),
    "yaml": ("```yaml\nmethods: [{method: lora, rate: 1}]\n```", "not a sweep: .*unknown 'rate'"),
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT)
def test_a_right_page_passes(text: str, tmp_path: Path) -> None:
    run_page(blocks_of(text, "page"), tmp_path)


@pytest.mark.parametrize(("text", "complaint"), BROKEN.values(), ids=BROKEN)
def test_a_broken_page_is_seen(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(PageError, match=f"(?s){complaint}"):
        run_page(blocks_of(text, "page"), tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "offprincipal compare --models lora --out x",
        "offprincipal compare --methods lora,nothing --out x",
        "offprincipal compare --out x --steps 0",
        "pip install '.[nothing]'",
        "pip install numpy",
        "make nothing",
        "python examples/nothing.py",
        "rm -r x",
    ],
)
def test_a_command_that_would_not_run_is_seen(command: str) -> None:
    (words,) = commands_of(Block("page", 1, "bash", command))
    with pytest.raises(PageError, match="would not run"):
        read_command(words, Block("page", 1, "bash", command))
