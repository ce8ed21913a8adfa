"Builds the site in _docs/: nbdev's pages, links mended, rendered by smalldocs, which stops at a dead one."
import html, json, os, re, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from latex2mathml.converter import convert
from nbdev.serve import proc_nbs

root = Path(__file__).parents[1]
lessons = {o.stem.partition('_')[2]: o.name for o in sorted((root/'nbs').glob('[0-9]*.ipynb'))}

def source_links(text, repo):
    "Link the code of a function, or drop the link if the repository is not known"
    to = rf'[source](https://github.com/{repo}/blob/main/\1)\n' if repo else ''
    return re.sub(r'\[source\]\(/blob/main/([^)]+)\)\{[^}]*\}\n', to, text)

def page_links(text, page):
    "Turn nbdev's links to modules into links to numbered pages; a plain word is not a name of a later lesson"
    def link(m):
        name,module,anchor = m.groups()
        to = lessons.get(module)
        word = name.strip('`').islower() and '_' not in name
        return name if to is None or (word and to > page) else f'[{name}]({to}#{anchor})'
    return re.sub(r'\[(`[^`\]]+`)\]\(/([\w.]+)\.html#(\w+)\)', link, text)

def mended(o, page, repo):
    "Mend the links of a notebook, or of a part of one"
    if isinstance(o, dict): return {k: mended(v, page, repo) for k,v in o.items()}
    if isinstance(o, list): return [mended(v, page, repo) for v in o]
    if not isinstance(o, str): return o
    text = re.sub(r'<function (\w+) at 0x[0-9a-f]+>', r'\1', re.sub(r'(?m)^output-file: .*\n', '', o))
    return page_links(source_links(text, repo), page)

def with_mathml(text):
    "Turn formulas into MathML, which every browser draws by itself, without a script from elsewhere"
    def formula(m):
        tex = re.sub(r'\\tag\{(.*?)\}', '', html.unescape(m[1] or m[2]))
        tag = re.search(r'\\tag\{(.*?)\}', m[0])
        number = f'<span class="equation-number">({tag[1]})</span>' if tag else ''
        return convert(tex, display='block' if m[2] else 'inline') + number
    text = re.sub(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?', '', text)
    return re.sub(r'(?s)(?<=>)\\\((.+?)\\\)(?=</span>)|(?<=>)\\\[(.+?)\\\](?=</span>)', formula, text)

def without_imports(css):
    "Drop what a style sheet would fetch from elsewhere"
    return re.sub(r'@import\s+url\(["\']?https?:[^)]*\);?', '', css)

def main(repo=os.environ.get('GITHUB_REPOSITORY', '')):
    from live import places, with_live # Needs the explorers
    os.chdir(root)
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        beside = pool.submit(places)
        proc_nbs(n_workers=0) # Each worker of its own would import PyTorch anew
        for file in (root/'_proc').glob('*.ipynb'):
            nb = mended(json.loads(file.read_text(encoding='utf-8')), file.name, repo)
            file.write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
        render = subprocess.run([Path(sys.executable).with_name('smalldocs'), 'render', '--strict', '_proc'])
        live = beside.result()
    for file in (root/'_docs').glob('*.html'):
        page = file.read_text(encoding='utf-8')
        file.write_text(with_live(with_mathml(page), live), encoding='utf-8')
    for file in (root/'_docs').rglob('*.css'): file.write_text(without_imports(file.read_text('utf-8')), 'utf-8')
    return render.returncode

if __name__ == '__main__':
    status = main()
    sys.stdout.flush()
    os._exit(status) # Each page has had a shell, and on its way out each would collect garbage: a minute
