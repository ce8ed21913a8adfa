"Writes binder/, for mybinder.org, and 'Open in' on every page if settings.ini has a `git_url` on GitHub"
import json, re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).parents[1]
NOTEBOOK = ('jupyterlab', 'execnb') # Of the development tools, those that a reader of the book needs
NOT_USED = 'dev_requirements', 'peers_requirements' # By a reader of the book
# Those that are run and not imported
TOOLS = set('execnb jupyterlab fastaistyle smalldocs build wheel voila pytest-xdist'.split())
PYTHON = '3.11' # With which constraints.txt was tested
CPU = 'https://download.pytorch.org/whl/cpu' # Binder has no GPU, and 2 GB of memory

def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def name_of(requirement): return re.split('[<>=]', requirement)[0].lower().replace('_', '-')

def pins(file='constraints.txt'):
    "Read the tested version of each name"
    lines = (root/file).read_text(encoding='utf-8').splitlines()
    return {name_of(o): o for o in lines if '==' in o}

def user_requirements():
    "List the requirements of the core and of every extra for users"
    keys = [k for k in settings() if k.endswith('requirements') and k not in NOT_USED]
    return [o for k in keys for o in settings()[k].split()]

def binder_files():
    "Return name to text: the requirements at their tested versions, Python, and the kit itself"
    pinned = pins()
    wanted = [name_of(o) for o in user_requirements()] + list(NOTEBOOK)
    lines = [f'{pinned[o]}+cpu' if o in ('torch', 'torchvision') else pinned[o] for o in wanted]
    return {'requirements.txt': '\n'.join(['# Written by tools/binder.py', f'--extra-index-url {CPU}', *lines]) + '\n',
        'runtime.txt': f'python-{PYTHON}\n',
        'postBuild': '#!/bin/bash\nset -e\npip install --no-cache-dir --no-deps -e .\n'}

def badges(url, page='nbs/index.ipynb'):
    "Return the Markdown of two badges for a repository on GitHub; nothing without an address"
    found = re.fullmatch(r'https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?', url or '')
    if not found: return ''
    colab,mybinder = 'https://colab.research.google.com','https://mybinder.org'
    return (f'[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{found[1]}/blob/main/{page}) '
        f'[![Binder]({mybinder}/badge_logo.svg)]({mybinder}/v2/gh/{found[1]}/main?urlpath=lab/tree/{page})')

COLAB = """#| hide
import sys
if 'google.colab' in sys.modules:
    from importlib.metadata import packages_distributions, version
    from pathlib import Path
    def loaded(): return {{d: version(d) for m,ds in packages_distributions().items() if m in sys.modules for d in ds}}
    before = loaded()
    kept = 'torch', 'torchvision', 'numpy', 'pandas', 'ipywidgets'
    Path('kept.txt').write_text('\\n'.join(f'{{o}}=={{version(o)}}' for o in kept))
    get_ipython().system("pip install -q -c kept.txt 'cwcl[all] @ git+{url}'")
    changed = [o for o,v in loaded().items() if before.get(o) != v]
    if changed: raise SystemExit(f'Choose Runtime, Restart session, then run again: {{", ".join(changed)}} changed')"""

def open_in(nb, url, page):
    "Put badges and a cell that installs the kit on Colab behind the first cell of `nb`, if we have an address"
    kept = [c for c in nb['cells'] if not c.get('id', '').startswith('open-in-')]
    if not badges(url): return {**nb, 'cells': kept}
    source = badges(url, page).splitlines(keepends=True)
    badge = dict(cell_type='markdown', id='open-in-badges', metadata={}, source=source)
    install = dict(cell_type='code', id='open-in-colab', metadata={'jupyter': {'source_hidden': True}},
        execution_count=None, outputs=[], source=COLAB.format(url=url).splitlines(keepends=True))
    return {**nb, 'cells': [kept[0], badge, install, *kept[1:]]}

def main():
    url = settings().get('git_url')
    for path in sorted((root/'nbs').glob('*.ipynb')):
        old = path.read_text(encoding='utf-8')
        nb = open_in(json.loads(old), url, f'nbs/{path.name}')
        new = json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + '\n'
        if new != old: path.write_text(new, encoding='utf-8')
    (root/'binder').mkdir(exist_ok=True)
    for name,text in binder_files().items():
        path = root/'binder'/name
        path.write_text(text, encoding='utf-8')
        path.chmod(0o755 if name == 'postBuild' else 0o644)

if __name__ == '__main__': main()
