"""What is on the pages README.md, CONTRIBUTING.md, CHANGELOG.md and of docs/: blocks, text, commands."""
import re
import shlex
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
PATH = re.compile(r'# ((?:moe_zoo|tests|registry|configs)/[\w./-]+)\n')  # as the first line of a block: a file
COMMAND = re.compile(r'(?:\.venv/bin/)?(?:moe-zoo|python tools/\w+\.py|tools/\w+\.(?:py|sh)|torchrun|pip install)\b')
OPTION = re.compile(r'\.\.\. |--\w|\w+=|\w+ --')  # to append to a command, in the job table


class Block(NamedTuple):
    """A fenced block: its page, the line that its text begins at, its language and its text."""
    page: str
    line: int
    language: str
    text: str

    @property
    def path(self) -> str:
        """The file that it is the content of; empty for a block that is none."""
        found = PATH.match(self.text)
        return found[1] if found else ''


def find_pages() -> list[str]:
    pages = [name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md') if (REPOSITORY / name).is_file()]
    return pages + sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / 'docs').rglob('*.md'))


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding='utf-8')


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks in order."""
    found, opened = [], None
    for number, line in enumerate((read(page) if text is None else text).splitlines(), 1):
        if line.lstrip().startswith('```'):
            if opened is None:
                opened = (number + 1, line.strip()[3:], len(line) - len(line.lstrip()), [])
            else:
                first, language, _, lines = opened
                found.append(Block(page, first, language, ''.join(f'{each}\n' for each in lines)))
                opened = None
        elif opened is not None:
            opened[3].append(line[opened[2]:])
    assert opened is None, f'{page}: the block at line {opened[0]} does not end'
    return found


def prose_of(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r'^ *```.*?^ *```$', '', read(page), flags=re.S | re.M)


def commands_of(page: str) -> list[str]:
    """Every command of a page: lines of its `sh` blocks, code in its text, and the job table's options of a command."""
    found = []
    for block in blocks_of(page):
        if block.language == 'sh':
            lines = block.text.replace('\\\n', ' ').splitlines()
            found += [line for line in lines if shlex.split(line, comments=True)]
    table = last = ''
    for line in re.split(r'\n\s*\n|\n(?=[|-] ?)', prose_of(page)):  # paragraphs, rows of tables, items of lists
        codes = [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', line)]
        whole = [code for code in codes if COMMAND.match(code)]
        found += whole
        table = (table or line) if line.startswith('|') else ''
        if table == '| job | command |':  # `... --twin`, `--twin`, `epochs=10`: of the command in the row, or above it
            last = next((code for code in reversed(whole) if ' ' in code), last)
            options = [code for code in codes if OPTION.match(code) and code not in whole]
            found += [f'{last} {option.removeprefix("... ")}' for option in options]
    return found
