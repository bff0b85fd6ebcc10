"""The house rules of the design. Each rule is a function of a project's root that lists what breaks it, and each is
tried on a planted tree that breaks it before this project is held to it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("attnbench", "models")
LINES, FUNCTION_LINES = 500, 60
NO_ROOMS = {"utils", "util", "helpers", "helper", "common", "misc"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNPICKLING_CALLS = {
    "torch.load",
    "torch.save",
    "pandas.read_pickle",
    "pd.read_pickle",
    "yaml.unsafe_load",
    "yaml.full_load",
}

Rule = Callable[[Path], list[str]]


def sources(root: Path, *folders: str) -> Iterator[tuple[str, Path]]:
    """Module names and files of the Python files below the folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names that a file imports anywhere but under TYPE_CHECKING, with the lines."""
    tree = tree_of(path)
    typing_only = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(node) for guard in typing_only for body in guard.body for node in ast.walk(body)}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def models_import_attnbench(root: Path) -> list[str]:
    """Mathematics knows nothing of runs."""
    return [
        f"{path.name}:{line} imports {name}"
        for module, path in sources(root, "models")
        for name, line in imported(module, path)
        if name.split(".")[0] == "attnbench"
    ]


def named_variants(root: Path, names: set[str]) -> list[str]:
    """Strings in attnbench that name a variant; a plain word ("linear") must be the whole string to count."""
    distinct = [name for name in names if re.search(r"[\d-]", name)]
    words = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, distinct)) + r")(?![\w-])") if distinct else None
    found = []
    for _, path in sources(root, "attnbench"):
        tree = tree_of(path)
        # A string that is a statement is a docstring, of a module, class, function or attribute.
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docs:
                continue
            if node.value in names or (words and words.search(node.value)):
                found.append(f"{path.name}:{node.lineno} names a variant: {node.value!r}")
    return found


def unpickling(root: Path) -> list[str]:
    """Imports and calls that could run code found in a file."""
    found = []
    for module, path in sources(root, *PACKAGES):
        found += [
            f"{path.name}:{line} imports {name}"
            for name, line in imported(module, path)
            if name.split(".")[0] in UNPICKLERS or name in UNPICKLING_CALLS
        ]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in UNPICKLING_CALLS:
                found.append(f"{path.name}:{node.lineno} uses {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                found.append(f"{path.name}:{node.value.lineno} allows pickle")
    return found


def writes_elsewhere(root: Path) -> list[str]:
    """Files made, filled, renamed or deleted anywhere but in storage.py, through which every write goes."""
    found = []
    for _, path in sources(root, *PACKAGES):
        calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        names = [(ast.unparse(call.func), call) for call in calls]
        found += [
            f"{path.name}:{call.lineno} calls {name}"
            for name, call in names
            if (WRITING.search(name) or (re.search(r"(^|\.)(open|fdopen)$", name) and _opens_to_write(call)))
            and (path.name, name) not in OWN_WRITES
        ]
    return found


WRITING = re.compile(
    r"(?<!storage)\.(write_text|write_bytes|touch|mkdir|unlink|rmdir|symlink_to|hardlink_to)$|\bsave_file$"
    r"|^os\.(replace|rename|renames|link|symlink|mkdir|makedirs|remove|removedirs|truncate|write)$|^np\.save"
    r"|^shutil\.(copy|move|rmtree)|^tempfile\."
)
"""Calls that change a file system, whatever they are given."""
OWN_WRITES = {
    *(("storage.py", name) for name in ("os.open", "os.write", "os.replace", "os.link", "os.unlink")),
    ("storage.py", "path.parent.mkdir"), ("storage.py", "path.unlink"),
    # The compiler's cache is no result, and models knows no attnbench; it renames what it has built, too.
    *(("compiler.py", name) for name in ("base.mkdir", "os.replace", "tempfile.TemporaryDirectory")),
    ("engines.py", "folder.mkdir"),  # submitit's own folder
    ("measure.py", "Path('/proc/self/clear_refs').write_text"), ("measure.py", "os.fdopen"),  # the kernel, and stdout
    ("cli.py", "os.open"),  # /dev/null
}  # fmt: skip


def _opens_to_write(call: ast.Call) -> bool:
    """Whether a call of open has a mode, or flags, that can write; a mode that is no constant counts."""
    told = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [a.value for a in told if isinstance(a, ast.Constant) and re.fullmatch(r"[rwaxbt+U]+", str(a.value))]
    return any(re.search("[wax+]", str(mode)) for mode in modes) or "os.O_WRONLY" in ast.unparse(call)


def long_files(root: Path) -> list[str]:
    """Files over 500 lines."""
    counts = [
        (path, len(path.read_text(encoding="utf-8").splitlines())) for _, path in sources(root, *PACKAGES, "tests")
    ]
    return [f"{path.name} has {count} lines" for path, count in counts if count > LINES]


def long_functions(root: Path) -> list[str]:
    """Functions over 60 lines."""
    return [
        f"{path.name}:{node.lineno} {node.name} has {1 + (node.end_lineno or 0) - node.lineno} lines"
        for _, path in sources(root, *PACKAGES, "tests")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and 1 + (node.end_lineno or 0) - node.lineno > FUNCTION_LINES
    ]


def import_cycles(root: Path) -> list[str]:
    """Rings of modules that import one another, lazily or not."""
    modules = dict(sources(root, *PACKAGES))
    graph = {
        module: {name for name, _ in imported(module, path) if name in modules and name not in PACKAGES} - {module}
        for module, path in modules.items()
    }
    # What nothing left imports, or what imports nothing left, stands in no ring.
    while loose := [m for m, out in graph.items() if not out or not any(m in o for o in graph.values())]:
        for module in loose:
            del graph[module]
        graph = {module: out - set(loose) for module, out in graph.items()}
    return [f"{module} stands in an import cycle with {', '.join(sorted(out))}" for module, out in graph.items()]


def lumber_rooms(root: Path) -> list[str]:
    """Files and folders whose name says nothing of their subject."""
    found = (
        path for folder in (*PACKAGES, "tests") for path in (root / folder).rglob("*") if path.suffix in ("", ".py")
    )
    return [f"{path.relative_to(root)}" for path in found if path.stem.removeprefix("test_") in NO_ROOMS]


def slot_arithmetic(root: Path) -> list[str]:
    """Row and column worked out from a slot number (// width, % width) in models outside geometry.py."""
    return [
        f"{path.name}:{node.lineno} computes {ast.unparse(node)}"
        for _, path in sources(root, "models")
        if path.name != "geometry.py"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.FloorDiv | ast.Mod)
        and re.search(r"(^|\.)width$", ast.unparse(node.right))
    ]


def commands(root: Path) -> list[str]:
    """The command lines of attnbench: what runs as a module and reads its flags through attnbench.cli."""
    return [
        module
        for module, path in sources(root, "attnbench")
        if "__main__" in path.read_text(encoding="utf-8")
        and any(name.startswith("attnbench.cli") for name, _ in imported(module, path))
    ]


def needs_torch(root: Path, *arguments: str) -> list[str]:
    """Runs Python in root with these arguments: complaints if it fails or imports torch on the way."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=root, capture_output=True, text=True, timeout=120
    )
    found = [f"{arguments}: exit status {run.returncode}: {run.stderr[-300:]}"] if run.returncode else []
    return found + ([f"{arguments}: imports torch"] if re.search(r"\|\s+torch$", run.stderr, re.M) else [])


def config_needs_torch(root: Path) -> list[str]:
    """attnbench.config is read without torch."""
    return needs_torch(root, "-c", "import attnbench.config")


def help_needs_torch(root: Path) -> list[str]:
    """Every command's --help is answered without torch."""
    return [found for command in commands(root) for found in needs_torch(root, "-m", command, "--help")]


def no_variant_named(root: Path) -> list[str]:
    """named_variants for the variants that there are."""
    import models

    return named_variants(root, set(models.VARIANTS))


RULES: list[Rule] = [
    models_import_attnbench, no_variant_named, unpickling, writes_elsewhere, long_files, long_functions, import_cycles,
    lumber_rooms, slot_arithmetic, config_needs_torch, help_needs_torch,
]  # fmt: skip

COMMAND = 'import sys\nfrom attnbench.cli import parse\nif __name__ == "__main__":\n    sys.exit(0)\n'
PLANTED: list[tuple[Rule, str, str]] = [
    (models_import_attnbench, "models/full.py", "def f():\n    from attnbench.config import RunConfig\n"),
    (models_import_attnbench, "models/full.py", "import attnbench.config as c\n"),
    (no_variant_named, "attnbench/run.py", 'if name == "linear":\n    pass\n'),
    (no_variant_named, "attnbench/run.py", "x = f'try {y} or local2d'\n"),
    (no_variant_named, "attnbench/run.py", "def f(name: str = 'dense-none') -> None: ...\n"),
    (unpickling, "attnbench/load.py", "import pickle\n"),
    (unpickling, "models/load.py", "from torch import load\n"),
    (unpickling, "attnbench/load.py", "import torch\nx = torch.load('f')\n"),
    (unpickling, "attnbench/load.py", "import numpy as np\nx = np.load('f', allow_pickle=True)\n"),
    (writes_elsewhere, "attnbench/report.py", "with open(path, 'w') as file:\n    file.write(page)\n"),
    (writes_elsewhere, "attnbench/report.py", "Path(path).write_text(page)\n"),
    (writes_elsewhere, "attnbench/report.py", "file = path.open(mode='ab')\n"),
    (writes_elsewhere, "models/cache.py", "import os\nos.replace(a, b)\n"),
    (long_files, "tests/test_long.py", "x = 1\n" * 501),
    (long_functions, "models/long.py", "def f():\n" + "    x = 1\n" * 60),
    (import_cycles, "models/ring.py", "from . import geometry\n"),
    (import_cycles, "attnbench/ring.py", "import attnbench.config\n"),
    (lumber_rooms, "attnbench/utils.py", ""),
    (lumber_rooms, "models/common/norm.py", ""),
    (slot_arithmetic, "models/local.py", "def f(slot, grid):\n    return (slot - 1) % grid.width\n"),
    (config_needs_torch, "attnbench/config.py", "import torch\n"),
    (help_needs_torch, "attnbench/run.py", "import torch\n" + COMMAND),
    (help_needs_torch, "attnbench/run.py", COMMAND.replace("0)", "1)")),
]
CLEAN = {
    "torch.py": "def load(f): ...\n",
    "attnbench/__init__.py": "",
    "attnbench/cli.py": "def parse(): ...\n",
    "attnbench/config.py": '"""Of local2d."""\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ring\n',
    "attnbench/run.py": 'SCALES = ("linearly", "local2dish")\n' + COMMAND,
    "models/__init__.py": "from . import geometry\n",
    "models/geometry.py": "def row(slot, width):\n    return slot // width\n",
}  # fmt: skip


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_clean_tree_keeps_the_rule(rule: Rule, tmp_path: Path) -> None:
    plant(tmp_path, CLEAN)
    assert rule(tmp_path) == []


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED)
def test_a_planted_violation_is_found(rule: Rule, name: str, text: str, tmp_path: Path) -> None:
    back = {
        "ring": {"models/geometry.py": "from . import ring\n", "attnbench/config.py": "from attnbench import ring\n"}
    }
    plant(tmp_path, CLEAN | back.get(Path(name).stem, {}) | {name: text})
    assert rule(tmp_path) != []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_project_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


def test_every_rule_was_planted() -> None:
    assert {rule for rule, _, _ in PLANTED} == set(RULES)


def test_the_project_has_files_and_commands_to_judge() -> None:
    assert len(list(sources(ROOT, *PACKAGES))) > 10
    assert "attnbench.doctor" in commands(ROOT)


@pytest.mark.parametrize(
    ("told", "spin"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_that_wait_leave_the_processor_to_others(told: dict[str, str], spin: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    asked = "import attnbench, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", asked], env=clean | told, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [spin, "False"]
