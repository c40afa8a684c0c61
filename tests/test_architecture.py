"""The layout's rules, read from the source: imports point one way, and every file has one job and one place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "longlive"

LEVELS = (
    ("typing", "rng"),
    ("data", "diffusion"),
    ("codecs", "text", "models"),
    ("parallel",),
    ("precision",),
    ("adapters",),
    ("rollout",),
    ("objectives",),
    ("modules",),
    ("callbacks", "metrics"),
    ("config",),
    ("trained", "encode_shards"),
    ("train", "generate", "export", "make_shards", "doctor"),
    ("cli",),
)
"""A file may import from its own folder and from the levels before it; neighbours on a level do not know each other."""

LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

TOP_LEVEL = {
    "longlive", "conf", "recipes", "tests", "tools",
    "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE",
    ".ci", ".gitignore", ".pre-commit-config.yaml",
}  # fmt: skip
GENERATED = {"runs", "dist", "build", ".git", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache"}

MAX_LINES = 420
PRINTING = {"cli", "doctor", "encode_shards", "export", "generate", "make_shards", "train"}
TELL_THEIR_CHILDREN = {"longlive.parallel.launcher"}
"""Pass a value to processes that they start, by the environment; nobody sets it by hand."""
KNOW_CONFIGS = {"config", "trained", "cli", "doctor", "encode_shards", "export", "generate", "make_shards", "train"}

FORBIDDEN_IMPORTS = {
    "data": {"torch.distributed"},
    "diffusion": {"torch.distributed", "lightning"},
    "codecs": {"torch.distributed", "lightning"},
    "text": {"torch.distributed", "lightning"},
    "models": {"torch.distributed", "lightning"},
}
"""What a folder must not know: files know no ranks, networks neither mesh nor Lightning."""


TESTS_ACROSS_FILES = {"data/test_readers.py", "parallel/test_elastic_resume.py", "parallel/test_kills.py"}
"""Tests of what several files promise together."""


def sources(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def name_of(path: Path) -> str:
    """`longlive.data.batch` of longlive/data/batch.py; a package is named by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def area_of(module: str) -> str:
    """The part of the package that a module belongs to: `data` of `longlive.data.batch`, "" of `longlive`."""
    return [*module.split("."), ""][1]


def imports_of(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[str]:
    """Every dotted name that the source imports, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def backward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    area = area_of(module)
    faults = []
    for target in imports_of(ast.parse(source), module, is_package):
        parts = target.split(".")
        if parts[0] != "longlive" or len(parts) == 1 or parts[1].startswith("__") or parts[1] == area:
            continue
        if not area:
            continue  # longlive/__init__.py gathers the public names
        if parts[1] not in LEVEL_OF:
            faults.append(f"{module} imports {target}, whose folder has no level")
        elif LEVEL_OF[parts[1]] >= LEVEL_OF[area]:
            faults.append(f"{module} imports {target}, which is not below it")
    return faults


def uses(source: str, names: set[str], module: str) -> set[str]:
    """Which of the dotted names a source imports, or reaches as an attribute (`torch.distributed.get_rank()`)."""
    tree = ast.parse(source)
    reached = list(imports_of(tree, module))
    reached += [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {name for name in names for other in reached if other == name or other.startswith(f"{name}.")}


def code_of_init(source: str) -> list[str]:
    """Statements of an `__init__.py` that are more than names: docstring, imports, constants, one registration."""
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    found = []
    for node in ast.parse(source).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_registration = isinstance(node, ast.Expr) and ast.unparse(node).startswith("StrategyRegistry.register(")
        if not (isinstance(node, allowed) or is_docstring or is_registration):
            found.append(ast.unparse(node))
    return found


def calls_of(source: str, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            yield node


def defaults_from_configs(source: str) -> list[str]:
    """`getattr(config, "x", default)`: the way in which a misspelt setting trains with its default."""
    return [
        ast.unparse(call)
        for call in calls_of(source, "getattr")
        if len(call.args) == 3 and re.search(r"config|cfg|settings|hparams", ast.unparse(call.args[0]))
    ]


def test_every_folder_and_file_of_the_package_has_a_level():
    areas = {area_of(name_of(path)) for path in sources()} - {""}
    assert areas <= set(LEVEL_OF), f"no level: {sorted(areas - set(LEVEL_OF))}"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_point_from_later_levels_to_earlier_ones(path):
    faults = backward_imports(path.read_text(), name_of(path), path.name == "__init__.py")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longlive.data.batch", "from longlive.models.wan import model"),
        ("longlive.data.batch", "from longlive import rollout"),
        ("longlive.data.batch", "from longlive.diffusion.path import noisy"),
        ("longlive.data.batch", "from ..codecs import base"),
        ("longlive.codecs.dct", "import longlive.text.base"),
        ("longlive.rollout.engine", "def f():\n    from longlive.modules.base import Module"),
        ("longlive.models.attention", "if TYPE_CHECKING:\n    from longlive.parallel.mesh import Mesh"),
        ("longlive.train", "from longlive.cli import main"),
        ("longlive.data.batch", "from longlive.utils import helper"),
    ],
)
def test_an_import_that_runs_back_is_found(module, source):
    assert len(backward_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longlive.rollout.engine", "from longlive.models.wan.model import CausalWan\nfrom longlive import rng"),
        (
            "longlive.models.wan.model",
            "from longlive.models.attention import A\nfrom .rope import rotation",
        ),
        ("longlive.cli", "from longlive import __version__\nimport longlive"),
        ("longlive.data.batch", "import torch\nfrom torch.models import thing"),
    ],
)
def test_an_import_that_points_the_right_way_is_allowed(module, source):
    assert backward_imports(source, module) == []


@pytest.mark.parametrize("area", FORBIDDEN_IMPORTS)
def test_a_folder_knows_nothing_beyond_its_job(area):
    for path in sources(PACKAGE / area):
        found = uses(path.read_text(), FORBIDDEN_IMPORTS[area], name_of(path))
        assert not found, f"{path.relative_to(ROOT)} uses {', '.join(found)}"


def test_a_forbidden_use_is_found_however_it_is_written():
    for source in (
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import get_rank",
        "import torch\nrank = torch.distributed.get_rank()",
    ):
        assert uses(source, {"torch.distributed"}, "longlive.data.batch") == {"torch.distributed"}
    assert not uses("import torch\nx = torch.nn.Module", {"torch.distributed"}, "longlive.data.batch")


def test_only_the_commands_see_a_config():
    for path in sources():
        if area_of(name_of(path)) not in KNOW_CONFIGS:
            found = uses(path.read_text(), {"hydra", "omegaconf"}, name_of(path))
            assert not found, f"{path.relative_to(ROOT)} uses {', '.join(found)}: settings are plain typed arguments"


def test_no_setting_is_read_with_a_default_on_the_side():
    for path in sources():
        assert not defaults_from_configs(path.read_text()), path.relative_to(ROOT)
    assert defaults_from_configs('lr = getattr(self.config, "learning_rate", 1e-4)')


def test_init_files_hold_names_only():
    for path in sources():
        if path.name == "__init__.py":
            found = code_of_init(path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: {found}"
    assert code_of_init("import os\ndef f(): ...\nprint(1)\nStrategyRegistry.register('x', X)\n__all__ = ['f']") == [
        "def f():\n    ...",
        "print(1)",
    ]


def test_nothing_prints_but_the_commands():
    for path in sources():
        if area_of(name_of(path)) not in PRINTING:
            assert not list(calls_of(path.read_text(), "print")), path.relative_to(ROOT)


def test_no_environment_variable_is_a_hidden_switch():
    for path in sources():
        if name_of(path) in TELL_THEIR_CHILDREN:
            continue
        found = uses(path.read_text(), {"os.environ", "os.getenv"}, name_of(path))
        assert not found, f"{path.relative_to(ROOT)} uses {', '.join(found)}: make it a setting"


def test_every_file_has_one_job():
    for path in [*sources(), *sources(ROOT / "tests")]:
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {num_lines} lines: split it"
        assert "util" not in path.stem, f"{path.relative_to(ROOT)}: name it after its job"


def test_every_file_of_the_package_begins_with_its_design_note():
    for path in sources():
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path.relative_to(ROOT)


def test_nothing_is_left_for_later():
    words = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK", "NotImplemented" + "Error"]
    marks = re.compile(rf"\b({'|'.join(words)})\b")
    for folder in ("longlive", "tests", "tools", "conf", "recipes"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".yaml", ".md", ".sh", ""} and path.is_file():
                found = marks.search(path.read_text())
                assert not found, f"{path.relative_to(ROOT)} says {found[0]}"


def test_the_top_level_holds_only_what_the_layout_names():
    present = {path.name for path in ROOT.iterdir()}
    unknown = {name for name in present - TOP_LEVEL - GENERATED if not name.startswith(".venv")}
    assert not unknown, f"not in the layout: {sorted(unknown)}"


def test_the_tests_mirror_the_package_file_by_file():
    """A test file whose source was renamed or removed goes on testing by accident, or nothing."""
    orphans = set()
    for path in sources(ROOT / "tests"):
        relative = path.relative_to(ROOT / "tests")
        if path.stem.startswith("test_") and relative.parts[0] != "helpers" and len(relative.parts) > 1:
            folder = PACKAGE / relative.parent
            subject = path.stem.removeprefix("test_")
            if not any(subject == other.stem or subject.startswith(f"{other.stem}_") for other in folder.glob("*.py")):
                orphans.add(str(relative))
    assert orphans == TESTS_ACROSS_FILES, "these test no file of the package, or are listed and do not exist"
