"Explorers of windows, folds, predictions and scales, without a browser: slower ways give the same state."
import base64, io, math, shutil
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from cwcl.checkpoint import save_model
from cwcl.core import InputError, data_file, recipe
from cwcl.data.cholec import frame_table
from cwcl.data.images import read_mask
from cwcl.data.labels import CLASSES, class_set
from cwcl.data.splits import TEST_VIDEOS, class_coverage, coverage_warnings, video_folds
from cwcl.infer import sliding_window, window_starts
from cwcl.pairs import label_set_ids
from cwcl.tasks import CWCLNet
from cwcl.widgets.base import Explorer, update_ms
from cwcl.widgets.folds import SplitExplorer, VideoPicker, class_counts, split_counts
from cwcl.widgets.frames import VISIBLE, PredictionBrowser, WindowExplorer, jumps, ramp, run_frames, stored_frames
from cwcl.widgets.scales import ScaleExplorer, brief_training, small_scenes

def put(ex, **values):
    "Set controls as a browser does"
    for k,v in values.items(): ex.controls[k].value = v
    return ex

def literal_neighbors(z, barred, k=3):
    "Return for each row the k others with the largest cosine, by sorting"
    z = z.double()/z.double().norm(dim=1, keepdim=True)
    def nearest(i): return sorted((j for j in range(len(z)) if not barred(i, j)), key=lambda j: -float(z[i] @ z[j]))
    return [nearest(i)[:k] for i in range(len(z))]

@pytest.fixture
def blind(monkeypatch):
    "Explorers that do not draw, for tests of their state"
    monkeypatch.setattr(Explorer, 'png', lambda self: b'')

@pytest.fixture(scope='module')
def windows(): return WindowExplorer()

@pytest.fixture(scope='module')
def split(): return SplitExplorer()

@pytest.fixture(scope='module')
def browser(): return PredictionBrowser()

@pytest.fixture(scope='module')
def counts(): return class_counts()

@pytest.fixture(scope='module')
def laid_out(counts):
    "A row for each real frame"
    def rows(video, n): return pd.DataFrame({k: np.arange(n.frames) < n[k] for k in CLASSES.name}).assign(video=video)
    return pd.concat([rows(*o) for o in counts.iterrows()], ignore_index=True)

def net(seed):
    torch.manual_seed(seed)
    return CWCLNet(recipe('smoke')).eval()

@pytest.fixture(scope='module')
def scales():
    f = small_scenes([50], (48,32))
    pick = np.r_[0:101:4]
    return ScaleExplorer(net(0), net(1), f['images'][pick], f['shows'][pick], f['videos'][pick])

@pytest.fixture(params=['windows', 'split', 'browser', 'scales'])
def explorer(request): return request.getfixturevalue(request.param)

# Windows

PLACES = [(256,.25,'constant'), (128,.5,'gaussian'), (96,.33,'constant'), (64,0,'gaussian'), (224,.75,'constant')]

@pytest.mark.parametrize('window,overlap,blend', PLACES)
def test_hits_count_the_windows_over_each_pixel(windows, blind, window, overlap, blend):
    ex = put(windows, window=window, overlap=overlap, blend=blend)
    ys,xs = window_starts(240, window, overlap),window_starts(427, window, overlap)
    assert ex.boxes == [(y, x) for y in ys for x in xs]
    assert ex.hits.shape == (max(240, window), 427)
    for y,x in [(0,0), (239,426), (120,200), (17,171), (200,255), (64,256)]:
        assert ex.hits[y,x] == sum(a <= y < a+window and b <= x < b+window for a in ys for b in xs)

@pytest.mark.parametrize('window,overlap,blend', PLACES)
def test_error_is_that_of_the_sliding_window(windows, blind, window, overlap, blend):
    ex = put(windows, window=window, overlap=overlap, blend=blend)
    def slopes(w): return w[:,:1]*0 + ramp(window)
    whole = sliding_window(slopes, torch.zeros(1, 3, *ex.hits.shape), window, overlap, blend)[0,0]
    assert torch.allclose(ex.error, whole, atol=1e-5)
    right,below = np.abs(np.diff(whole, axis=1)),np.abs(np.diff(whole, axis=0))
    assert ex.jumps.max().item() == pytest.approx(max(right.max(), below.max()), abs=1e-5)
    y,x = divmod(ex.jumps.argmax().item(), 427)
    near = [abs(float(whole[y,x] - whole[b,a])) for b,a in [(y+1, x), (y, x+1)] if b < len(whole) and a < 427]
    assert max(near) == pytest.approx(ex.jumps.max().item(), abs=1e-5)
    assert torch.equal(ex.seams, ex.jumps > VISIBLE)

def test_jumps_look_right_and_below():
    a = torch.rand(7, 9, generator=torch.Generator().manual_seed(0))
    for y in range(7):
        for x in range(9):
            near = [abs(a[y,x] - a[b,c]).item() for b,c in [(y+1, x), (y, x+1)] if b < 7 and c < 9]
            assert jumps(a)[y,x].item() == pytest.approx(max(near, default=0), abs=1e-6)

@pytest.mark.parametrize('blend', ['constant', 'gaussian'])
def test_shares_of_all_windows_add_up_to_one(windows, blind, blend):
    put(windows, window=192, overlap=.33, blend=blend)
    shares = {}
    for a in windows.controls['along'].options: shares[put(windows, along=a).k] = windows.share
    assert list(shares) == list(range(len(windows.boxes)))
    assert torch.allclose(sum(shares.values()), torch.ones(240, 427), atol=1e-5)
    for k,share in shares.items():
        y,x = windows.boxes[k]
        assert (share[y:y+192, x:x+192] > 0).all() and share.count_nonzero() == 192*192

def test_a_frame_smaller_than_the_window_is_padded():
    noise = np.random.default_rng(0).integers(0, 255, (50,90,3), dtype=np.uint8)
    ex = put(WindowExplorer(noise), window=64, overlap=.5)
    assert ex.padded.shape == (64,90,3) and ex.hits.shape == (64,90)
    assert np.array_equal(ex.padded[7:57], ex.frame)
    assert '90×50' in ex.summary()

# Folds

def choices(counts):
    others = counts.index.drop(list(TEST_VIDEOS))
    return [(), ('video01',), tuple(others[3:8]), tuple(others[others != 'video01']), tuple(others)]

@pytest.mark.parametrize('k', range(5))
@pytest.mark.parametrize('n', [8, 13])
def test_split_agrees_with_the_frames_laid_out(split, blind, counts, laid_out, k, n):
    valid = choices(counts)[k]
    put(split, valid=valid, classes=n)
    part = np.select([laid_out.video.isin(TEST_VIDEOS), laid_out.video.isin(valid)], ['test', 'valid'], 'train')
    table = laid_out.assign(part=part, labelled=part == 'train')
    want = class_coverage(table, class_set(n))
    for o in ('train', 'valid', 'test'): assert split.coverage[o].tolist() == want[o].tolist()
    assert split.coverage.videos.tolist() == want.train_videos.tolist()
    assert split.frames.to_dict() == {o: (part == o).sum() for o in ('train', 'valid', 'test')}
    said = coverage_warnings(table, class_set(n))
    assert split.lacking['train'] == [o.split(':')[0] for o in said if 'no training frame' in o]
    assert set(split.lacking['valid']) >= {o.split(':')[0] for o in said if 'no validation frame' in o}
    assert ('Training lacks' in split.summary()) == bool(split.lacking['train'])

@pytest.mark.parametrize('k', range(4))
def test_budgets_by_counting_draws(counts, k):
    res = split_counts(counts, choices(counts)[k], CLASSES.name)
    n = counts.drop([*TEST_VIDEOS, *choices(counts)[k]]).frames.sum()
    for name,c in res.iterrows():
        t = int(c.train)
        for s,key in ((.01, '1%'), (.05, '5%'), (.1, '10%')): assert c[key] == pytest.approx(round(s*n)*t/n)
        m = round(.01*n)
        assert c.missed == pytest.approx(math.comb(n-t, m)/math.comb(n, m), abs=1e-9), name

@pytest.mark.parametrize('video', ['video12', 'video52', 'video99'])
def test_only_videos_outside_the_test_validate(counts, video):
    with pytest.raises(InputError, match=f'{video}: not a video'): split_counts(counts, [video], ['liver'])

def test_buttons_folds_and_value_are_one_control(counts):
    others = counts.index.drop(list(TEST_VIDEOS))
    frames = pd.DataFrame(dict(video=counts.index.repeat(counts.frames)))
    folds = {f'fold {i}': f for i,f in enumerate(video_folds(frames))}
    picker = VideoPicker(others, folds)
    seen = []
    picker.observe(lambda o: seen.append(o.new), 'value')
    picker.start.value = folds['fold 1']
    assert seen == [folds['fold 1']] and {v for v,b in picker.buttons.items() if b.value} == set(folds['fold 1'])
    picker.buttons['video01'].value = True
    assert picker.value == ('video01', *folds['fold 1']) and picker.start.label == 'by hand'
    picker.buttons['video01'].value = False
    assert picker.value == folds['fold 1'] and picker.start.label == 'fold 1'
    picker.value = ()
    assert not any(b.value for b in picker.buttons.values()) and picker.start.label == 'by hand'

def test_a_fold_is_drawn_once(split, monkeypatch):
    put(split, valid=())
    drawn = []
    monkeypatch.setattr(SplitExplorer, 'draw', lambda self, fig: drawn.append(self.now.valid))
    split.controls['valid'].start.index = 2
    assert drawn == [split.controls['valid'].start.value] and len(drawn[0]) > 2

# Predictions

def literal_iou(truth, pred, c):
    t,p = ({tuple(o) for o in np.argwhere((m == c) & (truth != 255))} for m in (truth, pred))
    return len(t & p)/len(t | p) if t | p else None

def test_prediction_state_by_sets_of_pixels(browser, blind):
    stored = stored_frames()
    for i in range(len(stored['images'])):
        for method in ('Random', 'DCL+cls'):
            put(browser, frame=i, method=method)
            truth,pred = stored['truths'][i],stored['masks'][method][i]
            assert np.array_equal(browser.truth, truth) and np.array_equal(browser.pred, pred)
            assert browser.error.sum() == sum(int(a != b) for a,b in zip(truth.ravel(), pred.ravel()) if a != 255)
            for c,name in enumerate(browser.classes.names):
                want = literal_iou(truth, pred, c)
                assert np.isnan(browser.iou[name]) if want is None else browser.iou[name] == pytest.approx(want)
            assert f'{browser.iou.mean():.2f}' in browser.summary() and method in browser.summary()

def test_opacity_changes_the_picture_and_not_the_state(browser):
    put(browser, opacity=.6)
    before = browser.image.value
    iou = browser.iou.copy()
    put(browser, opacity=.1)
    assert browser.image.value != before and browser.iou.equals(iou)

def test_browser_takes_arrays_of_any_class_set():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 13, (2,20,30)).astype(np.uint8)
    images = rng.integers(0, 255, (2,20,30,3), dtype=np.uint8)
    ex = PredictionBrowser(images, truth, dict(same=truth, none=np.zeros_like(truth)), class_set(13))
    assert ex.now.method == 'none' and ex.iou['liver'] == 0
    assert ex.iou['black background'] == pytest.approx((truth[0] == 0).mean())
    assert put(ex, method='same', frame=1).iou.eq(1).all() and not ex.error.any()
    for kw in (dict(), dict(truths=[]), dict(truths=[], masks={})):
        with pytest.raises(ValueError, match='1 frames: give their truths, and masks'):
            PredictionBrowser([np.zeros((4, 4, 3), np.uint8)], **kw)
    with pytest.raises(ValueError, match=r'truth: masks of \[\(10, 30\), \(10, 30\)\] for frames of \[\(20, 30, 3\)'):
        PredictionBrowser(images, truth[:,::2], dict(same=truth), class_set(13))

def test_lost_files_leave_frames_or_methods_out(tmp_path):
    shutil.copytree(data_file('results/figure3'), tmp_path/'figure3')
    (tmp_path/'figure3'/'video52_200_simclr.png').unlink()
    (tmp_path/'figure3'/'video12_19500.jpg').unlink()
    o = stored_frames(tmp_path)
    assert len(o['images']) == 3 and 'SimCLR' not in o['masks'] and 'DCL' in o['masks']
    PredictionBrowser(**o)

# Scales

@pytest.mark.parametrize('others', [True, False])
def test_neighbors_by_sorting(scales, blind, others):
    put(scales, others=others)
    def barred(i, j): return scales.videos[i] == scales.videos[j] if others else i == j
    sets = [tuple(o) for o in scales.shows.tolist()]
    x = torch.from_numpy(scales.images).permute(0, 3, 1, 2).float()/255
    def alike(i): return np.mean([sets[i] == sets[j] for j in range(len(sets)) if not barred(i, j)])
    chance = np.mean([alike(i) for i in range(len(sets))])
    assert scales.chance == pytest.approx(chance, abs=1e-6)
    for n,model in enumerate((net(0), net(1))):
        with torch.no_grad(): zs = model.msph(model.encoder((x - .5)/.25)[model.levels])
        for l,z in enumerate(zs):
            want = literal_neighbors(z, barred)
            agree = np.mean([[sets[j] == sets[i] for j in row] for i,row in enumerate(want)])
            assert scales.agree[n,l].item() == pytest.approx(agree, abs=.015)
            for i in (0, 7, 25):
                put(scales, frame=i)
                cos = torch.nn.functional.cosine_similarity(z[i:i+1].double(), z[want[i]].double())
                assert torch.allclose(scales.similarity[n,l], cos, atol=1e-9)

ALL = np.ones((6, 8), bool)
FEW = [dict(), dict(shows=ALL, videos=['a']*6), dict(shows=ALL, videos=list('abc')),
    dict(shows=ALL[:5], videos=list('abcdef'))]

@pytest.mark.parametrize('kw', FEW)
def test_frames_without_neighbors_are_refused(kw):
    black = np.zeros((6, 32, 48, 3), np.uint8)
    with pytest.raises(ValueError, match='6 frames: give shows and videos of each, with at least 3'):
        ScaleExplorer(net(0), net(1), black, **kw)

def test_maps_are_channels_of_the_encoder(scales, blind):
    put(scales, frame=3, channel=2)
    model = net(1)
    x = torch.from_numpy(scales.images).permute(0, 3, 1, 2).float()/255
    with torch.no_grad(): maps = model.encoder((x - .5)/.25)[model.levels]
    for shown,m in zip(scales.maps[1], maps):
        spread = m.flatten(2).std(2).mean(0)
        assert torch.allclose(shown, m[3,spread.argsort(descending=True)[1]], atol=1e-6)

def test_training_is_seeded_and_does_not_touch_global_randomness(monkeypatch):
    few = {k: v[:12] for k,v in small_scenes([5], (48,32)).items()}
    monkeypatch.setattr('cwcl.widgets.scales.small_scenes', lambda at: few)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    (a,b),(c,d) = brief_training(2),brief_training(2)
    assert torch.equal(state, torch.get_rng_state())
    for p,q in ((a, c), (b, d)): assert all(torch.equal(o, q.state_dict()[k]) for k,o in p.state_dict().items())
    assert not torch.equal(a.encoder.levels[0][0].weight, b.encoder.levels[0][0].weight)

def test_default_networks_learn_something():
    ex = ScaleExplorer()
    assert len(ex.images) == 101 and (ex.agree[1] > ex.agree[0] + .05).all()
    assert set(label_set_ids(ex.shows).tolist()) == set(ex.ids.tolist())

def test_frames_of_a_run(scenes):
    "By clip, or the worst first; a network that is asked twice answers twice the same"
    t = frame_table(scenes).iloc[:12]
    got = run_frames(dict(one='demo', two='demo'), t, most=5)
    clips = [o.split(',')[0] for o in got['names']]
    assert len(clips) == 5 and clips == sorted(clips)
    for a,b,truth,image in zip(*got['masks'].values(), got['truths'], got['images']):
        assert (a == b).all() and a.shape == truth.shape == image.shape[:2]
    ex = PredictionBrowser(**got)
    assert ex.error.sum() == ((got['masks']['two'][0] != got['truths'][0]) & (got['truths'][0] != 255)).sum()
    worst = run_frames('demo', t, most=5, worst=True)
    found = [(a != b)[b != 255].mean() for a,b in zip(worst['masks']['prediction'], worst['truths'])]
    assert found == sorted(found, reverse=True) and sorted(worst['names']) == sorted(got['names'])

def test_a_name_is_no_formula():
    images = np.zeros((2, 20, 30, 3), np.uint8)
    masks = np.zeros((2, 20, 30), np.uint8)
    ex = PredictionBrowser(list(images), list(masks), {r'$\beta{$': list(masks)}, class_set(8), ['$a_{$', 'b'])
    assert len(ex.png()) > 1000

def test_a_frame_without_truth_is_not_the_worst(scenes, monkeypatch):
    blank = []
    def read(path):
        blank.append(path)
        return np.full_like(read_mask(path), 255) if len(blank) == 2 else read_mask(path)
    monkeypatch.setattr('cwcl.widgets.frames.read_mask', read)
    got = run_frames('demo', frame_table(scenes).iloc[:12], most=4, worst=True)
    assert [(o == 255).all() for o in got['truths']] == [False, False, False, True]

def test_frames_of_a_run_say_what_is_wrong(scenes, tmp_path):
    t = frame_table(scenes).iloc[:3]
    with pytest.raises(InputError, match='none of 3 frames has a mask'): run_frames('demo', t.assign(mask=''))
    other = CWCLNet(recipe('smoke', class_set=10)).eval()
    save_model(tmp_path/'model.safetensors', other)
    with pytest.raises(InputError, match='different classes'): run_frames(dict(a='demo', b=tmp_path), t)

# All of them

def test_static_fallback_is_a_png(explorer):
    bundle = explorer._repr_mimebundle_()
    image = Image.open(io.BytesIO(base64.b64decode(bundle['image/png'])))
    assert image.format == 'PNG' and image.size == tuple(round(o*explorer.dpi) for o in explorer.size)
    assert len(bundle['image/png']) < 90_000 and len(np.unique(np.asarray(image))) > 20
    assert bundle['text/plain'] == explorer.summary() and 'application/vnd.jupyter.widget-view+json' in bundle

def test_state_has_no_memory(explorer):
    now = {k: c.value for k,c in explorer.controls.items()}
    before = explorer.png()
    for name in explorer.controls: update_ms(explorer, name, 2)
    put(explorer, **now)
    assert explorer.image.value == before

def test_names_lie_beside_colors(browser, split):
    names = set(class_set(8).names)
    assert names <= {t.get_text() for t in browser.figure().axes[-1].get_yticklabels()}
    assert names <= {t.get_text() for t in put(split, classes=8).figure().axes[0].texts}
