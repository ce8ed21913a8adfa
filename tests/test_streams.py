"Two streams in one batch: what is drawn, what is kept, what is refused, and that a Learner can live on it"
import random, types
import numpy as np, pytest, torch
from collections import Counter
from dataclasses import replace
from itertools import islice
from math import comb
from pathlib import Path
import matplotlib.pyplot as plt
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorImage, TensorMask
from PIL import Image
from torch import nn
import cwcl.data.streams as streams
from cwcl.core import InputError, recipe
from cwcl.data.cholec import frame_table, read_png
from cwcl.data.labels import class_set, decode_mask
from cwcl.data.splits import split_frames
from cwcl.data.streams import (ID_COLUMNS, FrameDL, Frames, FrameStore, LabelSets, Shuffled, TwoStreamDL, channel_stats, cwcl_dls, label_groups,
    load_image, load_mask, store_key, two_streams)
from cwcl.data.synth import write_scenes

plt.switch_backend('agg')
pytest.importorskip('fastai.callback.schedule')

@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "One frame of each clip"
    return write_scenes(tmp_path_factory.mktemp('scenes')/'data', frames_per_clip=1, size=(107,60), progress=False)

@pytest.fixture(scope='module')
def smoke(): return recipe('smoke', budget=.3, seed=3)

@pytest.fixture(scope='module')
def split(scenes, smoke): return split_frames(frame_table(scenes), smoke)

@pytest.fixture(scope='module')
def dls(split, smoke): return cwcl_dls(split, smoke, device='cpu')

def make(split, smoke, **changes): return cwcl_dls(split, replace(smoke, **changes), device='cpu')

# Orders

@pytest.mark.parametrize('seed', range(5))
def test_shuffled_equals_one_long_list_with_removals(seed):
    rng,asks = np.random.default_rng(seed),np.random.default_rng(100 + seed)
    s,long = Shuffled(range(7), rng),[]
    twin = np.random.default_rng(seed)
    while len(long) < 400: long += twin.permutation(7).tolist()[::-1]
    for _ in range(60):
        n,avoid = int(asks.integers(0, 9)),asks.choice(7, asks.integers(0, 4), replace=False).tolist()
        ref = []
        for i in list(long):
            if len(ref) == min(n, 7 - len(avoid)): break
            if i not in ref + avoid: ref.append(i)
        for i in ref: long.remove(i)
        assert s.take(n, avoid) == ref

@pytest.mark.parametrize('n,items', [(3,5), (4,4), (60,66), (2,100)])
def test_every_item_comes_equally_often(n, items):
    s,seen = Shuffled(range(items), np.random.default_rng(0)),Counter()
    for _ in range(3*items):
        taken = s.take(n)
        assert len(set(taken)) == n
        seen.update(taken)
    assert set(seen.values()) == {3*n}

@pytest.mark.parametrize('sampler', ['uniform', 'pk'])
@pytest.mark.parametrize('masks,n,b', [(12,3,8), (3,8,10), (30,8,8), (1,1,2), (40,20,39)])
def test_a_batch_has_its_masks_first_and_no_frame_twice(masks, n, b, sampler):
    groups,labelled = np.arange(40)%5,np.random.default_rng(0).permutation(40)[:masks]
    for batch in islice(two_streams(labelled, groups, n, b, 0, sampler), 60):
        assert len(batch) == len(set(batch)) == b and set(batch) <= set(range(40))
        assert set(batch[:min(n, masks)]) <= set(labelled)
        if masks <= n: assert set(batch[:masks]) == set(labelled)

def test_labelled_frames_are_class_only_frames_too():
    batches = list(islice(two_streams(range(10), np.zeros(30), 4, 12), 200))
    late = Counter(i for b in batches for i in b[4:])
    assert set(late) == set(range(30)) and min(late[i] for i in range(10)) > 20
    assert {n for n in Counter(i for b in batches for i in b[:4]).values()} == {80}

def test_the_seed_alone_decides_the_order():
    def first(seed): return list(islice(two_streams(range(10), np.zeros(30), 4, 12, seed), 20))
    a,state = first(1),np.random.get_state()[1].copy()
    np.random.rand(3), random.random(), torch.rand(3)
    assert first(1) == a != first(2)
    assert first(-1) != first(1) and len(state) == 624

def test_lonely_share_of_uniform_batches_is_the_closed_form():
    sizes,b = [60, 20, 10, 6, 3, 1],16
    groups = np.repeat(range(6), sizes)
    ref = sum(s*comb(100-s, b-1)/comb(99, b-1) for s in sizes)/100
    drawn = [groups[o] for o in islice(two_streams([], groups, 0, b), 4000)]
    assert abs(np.mean([np.bincount(g, minlength=6)[g] == 1 for g in drawn]) - ref) < .006

def test_pk_batches_hold_k_of_each_of_p_sets_taking_turns():
    groups = np.r_[np.repeat(range(6), 20), [6], [-1]*5]
    pk = LabelSets(groups, 4, np.random.default_rng(0))
    seen = Counter()
    for _ in range(30):
        g = groups[pk.take(12)]
        assert sorted(np.bincount(g)[np.bincount(g) > 0]) == [4, 4, 4]
        seen.update(set(g.tolist()))
    assert set(seen.values()) == {15} and 6 not in seen and -1 not in seen

def test_pk_fills_up_when_sets_run_out():
    groups = np.r_[[0]*3, [1]*3, range(2, 30)]
    taken = LabelSets(groups, 2, np.random.default_rng(0)).take(20, avoid=[0, 1])
    assert len(set(taken)) == 20 and not {0, 1} & set(taken) and {3, 4, 5} & set(taken)
    with pytest.raises(InputError, match="take sampler='uniform'"): LabelSets(np.array([0, 1, -1, -1]), 4, None)

def test_label_groups_equal_pairwise_comparison():
    rng = torch.Generator().manual_seed(0)
    shown,phase = torch.randint(0, 2, (40,3), generator=rng).float(),torch.randint(-1, 2, (40,), generator=rng)
    plain,phased = label_groups(shown),label_groups(shown, phase)
    for i in range(40):
        for j in range(40):
            same = bool((shown[i] == shown[j]).all())
            assert (plain[i] == plain[j]) == same
            if phase[i] >= 0 <= phase[j]: assert (phased[i] == phased[j]) == (same and bool(phase[i] == phase[j]))
    assert ((phased == -1) == (phase == -1).numpy()).all()

# Decoding

def test_every_kind_of_frame_gives_the_same_bytes(split):
    p = split.image.iloc[0]
    pixels = read_png(p)
    chw = torch.tensor(pixels).permute(2, 0, 1)
    kinds = [p, Path(p), Image.open(p), pixels, pixels/255, pixels.astype(np.float32)/255, chw, chw/255, TensorImage(chw)]
    ref = np.asarray(Image.open(p).convert('RGB').resize((50,30), Image.BILINEAR)).transpose(2, 0, 1)
    for o in kinds: assert (load_image(o, (30,50)) == ref).all()
    grey = load_image(pixels[...,0], (60,107))
    assert (grey[0] == pixels[...,0]).all() and (grey[0] == grey[2]).all()

def test_shrinking_averages_and_does_not_skip():
    stripes = np.tile(np.array([0, 255], np.uint8), (40,40))
    assert abs(load_image(stripes, (20,20)).astype(int)[:,2:-2,2:-2] - 127).max() <= 1

@pytest.mark.parametrize('bad,message', [(np.ones((4,4,3)), None), (np.full((4,4,3), 2.), 'floats in 0..1'), (np.ones((4,4), int), 'type int64'),
    (np.ones((4,4,7), np.uint8), r'\(4, 4, 7\)'), (torch.full((3,4,4), -1.), 'floats in 0..1'), (7, 'int is no frame'), (None, 'NoneType')])
def test_frames_that_are_none(bad, message):
    if message is None: assert load_image(bad, (4,4)).min() == 255
    else:
        with pytest.raises(InputError, match=message): load_image(bad, (4,4))

@pytest.mark.parametrize('n,left_out', [(8,'ignore'), (13,'ignore'), (8,'background')])
def test_masks_are_resized_by_nearest_neighbour(split, n, left_out):
    classes,p = class_set(n, left_out),split['mask'].iloc[0]
    full = decode_mask(read_png(p))
    rows,cols = ((np.arange(30) + .5)*60/30).astype(int),((np.arange(50) + .5)*107/50).astype(int)
    assert (load_mask(p, (30,50), classes) == classes.encode(full[rows][:,cols])).all()

def test_real_masks_keep_their_known_pixels(real):
    p = real/'cholecseg8k/video52/video52_00080/frame_120_endo_watershed_mask.png'
    count = np.bincount(load_mask(p, (240,427), class_set(13)).ravel(), minlength=256)
    assert count[[0, 1, 2, 4, 5, 10, 255]].tolist() == [27777, 43703, 6024, 18102, 2628, 3580, 666]
    assert load_image(p.with_name('frame_120_endo.png'), (240,427)).shape == (3, 240, 427)

def frames_and_masks(split, n=5): return split.image[:n].tolist(), [*split['mask'][:n-2], '', '']

def test_store_holds_image_and_mask(split):
    images,masks = frames_and_masks(split)
    store = FrameStore(images, masks, class_set(8), (30,50))
    assert store.data.shape == (5, 4, 30, 50) and store.data.dtype == torch.uint8
    for i in range(5):
        assert (store.data[i,:3].numpy() == load_image(images[i], (30,50))).all()
        assert (store.data[i,3].numpy() == (load_mask(masks[i], (30,50), class_set(8)) if masks[i] else 255)).all()

def little_memory(monkeypatch): monkeypatch.setattr(streams.psutil, 'virtual_memory', lambda: types.SimpleNamespace(available=1000))

def test_frames_that_do_not_fit_lie_in_a_file_and_are_found_again(split, tmp_path, monkeypatch):
    images,masks = frames_and_masks(split)
    ref = FrameStore(images, masks, class_set(8), (30,50)).data
    little_memory(monkeypatch)
    first = FrameStore(images, masks, class_set(8), (30,50), tmp_path)
    assert torch.equal(first.data, ref) and [p.suffix for p in tmp_path.iterdir()] == ['.npy']
    first.data[0] = 0
    def decode_again(*args): raise AssertionError('decoded twice')
    monkeypatch.setattr(FrameStore, 'fill', decode_again)
    assert torch.equal(FrameStore(images, masks, class_set(8), (30,50), tmp_path).data, ref)
    with pytest.raises(AssertionError): FrameStore(images, masks, class_set(13), (30,50), tmp_path)

def test_the_file_depends_on_everything_that_decides_its_bytes(split, tmp_path):
    images,masks = frames_and_masks(split)
    copy = tmp_path/'a.png'
    copy.write_bytes(Path(images[0]).read_bytes())
    images[0] = str(copy)
    keys = [store_key(images, masks, class_set(8), (30,50)), store_key(images[::-1], masks, class_set(8), (30,50)),
        store_key(images, masks[::-1], class_set(8), (30,50)), store_key(images, masks, class_set(8, 'background'), (30,50)),
        store_key(images, masks, class_set(8), (30,51))]
    copy.write_bytes(Path(images[1]).read_bytes() + b' ')
    assert len({*keys, store_key(images, masks, class_set(8), (30,50))}) == 6

def test_a_failure_or_a_full_disk_leaves_no_file(split, tmp_path, monkeypatch):
    images,masks = frames_and_masks(split)
    (tmp_path/'torn.png').write_bytes(Path(images[0]).read_bytes()[:500])
    little_memory(monkeypatch)
    with pytest.raises(InputError, match='torn.png: unreadable'):
        FrameStore([*images[:4], str(tmp_path/'torn.png')], masks, class_set(8), (30,50), tmp_path/'cache')
    monkeypatch.setattr(streams.shutil, 'disk_usage', lambda p: types.SimpleNamespace(free=10))
    with pytest.raises(InputError, match='give another cache_dir'): FrameStore(images, masks, class_set(8), (30,50), tmp_path/'cache')
    assert not list((tmp_path/'cache').iterdir())

def test_statistics_of_all_frames(split):
    store = FrameStore(*frames_and_masks(split), class_set(8), (30,50))
    x = store.data[[0,2],:3].double()/255
    mean,std = channel_stats(store, np.array([0, 2]))
    assert np.allclose(mean, x.mean((0,2,3))) and np.allclose(std, x.std((0,2,3), correction=0))

# Loaders

def test_shapes_types_and_counts(dls, smoke):
    x,mask,seen,ids = dls.train.one_batch()
    assert [tuple(o.shape) for o in (x, mask, seen, ids)] == [(6,3,64,64), (3,64,64), (6,8), (6,3)]
    assert (type(x), type(mask)) == (TensorImage, TensorMask)
    assert (x.dtype, mask.dtype, seen.dtype, ids.dtype) == (torch.float32, torch.long, torch.float32, torch.long)
    assert dls.n_inp == 1 and dls.n_labelled == 3 and len(dls.train) == len(dls.train_ds)//6 and ID_COLUMNS == ('phase', 'clip', 'video')
    assert dls.vocab == class_set(8).names and dls.recipe == smoke and dls.presence.shape == (len(dls.train_ds), 8)
    v,m = dls.valid.one_batch()
    assert (v.shape[1:], m.shape[1:], m.dtype) == ((3,60,107), (60,107), torch.long)

def test_the_labels_of_a_batch_are_those_of_its_frames(dls):
    t,order = dls.train_ds.table.reset_index(),dls.train.batches(dls.train.epoch)
    for b,(_,_,seen,ids) in zip(order, dls.train):
        rows = t.iloc[b]
        assert (seen.bool().numpy() == rows[list(dls.vocab)].to_numpy()).all()
        assert ids[:,0].tolist() == rows.phase.tolist() and ids[:,2].tolist() == [int(v[5:]) for v in rows.video]
        assert ids[:,1].tolist() == [int(c[5:7] + c[8:]) for c in rows['clip']]
        assert rows.labelled[:3].all()

def test_pixels_without_augmentation_are_those_of_the_files(split, smoke):
    r = replace(smoke, height=60, width=60, crop=60, scale=0, blur=False, flip=0)
    dls = cwcl_dls(split, r, device='cpu')
    b = dls.train.batches(0)[0]
    x,mask,_,_ = dls.train.one_batch()
    mean,std = [torch.tensor(o)[:,None,None] for o in dls.stats]
    t = dls.train_ds.table
    for i,j in enumerate(b):
        ref = (torch.tensor(load_image(t.image.iloc[j], (60,60)))/255 - mean)/std
        assert torch.allclose(torch.as_tensor(x[i]), ref, atol=1e-4)
        if i < 3: assert (mask[i].numpy() == load_mask(t['mask'].iloc[j], (60,60), class_set(8))).all()

def test_the_epoch_moves_on_only_at_its_end(split, smoke):
    a,b = make(split, smoke).train,make(split, smoke).train
    first = a.one_batch()
    next(iter(a))
    assert a.epoch == 0
    epochs = [[x for x in a] for _ in range(2)]
    assert a.epoch == 2 and torch.equal(epochs[0][0][0], first[0]) and not torch.equal(epochs[0][0][0], epochs[1][0][0])
    b.epoch = 1
    assert all(torch.equal(p, q) for x,y in zip(b, epochs[1]) for p,q in zip(x, y))

def test_an_interrupted_order_goes_on_as_if_it_had_not_been(dls):
    steps = dls.train.steps
    whole = list(islice(two_streams(dls.train.labelled, np.zeros(len(dls.train_ds)), 3, 6, 3), 3*steps))
    assert dls.train.batches(2) == whole[2*steps:]

def test_looking_changes_nothing(split, smoke):
    seen = []
    for look in (False, True):
        d = make(split, smoke)
        state = random.getstate(),np.random.get_state()[1].copy(),torch.get_rng_state()
        if look:
            d.show_batch(max_n=2)
            d.valid.show_batch(max_n=2)
            d.train.one_batch()
            d.test_dl(split[split.part == 'test'][:2]).one_batch()
        epoch = []
        for b in d.train:
            if look: d.train.one_batch()
            epoch.append(b[0])
        assert random.getstate() == state[0] and (np.random.get_state()[1] == state[1]).all() and torch.equal(torch.get_rng_state(), state[2])
        seen.append(torch.cat(epoch))
    plt.close('all')
    assert torch.equal(*seen)

def test_two_workers_give_the_batches_of_none(split, smoke):
    a,b = [list(cwcl_dls(split, smoke, device='cpu', workers=n).train) for n in (0, 2)]
    assert len(a) == len(b) and all(torch.equal(p, q) for x,y in zip(a, b) for p,q in zip(x, y))

def test_random_makes_as_many_steps_on_labelled_frames_alone(split, smoke, dls):
    d = make(split, smoke, method='random')
    x,mask,seen,ids = d.train.one_batch()
    assert len(d.train) == len(dls.train) and len(x) == len(mask) == len(ids) == 3 == d.n_labelled
    assert [b[:3] for b in dls.train.batches(1)] == d.train.batches(1)
    full = dls.train.one_batch()
    assert torch.allclose(full[0][:3], x) and torch.equal(full[1], mask)

def test_fewer_masks_than_n_are_in_every_batch(split, smoke):
    few = split.assign(labelled=split.labelled & (split.labelled.cumsum() <= 2))
    d = cwcl_dls(few, replace(smoke, labelled=5), device='cpu')
    assert d.n_labelled == 2 and len(d.train.one_batch()[1]) == 2
    assert all(set(b[:2]) == set(d.train.labelled) for b in d.train.batches(0))

def test_all_frames_of_a_batch_labelled(split, smoke):
    x,mask,_,_ = make(split, smoke, batch=4, labelled=4).train.one_batch()
    assert len(x) == len(mask) == 4

def test_validation_labels_can_be_kept_out(split, smoke, dls):
    assert set(dls.train_ds.table.part) == {'train', 'valid'} and set(dls.valid_ds.table.part) == {'valid'}
    d = make(split, smoke, valid_labels=False)
    assert set(d.train_ds.table.part) == {'train'} and len(d.valid_ds) == len(dls.valid_ds)
    assert d.stats == dls.stats

def test_masks_outside_the_budget_are_never_opened(split, smoke, tmp_path):
    t = split.copy()
    hidden = (t.part == 'train') & ~t.labelled
    t.loc[hidden, 'mask'] = str(tmp_path/'nosuch.png')
    d = cwcl_dls(t, smoke, device='cpu')
    ds = d.train_ds
    assert (ds.store.data[ds.rows[torch.tensor(hidden[ds.table.index].to_numpy())],3] == 255).all()

def test_frames_without_labels_are_left_out(split, smoke):
    t = split.copy()
    gone = t.index[(t.part == 'train') & ~t.labelled][:4]
    t.loc[gone, ['mask', *class_set(13).names]] = [''] + [False]*13
    assert not set(gone) & set(cwcl_dls(t, smoke, device='cpu').train_ds.table.index)
    t.loc[gone, 'liver'] = True
    assert set(gone) <= set(cwcl_dls(t, smoke, device='cpu').train_ds.table.index)

def test_presence_of_the_crop(split, smoke):
    d = make(split, smoke, presence_from='crop', crop=16, scale=0, min_pixels=1)
    masks = []
    d.train.after_batch.fs[1].n_labelled = None
    for b in d.train: masks += [(m, p) for m,p in zip(*b[1:3])]
    assert len(masks) == 6*len(d.train)
    for m,p in masks:
        if (m != 255).any(): assert p.tolist() == [float((m == c).any()) for c in range(8)]
    assert len(make(split, smoke, presence_from='crop').train.one_batch()[1]) == 3

def test_two_views(split, smoke):
    x,mask,seen,ids = make(split, smoke, views=2).train.one_batch()
    assert [len(o) for o in (x, mask, seen, ids)] == [12, 3, 12, 12]
    assert torch.equal(ids[:6], ids[6:]) and torch.equal(seen[:6], seen[6:]) and not torch.equal(x[:6], x[6:])

def test_pk_makes_fewer_lonely_anchors(split, smoke):
    def lonely(sampler):
        d = make(split, smoke, sampler=sampler, batch=16, labelled=2, use_phase=False).train
        g = label_groups(d.presence)
        return np.mean([np.bincount(g[b])[g[b]] == 1 for e in range(10) for b in d.batches(e)])
    assert lonely('pk') < .7*lonely('uniform')

@pytest.mark.parametrize('change,message', [
    (dict(batch=500), '83 class-labelled frames cannot fill a batch of 500'), (dict(batch=500, method='random'), 'cannot fill a batch of 500')])
def test_too_few_frames(split, smoke, change, message):
    with pytest.raises(InputError, match=message): make(split, smoke, **change)

def test_no_mask_no_part_no_validation(split, smoke, tmp_path):
    with pytest.raises(InputError, match='no labelled frame: raise the budget'): cwcl_dls(split.assign(labelled=False), smoke)
    with pytest.raises(InputError, match='run split_frames first'): cwcl_dls(split.drop(columns='part'), smoke)
    with pytest.raises(InputError, match='labelled, but has no mask'): cwcl_dls(split.assign(labelled=split.part == 'test'), smoke)
    with pytest.raises(InputError, match='no validation frame'): cwcl_dls(split[split.part != 'valid'], smoke)
    t = split.copy()
    t.loc[t.index[t.part == 'train'][0], 'image'] = str(tmp_path/'gone.png')
    with pytest.raises(InputError, match='gone.png: unreadable'): cwcl_dls(t, smoke)

def test_test_dl_keeps_the_order_and_the_masks(dls, split, smoke):
    t = split[split.part == 'test'].iloc[::-1]
    dl = dls.test_dl(t)
    x,m = [torch.cat(o) for o in zip(*dl)]
    for i,(image,mask) in enumerate(zip(t.image, t['mask'])):
        assert (m[i].numpy() == load_mask(mask, (60,107), class_set(8))).all()
        assert abs(dl.frames_of((x[i:i+1], m[i:i+1]))[0][0].astype(int) - load_image(image, (60,107)).transpose(1, 2, 0)).max() <= 1
    assert (dls.test_dl(t.assign(mask='')).one_batch()[1] == 255).all()

def test_test_dl_reuses_decoded_frames_but_not_hidden_masks(dls, split):
    valid,hidden = split[split.part == 'valid'],split[(split.part == 'train') & ~split.labelled][:3]
    assert dls.test_dl(valid).dataset.store is dls.train_ds.store
    other = dls.test_dl(hidden)
    assert other.dataset.store is not dls.train_ds.store and (other.one_batch()[1] != 255).any()

# A Learner lives on it

class Tiny(nn.Module):
    "Frames to logits, without a care for masks or labels"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    def forward(self, x): return self.net(x)

class TinyLoss:
    "Cross-entropy of the frames that have a mask"
    def __init__(self): self.reduction = 'mean'
    def __call__(self, out, mask, presence=None, ids=None):
        if presence is not None: assert len(out) == len(presence) == len(ids) >= len(mask)
        pixels = nn.functional.cross_entropy(out[:len(mask)], mask, ignore_index=255, reduction='none').mean((1,2))
        return pixels if self.reduction == 'none' else pixels.mean()
    def activation(self, x): return x.softmax(1)
    def decodes(self, x): return x.argmax(1)

@pytest.mark.parametrize('workers', [0, 2])
def test_an_ordinary_learner(split, smoke, workers, tmp_path):
    torch.manual_seed(0)
    dls = cwcl_dls(split, smoke, device='cpu', workers=workers)
    learn = Learner(dls, Tiny(), TinyLoss(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[0]
        assert 0 < learn.lr_find(num_it=20, show_plot=False).valley < 10
        learn.fit_one_cycle(2, 2e-2)
        assert learn.validate()[0] < before
        learn.show_results(max_n=2)
        learn.show_results(ds_idx=0, max_n=2)
        preds,truth,losses = learn.get_preds(with_loss=True)
        assert preds.shape == (len(truth), 8, 60, 107) and losses.shape == (len(dls.valid_ds),)
        assert len(learn.get_preds(ds_idx=0)[0]) == len(dls.train.labelled)
        image = split.image.iloc[0]
        pixels = read_png(image)
        results = [learn.predict(o)[0] for o in (image, Path(image), Image.open(image), pixels, torch.tensor(pixels).permute(2, 0, 1)/255)]
    dls.show_batch()
    dls.valid.show_batch(max_n=3)
    plt.close('all')
    assert isinstance(results[0], TensorMask) and results[0].shape == (60, 107)
    assert all(torch.equal(o, results[0]) for o in results)

def test_an_exported_learner_predicts(split, smoke, tmp_path):
    learn = Learner(make(split, smoke), Tiny(), TinyLoss(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        mask = learn.predict(split.image.iloc[0])[0]
        learn.export('net.pkl')
        again = load_learner(tmp_path/'net.pkl')
        with again.no_bar(), again.no_logging(): assert torch.equal(again.predict(split.image.iloc[0])[0], mask)
    assert len(again.dls.train_ds) == 0 and (tmp_path/'net.pkl').stat().st_size < 200_000

def test_decoding_a_training_batch(dls):
    b = dls.train.one_batch()
    samples = dls.train.decode_batch(b)
    assert len(samples) == 3 and samples[0][0].shape == (3, 64, 64) and samples[0][1].shape == (64, 64)
    assert isinstance(dls.train.new(), TwoStreamDL) and dls.train.new().n_labelled == 3
    assert type(dls.train.new(shuffle=False)) is FrameDL and isinstance(dls.train_ds, Frames)
