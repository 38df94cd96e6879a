"""Tables of numbers: units of columns, order, and the same rows as CSV, Markdown and LaTeX."""
import pytest
from rich.console import Console

from moe_zoo.analysis.tables import (
    Column,
    Grid,
    as_csv,
    as_latex,
    as_markdown,
    as_rich,
    quantity,
    sort_grids,
    stacked,
)
from moe_zoo.errors import InputError

COLUMNS = (
    Column('name', 'name', 'text'), Column('size', 'size'), Column('memory', 'memory\nat most', 'bytes'),
    Column('share', 'share', 'percent'), Column('star', '', 'mark'))
GRID = Grid('two of them', COLUMNS, (
    ('big_one', 4_208_394_048, 12_500_000, 97.5, '*'), ('  small|1', 45_600_000, None, 2.5, None)))


def drawn(grid: Grid) -> str:
    console = Console(width=100, record=True, file=open('/dev/null', 'w'))
    console.print(as_rich(grid))
    return console.export_text()


def test_quantities_of_a_column_share_a_unit():
    # sizes in millions: 4.2e9 has four digits before the point there, and 45.6 needs one behind it for three digits
    lines = [' '.join(line.split()) for line in drawn(GRID).splitlines()]
    assert lines[lines.index('memory'):][:3] == ['memory', 'size at most', 'name (M) (MB) share']
    assert 'big_one 4,208.4 12.5 97.50 % *' in lines
    assert 'small|1 45.6 - 2.50 %' in lines
    # differences beside what they are of: one unit for all three, small numbers in full
    columns = [Column(key, key, unit_with='same') for key in 'abc']
    assert ' 1,500.000 1,499.800 0.200 ' in ' '.join(drawn(Grid('', columns, ((1.5e9, 1.4998e9, 2e5),))).split()) + ' '
    assert '1,234' in drawn(Grid('', columns[:1], ((1234,),)))


def test_csv_keeps_digits():
    assert as_csv(GRID) == (
        'name,size,memory,share,star\nbig_one,4208394048,12500000,97.5,*\nsmall|1,45600000,,2.5,\n')


def test_markdown():
    assert as_markdown(GRID).splitlines() == [
        '**two of them**', '', '| name | size (M) | memory at most (MB) | share |  |',
        '| --- | ---: | ---: | ---: | --- |', '| big_one | 4,208.4 | 12.5 | 97.50 % | * |',
        '| &nbsp;&nbsp;small\\|1 | 45.6 | - | 2.50 % |  |']


def test_latex():
    grid = Grid('two of them', (*COLUMNS[:2], Column('d', 'A - B')), (('big_one & 50 %', 5, -3), ('  x', 7, 4)))
    assert as_latex(grid).splitlines() == [
        '% two of them', r'% \usepackage{booktabs}', r'\begin{tabular}{lrr}', r'\toprule', r'name & size & A - B \\',
        r'\midrule', r'big\_one \& 50 \% & 5 & $-$3 \\', r'\quad x & 7 & 4 \\', r'\bottomrule', r'\end{tabular}']


def test_sorting_puts_large_numbers_first_and_missing_ones_last():
    assert [row[0] for row in GRID.sorted_by('memory').rows] == ['big_one', '  small|1']
    assert [row[0] for row in GRID.sorted_by('name').rows] == ['  small|1', 'big_one']
    other = Grid('', (Column('z', 'z'),), ((1,), (2,)))
    by_size, same = sort_grids([Grid('', COLUMNS, GRID.rows[::-1]), other], 'size')
    assert [row[0] for row in by_size.rows] == ['big_one', '  small|1'] and same is other
    with pytest.raises(InputError, match="--sort 'siz': there is no such column. Did you mean 'size'.* Known: name,"):
        sort_grids([GRID], 'siz')


def test_grids_are_stacked_and_empty_columns_left_out():
    first = Grid('one', (Column('a', 'a'), Column('b', 'b')), ((1, None),))
    both = stacked([first, Grid('two', (Column('c', 'c'),), ((3,),))])
    assert [column.key for column in both.columns] == ['of', 'a', 'b', 'c']
    assert both.rows == (('one', 1, None, None), ('two', None, None, 3))
    assert [column.key for column in both.without_empty_columns().columns] == ['of', 'a', 'c']


@pytest.mark.parametrize(('value', 'text'), [(4_208_394_048, '4.208 G'), (56e6, '56.00 M'), (123, '123'), (0, '0')])
def test_quantity(value, text):
    assert quantity(value) == text
