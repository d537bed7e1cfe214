"""Only ``nemo_brain.host`` reaches into NeMo, Lightning, Megatron-core and torch.distributed."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemo_brain"
HOSTS = ("nemo", "megatron", "lightning", "torch.distributed", "torch.cuda")
# Public, and used in host/ too: groups and their random numbers, and what is subclassed there and in other rooms.
SHARED = {"parallel_state", "tensor_parallel", "MegatronStrategy", "GPTModel", "GPTConfig"}


def is_host(module: str) -> bool:
    return any(module == host or module.startswith(f"{host}.") for host in HOSTS)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def imports(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """(module, name within it or "", name that it is bound to) of every import of a host's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_host(alias.name):
                    yield alias.name, "", alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = node.module or ""
                if is_host(module) or is_host(f"{module}.{alias.name}"):
                    yield module, alias.name, alias.asname or alias.name


def defined_privately(trees: Iterable[ast.AST]) -> set[str]:
    """Private names that these files give to functions, classes, variables and attributes of ``self``."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def root_of(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def offences(tree: ast.AST, ours: set[str], wrapped: set[str]) -> list[str]:
    """What a file outside host/ does that belongs there.

    Args:
        ours: private names of the package's own.
        wrapped: names of the hosts that host/ imports, so that others need not.
    """
    found = []
    bound = {variable for _, _, variable in imports(tree)}
    for module, name, _ in imports(tree):
        if any(map(is_private, [*module.split("."), name])):
            found.append(f"imports the private {module}.{name}")
        if name in wrapped:
            found.append(f"imports {module}.{name}, which is in host/")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if is_private(node.attr) and node.attr not in ours and text != "os._exit":
                found.append(f"uses the private {text}")
            if not isinstance(node.ctx, ast.Load) and (root_of(node) in bound or is_host(text)):
                found.append(f"replaces {text}")
            if node.attr == "MethodType":
                found.append("binds a function to somebody else's object")
        elif isinstance(node, ast.alias) and node.name == "MethodType":
            found.append("binds a function to somebody else's object")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            target = node.args[0]
            if root_of(target) in bound or is_host(ast.unparse(target)):
                found.append(f"replaces {ast.unparse(node)}")
    return found


def parsed(folder: Path) -> dict[str, ast.AST]:
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}


@functools.cache
def names_in_host() -> set[str]:
    host = parsed(PACKAGE / "host").values()
    return {name for tree in host for _, name, _ in imports(tree) if name} - SHARED


def test_only_host_reaches_into_the_hosts():
    # What a server's workers load runs where the rest of the package is not.
    apart = ("nemo_brain/host/", "nemo_brain/sampling/vllm_worker/")
    files = {path: tree for path, tree in parsed(PACKAGE).items() if not path.startswith(apart)}
    assert len(files) > 50
    ours, wrapped = defined_privately(files.values()), names_in_host()
    assert {"get_gpt_layer_local_spec", "set_model_parallel_attributes", "ParallelLinearAdapter"} <= wrapped
    found = {path: bad for path, tree in files.items() if (bad := offences(tree, ours, wrapped))}
    assert not found


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_scripts_import_nothing_private_of_the_hosts(folder):
    for path, tree in parsed(ROOT / folder).items():
        for module, name, _ in imports(tree):
            assert not any(map(is_private, [*module.split("."), name])), path


@pytest.mark.parametrize(
    "code",
    [
        "from nemo.lightning._strategy_lib import set_model_parallel_attributes",
        "from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup",
        "import lightning.pytorch._graveyard",
        "from torch.distributed.checkpoint.filesystem import _StorageInfo",
        "from megatron.core.fp8_utils import get_fp8_align_size",
        "from nemo.lightning.io import pl\npl.fix = None",
        "from nemo.lightning.io import pl as nemo_io\nnemo_io.Connector.fix += 1",
        "import torch\ntorch.cuda.synchronize = print",
        "import torch.distributed as dist\nsetattr(dist, 'barrier', print)",
        "from megatron.core import parallel_state\ndel parallel_state.anything",
        "def f(strategy): strategy.checkpoint_io._save_sharded_strategy = None",
        "class Layer(TransformerLayer):\n    def forward(self, x): return self._forward_attention(x)",
        "from types import MethodType",
        "import types\ndef f(optimizer, step): optimizer.step = types.MethodType(step, optimizer)",
    ],
)
def test_an_offence_is_found(code):
    assert offences(ast.parse(code), {"_ours"}, names_in_host())


@pytest.mark.parametrize(
    "code",
    [
        "from megatron.core import parallel_state\nx = parallel_state.get_data_parallel_group()",
        "import torch.distributed as dist\ndist.barrier()",
        "class A:\n    def f(self): self._ours = 1; return self._ours",
        "from nemo.lightning import MegatronStrategy\nclass S(MegatronStrategy):\n    def f(self): self.layout = 1",
    ],
)
def test_what_is_public_is_used_everywhere(code):
    assert not offences(ast.parse(code), {"_ours"}, names_in_host())
