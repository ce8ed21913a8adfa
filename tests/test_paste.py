"Pasted structures against literal loops, and a batch whose frames, masks and labels still belong together"
import pytest, torch
from dataclasses import replace
from types import SimpleNamespace
from torch._subclasses.fake_tensor import FakeTensorMode
from fastai.callback.core import Callback
from cwcl.beyond.paste import PasteRare, paste_rare, rare_classes, rare_pixels
from cwcl.core import InputError, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.multitask import cwcl_learner
from cwcl.pairs import label_set_ids

SEEDS = range(6)

def test_without_a_labelled_frame_nothing_is_pasted():
    x = torch.rand(2, 3, 4, 4)
    frames,mask,got = paste_rare(x, torch.zeros(0, 4, 4).long(), torch.ones(3).bool(), torch.rand(0, 2), 1.)
    assert frames.equal(x) and mask.shape == (0, 4, 4) and got.shape == (0, 3)

def literal(x, mask, rare, u, p, min_pixels):
    "Pixel by pixel, frame by frame"
    n,h,w = mask.shape
    old,new = mask.clone(),mask.clone()
    frames,x = x.clone(),x.clone()
    got = torch.zeros(n, len(rare), dtype=torch.bool)
    def gives(i): return [c for c in range(len(rare)) if rare[c] and (old[i] == c).sum() >= max(min_pixels, 1)]
    for i in range(n):
        donors = [j for j in range(n) if j != i and gives(j)]
        if not donors or not u[i,n] < p: continue
        j = max(donors, key=lambda k: u[i,k])
        for c in gives(j): got[i,c] = True
        for a in range(h):
            for b in range(w):
                at = w-1-b if u[i,n+1] < .5 else b
                if int(old[j,a,at]) in gives(j):
                    new[i,a,b] = old[j,a,at]
                    x[i,:,a,b] = frames[j,:,a,at]
    return x, new, got

def batch(seed, n=4, extra=2, classes=5):
    g = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, classes, (n, 6, 7), generator=g)
    mask[torch.rand(n, 6, 7, generator=g) < .2] = 255
    if seed % 3 == 0: mask[0] = 255
    rare = torch.rand(classes, generator=g) < .5
    return torch.rand(n+extra, 3, 6, 7, generator=g), mask, rare, torch.rand(n, n+2, generator=g)

@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('p,min_pixels', [(1., 0), (.5, 6), (.7, 8)])
def test_a_literal_loop_agrees(seed, p, min_pixels):
    args = batch(seed)
    for got,want in zip(paste_rare(*args, p, min_pixels), literal(*args, p, min_pixels)): assert torch.equal(got, want)

@pytest.mark.parametrize('seed', SEEDS)
def test_what_is_given_was_there(seed):
    x,mask,rare,u = batch(seed)
    pixels,gives = rare_pixels(mask, rare, 6)
    for i in range(len(mask)):
        for c in range(len(rare)):
            enough = (mask[i] == c).sum() >= 6
            assert gives[i,c] == (rare[c] and enough)
            assert pixels[i][mask[i] == c].all() if gives[i,c] else not pixels[i][mask[i] == c].any()
    assert not pixels[mask == 255].any()

def test_a_frame_never_gives_to_itself():
    x,mask,_,u = batch(1)
    only = torch.zeros(5, dtype=torch.bool)
    mask[1:] = mask[1:].where(mask[1:] != 3, 0)
    only[3] = True
    after,_,got = paste_rare(x, mask, only, u, 1., 1)
    assert torch.equal(after[0], x[0]) and not got[0].any() and got[1:,3].all()

def test_rare_is_below_the_mean_of_all_classes():
    presence = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]])
    assert rare_classes(presence).tolist() == [False, False, True, True]
    assert not rare_classes(torch.ones(3, 5)).any()

def test_bfloat16_and_a_pretended_gpu():
    x,mask,rare,u = batch(2)
    got,want = (paste_rare(o, mask, rare, u, 1., 1)[0] for o in (x.bfloat16(), x))
    assert torch.equal(got, want.bfloat16())
    with FakeTensorMode():
        with torch.device('cuda'):
            n = torch.zeros(4, 6, 6, dtype=torch.long)
            given = torch.zeros(6, 3, 6, 6),n,torch.ones(5) > 0,torch.zeros(4, 6)
        out = paste_rare(*given, .5)
        assert {o.device.type for o in out} == {'cuda'}

class Before(Callback):
    "Notes each batch as it was before the paste"
    order = -4.5
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen.append([o.clone() for o in (*self.xb, *self.yb)])

class After(Before): order = -3.5

def watched(table, r, seed=0):
    set_seed(seed, 1)
    learn = cwcl_learner(cwcl_dls(table, r, device='cpu'), r.method, r, cbs=[Before(), After()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn

@pytest.fixture(scope='module')
def pasted(table, smoke): return watched(table, replace(smoke, batch=12, labelled=6, paste=1.))

def test_labels_follow_the_paste(pasted):
    rare = rare_classes(pasted.dls.presence)
    changed = 0
    for (x,mask,seen,ids),(x2,mask2,seen2,ids2) in zip(pasted.before.seen, pasted.after.seen):
        n = len(mask)
        assert torch.equal(ids, ids2) and torch.equal(x[n:], x2[n:]) and torch.equal(seen[n:], seen2[n:])
        moved = mask != mask2
        repainted = (x != x2).any(1)[:n]
        assert rare[mask2[repainted]].all() and rare[mask2[moved]].all()
        assert repainted[moved].float().mean() > .99
        for i in range(n):
            for c in range(seen.shape[1]):
                new = c in mask2[i][moved[i]] and (mask2[i] == c).sum() >= 16
                if new: assert seen2[i,c] == 1
                assert seen2[i,c] >= seen[i,c] and (seen2[i,c] == seen[i,c] or rare[c])
        before,after = (label_set_ids(o > .5, ids[:,0]) for o in (seen, seen2))
        changed += (before != after).sum()
    assert changed > 0

def test_the_same_again_after_other_random_numbers(table, pasted):
    again = watched(table, pasted.model.recipe, seed=1)
    for a,b in zip(pasted.after.seen, again.after.seen):
        for o,p in zip(a, b): assert torch.equal(o, p)

def test_presence_of_the_crop_is_counted_again(table, smoke):
    learn = watched(table, replace(smoke, batch=12, labelled=6, paste=1., presence_from='crop'))
    for _,mask,seen,_ in learn.after.seen:
        for i,m in enumerate(mask):
            if (m == 255).all(): continue
            assert seen[i].tolist() == [float((m == c).sum() >= 16) for c in range(8)]

SIMCLR = dict(method='simclr', views=2, scales=1, projection='mlp_bn')

@pytest.mark.parametrize('source,want', [('crop', [0, 0, 1]), ('image', [1, 1, 1])])
def test_what_is_covered_is_gone_from_a_crop_only(smoke, source, want):
    mask = torch.full((2, 8, 8), 2)
    mask[0] = 0
    mask[0,:4] = 1
    r = replace(smoke, paste=1., presence_from=source)
    cb = PasteRare(r)
    cb.rare = torch.tensor([False, False, True])
    yb = mask, torch.tensor([[1., 1, 0], [0, 0, 1]]), torch.zeros(2, 3)
    net,loader = SimpleNamespace(recipe=r),SimpleNamespace(epoch=0)
    cb.learn = SimpleNamespace(xb=(torch.rand(2, 3, 8, 8),), yb=yb, training=True, iter=0, model=net,
        dls=SimpleNamespace(train=loader))
    cb.before_batch()
    assert (cb.learn.yb[0] == 2).all() and cb.learn.yb[1].tolist() == [want, [0, 0, 1]]

@pytest.mark.parametrize('change', [dict(method='random'), SIMCLR, dict(views=2), dict(chunks=2),
    dict(precision='bf16', channels_last=True), dict(class_set=13)], ids=str)
def test_it_trains_with_the_other_options(table, smoke, change):
    r = replace(smoke, batch=8, labelled=4, paste=.5, **change)
    learn = watched(table, r)
    assert learn.recorder.losses[-1].isfinite()
    strong = r.method == 'simclr'
    for (x,mask,seen,_),(x2,mask2,seen2,_) in zip(learn.before.seen, learn.after.seen):
        assert torch.equal(x[len(mask):], x2[len(mask):])
        if strong: assert torch.equal(seen, seen2)

def test_without_masks_there_is_nothing_to_do(table, smoke):
    learn = watched(table, replace(smoke, stage='pretrain', paste=1.))
    for a,b in zip(learn.before.seen, learn.after.seen):
        for o,p in zip(a, b): assert torch.equal(o, p)

def test_one_mask_and_several_processes_are_refused(table, smoke, monkeypatch):
    one = replace(smoke, labelled=1, paste=.5)
    with pytest.raises(InputError, match='paste=0.5 with 1 mask'): watched(table, one)
    monkeypatch.setattr('cwcl.beyond.paste.ranks', lambda: (0, 2))
    with pytest.raises(InputError, match='paste=0.5 in 2 processes'): watched(table, replace(smoke, paste=.5))

def test_off_is_off(table, smoke): assert not any(isinstance(o, PasteRare) for o in watched(table, smoke).cbs)
