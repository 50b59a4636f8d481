"""Package layout: the top-level folders install as one namespace, ``gigabatch``."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ["launcher", "trainer", "data", "kernels", "configs"]

packages = [
    f"gigabatch.{name}"
    for folder in FOLDERS
    for name in [folder, *(f"{folder}.{sub}" for sub in find_packages(folder))]
]

setup(
    name="gigabatch",
    version="0.1.0",
    description="Large-batch contrastive pre-training, exact on one laptop or many nodes",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir={f"gigabatch.{folder}": folder for folder in FOLDERS},
    package_data={"gigabatch.configs": ["*.yaml"], "": ["py.typed"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26",
        "deepspeed>=0.19.8,<0.20",  # trainer/zero.py relies on behaviour checked on this line
        "ray[default,train]>=2.60,<3",
        "webdataset>=1.0.2,<2",
        "braceexpand>=0.1.7",
        "fsspec>=2024.12",
        "google-crc32c>=1.5",
        "packaging>=23",
        "psutil>=6",
        "pyarrow>=17",
        "tensorboard>=2.18,<3",
        "transformers>=5,<6",
        "tokenizers>=0.22,<1",
        "safetensors>=0.5,<1",
        "pydantic>=2.10,<3",
        "PyYAML>=6",
        "typer>=0.16,<1",
        "rich>=13",
        "pillow>=11",
        "matplotlib>=3.9",  # its fonts are the demo set; pictures in the README
        "fonttools>=4.50",
    ],
    extras_require={
        "remote": ["s3fs>=2025.7", "gcsfs>=2024.12", "aiohttp>=3.9"],  # exclusive writes work since
        "audio": ["soundfile>=0.13", "soxr>=0.5"],
        "test": [
            "pytest>=8,<9.2",  # 9.2 names tests anew: xdist 3.8 no longer keeps a group together
            "pytest-xdist>=3.6",
            "pytest-timeout>=2.3",
            "hypothesis>=6.150",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-psutil",
            "types-PyYAML",
            "jsonschema>=4",
            "s3fs>=2025.7",
            "aiohttp>=3.9",
            "moto[server]>=5",
            "soundfile>=0.13",
            "soxr>=0.5",
            "triton>=3.6,<3.8",
        ],
    },
    entry_points={"console_scripts": ["gigabatch = gigabatch.launcher.cli.app:main"]},
)
