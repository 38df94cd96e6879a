"""Errors a user can cause, the words of their sentences, and files that are never half-written. Standard library only.

Library code raises `InputError` with one sentence that names the argument, its value and what would be accepted;
a command line prints that sentence and exits with code 2 (`exit_on_input_error`).
"""
import contextlib
import difflib
import errno
import functools
import inspect
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Union

try:
    import fcntl
except ImportError:  # Windows, which has no such locks
    fcntl = None

PATIENCE = 10.0  # seconds


class InputError(ValueError):
    """What was given cannot be used. The message is one sentence that says what would be."""


class MissingPackage(InputError):
    """An optional package is not installed. The message says which, and how it is had."""


def counted(number: int, noun: str) -> str:
    """`1 image`, `2,000 images`, `3 classes`."""
    ending = '' if number == 1 else 'es' if noun.endswith('s') else 's'
    return f'{number:,} {noun}{ending}'


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Name the entries of `choices` that look like `name`.

    Returns:
        `" Did you mean 'a' or 'b'?"` with a leading space, or an empty string where nothing is close.
    """
    found = difflib.get_close_matches(str(name), list(choices), n=count, cutoff=0.6)
    if not found:
        return ''
    return ' Did you mean ' + ' or '.join(repr(f) for f in found) + '?'


def nearest_keyword(error: BaseException, build: Callable[..., Any]) -> str:
    """What to put behind the text of a TypeError by which a model refused a keyword: `. Did you mean 'a'?` or nothing.

    Args:
        error: What was raised; to anything but an unexpected keyword nothing is added.
        build: Makes the model (a torch module) from keywords. Keywords of its own class and of its layers are tried,
            because many models hand theirs on.
    """
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not unknown:
        return ''
    try:
        classes = {cls for module in build().modules() for cls in type(module).__mro__}
    except Exception:  # whatever it is, it is not what the user asked for
        return ''
    known = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    similar = difflib.get_close_matches(unknown[1], sorted(known), n=6, cutoff=0.6)
    meant = next((name for name in similar if _accepts(build, name)), None)
    return f'. Did you mean {meant!r}?' if meant else ''


def _accepts(build: Callable[..., Any], keyword: str) -> bool:
    try:
        build(**{keyword: 1})  # timm leaves out what is None
    except Exception as error:  # a value that does not fit is no refusal of the keyword
        return 'unexpected keyword argument' not in str(error)
    return True


def exit_on_input_error(main: Callable) -> Callable:
    """Turn an `InputError` of a command into one sentence on stderr and exit code 2.

    Under torchrun, which ends all processes of a machine when one has failed, the first of them speaks. The others hold
    their tongue for `PATIENCE` seconds, which they only outlive where the fault is theirs alone (one corrupt image).
    """
    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            if os.environ.get('LOCAL_RANK', '0') != '0':
                time.sleep(PATIENCE)
            print(f'error: {error}', file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print('interrupted', file=sys.stderr)
            raise SystemExit(130) from None
    return wrapped


# ---- files

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN = (errno.EROFS, errno.EIO, errno.ESTALE, errno.EISDIR)
_LEFTOVER = re.compile(r'\..+\.\w{8}\.part')


@contextlib.contextmanager
def atomic_write(path: Union[str, os.PathLike], shown: Union[str, os.PathLike] = '') -> Iterator[Path]:
    """Yield a temporary path beside `path` that is renamed onto it when the block ends without an error.

    A reader sees the old file or the new one, never a part. On failure the old file stays and the temporary one goes;
    that of a process which was killed goes when the file is next written.

    Args:
        path: The file.
        shown: What sentences call it, where that is not `path`.

    Raises:
        InputError: The disk is full, or the place cannot be written to (the old file is intact).
    """
    path = Path(path)
    make_folder(path.parent)
    remove_leftovers(path.parent, path.name)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.part')
    except OSError as error:
        raise InputError(unwritten(error, shown or path) or cannot_write(shown or path, error.errno)) from error
    temporary = Path(name)
    if fcntl:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)  # while this process lives, the file is no leftover
    else:
        os.close(handle)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # temporary files are private; the result is an ordinary one
        with open(temporary, 'rb') as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except Exception as error:
        sentence = unwritten(error, shown or path)
        if not sentence:
            raise
        raise InputError(sentence) from error
    finally:
        temporary.unlink(missing_ok=True)
        if fcntl:
            os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in.

    Raises:
        InputError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(cannot_write(path, error.errno)) from error


def remove_leftovers(folder: Path, name: str = '') -> None:
    """Remove what killed processes left of files that they wrote by `atomic_write`; living ones have theirs locked.

    Args:
        folder: Where to look.
        name: Of the file that was written; empty for any.
    """
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # a folder may be written to and not listed
        for entry in list(os.scandir(folder)):
            if _LEFTOVER.fullmatch(entry.name) and entry.name.startswith(f'.{name}.' if name else '.'):
                with contextlib.suppress(OSError), open(entry.path, 'rb') as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)


def unwritten(error: Exception, path: Any) -> str:
    """Why a file was not written, where the disk is the reason: with an error of Python, or of Rust (safetensors)."""
    number = getattr(error, 'errno', None) or int((re.search(r'\(os error (\d+)\)', str(error)) or ['', 0])[1])
    if number in _FULL:
        return f"No space left to write '{path}': free some and run again; what was there before is intact."
    return cannot_write(path, number) if number in _BROKEN else ''


def cannot_write(path: Any, number: int) -> str:
    return f"Cannot write to '{path}': {os.strerror(number)}; choose another place."
