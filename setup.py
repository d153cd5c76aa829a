"""Packaging: `pip install -e .` or a wheel that carries ds_configs inside the package."""

from pathlib import Path

from setuptools import find_packages, setup

# The lower limits are tested versions. training/engine.py uses private names of the deepspeed 0.19
# series.
REQUIRES = [
    "torch>=2.6",
    "deepspeed>=0.19,<0.20",
    "webdataset>=1.0",
    "sentencepiece>=0.2.3",
    "mpi4py>=4.0",
    "tensorboard>=2.15",
    "tokenizers>=0.20",
    "pydantic>=2.5",
    "typer>=0.19",
    "rich>=13",
    "numpy>=1.26",
    "safetensors>=0.8",  # 0.5 holds Python's lock while it writes: no training, no heartbeats
    "zstandard>=0.22",
    "fsspec>=2026.6",  # earlier ones run code from templates of the protocol reference
    "scikit-learn>=1.3",
    "scipy>=1.11",
]
EXTRAS = {
    "test": [
        "pytest>=8",
        "hypothesis>=6",
        "ruff>=0.6",
        "mypy>=1.11",
        "matplotlib>=3.8",
        "transformers>=4.40",
        "datasets>=4",  # brings pyarrow
        "aiohttp>=3.14",
        "rensa>=0.5,<0.6",
        "google-crc32c>=1.5",
        "mpich>=4.3; sys_platform == 'linux'",  # an MPI library with mpirun, without root
        "protobuf>=6.33.5",
    ],
    # bench/step.py also measures electra-pytorch, which requires old versions of its dependencies:
    # pip install --no-deps electra-pytorch
    "bench": ["transformers>=4.40"],
    # plot
    "plot": ["matplotlib>=3.8"],
    # import from TensorFlow checkpoints; tensorflow-cpu is enough
    "tf": ["tensorflow>=2.16"],
    # convert
    "tfrecord": ["google-crc32c>=1.5", "protobuf>=6.33.5"],
    # .parquet and .arrow inputs
    "parquet": ["pyarrow>=15"],
    # prepare --near-duplicates; the signatures of rensa may change between minor versions
    "clean": ["rensa>=0.5,<0.6"],
    # inputs at http(s) and s3; hf:// comes with huggingface_hub
    "remote": ["aiohttp>=3.14", "s3fs>=2026.6"],
    # Hugging Face datasets as inputs and tasks; versions below 4 execute a dataset's code
    "hf": ["datasets>=4"],
}

KINDS = ("pretrain", "engine", "glue")  # folders of ds_configs

setup(
    name="electra_ds",
    version="0.1.0",
    description="Pretraining of text encoders by replaced token detection (ELECTRA) on DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["electra_ds", "electra_ds.*", "data_tools", "data_tools.*"]),
        "electra_ds.ds_configs",
        *(f"electra_ds.ds_configs.{kind}" for kind in KINDS),
    ],
    package_dir={
        "electra_ds.ds_configs": "ds_configs",
        **{f"electra_ds.ds_configs.{kind}": f"ds_configs/{kind}" for kind in KINDS},
    },
    package_data={
        "electra_ds": ["py.typed"],
        **{f"electra_ds.ds_configs.{kind}": ["*.json"] for kind in KINDS},
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["electra-ds = electra_ds.cli:main"]},
)
