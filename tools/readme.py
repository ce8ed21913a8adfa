"Render nbs/index.ipynb to Markdown, which is README.md"
import nbformat, re
from pathlib import Path
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent

def render():
    "The README: hidden cells, directives and outputs dropped, links made from the top folder"
    nb = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
    for c in nb.cells:
        c.source = '\n'.join(o for o in c.source.split('\n') if not o.startswith('#|'))
        if c.cell_type == 'code': c.outputs = [o for o in c.outputs if 'text/plain' in o.get('data', {})]
    nb.metadata['language_info'] = dict(name='python')
    text,_ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((images/|\d\d[a-z]?_|index)', r'](nbs/\1', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(render(), encoding='utf-8')
