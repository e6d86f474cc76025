"""Write README.md from nbs/index.ipynb, as Markdown without hidden cells and `#|` directives.

With `--check`, compare instead of writing, and exit 1 when README.md is stale."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r'^#\|.*\n?', re.MULTILINE)


def readme() -> str:
    "The README that the index notebook stands for"
    notebook = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    notebook.metadata['language_info'] = {'name': 'python'}  # cleaning drops it, and the code fences need it
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith('#| hide')]
    for cell in notebook.cells:
        cell.source = DIRECTIVE.sub('', cell.source)
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return re.sub(r'\n{3,}', '\n\n', text).strip()+'\n'


if __name__ == '__main__':
    path = ROOT/'README.md'
    if '--check' not in sys.argv:
        path.write_text(readme(), encoding='utf-8')
    elif path.read_text(encoding='utf-8') != readme():
        sys.exit('README.md is stale: run `make readme`')
