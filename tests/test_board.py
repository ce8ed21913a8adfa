"The board of pairs: its rule in the page against `positive_mask`, and clicks, keys and links in a browser"
import base64, json
from importlib.util import find_spec
from itertools import product
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
pytest.importorskip('anywidget')
from cwcl import widgets
from cwcl.core import InputError
from cwcl.data.cholec import frame_table
from cwcl.data.labels import CLASSES
from cwcl.pairs import label_set_ids, positive_mask
from cwcl.widgets.board import PairBoard, board_frames
from test_browser import browser, chromium, page # chkstyle: ignore

in_browser = pytest.mark.skipif(not browser or not find_spec('playwright'), reason='no chromium or no playwright here')

def some(n=40, c=35, seed=0, **kwargs):
    "A table with many classes, in few label sets, so that there are partners"
    rng = np.random.default_rng(seed)
    kinds = rng.random((6, c)) < .5
    has = kinds[rng.integers(6, size=n)] ^ (rng.random((n, c)) < .01)
    t = pd.DataFrame(has, columns=[f'class {k}' for k in range(c)])
    return t.assign(name=[f'frame {i}' for i in range(n)], video=rng.integers(3, size=n).astype(str),
        clip=rng.integers(9, size=n).astype(str), phase=rng.integers(-1, 3, size=n), **kwargs)

SETTINGS = list(product((False, True), ('none', 'clip', 'video'), (0, 1)))

def change(board, phase, exclude, some_off):
    board.phase,board.exclude = phase,exclude
    c = len(board.shown.classes)
    board.on = [k for k in range(c) if not some_off or k % 5]

@pytest.mark.parametrize('phase,exclude,off', SETTINGS)
def test_pairs_by_a_loop(phase, exclude, off):
    t = some()
    board = PairBoard(t, batch=30, seed=1)
    change(board, phase, exclude, off)
    on = [board.shown.classes[k] for k in board.on]
    a = t.iloc[board.anchor]
    for row in board.pairs().itertuples():
        b = t.iloc[row.frame]
        n = sum(a[k] != b[k] for k in on) + (phase and (a.phase != b.phase or a.phase < 0))
        group = exclude != 'none' and a[exclude] == b[exclude]
        want = 'near' if n == 1 else 'negative' if n else 'out' if group else 'positive'
        assert (row.kind, row.differs, row.name) == (want, n, b['name'])

def served(page, html):
    "Open a page of our own, which can reach nothing"
    body = '<!doctype html><meta charset="utf-8"><title>b</title>' + html
    page.route('http://127.0.0.1:9/', lambda r: r.fulfill(body=body, content_type='text/html; charset=utf-8'))
    page.goto('http://127.0.0.1:9/')
    page.wait_for_selector('.cwcl-board .tile')

@in_browser
def test_the_rule_in_the_page_is_that_of_the_kit(page):
    board = PairBoard(some(), batch=40)
    code = Path(widgets.__file__).with_name('board.js').read_text(encoding='utf-8')
    page.goto('about:blank')
    page.evaluate("""async code => {
        const file = new Blob([code], {type: 'text/javascript'})
        window.rule = await import(URL.createObjectURL(file))
    }""", code)
    f = board.shown
    for phase,exclude,off in SETTINGS:
        change(board, phase, exclude, off)
        got = page.evaluate("""({d, s}) => {
            d.pixels = new Uint32Array(d.pixels)
            const labels = rule.labelSets(d, s), all = d.names.map((_, i) => i)
            return all.map(i => all.map(j => rule.relation(d, s, labels, i, j)))
        }""", dict(d=dict(board.frames, pixels=f.pixels.ravel().tolist()),
            s=dict(on=board.on, least=board.least, phase=phase, exclude=exclude)))
        has = torch.tensor(f.pixels[:,board.on] >= board.least)
        ids = label_set_ids(has, torch.tensor(f.phase) if phase else None)
        group = dict(clip=f.clip, video=f.video).get(exclude)
        want = positive_mask(ids, exclude=None if group is None else torch.tensor(group)).numpy()
        assert ((np.array(got) == 'positive') == want).all()
        for anchor in range(0, 40, 7):
            board.anchor = anchor
            for row in board.pairs().itertuples(): assert got[anchor][row.frame] == row.kind

@in_browser
def test_a_click_makes_the_anchor_and_a_link_keeps_it(page):
    board = PairBoard(some(c=6), batch=20)
    served(page, board.page())
    first = page.locator('.tile').first
    i = int(first.get_attribute('data-frame'))
    first.click()
    assert page.locator('figure .picture').get_attribute('data-frame') == str(i)
    page.get_by_role('button', name='class 2', exact=True).click()
    page.get_by_label('the phase counts').check()
    board.anchor = i
    board.on = [0, 1, 3, 4, 5]
    board.phase = True
    counts = board.pairs().kind.value_counts()
    assert page.locator('.group.near .head').inner_text() == f'▲ {counts.get("near", 0)} near misses'
    url = page.url
    assert '#board=' in url
    page.goto('about:blank')
    page.goto(url)
    page.wait_for_selector('.cwcl-board .tile')
    assert page.locator('figure .picture').get_attribute('data-frame') == str(i)
    assert page.get_by_role('button', name='class 2', exact=True).get_attribute('aria-pressed') == 'false'
    page.goto('about:blank')
    page.goto(url.split('#')[0] + '#board=99_1_0_none_0_0.1')
    page.wait_for_selector('.cwcl-board .tile')
    assert page.locator('figure .picture').get_attribute('data-frame') == str(PairBoard(some(c=6), batch=20).anchor)

@in_browser
def test_keys_reach_everything(page):
    served(page, PairBoard(some(c=6), batch=20).page())
    page.locator('.tile').first.focus()
    page.keyboard.press('ArrowRight')
    at = page.evaluate("+document.activeElement.dataset.frame")
    page.keyboard.press('Enter')
    assert page.locator('figure .picture').get_attribute('data-frame') == str(at)
    page.locator('canvas').focus()
    for k in ('ArrowDown', 'ArrowDown', 'ArrowRight'): page.keyboard.press(k)
    said = page.locator('.say').inner_text()
    assert ' and ' in said
    page.keyboard.press('Enter')
    assert page.locator('figcaption').inner_text().split(' shows')[0] == said.split(' and ')[0]

@in_browser
def test_pictures_come_when_they_are_seen(page):
    served(page, PairBoard(batch=12).page())
    tile = page.locator('.tile .picture').first
    assert 'blob:' in tile.evaluate('o => getComputedStyle(o).backgroundImage')
    assert page.evaluate("""() => document.documentElement.scrollWidth <= innerWidth""")

def test_own_tables():
    with pytest.raises(InputError, match='0 classes'): board_frames(pd.DataFrame(dict(name=['a'])))
    with pytest.raises(InputError, match='0 frames'): board_frames(some()[:0])
    bare = board_frames(pd.DataFrame(dict(liver=[True, False])))
    assert bare.names == ['0', '1'] and (bare.phase == -1).all() and (bare.clip == 0).all() and bare.images == []
    board = PairBoard(pd.DataFrame(dict(liver=[True, False])))
    assert len(board.batch) == 2 and not board.frames['phased'] and not board.frames['counted']

def test_frames_on_disk(scenes):
    t = frame_table(scenes)
    board = PairBoard(t, batch=30)
    assert board.shown.classes == list(CLASSES.name) and board.frames['sets']['8 of Table 1'] == PairBoard().on
    sent = []
    board.send = lambda message, buffers: sent.append((message, buffers))
    board._answer(board, dict(kind='sheet', k=0), [])
    assert sent[0][0] == dict(kind='sheet', k=0) and sent[0][1][0][:2] == b'\xff\xd8'
    old = board.batch
    board._answer(board, dict(kind='draw'), [])
    assert board.batch != old and board.anchor in board.batch
    assert json.loads(json.dumps(board.frames)) and base64.b64encode(board.pixels)
