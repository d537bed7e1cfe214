"""Packaging of nemo_brain.

Requirements are ranges, so that installing into an NGC NeMo container keeps the container's own torch, NeMo and
Megatron. The exact versions of the CPU environment are in constraints-cpu.txt.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="nemo_brain",
    version="0.1.0",
    description="BRAIn (Bayesian Reward-conditioned Amortized Inference) for Megatron GPT models in NeMo",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["nemo_brain", "nemo_brain.*"]),
    package_data={"nemo_brain.report": ["*.html.j2"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.6",
        "nemo_toolkit[lightning]>=2.7,<3",
        "megatron-core>=0.15",
        "transformers>=4.51,<5",
        "omegaconf>=2.3,<2.4",
        "hydra-core>=1.3,<1.4",
        "numpy<3",
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
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "packaging",
        "safetensors>=0.5",
        "scipy>=1.11",
        "starlette>=0.40,<1",
        "tensorboard>=2.16",
        "tokenizers>=0.21",
        "tqdm",
        "uvicorn>=0.30,<1",
    ],
    extras_require={
        "test": [
            "hypothesis",
            "import-linter",
            "mypy",
            "peft",
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
        ],
    },
)
