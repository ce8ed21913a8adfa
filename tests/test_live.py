"The explorers that are live on the site: the rules in the page against those of the kit"
from importlib.util import find_spec
from itertools import product
import numpy as np, pytest
pytest.importorskip('anywidget')
from cwcl.data.labels import CLASSES, IGNORE, class_set
from cwcl.metrics import class_iou, confusion_matrix
from cwcl.widgets.folds import SplitExplorer, split_counts
from cwcl.widgets.frames import PredictionBrowser, WindowExplorer
from cwcl.widgets.scales import ScaleExplorer, brief_training
import live
from test_board import module, served
from test_browser import browser, chromium, page # chkstyle: ignore

pytestmark = pytest.mark.skipif(not browser or not find_spec('playwright'), reason='no chromium or no playwright here')

@pytest.fixture
def rule(page):
    module(page, live.script())
    return page

SMALL = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)

@pytest.mark.parametrize('side,overlap,blend', [(64, 0, 'constant'), (64, .75, 'gaussian'), (96, .25, 'gaussian'),
    (96, .33, 'constant'), (160, .25, 'constant'), (160, .75, 'gaussian')])
def test_windows(rule, side, overlap, blend):
    small = WindowExplorer(SMALL)
    for along in (0, .35, 1):
        ex = small.at(window=side, overlap=overlap, blend=blend, along=along)
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

@pytest.mark.parametrize('shape', ((1, 1), (3, 5), (40, 60)))
def test_masks_and_their_iou(rule, shape):
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.choice([0, 1, 2, IGNORE], (shape[0], 1)), shape[1], 1).astype(np.uint8)
    for pred in (truth % IGNORE, rng.integers(0, 5, shape, dtype=np.uint8), np.zeros(shape, np.uint8)):
        got = rule.evaluate('''([a, b, n]) => {
            const [p, t] = [a, b].map(o => rule.unrolled(Uint8Array.from(atob(o), c => c.charCodeAt(0)), n))
            return {p: [...p], t: [...t], iou: rule.classIou(p, t, 5).map(o => Number.isNaN(o) ? null : o)}
        }''', [live.runs(pred), live.runs(truth), truth.size])
        assert got['p'] == pred.flatten().tolist() and got['t'] == truth.flatten().tolist()
        want = class_iou(confusion_matrix(pred, truth, 5))
        assert np.allclose(np.array(got['iou'], float), want, equal_nan=True)

def test_what_a_reader_sees_of_predictions(page):
    browser = PredictionBrowser()
    served(page, '<h1>a</h1>' + live.page('mountPredictions', live.predictions(), 'predictions'), wait='td')
    page.evaluate('''() => { window.orange = () => {
        const o = document.querySelector('canvas[aria-label="wrong pixels"]')
        const {data} = o.getContext('2d').getImageData(0, 0, o.width, o.height)
        return data.filter((v, k) => k % 4 === 0 && v === 230 && data[k+1] === 159 && data[k+2] === 0).length
    } }''')
    for method,i in product(browser.masks, range(len(browser.names))):
        o = browser.at(method=method, frame=i)
        page.get_by_role('combobox', name='method').select_option(method)
        page.get_by_role('combobox', name='frame').select_option(browser.names[i])
        assert page.locator('.sum').inner_text() == o.summary()
        words = ['absent' if np.isnan(v) else f'{v:.2f}' for v in o.iou]
        assert page.locator('td').all_inner_texts() == words
        assert f'wrong: {o.error.sum()} pixels' in page.locator('figcaption').all_inner_texts()
        page.wait_for_function('n => orange() === n', arg=int(o.error.sum()))

@pytest.fixture(scope='module')
def scales():
    "An explorer of scales with an untrained and a barely trained network, and what the page gets of it"
    explorer = ScaleExplorer(*brief_training(2))
    return explorer,live.scales(explorer)

def test_what_a_reader_sees_of_scales(page, scales):
    explorer,data = scales
    served(page, '<h1>a</h1>' + live.page('mountScales', data, 'scales'), wait='.quads')
    for others,i in product((True, False), (0, 50, 100)):
        o = explorer.at(others=others, frame=i)
        page.get_by_label('neighbors from other videos').set_checked(others)
        page.get_by_role('slider', name='frame').fill(f'{i}')
        assert page.locator('.sum').inner_text() == o.summary()
        found = page.locator('.quads canvas.picture').evaluate_all('all => all.map(o => o.ariaLabel)')
        near = o.neighbors.flatten().tolist()
        assert found == [f'frame {j}, {explorer.videos[j]}' for j in near]
        said = page.locator(':is(.same, .other) figcaption').all_inner_texts()
        def mark(j): return '✓' if o.ids[j] == o.ids[i] else '✗'
        for text,j,c in zip(said, near, o.similarity.flatten().tolist(), strict=True):
            sign,number,video = text.replace(',', '').split()
            assert (sign, video) == (mark(j), o.videos[j]) and abs(float(number) - c) < .0051

def test_feature_maps_of_the_page(page, scales):
    explorer,data = scales
    served(page, '<h1>a</h1>' + live.page('mountScales', data, 'scales'), wait='.quads')
    page.get_by_role('slider', name='frame').fill('100')
    page.get_by_role('slider', name='feature map').fill('2')
    shapes = page.locator('canvas.heat').evaluate_all('all => all.map(o => [o.height, o.width])')
    assert shapes == 2*data['maps']
    light = page.locator('canvas.heat').evaluate_all('''all => all.map(o => {
        const {data} = o.getContext('2d').getImageData(0, 0, o.width, o.height)
        return Array.from({length: o.width*o.height}, (_, k) => data[4*k] + data[4*k+1] + data[4*k+2])
    })''')
    for net in (0, 1):
        for scale,m in enumerate(explorer.all_maps[net]):
            m = m[100,2].flatten()
            assert m[int(np.argmax(light[3*net + scale]))] >= m.min() + .97*(m.max() - m.min())

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

def test_nothing_serious_for_a_screen_reader(page, scales):
    if not find_spec('axe_playwright_python'): pytest.skip('axe is not installed')
    from axe_playwright_python.sync_playwright import Axe
    for mount,data,wait in (('mountWindows', live.windows(), '.heat'), ('mountSplit', live.folds(), '.chip'),
        ('mountPredictions', live.predictions(), 'td'), ('mountScales', scales[1], '.quads')):
        body = f'<main><h1>b</h1>{live.page(mount, data, "live")}</main>'
        for scheme in ('light', 'dark'):
            page.emulate_media(color_scheme=scheme)
            served(page, f'<html lang="en"><body>{body}</body></html>', wait=wait)
            found = Axe().run(page).response['violations']
            assert not [(o['id'], o['nodes'][0]['html'][:200], o['nodes'][0]['failureSummary']) for o in found]
