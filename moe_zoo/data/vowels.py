"""Vowels of 76 speakers as four frequencies each: the measurements of Peterson and Barney.

Source: G. E. Peterson and H. L. Barney, "Control Methods Used in a Study of the Vowels", JASA 24, 1952, as the program
Praat holds them: ten vowels in hVd words, said twice by 33 men, 28 women and 15 children.

Letters: N tokens, S speakers.
"""
import csv
import importlib.util
import tempfile
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

import torch
from torch.nn import functional as F

from moe_zoo.errors import InputError, MissingPackage

VOWELS = ('iy', 'ih', 'eh', 'ae', 'ah', 'aa', 'ao', 'uh', 'uw', 'er')
TYPES = {'m': 'men', 'w': 'women', 'c': 'children'}
FORMANTS = ('F0', 'F1', 'F2', 'F3')  # fundamental frequency and three formants, Hz
COLUMNS = ('Type', 'Speaker', 'Vowel', *FORMANTS)
MISSING = (
    'The vowels of Peterson and Barney come from Praat, which is not installed: give --data-dir a CSV of them, or '
    'pip install praat-parselmouth (licence: GPL).')


class Vowels(NamedTuple):
    """Tokens: who says what, and how it sounds.

    Attributes:
        formants: (N, 4) float32, F0 to F3 in Hz.
        vowels: (N,) int64, places in `VOWELS`.
        speakers: (N,) int64, their numbers in the table.
        types: (N,) int64, places in `TYPES`: man, woman, child.
    """
    formants: torch.Tensor
    vowels: torch.Tensor
    speakers: torch.Tensor
    types: torch.Tensor

    def take(self, positions: torch.Tensor) -> 'Vowels':
        """Some of the tokens, by position or mask."""
        return Vowels(*(field[positions] for field in self))

    def join(self, other: 'Vowels') -> 'Vowels':
        """These tokens and others."""
        return Vowels(*(torch.cat(pair) for pair in zip(self, other)))

    def of(self, names: Sequence[str]) -> 'Vowels':
        """The tokens of some vowels, which are numbered in the order of the names."""
        places = torch.tensor([VOWELS.index(name) for name in names])
        found = self.vowels[:, None] == places
        return self._replace(vowels=found.int().argmax(dim=1)).take(found.any(dim=1))

    def select(self, columns: Sequence[str], like: 'Vowels') -> torch.Tensor:
        """(N, len(columns)) of `FORMANTS`, standardised by mean and deviation of the tokens `like`, for training."""
        places = [FORMANTS.index(column) for column in columns]
        of = like.formants[:, places]
        return (self.formants[:, places] - of.mean(dim=0)) / of.std(dim=0)

    def tell_speaker(self, by: str, like: 'Vowels') -> torch.Tensor:
        """What a gate may be told of who speaks: (N, 3) one-hot by 'type', or (N, S) one-hot by 'identity'.

        S are the speakers of the tokens `like`, for training; an unknown speaker is none of them, all zeros.
        """
        if by == 'type':
            return F.one_hot(self.types, len(TYPES)).float()
        return (self.speakers[:, None] == like.speakers.unique()).float()


def load_vowels(path: Optional[str] = None) -> Vowels:
    """The tokens of a table.

    Args:
        path: A CSV with the columns `COLUMNS` and any others, or a folder with one; None asks Praat for the table, by
            the optional package praat-parselmouth.

    Raises:
        InputError: There is no such table, a column is missing, or a value cannot be one; or Praat is not installed.
    """
    if path is not None:
        return _read(_find(Path(path).expanduser()))
    if importlib.util.find_spec('parselmouth') is None:
        raise MissingPackage(MISSING)
    from parselmouth.praat import call
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'praat.csv'
        call(call('Create formant table (Peterson & Barney 1952)'), 'Save as comma-separated file', str(file))
        return _read(file)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise InputError(f"--data-dir '{path}' does not exist: give a CSV, or a folder with one.")
    found = sorted(path.glob('*.csv'))
    if len(found) != 1:
        raise InputError(f"--data-dir '{path}' holds {len(found)} CSV files: give one, or a folder with one.")
    return found[0]


def _read(file: Path) -> Vowels:
    try:
        with open(file, newline='', encoding='utf-8') as lines:
            table = csv.DictReader(lines)
            missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
            if missing:
                raise InputError(
                    f"--data-dir '{file}' has no column {', '.join(map(repr, missing))}: {', '.join(COLUMNS)} are "
                    'needed.')
            rows = [_row(row, f"--data-dir '{file}', line {table.line_num}") for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--data-dir '{file}' cannot be read as a CSV: {error}") from error
    if not rows:
        raise InputError(f"--data-dir '{file}' has no rows.")
    formants, *rest = zip(*rows)
    return Vowels(torch.tensor(formants), *(torch.tensor(column) for column in rest))


def _row(row: dict, where: str) -> tuple:
    """(formants, vowel, speaker, type) of one line."""
    for column, known in (('Vowel', VOWELS), ('Type', tuple(TYPES))):
        if row[column] not in known:
            raise InputError(f'{where}: {column} is {row[column]!r}, not one of {", ".join(known)}.')
    try:
        formants = tuple(float(row[column]) for column in FORMANTS)
        speaker = int(row['Speaker'])
    except (TypeError, ValueError):
        formants, speaker = (), 0
    if not formants or not all(0 < value < 1e5 for value in formants):
        raise InputError(f'{where}: Speaker is to be a whole number, and {", ".join(FORMANTS)} frequencies in Hz.')
    return formants, VOWELS.index(row['Vowel']), speaker, list(TYPES).index(row['Type'])


def split_by_speaker(vowels: Vowels, shares: Sequence[float], seed: int = 0) -> List[Vowels]:
    """Parts without a common speaker, men, women and children in equal proportions as far as whole people allow.

    Args:
        shares: Of the speakers, in any unit: (40, 10, 26) parts all 76 of them so.
        seed: Of who goes where.

    Raises:
        InputError: There are too few speakers for so many parts.
    """
    random = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0., *shares], dtype=torch.float64).cumsum(dim=0) / sum(shares)
    members: List[List[torch.Tensor]] = [[] for _ in shares]
    for kind in range(len(TYPES)):
        speakers = vowels.speakers[vowels.types == kind].unique()
        speakers = speakers[torch.randperm(len(speakers), generator=random)]
        cuts = (ends * len(speakers)).round().int().tolist()
        for part, start, stop in zip(members, cuts, cuts[1:]):
            part.append(speakers[start:stop])
    parts = [vowels.take(torch.isin(vowels.speakers, torch.cat(part))) for part in members]
    if not all(len(part.vowels) for part in parts):
        raise InputError(f'{len(vowels.speakers.unique())} speakers are too few for {len(parts)} parts.')
    return parts
