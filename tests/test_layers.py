"""The layers hold: imports point down only, and process groups and collectives have one owner each."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "moeca_dist"
MESH = "moeca_dist.parallel.mesh"


def test_imports_point_down() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def names_used(source: str) -> Iterator[str]:
    """Every dotted name that ``source`` imports or reads, with import aliases spelled out.

    import-linter sees external packages as a whole (deepspeed); the rules below are about modules inside them.
    """
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name
                if name.asname:
                    aliases[name.asname] = name.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                yield f"{node.module}.{name.name}"
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, dot, rest = ast.unparse(node).partition(".")
            yield aliases.get(head, head) + dot + rest


def trespasses(module: str, source: str) -> set[str]:
    """What ``module`` uses although it belongs to another part of the package."""
    owned = [] if module == MESH else ["deepspeed.utils.groups"]
    if not module.startswith("moeca_dist.parallel."):
        owned += ["torch.distributed", "deepspeed.comm"]
    return {name for name in names_used(source) if any(f"{name}.".startswith(f"{owner}.") for owner in owned)}


def modules() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name, path.read_text(encoding="utf-8")


def test_collectives_and_process_groups_have_one_owner() -> None:
    found = {name: names for name, source in modules() if (names := trespasses(name, source))}
    assert not found
    assert any("deepspeed.utils.groups" in set(names_used(source)) for name, source in modules() if name == MESH)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moeca_dist.moe.layer", "import torch\ndef f(): torch.distributed.barrier()"),
        ("moeca_dist.moe.layer", "import torch as t\nrank = t.distributed.get_rank()"),
        ("moeca_dist.moe.layer", "import torch.distributed as dist"),
        ("moeca_dist.moe.layer", "from torch import distributed"),
        ("moeca_dist.runtime.engine", "def f():\n    import deepspeed.comm as dist"),
        ("moeca_dist.runtime.engine", "from deepspeed import comm"),
        ("moeca_dist.runtime.engine", "from torch.distributed import get_rank"),
        ("moeca_dist.parallel.all_to_all", "from deepspeed.utils import groups"),
        ("moeca_dist.parallel.all_to_all", "import deepspeed\ndeepspeed.utils.groups._get_expert_parallel_group('a')"),
    ],
)
def test_trespasses_are_seen(module: str, source: str) -> None:
    assert trespasses(module, source)
    assert not trespasses(MESH, source)
