"The explorers that are live on the site: the rules in the page against those of the kit"
from importlib.util import find_spec
from itertools import product
import numpy as np, pytest
pytest.importorskip('anywidget')
from cwcl.data.labels import CLASSES, class_set
from cwcl.widgets.folds import SplitExplorer, split_counts
from cwcl.widgets.frames import WindowExplorer
import live
from test_board import module, served
from test_browser import browser, chromium, page # chkstyle: ignore

pytestmark = pytest.mark.skipif(not browser or not find_spec('playwright'), reason='no chromium or no playwright here')

@pytest.fixture
def rule(page):
    module(page, live.script())
    return page

SMALL = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)

@pytest.mark.parametrize('side,overlap,blend', product((64, 96, 160), (0, .25, .33, .75), ('constant', 'gaussian')))
def test_windows(rule, side, overlap, blend):
    ex = WindowExplorer(SMALL)
    for along in (0, .35, 1):
        ex.png = lambda: b''
        for k,v in dict(window=side, overlap=overlap, blend=blend, along=along).items(): ex.controls[k].value = v
        ex.compute()
        got = rule.evaluate("""s => {
            const o = rule.windowState(90, 140, s)
            return {...o, hits: [...o.hits], share: [...o.share], error: [...o.error]}
        }""", dict(side=side, overlap=overlap, blend=blend, along=along))
        assert got['boxes'] == [list(o) for o in ex.boxes] and got['number'] == ex.k
        assert got['hits'] == ex.hits.flatten().tolist()
        for k in ('share', 'error'): assert np.allclose(got[k], getattr(ex, k).flatten(), atol=1e-4)
        at_the_edge = ((ex.jumps - .05).abs() < 1e-4).sum() # Of .05, in single precision
        assert abs(got['seams'] - ex.seams.sum()) <= at_the_edge

def test_splits(rule):
    ex = SplitExplorer()
    data = live.folds()
    rng = np.random.default_rng(0)
    may = [v for v in data['videos'] if v not in data['test']]
    for k,n in product((8, 10, 13), (0, 1, 3, 8)):
        valid = sorted(rng.choice(may, n, replace=False).tolist())
        ids = [list(CLASSES.name).index(o) for o in class_set(k).names]
        got = rule.evaluate('([d, v, c]) => rule.splitCounts(d, v, c)', [data, valid, ids])
        want = split_counts(ex.counts, valid, class_set(k).names)
        for row,(_,w) in zip(got, want.iterrows(), strict=True):
            sums = ['train', 'valid', 'test', 'videos']
            assert [row[k] for k in sums] == w[sums].tolist() and abs(row['missed'] - w.missed) < 1e-9
            assert np.allclose(row['masks'], w[['1%', '5%', '10%']].astype(float))

def test_what_a_reader_sees(page):
    served(page, '<h1>a</h1>' + live.page('mountWindows', live.windows(), 'windows'), wait='.heat')
    page.locator('.sum').get_by_text('windows of 128 pixels').wait_for()
    assert page.locator('.sum').inner_text() == WindowExplorer().summary()
    page.get_by_label('overlap').press('End')
    page.locator('.sum').get_by_text('largest jump').wait_for()
    served(page, '<h1>a</h1>' + live.page('mountSplit', live.folds(), 'folds'), wait='.chip')
    assert page.locator('.sum').inner_text() == SplitExplorer().summary()
    page.get_by_role('button', name='01', exact=True).click()
    assert page.get_by_label('start from').input_value() == ''

def test_nothing_serious_for_a_screen_reader(page):
    if not find_spec('axe_playwright_python'): pytest.skip('axe is not installed')
    from axe_playwright_python.sync_playwright import Axe
    for mount,data,wait in (('mountWindows', live.windows(), '.heat'), ('mountSplit', live.folds(), '.chip')):
        body = f'<main><h1>b</h1>{live.page(mount, data, "live")}</main>'
        for scheme in ('light', 'dark'):
            page.emulate_media(color_scheme=scheme)
            served(page, f'<html lang="en"><body>{body}</body></html>', wait=wait)
            found = Axe().run(page).response['violations']
            assert not [(o['id'], o['nodes'][0]['html'][:200], o['nodes'][0]['failureSummary']) for o in found]
