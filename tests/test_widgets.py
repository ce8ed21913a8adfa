"Explorers without a browser: their state against slow oracles, their picture, their price."
import base64, io, itertools, json, re
from pathlib import Path
import numpy as np, pytest, torch
from fastcore.nbio import dict2nb
from IPython.core.formatters import DisplayFormatter
from ipywidgets import Widget
from nbdev.clean import clean_nb
from PIL import Image
from cwcl.core import InputError
from cwcl.data.cholec import frame_table
from cwcl.data.labels import class_set
from cwcl.losses.contrastive import contrastive_loss
from cwcl.pairs import pair_stats, positive_mask
from cwcl.widgets.base import Explorer, small_png, step, update_ms
from cwcl.widgets.pairs import BatchExplorer, PairExplorer
from cwcl.widgets.temperature import TemperatureExplorer
from cwcl.widgets.pools import POOLS, counted_pool, draw_batch, drawn_frames, pool_ids, table_frames

book = Path(__file__).parents[1]/'nbs'

@pytest.fixture(scope='module')
def pairs(): return PairExplorer()

@pytest.fixture(scope='module')
def batch(): return BatchExplorer()

@pytest.fixture(scope='module')
def temperature(): return TemperatureExplorer()

def put(explorer, **values):
    "Set controls as a browser does"
    for k,v in values.items(): explorer.controls[k].value = v

def by_hand(f, anchor, ids13, least, phase):
    "Kind of each frame, counted class by class"
    for i in range(len(f.names)):
        n = sum((f.pixels[i,k] >= least) != (f.pixels[anchor,k] >= least) for k in ids13)
        if phase and f.phase[i] != f.phase[anchor]: n += 1
        if i == anchor: yield 'anchor'
        else: yield ('positive', 'near', 'negative')[min(n, 2)]

KINDS = dict(positive='are positives', near='near misses', negative='negatives')
PLACES = list(itertools.product((0, 32, 100), (1, 16, 256), (8, 13), (True, False)))

@pytest.mark.parametrize('anchor,least,classes,phase', PLACES)
def test_kinds_of_frames_are_what_counting_gives(pairs, anchor, least, classes, phase):
    pairs = pairs.at(anchor=anchor, min_pixels=least, classes=classes, phase=phase)
    kinds = np.array(list(by_hand(pairs.frames, anchor, class_set(classes).ids, least, phase)))
    for k,found in pairs.groups.items():
        assert found.tolist() == np.flatnonzero(kinds == k).tolist()
        assert re.search(rf'\b{len(found)} {KINDS[k]}', pairs.summary())

def test_words_name_every_difference(pairs):
    pairs = pairs.at(anchor=32, min_pixels=4, classes=13, phase=True)
    for i in range(101): assert len(pairs.why(i)) == pairs.differences[i], i
    near = pairs.groups['near'][0]
    assert pairs.why(32) == [] and len(pairs.why(near)) == 1

def test_an_unknown_phase_is_a_positive_of_nobody():
    f = drawn_frames()
    unknown = PairExplorer(f._replace(phase=np.full(101, -1)))
    assert not unknown.positive.any() and 'phase unknown' in unknown.why(0)
    put(unknown, phase=False)
    assert unknown.positive.sum() > 0

def test_frames_on_disk_can_be_explored(scenes):
    table = frame_table(scenes)
    own = PairExplorer(table_frames(table.head(30)))
    assert own.frames.images.shape == (30, 120, 214, 3) and own.now.anchor == 29
    shown = table.head(30)[list(class_set(8).names)].to_numpy()
    put(own, min_pixels=16, phase=False)
    assert (own.shown == shown).all()
    with pytest.raises(InputError, match='none of 2 frames'): table_frames(table.head(2).assign(mask=''))

BATCHES = list(itertools.product(('drawn scenes', 'CholecSeg8k'), (8, 60, 200), (0, 4), (True, False)))

@pytest.mark.parametrize('pool,size,per_clip,phase', BATCHES)
def test_a_batch_is_what_loops_count(batch, pool, size, per_clip, phase):
    batch = batch.at(pool=pool, batch=size, per_clip=per_clip, phase=phase, labelled=.3, seed=size)
    ids = batch.ids.tolist()
    video = POOLS[pool]().video[batch.chosen].tolist()
    n = round(.3*size)
    partners = [[j for j in range(size) if j != i and ids[j] == ids[i]] for i in range(size)]
    assert len(set(batch.chosen.tolist())) == size and batch.n == n
    assert batch.per_anchor.tolist() == [len(o) for o in partners]
    assert batch.lonely == pytest.approx(sum(not o for o in partners)/size)
    assert batch.lonely_labelled == pytest.approx(sum(not [j for j in o if j < n] for o in partners[:n])/n)
    same = [video[i] == video[j] for i,o in enumerate(partners) for j in o]
    assert np.isclose(batch.same_video, np.mean(same) if same else np.nan, equal_nan=True)
    assert (batch.pos == positive_mask(batch.ids)).all()

def test_labelled_frames_come_first_for_any_share(batch):
    put(batch, pool='CholecSeg8k', batch=60, per_clip=0, seed=5, labelled=0)
    assert np.isnan(batch.lonely_labelled)
    whole = set(batch.chosen.tolist())
    put(batch, labelled=1)
    assert batch.lonely_labelled == batch.lonely and set(batch.chosen.tolist()) == whole
    put(batch, labelled=.5)
    assert set(batch.chosen.tolist()) == whole
    assert set(batch.chosen[:30].tolist()) == set(draw_batch(counted_pool().clip, 60, 0, 5)[:30].tolist())

def test_the_closed_form_beside_the_batch_is_that_of_lesson_20(batch):
    put(batch, pool='CholecSeg8k', classes=13, batch=25)
    want = pair_stats(pool_ids('CholecSeg8k', 13, False)[0], batch_sizes=[25])
    assert batch.expected == want['lonely'][25] and batch.expected == pytest.approx(.238, abs=5e-4)
    assert batch.controls['phase'].disabled
    put(batch, pool='drawn scenes')
    assert not batch.controls['phase'].disabled

@pytest.mark.parametrize('per_clip,size', itertools.product((1, 3, 8), (7, 24)))
def test_clips_give_their_frames_in_a_row(per_clip, size):
    clip = torch.randint(0, 12, (100,), generator=torch.Generator().manual_seed(size))
    found = clip[draw_batch(clip, size, per_clip, 3)].tolist()
    runs = [(k, len(list(g))) for k,g in itertools.groupby(found)]
    full = torch.bincount(clip).clamp(max=per_clip).tolist()
    assert len(found) == min(size, sum(full)) and len({k for k,_ in runs}) == len(runs)
    assert all(n == full[k] for k,n in runs[:-1])

@pytest.mark.parametrize('temp,anchor,trained', itertools.product((.01, .07, 1.), (0, 8, 14, 15), (0, .6)))
def test_forces_are_those_of_autograd(temperature, temp, anchor, trained):
    t = temperature.at(temp=temp, anchor=anchor, trained=trained)
    pos = positive_mask(t.ids)
    z = t.z.clone().requires_grad_()
    loss = contrastive_loss(z, pos, temp, reduction='none')[anchor]
    grad, = torch.autograd.grad(loss, z)
    assert t.loss == pytest.approx(loss.item(), abs=1e-9)
    torch.testing.assert_close(t.gradient[t.others], grad[t.others], rtol=1e-7, atol=1e-9)
    sim = t.cosine[t.others].clone().requires_grad_()
    p = pos[anchor][t.others]
    value = -(sim/temp).log_softmax(0)[p].mean() if p.any() else 0*sim.sum()
    torch.testing.assert_close(t.force[t.others], torch.autograd.grad(value, sim)[0], rtol=1e-7, atol=1e-9)
    assert t.weights.sum().item() == pytest.approx(1) and t.weights[anchor] == 0

def test_a_trained_encoder_puts_positives_on_the_anchor(temperature):
    put(temperature, trained=1, anchor=0, temp=.07)
    assert temperature.cosine[temperature.pos].min() > 1 - 1e-9 and temperature.gradient[temperature.pos].norm() < 1e-6

PAIRS = dict(anchor=32, min_pixels=1, classes=8, phase=True)
BATCH = dict(pool='drawn scenes', batch=25, labelled=.3, per_clip=0, classes=8, phase=True, seed=0)
STARTS = dict(pairs=PAIRS, temperature=dict(temp=.07, anchor=0, trained=.6), batch=BATCH)

@pytest.mark.parametrize('name', STARTS)
def test_every_control_changes_the_picture(name, request):
    explorer = request.getfixturevalue(name)
    put(explorer, **STARTS[name])
    for k,c in explorer.controls.items():
        before,value = explorer.image.value,c.value
        for _ in range(8):
            step(c)
            if explorer.image.value != before: break
        else: pytest.fail(f'{k} changes nothing')
        c.value = value
        assert explorer.image.value == before, k

@pytest.mark.parametrize('name,control', [('pairs', 'anchor'), ('batch', 'batch'), ('temperature', 'temp')])
def test_a_price_is_that_of_steps(name, control, request):
    "A lesson shows how much a step costs; this test only checks that the steps are made"
    explorer = request.getfixturevalue(name)
    seen = []
    moved = explorer.controls[control]
    value = moved.value
    def note(change): seen.append(change.new)
    moved.observe(note, 'value')
    assert update_ms(explorer, control, 3) >= 0 and len(set(seen)) == 3
    moved.unobserve(note, 'value')
    moved.value = value

@pytest.mark.parametrize('name', ['pairs', 'batch', 'temperature'])
def test_the_display_holds_view_picture_and_sentence(name, request):
    explorer = request.getfixturevalue(name)
    data = explorer._repr_mimebundle_()
    assert data['application/vnd.jupyter.widget-view+json']['model_id'] == explorer.view.model_id
    assert data['text/plain'] == explorer.summary() and explorer.summary() in explorer.note.value.replace('&#x27;', "'")
    kept,live = (Image.open(io.BytesIO(o)) for o in (base64.b64decode(data['image/png']), explorer.image.value))
    assert kept.format == live.format == 'PNG'
    assert kept.size == live.size == tuple(round(o*explorer.dpi) for o in explorer.size)
    assert len(data['image/png']) <= 4*explorer.kept/3 + 4

def test_a_kept_picture_is_small_and_looks_alike():
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, 'PNG')
    large,small = (Image.open(io.BytesIO(small_png(file.getvalue(), n))) for n in (10**6, 1))
    assert (large.size, len(large.getcolors())) == ((80, 60), 128)
    assert (small.size, len(small.getcolors())) == ((40, 30), 32)
    flat = np.full((9, 9, 3), [0, 158, 115], np.uint8)
    file = io.BytesIO()
    Image.fromarray(flat).save(file, 'PNG')
    assert (np.asarray(Image.open(io.BytesIO(small_png(file.getvalue(), 1000))).convert('RGB')) == flat).all()

def test_an_explorer_shows_itself_under_ipywidgets_7(temperature, monkeypatch):
    "Whose widgets have no bundle to be asked for; as on Colab"
    shown = []
    monkeypatch.delattr(Widget, '_repr_mimebundle_', raising=False)
    monkeypatch.setattr('IPython.display.display', lambda data, raw: shown.append(data))
    assert DisplayFormatter().format(temperature) == ({}, {})
    assert shown == [temperature._repr_mimebundle_()]

def test_an_explorer_is_asked_for_its_bundle_under_ipywidgets_8(temperature, monkeypatch):
    monkeypatch.setattr(Widget, '_repr_mimebundle_', lambda self: None, raising=False)
    assert DisplayFormatter().format(temperature)[0] == temperature._repr_mimebundle_()

def test_cleaning_and_the_site_keep_the_picture(temperature):
    output_html = pytest.importorskip('smalldocs.notebook').output_html
    data = temperature._repr_mimebundle_()
    out = dict(output_type='execute_result', execution_count=3, data=dict(data), metadata={'a': 1})
    cell = dict(cell_type='code', source='t', outputs=[out], execution_count=3, metadata={})
    nb = dict2nb(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5))
    clean_nb(nb)
    kept = nb['cells'][0]['outputs'][0]
    assert kept['data']['image/png'] == data['image/png']
    assert f'<img src="data:image/png;base64,{data["image/png"]}"' in output_html(kept)

def test_an_explorer_that_fails_leaves_the_collector_on():
    import gc
    class Broken(Explorer):
        def draw(self, fig): raise RuntimeError('no')
    with pytest.raises(RuntimeError): Broken()
    assert gc.isenabled()

@pytest.mark.parametrize('nb', sorted([*book.glob('59*.ipynb'), *book.glob('6[0-3]*.ipynb')]), ids=lambda o: o.stem)
def test_explorers_are_kept_as_pictures_and_nothing_else(nb):
    own = json.loads(nb.read_text(encoding='utf-8'))
    assert 'widgets' not in own['metadata']
    for c in own['cells']:
        for o in c.get('outputs', []):
            data = o.get('data', {})
            if 'application/vnd.jupyter.widget-view+json' in data: assert 'image/png' in data, ''.join(c['source'])
