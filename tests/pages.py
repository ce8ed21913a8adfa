"What the tests of the book's pages share: their cells, exports, links, and what a link may lead to"
import ast, csv, json, re
from pathlib import Path

root = Path(__file__).parents[1]

def table(name):
    "Rows of a table in data/, as dicts of text"
    with open(root/'data'/name, encoding='utf-8', newline='') as f: return list(csv.DictReader(f))

def cells(nb): return json.loads((root/'nbs'/nb).read_text(encoding='utf-8'))['cells']

def source(cell): return ''.join(cell['source'])

def exported(nb):
    "Module of a lesson, and the names that its exported cells define"
    code = [source(c) for c in cells(nb) if c['cell_type'] == 'code']
    module = next((m[1] for c in code if (m := re.match(r'#\| default_exp (\S+)', c))), None)
    made = [o for c in code if c.startswith('#| export') for o in ast.parse(c).body]
    return module, [o.name for o in made if isinstance(o, (ast.FunctionDef, ast.ClassDef))]

def slug(heading): return re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')

def anchors(nb):
    "What a link into a page of the site may name: headings and exported definitions"
    text = '\n'.join(source(c) for c in cells(nb) if c['cell_type'] == 'markdown')
    return {slug(o) for o in re.findall(r'^#+ (.+)$', text, flags=re.M)} | {o.lower() for o in exported(nb)[1]}

def shown(nb):
    "The text of a page, and what its cells show"
    outputs = [o.get('data', {}) for c in cells(nb) if c['cell_type'] == 'code' for o in c['outputs']]
    made = [''.join(o['text/markdown']) for o in outputs if 'text/markdown' in o]
    return '\n'.join([source(c) for c in cells(nb) if c['cell_type'] == 'markdown'] + made)

def links(nb):
    "Links of a page to other pages: (file, anchor or nothing)"
    return re.findall(r'\]\(([\w.]+\.ipynb)(?:#([^)]*))?\)', shown(nb))
