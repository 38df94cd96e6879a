"""Files of torch.save are zip archives in which nothing is packed: what would unpack to more than it is, is refused."""
import os
import zipfile
from pathlib import Path
from typing import Union

from ..errors import InputError


def refuse_packed(path: Union[str, os.PathLike]) -> None:
    """Look at the list of an archive, before torch takes the memory that it asks for.

    Raises:
        InputError: A few bytes would unpack to many.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return  # no archive, or a damaged one, of which torch will tell
    size = Path(path).stat().st_size
    if unpacked > size:
        raise InputError(f"The checkpoint '{path}' cannot be read: its {size:,} bytes would unpack to {unpacked:,}.")
