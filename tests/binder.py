"Writes binder/, with which mybinder.org builds the book's environment, and 'Open in' on every page where settings.ini has a `git_url` on GitHub"
import json, re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).parents[1]
NOTEBOOK = ('jupyterlab', 'execnb') # Of the development tools, those that a reader of the book needs

def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def name_of(requirement): return re.split('[<>=]', requirement)[0].lower()

def pins():
    "Name to the version that was tested"
    lines = (root/'constraints.txt').read_text(encoding='utf-8').splitlines()
    return {name_of(o): o for o in lines if '==' in o}

def binder_files():
    "Name to text: the requirements at their tested versions, Python, and the kit itself"
    cfg,pinned = settings(),pins()
    wanted = cfg['requirements'].split() + [o for o in cfg['dev_requirements'].split() if name_of(o) in NOTEBOOK]
    return {'requirements.txt': '\n'.join(['# Written by tests/binder.py', *(pinned[name_of(o)] for o in wanted)]) + '\n',
        'runtime.txt': f'python-{cfg["min_python"]}\n', 'postBuild': '#!/bin/bash\nset -e\npip install --no-cache-dir --no-deps -e .\n'}

def badges(url, page='nbs/index.ipynb'):
    "Markdown of the two badges for a repository on GitHub; nothing where there is no address"
    found = re.fullmatch(r'https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?', url or '')
    if not found: return ''
    return (f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{found[1]}/blob/main/{page}) '
        f'[![Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/{found[1]}/main?urlpath=lab/tree/{page})')

COLAB = """#| hide
import sys
if 'google.colab' in sys.modules: get_ipython().system('pip install -q git+{url}')"""

def open_in(nb, url, page):
    "`nb` with badges and a cell that installs the kit on Colab, behind its first cell; without them where there is no address"
    kept = [c for c in nb['cells'] if not c.get('id', '').startswith('open-in-')]
    if not badges(url): return {**nb, 'cells': kept}
    badge = dict(cell_type='markdown', id='open-in-badges', metadata={}, source=badges(url, page).splitlines(keepends=True))
    install = dict(cell_type='code', id='open-in-colab', metadata={'jupyter': {'source_hidden': True}}, execution_count=None, outputs=[],
        source=COLAB.format(url=url).splitlines(keepends=True))
    return {**nb, 'cells': [kept[0], badge, install, *kept[1:]]}

def main():
    url = settings().get('git_url')
    for path in sorted((root/'nbs').glob('*.ipynb')):
        old = path.read_text(encoding='utf-8')
        new = json.dumps(open_in(json.loads(old), url, f'nbs/{path.name}'), indent=1, sort_keys=True, ensure_ascii=False) + '\n'
        if new != old: path.write_text(new, encoding='utf-8')
    (root/'binder').mkdir(exist_ok=True)
    for name,text in binder_files().items():
        path = root/'binder'/name
        path.write_text(text, encoding='utf-8')
        path.chmod(0o755 if name == 'postBuild' else 0o644)

if __name__ == '__main__': main()
