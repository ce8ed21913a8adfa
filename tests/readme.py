"Render nbs/index.ipynb to Markdown, which is README.md."
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent

def render():
    "The README as Markdown: hidden cells and directives dropped, pictures linked, not embedded"
    nb = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
    for c in nb.cells:
        c.source = '\n'.join(o for o in c.source.split('\n') if not o.startswith('#|'))
        if c.cell_type == 'code': c.outputs = []
    text,_ = MarkdownExporter().from_notebook_node(nb)
    return text.strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(render(), encoding='utf-8')
