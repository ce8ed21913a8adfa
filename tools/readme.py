"""Write the results of the study and the lists of lessons into nbs/index.ipynb, and render that page to README.md

Results are computed by the page's own cells from data/results. Lists follow the sections of nbs/_quarto.yml, and have
the titles and questions of the lessons."""
import json, re
from pathlib import Path

root = Path(__file__).parent.parent
INDEX = root/'nbs'/'index.ipynb'
LISTS = 'the-book' # The cell that holds the lists
RESULTS = 'study-table' # The cell that shows the results

def sections():
    "Names of the sections of the book, in order, each with its pages"
    text = (root/'nbs'/'_quarto.yml').read_text(encoding='utf-8')
    found = re.findall(r'- section: (.+)\n\s+contents: \[([^\]]*)\]', text)
    return {name: pages.split(', ') for name,pages in found}

def opening(page):
    "Title of a lesson, and its question: the last line of its first cell that is quoted"
    first = json.loads((root/'nbs'/page).read_text(encoding='utf-8'))['cells'][0]['source']
    title,*quoted = re.findall(r'^(?:#|>) (.+)', ''.join(first), flags=re.M)
    return title,quoted[-1]

def lesson_row(page):
    title,question = opening(page)
    number = page.partition('_')[0]
    return f'| [{number} {title}]({page}) | {question} |'

def lists():
    "A table of lessons for each section"
    tables = ['\n'.join([f'### {name}', '', '| lesson | question |', '|---|---|', *map(lesson_row, pages)])
        for name,pages in sections().items()]
    return '\n\n'.join(tables)

def study_text(nb):
    "What the index says of the study, computed by its hidden cells"
    found = {}
    code = {c['id']: ''.join(c['source']) for c in nb['cells']}
    for k in ('study-imports', 'study-rows'): exec(code[k], found) # nosec B102
    return found['study_text']()

def updated(nb):
    "The index with fresh lists and results"
    cells = {c['id']: c for c in nb['cells']}
    cells[LISTS]['source'] = lists().splitlines(keepends=True)
    plain = ['<IPython.core.display.Markdown object>']
    data = {'text/markdown': study_text(nb).splitlines(keepends=True), 'text/plain': plain}
    shown = dict(data=data, execution_count=None, metadata={}, output_type='execute_result')
    cells[RESULTS]['outputs'] = [shown]
    return nb

def as_text(cell):
    "A cell whose code is not shown, as the Markdown that it shows"
    from nbformat.v4 import new_markdown_cell
    return new_markdown_cell(''.join(o['data']['text/markdown'] for o in cell.outputs), id=cell.id)

def render():
    "The README: hidden cells, directives and outputs dropped, links made from the top folder"
    import nbformat # Here, as either takes seconds
    from nbconvert import MarkdownExporter
    nb = nbformat.read(INDEX, as_version=4)
    kept = [c for c in nb.cells if not c.source.startswith('#| hide')]
    nb.cells = [as_text(c) if c.source.startswith('#| echo: false') else c for c in kept]
    for c in nb.cells:
        c.source = '\n'.join(o for o in c.source.split('\n') if not o.startswith('#|'))
        if c.cell_type == 'code': c.outputs = [o for o in c.outputs if 'text/plain' in o.get('data', {})]
    nb.metadata['language_info'] = dict(name='python')
    text,_ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((images/|\d\d[a-z]?_|index)', r'](nbs/\1', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__':
    nb = updated(json.loads(INDEX.read_text(encoding='utf-8')))
    INDEX.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')
    (root/'README.md').write_text(render(), encoding='utf-8')
