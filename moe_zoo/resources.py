"""Where the data folders are: inside the package in a wheel, beside it in a checkout. Standard library only."""
from pathlib import Path


def folder(name: str) -> Path:
    """Path of `registry` or `configs`.

    A wheel carries both inside the package (pyproject.toml maps them there); a checkout, installed or not, has them
    beside it. wheels are unpacked on installation, so a plain path is enough.

    Raises:
        FileNotFoundError: Neither place has the folder, which means a broken installation.
    """
    package = Path(__file__).resolve().parent
    for path in (package / name, package.parent / name):
        if path.is_dir():
            return path
    raise FileNotFoundError(f'The folder {name!r} is neither in {package} nor beside it: install moe_zoo again.')
