"""Packaging. The runtime patches live in patches/ and install as the package megatron_rpp_patches."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_rpp" / "version.py").read_text(), re.M).group(1)

# `requirements/` pins the exact set that is tested; these are the bounds within which the code is meant to work.
TRAIN = ["torch==2.13.0", "megatron-core==0.16.1", "sglang==0.5.21", "transformers==5.12.1"]
TRAIN += ["math-verify==0.9.0", "tensorboard>=2.20", "psutil>=7"]
GPU = ["transformer-engine[core_cu13,pytorch]>=2.10"]
DEV = ["pytest>=9", "hypothesis>=6.150", "ruff>=0.17"]

setup(
    name="megatron_rpp",
    version=VERSION,
    description="REINFORCE++ post-training of large reasoning models on Megatron-Core and SGLang",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    classifiers=[f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")],
    package_dir={"megatron_rpp": "megatron_rpp", "megatron_rpp_patches": "patches"},
    packages=[
        *find_packages(include=["megatron_rpp", "megatron_rpp.*"]),
        "megatron_rpp_patches",
        *(f"megatron_rpp_patches.{name}" for name in find_packages("patches")),
    ],
    package_data={"megatron_rpp_patches": ["locks/*"]},
    install_requires=["numpy>=2", "pydantic>=2.13", "PyYAML>=6.0.2", "rich>=14", "safetensors>=0.7"],
    extras_require={"train": TRAIN, "gpu": TRAIN + GPU, "dev": DEV},
    entry_points={
        "console_scripts": ["rpp = megatron_rpp.__main__:main"],
        "sglang.srt.plugins": ["megatron_rpp = megatron_rpp_patches.sglang.plugin:register"],
    },
)
