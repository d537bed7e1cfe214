"""Packaging of nemo_brain.

Requirements are ranges, so that installing into an NGC NeMo container keeps the container's own torch, NeMo and
Megatron. The exact versions of the CPU environment are in constraints-cpu.txt.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

VERSION = re.search('__version__ = "(.+)"', Path("nemo_brain/__init__.py").read_text(encoding="utf-8"))[1]


class WithConfigurations(build_py):
    """An installed package has a copy of ``conf/``; a checkout reads its own."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("conf", Path(self.build_lib, "nemo_brain", "conf"), dirs_exist_ok=True)


setup(
    name="nemo_brain",
    version=VERSION,
    description="BRAIn (Bayesian Reward-conditioned Amortized Inference) for Megatron GPT models in NeMo",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["nemo_brain", "nemo_brain.*"]),
    package_data={"nemo_brain.data": ["*.jsonl"], "nemo_brain.report": ["*.html.j2"]},
    cmdclass={"build_py": WithConfigurations},
    entry_points={"console_scripts": ["nemo-brain=nemo_brain.cli.main:main"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.8",
        "nemo_toolkit[lightning]>=2.7,<3",
        "megatron-core>=0.15,<0.17",
        "transformers>=4.51,<5",
        "omegaconf>=2.3,<2.4",
        "hydra-core>=1.3,<1.4",
        "numpy<3",  # megatron-core 0.15 itself wants 1.26
        # Imported by NeMo's language-model collection, which does not declare them.
        "datasets>=3",
        "einops>=0.8",
        "leptonai<0.28",
        "nemo_run>=0.7,<0.9",
        "nvidia-modelopt>=0.37",
        "psutil",
        "pyarrow<22",
        "rich",
        "sentencepiece",
        "tensorstore",
        "tiktoken",
        # Ours.
        "gguf>=0.17",
        "httpx>=0.27,<1",
        "huggingface_hub>=0.30,<1",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "packaging",
        "regex",
        "safetensors>=0.5",
        "scipy>=1.11",
        "starlette>=0.40,<1",
        "tensorboard>=2.16",
        "tokenizers>=0.21",
        "tqdm",
        "uvicorn>=0.30,<1",
    ],
    extras_require={
        "docs": [
            "mkdocs-material>=9.5,<10",
            "mkdocstrings[python]>=0.26",
        ],
        "evaluation": ["rouge-score>=0.1.2"],
        "mlflow": ["mlflow-skinny>=3,<4", "pandas"],
        "verifiers": ["jsonschema>=4.18", "math-verify>=0.9,<0.10"],
        "test": [
            "hypothesis",
            "import-linter",
            "jsonschema>=4.18",
            "math-verify>=0.9,<0.10",
            "mlflow-skinny>=3,<4",
            "kubeflow-trainer-api",
            "kubernetes-validate",
            "mypy",
            "peft",
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "rouge-score>=0.1.2",
            "ruff",
            "triton; sys_platform == 'linux'",  # as torch's CUDA builds have it: its kernels are interpreted
        ],
    },
)
