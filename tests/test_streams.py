"Two streams in one batch: what it holds, what changes it, what is refused, and that a Learner can live on it"
import random
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from dataclasses import replace
from itertools import islice
from pathlib import Path
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorImage, TensorMask
from PIL import Image
from torch import nn
from cwcl.core import InputError, recipe
from cwcl.data.cholec import frame_table
from cwcl.data.images import read_mask
from cwcl.data.frames import ID_COLUMNS, FrameDL, Frames
from cwcl.data.labels import class_set
from cwcl.data.order import label_groups, two_streams
from cwcl.data.splits import split_frames
from cwcl.data.store import load_image, load_mask
from cwcl.data.streams import TwoStreamDL, cwcl_dls
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

def test_shapes_types_and_counts(dls, smoke):
    x,mask,seen,ids = dls.train.one_batch()
    assert [tuple(o.shape) for o in (x, mask, seen, ids)] == [(6,3,64,64), (3,64,64), (6,8), (6,3)]
    assert (type(x), type(mask)) == (TensorImage, TensorMask)
    assert (x.dtype, mask.dtype, seen.dtype, ids.dtype) == (torch.float32, torch.long, torch.float32, torch.long)
    assert dls.n_inp == 1 and dls.n_labelled == 3 and len(dls.train) == len(dls.train_ds)//6
    assert ID_COLUMNS == ('phase', 'clip', 'video')
    assert dls.vocab == class_set(8).names and dls.recipe == smoke and dls.presence.shape == (len(dls.train_ds), 8)
    v,m = dls.valid.one_batch()
    assert (v.shape[1:], m.shape[1:], m.dtype) == ((3,60,107), (60,107), torch.long)

def test_the_labels_of_a_batch_are_those_of_its_frames(dls):
    t = dls.train_ds.table.reset_index()
    order = dls.train.batches(dls.train.epoch)
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

def test_an_interrupted_order_continues_as_if_it_had_not_been(dls):
    steps = dls.train.steps
    whole = list(islice(two_streams(dls.train.labelled, np.zeros(len(dls.train_ds)), 3, 6, 3), 3*steps))
    assert dls.train.batches(2) == whole[2*steps:]

@pytest.mark.parametrize('sampler', ('uniform', 'pk'))
def test_a_training_goes_through_its_order_once(split, smoke, sampler, monkeypatch):
    "However often a batch is looked at, and an epoch that is set starts where it should"
    starts = []
    def spy(*args):
        starts.append(args)
        return two_streams(*args)
    monkeypatch.setattr('cwcl.data.streams.two_streams', spy)
    a,b = [make(split, smoke, sampler=sampler).train for _ in range(2)]
    seen = []
    for _ in range(4):
        a.one_batch()
        seen.append([x[3] for x in a])
    assert len(starts) == 1
    b.epoch = 3
    assert all(torch.equal(x[3], y) for x,y in zip(b, seen[3])) and len(starts) == 2

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
        assert random.getstate() == state[0] and (np.random.get_state()[1] == state[1]).all()
        assert torch.equal(torch.get_rng_state(), state[2])
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
    assert (ds.store.masks[ds.rows[torch.tensor(hidden[ds.table.index].to_numpy())]] == 255).all()

def test_frames_without_labels_are_left_out(split, smoke):
    t = split.copy()
    gone = t.index[(t.part == 'train') & ~t.labelled][:4]
    t.loc[gone, ['mask', *class_set(13).names]] = [''] + [False]*13
    assert not set(gone) & set(cwcl_dls(t, smoke, device='cpu').train_ds.table.index)
    t.loc[gone, 'liver'] = True
    assert set(gone) <= set(cwcl_dls(t, smoke, device='cpu').train_ds.table.index)

TEACHER = dict(method='random', average=.9, teacher=1.)

@pytest.mark.parametrize('change,used', [(TEACHER, False), (dict(TEACHER, allowed=False), True),
    (dict(TEACHER, allowed=False, method='cls'), False), (dict(method='simclr', views=2), True),
    (dict(method='simclr', views=2, sampler='pk', pk_frames=2), False),
    (dict(method='random', absent=.1), False)], ids=str)
def test_a_frame_without_labels_is_used_where_nothing_reads_labels(split, smoke, change, used):
    t = split.copy()
    bare = t.index[(t.part == 'train') & ~t.labelled]
    t.loc[bare, ['mask', *class_set(13).names]] = [''] + [False]*13
    r = replace(smoke, valid_labels=False, **change)
    rows = 'training' if used else 'class-labelled'
    with pytest.raises(InputError, match=f'{rows} frames cannot fill'): cwcl_dls(t, replace(r, batch=400))
    assert (set(bare) <= set(cwcl_dls(t, replace(r, batch=4, labelled=2), device='cpu').train_ds.table.index)) == used

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
    (dict(batch=500), '83 class-labelled frames cannot fill a batch of 500'),
    (dict(batch=500, method='random'), 'cannot fill a batch of 500')])
def test_too_few_frames(split, smoke, change, message):
    with pytest.raises(InputError, match=message): make(split, smoke, **change)

def test_no_mask_no_part_no_validation(split, smoke, tmp_path):
    bare,astray = split.assign(labelled=False),split.assign(labelled=split.part == 'test')
    with pytest.raises(InputError, match='no labelled frame: raise the budget'): cwcl_dls(bare, smoke)
    with pytest.raises(InputError, match='run split_frames first'): cwcl_dls(split.drop(columns='part'), smoke)
    with pytest.raises(InputError, match='labelled, but has no mask'): cwcl_dls(astray, smoke)
    with pytest.raises(InputError, match='no validation frame'): cwcl_dls(split[split.part != 'valid'], smoke)
    with pytest.raises(InputError, match='its mask is NaN'): cwcl_dls(split.assign(mask=split['mask'].replace('', None)
        .where(split.index > 0)), smoke)
    t = split.copy()
    t.loc[t.index[t.part == 'train'][0], 'image'] = str(tmp_path/'gone.png')
    with pytest.raises(InputError, match='gone.png: cannot be opened'): cwcl_dls(t, smoke)

def test_test_dl_keeps_the_order_and_the_masks(dls, split, smoke):
    t = split[split.part == 'test'].iloc[::-1]
    dl = dls.test_dl(t)
    x,m = [torch.cat(o) for o in zip(*dl)]
    for i,(image,mask) in enumerate(zip(t.image, t['mask'])):
        assert (m[i].numpy() == load_mask(mask, (60,107), class_set(8))).all()
        shown = dl.frames_of((x[i:i+1], m[i:i+1]))[0][0].astype(int)
        assert abs(shown - load_image(image, (60,107)).transpose(1, 2, 0)).max() <= 1
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
        pixels = read_mask(image)
        forms = image, Path(image), Image.open(image), pixels, torch.tensor(pixels).permute(2, 0, 1)/255
        results = [learn.predict(o)[0] for o in forms]
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
