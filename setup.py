"""Package metadata: the top-level folders install as one namespace, ``gigabatch``."""

from pathlib import Path

from setuptools import find_packages, setup

# Links to the folders, so that an editable install is one line in a .pth file: new modules are
# importable at once, and type checkers and editors see what the interpreter sees. (A folder
# `gigabatch` next to the others would hide the installed package in a checkout.)
SOURCE = Path(".src/gigabatch")
FOLDERS = ["launcher", "trainer", "data", "kernels", "configs"]

for folder in FOLDERS:
    if not SOURCE.joinpath(folder).is_dir():
        raise SystemExit(
            f"{SOURCE / folder} is not a link to {folder}/. Get the source with git, or from a "
            "tar archive: zip archives lose symbolic links."
        )

packages = ["gigabatch"]
for folder in FOLDERS:
    packages += [f"gigabatch.{folder}.{name}".rstrip(".") for name in ["", *find_packages(folder)]]

# The lower bounds were installed and tested together on Python 3.11; none has a known
# security advisory.
REMOTE = [
    "obstore>=0.11",
    "boto3>=1.40",  # credentials from AWS profiles and roles
    "fsspec>=2025.9",
]
AUDIO = ["soundfile>=0.13", "soxr>=1.0"]

setup(
    name="gigabatch",
    version="0.1.0",
    description="Large-batch contrastive pre-training, exact on one laptop or many nodes",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir={"": str(SOURCE.parent)},
    package_data={"gigabatch.configs": ["*.yaml"], "": ["py.typed"]},
    install_requires=[
        "torch>=2.13,<2.15",  # widen together with triton
        "numpy>=2.0",
        "deepspeed>=0.19.8,<0.20",  # trainer/engine.py relies on its internals
        "ray[default,train]>=2.60,<3",
        "webdataset>=1.0.2,<2",
        "braceexpand>=0.1.7",
        "google-crc32c>=1.7",
        "packaging>=24",
        "psutil>=6",
        "pyarrow>=23.0.1",
        "tensorboard>=2.20,<3",
        "transformers>=5.5,<6",
        "tokenizers>=0.22,<1",
        "safetensors>=0.6,<1",
        "pydantic>=2.11,<3",
        "PyYAML>=6.0.1",
        "typer>=0.16,<1",
        "rich>=13.7",
        "pillow>=12.3",
        "matplotlib>=3.10",  # fonts of the demo set; pictures in the README
        "fonttools>=4.60.2",
        "requests>=2.33",
        "aiohttp>=3.14.3",
    ],
    extras_require={
        "remote": REMOTE,
        "audio": AUDIO,
        "test": [
            *REMOTE,
            *AUDIO,
            "pytest>=9.0.3,<9.2",  # 9.2 renames tests: xdist 3.8 no longer keeps a group together
            "pytest-xdist>=3.8",
            "pytest-timeout>=2.4",
            "hypothesis>=6.150",
            "jsonschema>=4.23",
            "moto[s3]>=5.1.20",  # its server needs flask; moto[server] needs far more
            "flask>=3.1.3",
            "flask-cors>=6",
            "setuptools>=78.1.1",
            "triton>=3.7.1,<3.9",  # widen together with torch
        ],
        "dev": ["ruff>=0.17.6,<0.18", "mypy>=2.4,<3", "types-psutil", "types-PyYAML"],
        "docs": [
            "mkdocs-material>=9.7.7,<10",
            "mkdocstrings[python]>=1.0",
            "pymdown-extensions>=11.0.2",
        ],
    },
    entry_points={"console_scripts": ["gigabatch = gigabatch.launcher.__main__:main"]},
)
