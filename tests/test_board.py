"The board of pairs: its rule in the page against `positive_mask`, and clicks, keys and links in a browser"
import base64, json
from importlib.util import find_spec
from itertools import product
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
pytest.importorskip('anywidget')
from cwcl import widgets
from cwcl.core import InputError
from cwcl.data.cholec import frame_table
from cwcl.data.labels import CLASSES
from cwcl.data.own import own_table
from cwcl.pairs import label_set_ids, pair_stats, positive_mask
from cwcl.core import recipe
from cwcl.data.cholec import audit
from cwcl.data.files import scan
from cwcl.losses.contrastive import contrastive_loss, normalize
from cwcl.tasks import CWCLNet
from cwcl.widgets.board import KNOWN, STATE, PairBoard, board_frames, demo_networks
from cwcl.widgets.pools import table_frames
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
    board = PairBoard(t, size=30, seed=1)
    change(board, phase, exclude, off)
    on = [board.shown.classes[k] for k in board.on]
    a = t.iloc[board.anchor]
    for row in board.pairs().itertuples():
        b = t.iloc[row.frame]
        n = sum(a[k] != b[k] for k in on) + (phase and (a.phase != b.phase or a.phase < 0))
        group = exclude != 'none' and a[exclude] == b[exclude]
        want = 'near' if n == 1 else 'negative' if n else 'out' if group else 'positive'
        assert (row.kind, row.differs, row.name) == (want, n, b['name'])

def served(page, html, wait='.tile'):
    "Open a page of our own, which can reach nothing"
    body = '<!doctype html><meta charset="utf-8"><title>b</title>' + html
    page.route('http://127.0.0.1:9/', lambda r: r.fulfill(body=body, content_type='text/html; charset=utf-8'))
    page.goto('http://127.0.0.1:9/')
    page.wait_for_selector(f'.cwcl-board {wait}')

def module(page, code):
    "Load a script as a module, `rule`, into an empty page"
    page.goto('about:blank')
    page.evaluate("""async code => {
        const file = new Blob([code], {type: 'text/javascript'})
        window.rule = await import(URL.createObjectURL(file))
    }""", code)

def script(page, *names):
    "The same for parts of the board's script"
    parts = (Path(widgets.__file__).with_name(f'{k}.js').read_text(encoding='utf-8') for k in names)
    module(page, '\n'.join(parts))

def now(board): return {k: getattr(board, k) for k in ('on', 'least', 'phase', 'exclude', 'net', 'scale', 'temp')}

@in_browser
def test_the_rule_in_the_page_is_that_of_the_kit(page):
    board = PairBoard(some(), size=40)
    script(page, 'rule')
    f = board.shown
    for phase,exclude,off in SETTINGS:
        change(board, phase, exclude, off)
        got,kinds,counts = page.evaluate("""({d, s}) => {
            d.pixels = new Uint32Array(d.pixels)
            const labels = rule.labelSets(d, s), all = d.names.map((_, i) => i), names = Object.keys(rule.KINDS)
            const kinds = [...rule.kinds(d, s, labels, all)].map(k => names[k])
            const relations = all.map(i => all.map(j => rule.relation(d, s, labels, i, j)))
            return [relations, kinds, rule.counts(d, s, labels, all)]
        }""", dict(d=dict(board.frames, pixels=f.pixels.ravel().tolist()), s=now(board)))
        has = torch.tensor(f.pixels[:,board.on] >= board.least)
        ids = label_set_ids(has, torch.tensor(f.phase) if phase else None)
        group = dict(clip=f.clip, video=f.video).get(exclude)
        want = positive_mask(ids, exclude=None if group is None else torch.tensor(group)).numpy()
        assert ((np.array(got) == 'positive') == want).all() and kinds == sum(got, [])
        shares = page.evaluate("""({d, s}) => {
            d.pixels = new Uint32Array(d.pixels)
            const labels = rule.labelSets(d, s), all = d.names.map((_, i) => i)
            return [...rule.lonelyShares(rule.partners(d, s, labels, all).map(o => o[0]), 40)]
        }""", dict(d=dict(board.frames, pixels=f.pixels.ravel().tolist()), s=now(board)))
        expected = pair_stats(ids, batch_sizes=range(1, 41), exclude=None if group is None else torch.tensor(group))
        assert np.allclose(shares, list(expected['lonely'].values()), atol=1e-9)
        in_clip = (want & (f.clip[:,None] == f.clip)).sum()
        assert counts == dict(lonely=np.flatnonzero(~want.any(1)).tolist(), pairs=int(want.sum()), oneClip=int(in_clip))
        for anchor in range(0, 40, 7):
            board.anchor = anchor
            for row in board.pairs().itertuples(): assert got[anchor][row.frame] == row.kind

def noise(n, seed=0): return list(np.random.default_rng(seed).integers(0, 256, (n, 45, 80, 3), dtype=np.uint8))

@pytest.fixture(scope='module')
def nets():
    torch.manual_seed(0)
    return {k: CWCLNet(recipe('demo', widths=(4,4,8,8,8), dim=16)).eval() for k in ('first', 'second')}

@in_browser
def test_frames_of_unknown_groups(page):
    "A frame without a video is left out by nobody, in the page as in the kit; an unknown phase is said"
    board = PairBoard(some().assign(video=['a', None]*20), size=40, phase=True)
    script(page, 'rule')
    f = board.shown
    for board.exclude in ('video', 'clip'):
        got,said = page.evaluate("""({d, s}) => {
            d.pixels = new Uint32Array(d.pixels)
            const labels = rule.labelSets(d, s), all = d.names.map((_, i) => i), names = Object.keys(rule.KINDS)
            const kinds = [...rule.kinds(d, s, labels, all)].map(k => names[k])
            return [kinds, all.map(j => rule.why(d, s, labels, 0, j).join())]
        }""", dict(d=dict(board.frames, pixels=f.pixels.ravel().tolist()), s=now(board)))
        board.batch = list(range(40))
        for board.anchor in range(40):
            for row in board.pairs().itertuples(): assert got[40*board.anchor + row.frame] == row.kind
        unknown = [('phase unknown' in o) == (f.phase[0] < 0 or f.phase[j] < 0) for j,o in enumerate(said) if j]
        assert all(unknown) and (f.phase < 0).any()

@in_browser
def test_what_lies_inside_a_lasso(page):
    script(page, 'rule', 'map')
    rng = np.random.default_rng(0)
    for n in (3, 5, 12):
        polygon,points = rng.random((n, 2)),rng.random((200, 2))
        asked = [points.tolist(), polygon.tolist()]
        got = page.evaluate('([p, polygon]) => p.map(o => rule.inside(o, polygon))', asked)
        crossings = np.zeros(200, int)
        for (ax,ay),(bx,by) in zip(polygon, np.roll(polygon, 1, 0)):
            straddles = (ay > points[:,1]) != (by > points[:,1])
            crossings += straddles & (points[:,0] < ax + (bx - ax)*(points[:,1] - ay)/(by - ay))
        assert got == (crossings % 2 == 1).tolist() and 0 < sum(got) < 200

@in_browser
def test_the_page_weighs_as_the_loss_does(page, nets, monkeypatch):
    "From short integers: the nearest frame is the nearest, cosines are right to a thousandth"
    g = torch.Generator().manual_seed(0)
    spread = normalize(torch.randn(2, 3, 40, 16, generator=g, dtype=torch.float64))
    monkeypatch.setattr('cwcl.widgets.board.embed_frames', lambda nets, pictures: spread)
    t = some(image=noise(40))
    board = PairBoard(t, nets, size=40)
    script(page, 'rule', 'map')
    f,m = board.shown,board.frames['maps']
    embedded = np.frombuffer(board.embedded, '<i2')
    assert embedded.size == 2*3*40*16
    for net,scale,temp,exclude in ((0, 0, .07, 'none'), (1, 2, .3, 'clip'), (1, 1, 1., 'video')):
        board.net,board.scale,board.temp,board.exclude = net,scale,temp,exclude
        d = dict(board.frames, pixels=f.pixels.ravel().tolist(), maps=dict(m, embedded=embedded.tolist()))
        got = page.evaluate("""({d, s, anchor}) => {
            d.pixels = new Uint32Array(d.pixels)
            const labels = rule.labelSets(d, s)
            return rule.weights(d, s, labels, anchor, d.names.map((_, i) => i))
        }""", dict(d=d, s=now(board), anchor=board.anchor))
        want = board.pairs().set_index('frame')
        cosines = [o['cosine'] for o in got]
        assert len(got) == (want.kind != 'out').sum() and cosines == sorted(cosines, reverse=True)
        assert got[0]['frame'] == want[want.kind != 'out'].cosine.idxmax()
        for o in got:
            w = want.loc[o['frame']]
            assert o['kind'] == w.kind and abs(o['cosine'] - w.cosine) < 1e-3
            assert abs(np.log(o['weight']/w.weight)) < 1e-3/temp

def test_weights_are_those_of_the_loss(nets):
    board = PairBoard(some(image=noise(40)), nets, size=40, net=1, scale=1, temp=.2, exclude='clip')
    f,i = board.shown,board.anchor
    has = torch.tensor(f.pixels[:,board.on] >= board.least)
    same = positive_mask(label_set_ids(has))
    alike = torch.tensor(f.clip[:,None] == f.clip)
    loss = contrastive_loss(board.z[1,1], same & ~alike, .2, 'none', ignore=same & alike)[i]
    got = board.pairs()
    pos = got[got.kind == 'positive']
    assert len(pos) and np.isclose(-np.log(pos.weight).mean(), loss.item(), atol=1e-6)
    assert np.isclose(got.weight.sum(), 1) and (got.weight[got.kind == 'out'] == 0).all()

def test_networks_of_one_kind(nets):
    with pytest.raises(InputError, match='no pictures to embed'): PairBoard(some(), nets)
    odd = dict(nets, third=CWCLNet(recipe('demo', widths=(4,4,8,8,8), dim=8)))
    with pytest.raises(InputError, match='give networks of one kind'): PairBoard(some(image=noise(40)), odd)
    one = PairBoard(some(4, image=noise(4)), nets['first'])
    assert one.frames['maps']['nets'] == ['trained'] and 'maps' not in PairBoard(some()).frames

@in_browser
def test_a_click_makes_the_anchor_and_a_link_keeps_it(page):
    board = PairBoard(some(c=6), size=20)
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
    page.wait_for_url(lambda o: '_0.1.3.4.5_' in o)
    url = page.url
    assert '#board=' in url
    page.goto('about:blank')
    page.goto(url)
    page.wait_for_selector('.cwcl-board .tile')
    assert page.locator('figure .picture').get_attribute('data-frame') == str(i)
    assert page.get_by_role('button', name='class 2', exact=True).get_attribute('aria-pressed') == 'false'
    page.goto('about:blank')
    first = str(PairBoard(some(c=6), size=20).anchor)
    for bad in ('99_16_0_none_0_99_0_0_0.07__20', '0_16_0_none_0__0_0_0.07__20', '1_16_0_none_0_0_0_0_0.07__1', 'no'):
        page.goto('about:blank')
        page.goto(url.split('#')[0] + f'#board={bad}')
        page.wait_for_selector('.cwcl-board .tile')
        assert page.locator('figure .picture').get_attribute('data-frame') == first

@in_browser
def test_a_link_opened_in_the_same_page(page):
    "The board follows it, and the name of a section stays in the address"
    served(page, PairBoard(some(c=6), size=20).page())
    page.evaluate("location.hash = '#part&board=3_1_1_none_0.2_3.4.5_0_0_0.07_4_3'")
    page.locator('figure .picture[data-frame="3"]').wait_for()
    phase = page.get_by_label('the phase counts')
    assert page.locator('.sum').inner_text().startswith('3 frames') and phase.is_checked()
    phase.uncheck()
    page.wait_for_url(lambda o: '#part&board=3_1_0_none' in o)

@in_browser
def test_marks_are_right_after_show_all(page):
    board = PairBoard(some(c=6), size=40)
    served(page, board.page())
    phase = page.get_by_label('the phase counts')
    phase.check()
    phase.uncheck()
    for o in page.locator('.more').all():
        if o.is_visible(): o.click()
    has = board.shown.pixels >= board.least
    lonely = {i for i in range(40) if not any((has[i] == has[j]).all() for j in range(40) if j != i)}
    marked = page.locator('.tile.alone').evaluate_all('a => a.map(o => +o.dataset.frame)')
    assert set(marked) == lonely - {board.anchor}

@in_browser
def test_keys_reach_everything(page):
    served(page, PairBoard(some(c=6), size=20).page())
    page.locator('.tile').first.focus()
    page.keyboard.press('ArrowRight')
    at = page.evaluate("+document.activeElement.dataset.frame")
    page.keyboard.press('Enter')
    assert page.locator('figure .picture').get_attribute('data-frame') == str(at)
    page.locator('canvas.mask').focus()
    for k in ('ArrowDown', 'ArrowDown', 'ArrowRight'): page.keyboard.press(k)
    said = page.locator('.say').inner_text()
    page.keyboard.press('Enter')
    name = page.locator('figcaption').inner_text().split(' shows')[0]
    assert f' of {name}: ' in said

@in_browser
def test_another_batch_keeps_the_anchor(page):
    board = PairBoard(some(c=6), size=20)
    served(page, board.page())
    for _ in range(5):
        page.get_by_role('button', name='another batch').click()
        assert page.locator('figure .picture').get_attribute('data-frame') == str(board.anchor)
        assert page.locator('.sum').inner_text().startswith('20 frames')
    anchor = board.anchor
    for _ in range(5): board._answer(None, dict(kind='draw'), [])
    assert board.anchor == anchor and anchor in board.batch and len(set(board.batch)) == 20

@in_browser
def test_what_a_switch_does_to_the_anchor_is_said(page):
    board = PairBoard(some(c=6), size=40)
    served(page, board.page())
    had = (board.pairs().kind == 'positive').sum()
    def said(n, rest): return f'The anchor has {n} positive{"s"*int(n != 1)}{rest}.{" It is lonely."*int(n == 0)}'
    assert page.locator('.mine').inner_text() == said(had, '')
    page.get_by_label('the phase counts').check()
    board.phase = True
    has = (board.pairs().kind == 'positive').sum()
    assert page.locator('.mine').inner_text() == said(has, f', before {had}' if has != had else '')

@in_browser
def test_a_batch_of_another_size(page):
    served(page, PairBoard(some(c=6), size=20).page())
    page.get_by_label('frames in a batch').press('End')
    page.locator('.sum').get_by_text('40 frames').wait_for()
    assert 'In a batch of 40' in page.locator('.sizes ~ .counted').inner_text()
    page.locator('.lonely').click()
    assert page.locator('.group.positive .head').inner_text() == '● 0 positives'
    assert page.locator('.group.positive p').is_visible()
    assert 'does not push them, as it is lonely' in page.locator('.group.negative p').inner_text()

@in_browser
def test_pictures_come_when_they_are_seen(page):
    served(page, PairBoard(size=12).page())
    tile = page.locator('.tile .picture').first
    assert 'blob:' in tile.evaluate('o => getComputedStyle(o).backgroundImage')
    assert page.evaluate("""() => document.documentElement.scrollWidth <= innerWidth""")

@in_browser
def test_frames_are_chosen_on_the_map(page, nets):
    board = PairBoard(some(30, c=6, image=noise(30)), nets, size=12)
    served(page, board.page())
    canvas = page.locator('canvas.map')
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    square = (.01, .01),(.99, .01),(.99, .99),(.01, .99)
    corners = [(box['x'] + a*box['width'], box['y'] + b*box['height']) for a,b in square]
    page.mouse.move(*corners[0])
    page.mouse.down()
    for o in corners[1:]: page.mouse.move(*o, steps=4)
    page.mouse.up()
    page.get_by_role('button', name='make these 30 the batch').click()
    assert page.locator('.sum').inner_text().startswith('30 frames')
    assert page.locator('.tile.chosen').count() == page.locator('.tile').count()
    page.get_by_role('button', name='choose none').click()
    assert page.locator('.tile.chosen').count() == 0
    canvas.focus()
    before = page.locator('figure .picture').get_attribute('data-frame')
    for k in ('ArrowRight', 'ArrowDown', 'ArrowLeft', 'ArrowUp'): page.keyboard.press(k)
    page.keyboard.press('Space')
    chosen = page.locator('.embedding').get_by_role('button', name='choose none')
    chosen.wait_for()
    page.wait_for_url(lambda o: o.rsplit('_', 2)[1].isdigit())
    chosen = page.url.rsplit('_', 2)[1]
    page.keyboard.press('Enter')
    assert page.locator('figure .picture').get_attribute('data-frame') == chosen
    page.get_by_label('network').press('ArrowRight')
    page.locator('.embedding select').select_option('coarse')
    assert 'second, coarse scale' in canvas.get_attribute('aria-label') and before is not None
    page.wait_for_url(lambda o: o.split('_')[7] == '2')
    url = page.url
    page.goto('about:blank')
    page.goto(url)
    page.wait_for_selector('.cwcl-board .tile')
    assert 'second, coarse scale' in page.locator('canvas.map').get_attribute('aria-label')

@in_browser
def test_nothing_serious_for_a_screen_reader(page, nets):
    if not find_spec('axe_playwright_python'): pytest.skip('axe is not installed')
    from axe_playwright_python.sync_playwright import Axe
    board = PairBoard(some(30, c=6, image=noise(30)), nets, size=12, chosen=[1, 2])
    body = f'<main><h1>b</h1><h2>c</h2>{board.page()}</main>'
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme)
        served(page, f'<html lang="en"><body>{body}</body></html>')
        page.locator('summary').click()
        found = Axe().run(page).response['violations']
        assert not [(o['id'], o['nodes'][0]['html'][:200], o['nodes'][0]['failureSummary']) for o in found]

@in_browser
@pytest.mark.parametrize('scheme, light, paper', [('light', None, 255), ('dark', None, 22), ('light', 'false', 22),
    ('dark', 'true', 255), ('light', 'true', 255), ('dark', 'false', 22)])
def test_jupyterlab_has_the_last_word_on_the_theme(page, scheme, light, paper):
    page.emulate_media(color_scheme=scheme)
    served(page, f'<html><body>{PairBoard(some(12), size=4).page()}</body></html>')
    def painted(): return page.locator('canvas.mask').evaluate('o => o.toDataURL()')
    before = painted()
    if light: page.evaluate("light => document.body.dataset.jpThemeLight = light", light)
    def color(): return page.locator('.cwcl-board').evaluate('o => getComputedStyle(o).backgroundColor')
    def comes(seen): return any(seen() or page.wait_for_timeout(50) for _ in range(200))
    assert comes(lambda: color().startswith(f'rgb({paper},'))
    turned = light is not None and (light == 'false') != (scheme == 'dark')
    if turned: assert comes(lambda: painted() != before), 'the mask is painted again'
    else: assert painted() == before

@in_browser
def test_twenty_thousand_frames(page):
    t = some(20_000, c=13)
    board = PairBoard(t, size=2_000)
    page.goto('about:blank')
    state = dict({k: getattr(board, k) for k in ('frames', 'anchor', 'batch', 'chosen', 'size')}, **now(board))
    state.update(pixels=base64.b64encode(board.pixels).decode(), points='', embedded='')
    script(page, 'rule', 'map', 'board')
    page.evaluate("""state => {
        document.body.innerHTML = '<div id="b"></div>'
        rule.mount(new rule.Page(state, []), document.getElementById('b'))
    }""", state)
    counts = board.pairs().kind.value_counts()
    for kind in ('positive', 'near', 'negative'):
        assert page.locator(f'.group.{kind} .head').inner_text().split()[1] == str(counts.get(kind, 0))
    page.locator('.group.negative .more').click()
    assert page.locator('.group.negative .tile').count() == counts['negative']

def test_what_an_audit_found_is_noted(tmp_path):
    t = pd.DataFrame(dict(liver=[True, True], image=['a/f.png', 'a/g.png'], mask=['a/f_mask.png', '']))
    rows = [('a/f_mask.png', 'specks', 'blood: 3 pixels'), ('a', 'clip length', '1'), ('a/f.png', 'another', 'size')]
    found = pd.DataFrame(rows, columns=['file', 'problem', 'value'])
    board = PairBoard(t, findings=found)
    assert board.frames['notes'] == {0: ['specks: blood: 3 pixels', 'another: size']}
    assert board.picture(0).getcolors() == [(160*90, (0x88,)*3)]

def test_columns_of_numbers():
    t = pd.DataFrame(dict(a=[1, 0], b=[0, 1], c=[20, 3], d=['x', 'y'], e=[1, np.nan]))
    assert board_frames(t, ['a', 'b']).pixels.tolist() == [[KNOWN, 0], [0, KNOWN]]
    assert board_frames(t, ['a', 'c']).pixels.tolist() == [[1, 20], [0, 3]]
    assert board_frames(t.assign(g=[True, False]), ['c', 'g']).pixels.tolist() == [[20, KNOWN], [3, 0]]
    t = t.assign(h=[.5, 1])
    for bad in ('d', 'e', 'f', 'h'):
        with pytest.raises(InputError, match=f"classes .*{bad}"): board_frames(t, ['a', bad])

def test_what_does_not_fit_is_refused():
    t = some()
    for state in (dict(anchor=40), dict(batch=[0, 41]), dict(on=[35]), dict(net=1), dict(scale=-1), dict(chosen=[-1])):
        name, = state
        with pytest.raises(InputError, match=f'{name}=.*choose from 0 to'): PairBoard(t, **state)
        board = PairBoard(t)
        before = {k: getattr(board, k) for k in STATE}
        with pytest.raises(InputError, match=f'{name}=.*choose from 0 to'): setattr(board, name, state[name])
        assert {k: getattr(board, k) for k in STATE} == before
    with pytest.raises(InputError, match='anchor=3: is not in the batch'): PairBoard(t, batch=[1, 2], anchor=3)
    assert PairBoard(t, batch=[1, 2]).anchor == 1
    with pytest.raises(InputError, match='60 classes'): board_frames(some(c=60))
    with pytest.raises(InputError, match='column phase'): board_frames(t.assign(phase='cutting'))
    assert board_frames(t.assign(phase=[np.nan, *[1.]*39])).phase.tolist() == [-1, *[1]*39]

def test_the_picture_that_stays_shows_what_is_left_out():
    t = some(12).assign(image=noise(12), clip=['a', 'b']*6)
    board = PairBoard(t, batch=list(range(12)))
    h = board.still().height
    assert 'out' not in board._repr_mimebundle_()[0]['text/plain']
    board.exclude = 'clip'
    n = (board.pairs().kind == 'out').sum()
    said = board._repr_mimebundle_()[0]['text/plain']
    assert n and f'{n} out' in said and board.still().height == h*5//4

def test_frames_without_a_picture_are_gray():
    images = noise(4)
    board = PairBoard(some(4).assign(image=[images[0], None, np.nan, images[3]]))
    assert [len(set(board.picture(i).getdata())) > 1 for i in range(4)] == [True, False, False, True]
    with pytest.raises(InputError, match='row 1, .*image=None is neither'): board.embed({}, {})

def test_an_anchor_that_is_given_is_in_the_batch():
    for anchor in range(40):
        board = PairBoard(some(), size=5, anchor=anchor)
        assert board.anchor == anchor and anchor in board.batch and len(set(board.batch)) == 5

def test_a_batch_of_the_size_that_is_asked_for():
    board = PairBoard(some(), size=5)
    board._answer(board, dict(kind='draw', size=30), [])
    assert board.size == 30 and len(board.batch) == 30
    board._answer(board, dict(kind='draw', size=99), [])
    assert board.size == 40

def test_frames_with_pixels(scenes):
    t = scan(scenes)
    board = PairBoard(t, classes=list(CLASSES.name), findings=audit(scenes))
    assert board.frames['counted'] and "the 8 of the paper's Table 1" in board.frames['sets']
    pool = PairBoard(table_frames(frame_table(scenes)[:5]))
    assert len(pool.batch) == 5 and pool.frames['counted']

def test_the_real_label_sets(real):
    "8080 rows: what the board counts for an anchor is what the table says"
    t = pd.read_csv(real/'facts'/'cholecseg8k_frames.csv')
    percent = [k for k in t if k.endswith('_pct') and k != 'unlabeled_pct']
    t[percent] = (4099.2*t[percent]).round().astype(int) # Pixels of 854 x 480
    board = PairBoard(t, classes=percent, size=2_000)
    assert len(board.shown.names) == 8080 and board.shown.names[0] == 'video01 80' and board.frames['counted']
    has = t[percent] >= 16
    same = (has.iloc[board.batch] == has.iloc[board.anchor]).all(axis=1).sum() - 1
    assert (board.pairs().kind == 'positive').sum() == same > 0

def test_the_real_frames(real):
    t = frame_table(real/'cholecseg8k', real/'cholec80')
    board = PairBoard(t, demo_networks(), findings=audit(real/'cholecseg8k', real/'cholec80'))
    assert len(board.picture(0).getcolors(160*90)) > 1000 and board.z.shape == (2, 3, len(t), 64)
    assert len(board.pairs()) == len(t) - 1

def test_own_frames_of_thirty_classes(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ('frames', 'masks'): (tmp_path/folder).mkdir()
    for k in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path/'frames'/f'a_{k}.png')
        mask = np.kron(rng.choice(30, (4, 6)), np.ones((10, 10))).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path/'masks'/f'a_{k}.png')
    (tmp_path/'classes.csv').write_text('value,name\n' + '\n'.join(f'{k},part {k}' for k in range(30)))
    board = PairBoard(own_table(tmp_path/'frames', tmp_path/'masks', tmp_path/'classes.csv', '(.*)_'))
    assert len(board.shown.classes) == 30 and len(board.pairs()) == 5 and len(board.on) == 30
    assert board.picture(0).getcolors(1) is None

def test_the_networks_of_the_kit():
    nets = demo_networks()
    assert list(nets) == ['untrained', 'trained'] and not any(o.training for o in nets.values())
    kept = torch.get_rng_state()
    demo_networks()
    assert torch.equal(kept, torch.get_rng_state())

def test_own_tables():
    with pytest.raises(InputError, match='0 classes'): board_frames(pd.DataFrame(dict(name=['a'])))
    with pytest.raises(InputError, match='0 frames'): board_frames(some()[:0])
    bare = board_frames(pd.DataFrame(dict(liver=[True, False])))
    assert bare.names == ['0', '1'] and bare.images == []
    for k in ('phase', 'clip', 'video'): assert (getattr(bare, k) == -1).all()
    board = PairBoard(pd.DataFrame(dict(liver=[True]*4)))
    for k in ('clip', 'video'): # Frames of no known group are not of one
        board.exclude = k
        assert (board.pairs().kind == 'positive').all()
    board = PairBoard(pd.DataFrame(dict(liver=[True, False])))
    assert len(board.batch) == 2 and not board.frames['phased'] and not board.frames['counted']

def test_frames_on_disk(scenes):
    t = frame_table(scenes)
    board = PairBoard(t, size=30)
    assert board.shown.classes == list(CLASSES.name)
    assert board.frames['sets']["the 8 of the paper's Table 1"] == PairBoard().on
    sent = []
    board.send = lambda message, buffers: sent.append((message, buffers))
    board._answer(board, dict(kind='sheet', k=0), [])
    assert sent[0][0] == dict(kind='sheet', k=0) and sent[0][1][0][8:12] == b'WEBP'
    old = board.batch
    board._answer(board, dict(kind='draw'), [])
    assert board.batch != old and board.anchor in board.batch
    assert json.loads(json.dumps(board.frames)) and base64.b64encode(board.pixels)
