'use strict'
// Theme, charts, tables and reloading; loaded in the head so that the theme is there before anything is drawn.
const root = document.documentElement
root.classList.add('js')
const remember = (key, value) => { try { localStorage.setItem(key, value) } catch { } }
const remembered = key => { try { return localStorage.getItem(key) } catch { return null } }
if (['light', 'dark'].includes(remembered('llprobe-theme'))) root.dataset.theme = remembered('llprobe-theme')

// --- charts: drawn when they come into view, in the page's colours
const ink = element => {
  const style = getComputedStyle(element), page = getComputedStyle(document.body)
  return { 'font.color': style.color, 'hoverlabel.bgcolor': page.backgroundColor, 'hoverlabel.font.color': page.color, 'modebar.bgcolor': 'rgba(0,0,0,0)', 'modebar.color': style.color }
}
const spread = (layout, values) => {
  for (const [path, value] of Object.entries(values)) {
    const keys = path.split('.'), last = keys.pop()
    keys.reduce((part, key) => part[key] ??= {}, layout)[last] = value
  }
  return layout
}
const draw = element => {
  if (element.dataset.drawn || !window.Plotly) return
  element.dataset.drawn = 'yes'
  const figure = JSON.parse(element.nextElementSibling.textContent)
  Plotly.newPlot(element, figure.data, spread(figure.layout, ink(element)), { responsive: true, displaylogo: false, displayModeBar: matchMedia('(hover: hover)').matches ? 'hover' : false, showSendToCloud: false, plotlyServerURL: '', modeBarButtonsToRemove: ['lasso2d', 'select2d', 'sendChartToCloud'] })
}
const plots = () => [...document.querySelectorAll('.plot')]
const redraw = () => plots().filter(p => p.dataset.drawn).forEach(p => Plotly.relayout(p, ink(p)))
const watchCharts = () => {
  const watcher = new IntersectionObserver(entries => entries.filter(e => e.isIntersecting).forEach(e => { watcher.unobserve(e.target); draw(e.target) }), { rootMargin: '300px' })
  plots().forEach(p => watcher.observe(p))
  addEventListener('beforeprint', () => plots().forEach(draw))
}

// --- theme
const isDark = () => getComputedStyle(root).colorScheme === 'dark' || (getComputedStyle(root).colorScheme !== 'light' && matchMedia('(prefers-color-scheme: dark)').matches)
const watchTheme = () => {
  const button = document.getElementById('theme'), label = () => {
    button.textContent = isDark() ? 'Light' : 'Dark'
    button.setAttribute('aria-label', `${button.textContent} theme`)
  }
  label()
  button.addEventListener('click', () => { root.dataset.theme = isDark() ? 'light' : 'dark'; remember('llprobe-theme', root.dataset.theme); label(); redraw() })
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { label(); redraw() })
}

// --- tables: a button in each heading sorts, one field filters
const cellValue = (row, column) => {
  const cell = row.cells[column], value = cell.dataset.value
  return value === undefined ? cell.textContent.trim() : value === '' ? null : Number(value)
}
const compare = (a, b, numeric) => typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b), undefined, { numeric })
const sortTable = (table, column, direction) => {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0]
  headings.forEach((h, i) => h.setAttribute('aria-sort', i === column ? direction : 'none'))
  const sign = direction === 'ascending' ? 1 : -1, numeric = !headings[column].classList.contains('id')
  const rows = [...body.rows].map(row => [cellValue(row, column), row])
  rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b, numeric)) // what is missing comes last
  body.append(...rows.map(([, row]) => row))
}
const filterTable = (table, text) => {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean), rows = [...table.tBodies[0].rows]
  rows.forEach(row => { row.hidden = !words.every(w => row.textContent.toLowerCase().includes(w)) })
  document.querySelector(`output[data-table="${table.id}"]`).textContent = `${rows.filter(r => !r.hidden).length} of ${rows.length}`
}
const tables = () => [...document.querySelectorAll('table.sortable')]
const field = table => document.querySelector(`input[data-table="${table.id}"]`)
const watchTable = table => {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement('button')
    button.type = 'button'
    button.append(...heading.childNodes)
    heading.append(button)
    heading.setAttribute('aria-sort', 'none')
    button.addEventListener('click', () => {
      const first = [...table.tBodies[0].rows].some(row => typeof cellValue(row, column) === 'number') ? 'descending' : 'ascending', now = heading.getAttribute('aria-sort')
      sortTable(table, column, now === 'none' ? first : now === 'ascending' ? 'descending' : 'ascending')
    })
  })
  field(table).addEventListener('input', event => filterTable(table, event.target.value))
  filterTable(table, field(table).value)
}

// --- a served page follows its study: it reloads itself and stays where it was
const place = `llprobe-place-${location.pathname}`
const keepPlace = () => {
  const state = { y: scrollY, tables: {} }
  for (const table of tables()) {
    const column = [...table.tHead.rows[0].cells].findIndex(h => h.getAttribute('aria-sort') !== 'none')
    state.tables[table.id] = { column, direction: column < 0 ? null : table.tHead.rows[0].cells[column].getAttribute('aria-sort'), filter: field(table).value }
  }
  try { sessionStorage.setItem(place, JSON.stringify(state)) } catch { }
}
const returnToPlace = () => {
  let state = null
  try { state = JSON.parse(sessionStorage.getItem(place)); sessionStorage.removeItem(place) } catch { }
  if (!state) return
  for (const table of tables()) {
    const { column, direction, filter } = state.tables[table.id] ?? { column: -1, filter: '' }
    if (column >= 0) sortTable(table, column, direction)
    field(table).value = filter
    filterTable(table, filter)
  }
  scrollTo(0, state.y)
}
const follow = () => {
  const meta = document.querySelector('meta[name=llprobe-version]')
  if (!meta) return
  setInterval(async () => {
    try {
      const { version } = await (await fetch(meta.dataset.url, { cache: 'no-store' })).json()
      if (version !== meta.content) { keepPlace(); location.reload() }
    } catch { } // the server may have ended; the page stays
  }, 2000)
}

document.addEventListener('DOMContentLoaded', () => { watchTheme(); tables().forEach(watchTable); returnToPlace(); watchCharts(); follow() })
