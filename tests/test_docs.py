"The site: whole, without a dead link, and without anything from elsewhere."
import re, subprocess, sys
import pytest
from docs import lessons, mended, page_links, root, source_links, with_mathml

@pytest.fixture(scope='module')
def pages():
    "Every page of a freshly built site; the build stops at a dead link"
    pytest.importorskip('smalldocs', reason='smalldocs needs Python 3.11')
    p = subprocess.run([sys.executable, 'tools/docs.py'], cwd=root, capture_output=True, text=True)
    assert p.returncode == 0 and 'warning' not in p.stdout + p.stderr, p.stdout[-2000:] + p.stderr[-2000:]
    return {o.name: o.read_text(encoding='utf-8') for o in (root/'_docs').glob('*.html')}

@pytest.mark.slow
def test_every_notebook_has_a_page(pages):
    notebooks = (root/'nbs').glob('*.ipynb')
    assert set(pages) == {o.with_suffix('.html').name for o in notebooks}

@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(pages):
    source = r'<(?:script|img|iframe)[^>]*src="?(?:https?:)?//'
    style = r'<link[^>]*rel="?stylesheet"?[^>]*href="?(?:https?:)?//'
    for name,text in pages.items(): assert not re.findall(f'{source}|{style}', text), name
    for css in (root/'_docs').rglob('*.css'):
        assert not re.search(r'@import[^;]*//|url\(["\']?https?:', css.read_text(encoding='utf-8')), css.name

LIVE = {'01_tour': ['pairs'], '59b_widgets.folds': ['folds'], '60a_widgets.frames': ['windows', 'predictions'],
    '60b_widgets.scales': ['scales'], '60d_widgets.board': ['board']}

@pytest.mark.slow
def test_explorers_are_live(pages):
    assert {o.removesuffix('.html') for o,text in pages.items() if '<script type="module">' in text} == set(LIVE)
    for lesson,names in LIVE.items():
        text = pages[f'{lesson}.html']
        assert all(text.count(f'id="{o}-live"') == 1 for o in names) and len(text.encode()) < 600_000, lesson
    assert not any('id="live-' in o for o in pages.values())

@pytest.mark.slow
def test_formulas_figures_and_signatures_are_there(pages):
    text = pages['23_losses.contrastive.html']
    assert '<math' in text
    assert r'\frac' not in re.sub(r'(?s)<pre.*?</pre>|<code.*?</code>', '', text)
    assert 'def contrastive_loss(' in re.sub('<[^>]*>', '', text)
    for o in ('20_pairs', '24_losses.segmentation', '26_infer'): assert len(re.findall('<img', pages[f'{o}.html'])) >= 3
    assert 'demo.png' in pages['index.html'] and (root/'_docs'/'images'/'demo.png').exists()

def test_links_of_nbdev_lead_to_numbered_pages():
    link = '[`positive_mask`](/pairs.html#positive_mask)'
    assert page_links(link, '60_x.ipynb') == f'[`positive_mask`]({lessons["pairs"]}#positive_mask)'
    assert page_links('[`key`](/study.charts.html#key)', '08_data.surface.ipynb') == '`key`'
    assert page_links('[`f`](/gone.html#f)', '60_x.ipynb') == '`f`'

def test_code_is_linked_where_the_repository_is_known():
    link = '[source](/blob/main/cwcl/core.py#L20){target="_blank" style="float:right"}\n'
    assert source_links(link, '') == ''
    assert source_links(link, 'a/b') == '[source](https://github.com/a/b/blob/main/cwcl/core.py#L20)\n'

def test_a_notebook_is_mended_all_through():
    def notebook(first, link):
        outputs = [dict(data={'text/markdown': [f'[`Recipe`]({link})']})]
        return dict(cells=[dict(source=[first, 'title: Core\n'], n=1, outputs=outputs)])
    nb = notebook('output-file: core.html\n', '/core.html#recipe')
    assert mended(nb, '00_core.ipynb', '') == notebook('', '00_core.ipynb#recipe')
    assert mended('quick:<function store_true at 0x7f3c>=False', '00_core.ipynb', '') == 'quick:store_true=False'

def test_formulas_become_mathml():
    one = with_mathml(r'<p><span class="math display">\[a &lt; \frac{1}{2} \tag{7}\]</span> <code>\(x\)</code></p>')
    assert one.count('<math') == 1 and '<mfrac>' in one and '(7)</span>' in one and r'<code>\(x\)</code>' in one
    assert with_mathml('<script src="https://x/katex.min.js" defer></script><b>katex</b>') == '<b>katex</b>'
