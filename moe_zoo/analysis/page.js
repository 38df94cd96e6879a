// Tables that ask for it sort at a click on a heading, and filter by words and by group. page.py puts this in line.
for (const box of document.querySelectorAll('.sortable')) {
  const body = box.querySelector('tbody'), rows = [...body.rows];
  const headings = [...box.querySelectorAll('thead th')];
  const collator = new Intl.Collator('en', {numeric: true});
  const make = (tag, properties, ...inside) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...inside);
    return element;
  };

  const value = (row, column) => {
    const cell = row.cells[column], lines = [...cell.childNodes].filter(node => node.tagName !== 'SMALL');
    const text = lines.map(node => node.textContent).join('').trim();
    return cell.dataset.key !== undefined ? Number(cell.dataset.key) : text === '–' ? null : text;
  };
  const sort = (column, down) => rows
    .map(row => [value(row, column), row])
    .sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);  // what is missing comes last either way
      const order = typeof a === 'number' && typeof b === 'number' ? a - b : collator.compare(a, b);
      return down ? -order : order;
    })
    .forEach(([, row]) => body.append(row));

  headings.forEach((heading, column) => {
    const button = make('button', {type: 'button'}, ...heading.childNodes);
    heading.append(button);
    button.addEventListener('click', () => {
      const before = heading.getAttribute('aria-sort');
      const down = before ? before === 'ascending' : heading.classList.contains('n');  // numbers: largest first
      headings.forEach(other => other.removeAttribute('aria-sort'));
      heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      sort(column, down);
    });
  });

  const groups = [...new Set(rows.flatMap(row => row.dataset.groups.split('|')))].sort(collator.compare);
  const words = make('input', {type: 'search', placeholder: 'words to look for'});
  const group = make('select', {}, ...['all', ...groups].map(name => new Option(name, name === 'all' ? '' : name)));
  const count = make('output', {});
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every(word => text.includes(word))
        || Boolean(group.value) && !row.dataset.groups.split('|').includes(group.value);
    }
    count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} shown`;
  };
  words.addEventListener('input', filter);
  group.addEventListener('change', filter);
  box.prepend(make(
    'div', {className: 'filter'}, make('label', {}, 'Filter ', words), make('label', {}, `${box.dataset.label} `, group),
    count));
  filter();
}
