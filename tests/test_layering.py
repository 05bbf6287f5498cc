"""Imports run downward only, and files and functions stay short.

geometry ← kernels ← tuners ← interop ← rlvr ← cli; audit stands on geometry and html alone. The check reads the
source and runs none of it, so imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "offprincipal_peft"

# The package's own __init__ holds the public names of every layer, so it stands above all but the cli.
PUBLIC = "__init__"

# layer -> the other layers that it may import
BELOW: dict[str, set[str]] = {
    "html": set(),
    "geometry": set(),
    "kernels": {"geometry"},
    "audit": {"geometry", "html"},
    "tuners": {"geometry", "kernels"},
    "interop": {"geometry", "kernels", "tuners", "audit"},
    "rlvr": {"geometry", "kernels", "tuners", "audit", "html", "interop"},
    PUBLIC: {"geometry", "kernels", "tuners", "audit", "interop", "rlvr"},
    "commands": {"geometry", "html", "kernels", "tuners", "audit", "interop", "rlvr", PUBLIC},
    "cli": {"geometry", "html", "kernels", "tuners", "audit", "interop", "rlvr", "commands", PUBLIC},
}
# layer -> the only packages that it may import beside the standard library
ONLY: dict[str, set[str]] = {
    "html": set(),
    "geometry": {"torch", "einops", "safetensors"},
    "kernels": {"torch"},
    "audit": {"torch"},
}
# layer -> packages that it may not import
NEVER: dict[str, set[str]] = {
    "audit": {"peft", "transformers", "trl"},
    "tuners": {"trl", "ray"},
}
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60  # the aim is 50


def dotted_name(path: Path, root: Path) -> tuple[str, ...]:
    """root/package/geometry/masks.py -> (package, geometry, masks); an __init__.py is its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def is_module(root: Path, name: tuple[str, ...]) -> bool:
    place = root.joinpath(*name)
    return place.is_dir() or place.with_suffix(".py").is_file()


def absolute(level: int, module: str, path: Path, root: Path) -> tuple[str, ...]:
    """The parts of `module` as the file at `path` means it after `level` leading dots."""
    parts = tuple(module.split(".")) if module else ()
    if not level:
        return parts
    folder = path.relative_to(root).parent.parts
    if level > len(folder):
        raise ValueError(f"{path}: the relative import {'.' * level}{module} leaves the package")
    return folder[: len(folder) - level + 1] + parts


def from_targets(node: ast.ImportFrom, path: Path, root: Path) -> Iterator[tuple[str, ...]]:
    """The modules that a `from … import …` reaches: the named one, or the submodules of it that are named."""
    source = absolute(node.level, node.module or "", path, root)
    for alias in node.names:
        inner = (*source, alias.name)
        yield inner if source[0] == PACKAGE and is_module(root, inner) else source


def dynamic_target(node: ast.Call) -> str | None:
    """The module in `importlib.import_module("…")`, `import_module("…")` or `__import__("…")`."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    if called in {"import_module", "__import__"} and node.args:
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            return first.value
    return None


def imports(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, imported module as absolute parts) for every import, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            for target in from_targets(node, path, root):
                yield node.lineno, target
        elif isinstance(node, ast.Call) and (name := dynamic_target(node)):
            module = name.lstrip(".")
            yield node.lineno, absolute(len(name) - len(module), module, path, root)


def import_fault(layer: str, target: tuple[str, ...]) -> str | None:
    """What is wrong when `layer` imports `target`, or None."""
    top = target[0]
    if top == PACKAGE:
        other = target[1] if len(target) > 1 else PUBLIC
        if other == layer or other in BELOW[layer]:
            return None
        return f"{layer} imports {other}, which is not below it"
    if top in NEVER.get(layer, set()):
        return f"{layer} must not import {top}"
    if layer in ONLY and top not in ONLY[layer] | sys.stdlib_module_names:
        allowed = ", ".join(sorted(ONLY[layer])) or "the standard library"
        return f"{layer} may import only {allowed}, not {top}"
    return None


def length_faults(tree: ast.AST, text: str) -> Iterator[str]:
    count = len(text.splitlines())
    if count > MOST_FILE_LINES:
        yield f"1: the file has {count} lines, at most {MOST_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            span = node.end_lineno - node.lineno + 1
            if span > MOST_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {span} lines, at most {MOST_FUNCTION_LINES}"


def faults(root: Path) -> list[str]:
    """Every breach under root/offprincipal_peft, as `file:line: what`."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    if not paths:
        raise FileNotFoundError(f"no Python file under {root / PACKAGE}")
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path))
        where = path.relative_to(root)
        name = dotted_name(path, root)
        layer = name[1] if len(name) > 1 else PUBLIC
        found += [f"{where}:{fault}" for fault in length_faults(tree, text)]
        if layer not in BELOW:
            found.append(f"{where}:1: {layer} is no known layer ({', '.join(BELOW)})")
            continue
        for line, target in imports(tree, path, root):
            if fault := import_fault(layer, target):
                found.append(f"{where}:{line}: {fault}")
    return found


def test_the_package_keeps_its_layers_and_lengths():
    assert faults(ROOT) == []


def fake_package(root: Path, files: dict[str, str]) -> Path:
    """A package in which every layer exists and is sound, but for `files`."""
    layers = {f"{layer}/__init__.py": "" for layer in BELOW if layer not in {PUBLIC, "cli"}}
    for name, text in ({"__init__.py": "", "cli.py": "", "geometry/masks.py": ""} | layers | files).items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


SOUND = {
    "__init__.py": "from offprincipal_peft import geometry, audit\nfrom .tuners import x\n",
    "geometry/spectrum.py": "import torch.linalg\nfrom einops import rearrange\nfrom . import masks\n",
    "geometry/masks.py": "from safetensors.torch import load\nfrom .spectrum import f\nfrom os import path\n",
    "kernels/reference.py": "from torch import nn\nfrom ..geometry import masks\n",
    "tuners/lora/config.py": "import peft\nfrom ...geometry.masks import g\n",
    "tuners/lora/layer.py": "from ... import kernels\nfrom . import config\n",
    "interop/export.py": "from offprincipal_peft.tuners import x\n",
    "html/charts.py": "import html\nfrom zlib import compress\n",
    "html/page.py": "from .charts import x\n",
    "audit/page.py": "from ..html import charts\nfrom .report import x\n",
    "audit/report.py": "import torch\nfrom offprincipal_peft.geometry import masks\n",
    "rlvr/trial.py": "import trl\nfrom ..tuners.lora import layer\n",
    "cli.py": "from . import audit, interop, rlvr\nfrom offprincipal_peft import __version__\n",
}


def test_a_sound_package_passes(tmp_path):
    assert faults(fake_package(tmp_path, SOUND)) == []


UPWARD = {
    "relative": ("geometry/a.py", "from ..kernels import x\n", "geometry imports kernels"),
    "relative module": ("geometry/a.py", "from .. import tuners\n", "geometry imports tuners"),
    "deep relative": ("tuners/lora/a.py", "from ...rlvr.trial import x\n", "tuners imports rlvr"),
    "from a layer's init": ("geometry/__init__.py", "from ..tuners import x\n", "geometry imports tuners"),
    "absolute": ("kernels/a.py", "import offprincipal_peft.tuners.lora as x\n", "kernels imports tuners"),
    "absolute from": ("tuners/a.py", "from offprincipal_peft import interop\n", "tuners imports interop"),
    "public names": ("tuners/a.py", "from offprincipal_peft import MaskedAdamW\n", "tuners imports __init__"),
    "public names, relative": ("tuners/a.py", "from .. import MaskedAdamW\n", "tuners imports __init__"),
    "in a function": (
        "geometry/a.py",
        "def f():\n    import offprincipal_peft.cli\n",
        "geometry imports cli",
    ),
    "in a method": (
        "audit/a.py",
        "class A:\n    def f(self):\n        from ..kernels import x\n",
        "audit imports",
    ),
    "dynamic": (
        "kernels/a.py",
        'import importlib\nimportlib.import_module("offprincipal_peft.audit")\n',
        "audit",
    ),
    "dynamic, relative": (
        "kernels/a.py",
        '__import__("importlib").import_module("..audit", __package__)\n',
        "audit",
    ),
    "sideways": ("interop/a.py", "from ..rlvr import x\n", "interop imports rlvr"),
    "audit on tuners": ("audit/a.py", "from ..tuners import x\n", "audit imports tuners"),
    "html on geometry": ("html/a.py", "from ..geometry import x\n", "html imports geometry"),
    "geometry on html": ("geometry/a.py", "from ..html import charts\n", "geometry imports html"),
    "init on cli": ("__init__.py", "from .cli import main\n", "__init__ imports cli"),
}
FORBIDDEN = {
    "torch in html": ("html/a.py", "import torch\n", "only the standard library, not torch"),
    "peft": ("geometry/a.py", "import peft\n", "not peft"),
    "transformers": ("geometry/a.py", "from transformers.utils import x\n", "not transformers"),
    "hidden peft": ("geometry/a.py", "def f():\n    from peft import LoraConfig\n", "not peft"),
    "einops in kernels": ("kernels/a.py", "import einops\n", "not einops"),
    "triton": ("kernels/a.py", "try:\n    import triton\nexcept ImportError:\n    pass\n", "not triton"),
    "peft in audit": ("audit/a.py", "import peft.utils\n", "audit must not import peft"),
    "transformers in audit": (
        "audit/a.py",
        "def f():\n    from transformers import AutoModel\n",
        "audit must not import transformers",
    ),
    "numpy in audit": ("audit/a.py", "import numpy\n", "not numpy"),
    "trl in tuners": ("tuners/a.py", "import trl\n", "tuners must not import trl"),
    "unknown layer": ("utils/a.py", "x = 1\n", "utils is no known layer"),
    "unknown module": ("misc.py", "x = 1\n", "misc is no known layer"),
}
LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MOST_FUNCTION_LINES
LONG = {
    "function": ("geometry/a.py", LONG_FUNCTION, "f has 61 lines"),
    "async": ("geometry/a.py", "async " + LONG_FUNCTION, "f has 61 lines"),
    "method": (
        "geometry/a.py",
        "class A:\n" + LONG_FUNCTION.replace("def", " def").replace("    x", "     x"),
        "61",
    ),
    "file": ("geometry/a.py", "x = 1\n" * (MOST_FILE_LINES + 1), "the file has 401 lines"),
}
BREACHES = UPWARD | FORBIDDEN | LONG


@pytest.mark.parametrize("case", BREACHES)
def test_each_breach_is_reported_alone(tmp_path, case):
    name, text, message = BREACHES[case]
    found = faults(fake_package(tmp_path, SOUND | {name: text}))
    assert len(found) == 1, found
    assert found[0].startswith(f"{PACKAGE}/{name}:")
    assert message in found[0]


def test_lengths_at_the_limit_pass(tmp_path):
    function = "def f():\n" + "    x = 1\n" * (MOST_FUNCTION_LINES - 1)
    text = function + "x = 1\n" * (MOST_FILE_LINES - MOST_FUNCTION_LINES)
    assert faults(fake_package(tmp_path, {"geometry/a.py": text})) == []


def test_a_relative_import_out_of_the_package_raises(tmp_path):
    with pytest.raises(ValueError, match="leaves the package"):
        faults(fake_package(tmp_path, {"geometry/a.py": "from .... import x\n"}))


def test_no_package_is_an_error_and_not_a_pass(tmp_path):
    with pytest.raises(FileNotFoundError):
        faults(tmp_path)
