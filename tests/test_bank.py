"A labelled bank: the loss by a literal loop, what is kept, what finds a partner, and a training with it"
import copy, itertools, math, pytest, torch
from dataclasses import replace
from functools import partial
from fastai.callback.core import Callback
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.beyond.bank import BankContrast, LabelBank, bank_lonely, bank_term, ignored_keys
from cwcl.core import METHODS, InputError, recipe, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.losses.contrastive import normalize
from cwcl.methods import register_method
from cwcl.multitask import cwcl_learner
from cwcl.pairs import label_set_ids, positive_mask
from cwcl.tasks import dcl_term
from test_distrib import TINY, learner as double_learner, on_ranks, tiny # chkstyle: ignore

# The loss

def labels_of(g, n, first=0, frames=40):
    "Set (−1 where the phase is unknown), clip, video and number of n different frames, of few sets and clips"
    clip = torch.randint(0, 6, (n,), generator=g)
    number = first + torch.randperm(frames, generator=g)[:n]
    return torch.stack([torch.randint(-1, 9, (n,), generator=g), clip, clip//2, number], 1)

def problem(seed, n=9, size=14):
    "A batch, and a bank in which some places are empty and some frames are those of the batch"
    g = torch.Generator().manual_seed(seed)
    def embeddings(k): return [torch.randn(k, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in '123']
    labels,kept = (labels_of(g, k, frames=30) for k in (n, size))
    kept[torch.rand(size, generator=g) < .2] = -1
    return embeddings(n), labels, embeddings(size), kept

def cosine(a, b): return (a @ b)/(a.norm()*b.norm())

def by_hand(zs, labels, keys, kept, temp, exclude, reduction='mean', lonely='skip'):
    "Anchor by anchor, candidate by candidate"
    rows,old = (o.tolist() for o in (labels, kept))
    here = {o[3] for o in rows}
    column = dict(none=None, clip=1, video=2)[exclude]
    losses = []
    for i,a in enumerate(rows):
        far = [(k, o) for k,o in enumerate(old) if o[3] >= 0 and o[3] not in here and o[1] != a[1]]
        near = [(j, o) for j,o in enumerate(rows) if j != i]
        def alike(o): return a[0] >= 0 and o[0] == a[0]
        def left_out(o): return column is not None and alike(o) and o[column] == a[column]
        loss = zs[0].new_zeros(())
        for z,key in zip(zs, keys):
            logits = [(cosine(z[i], z[j])/temp, alike(o)) for j,o in near if not left_out(o)]
            logits += [(cosine(z[i], key[k].detach())/temp, alike(o)) for k,o in far if not left_out(o)]
            chosen = [s for s,pos in logits if pos]
            if not chosen: continue
            total = torch.stack([s for s,_ in logits]).logsumexp(0)
            loss = loss + sum(total - s for s in chosen)/len(chosen)
        losses.append((loss, any(alike(o) and not left_out(o) for _,o in near + far)))
    found = sum(has for _,has in losses)
    value = sum(loss for loss,_ in losses)
    if reduction == 'mean': value = value/(len(rows) if lonely == 'zero' else max(found, 1))
    return value, 1 - found/len(rows)

def close(a, b, tol=1e-10): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

@pytest.mark.parametrize('exclude', ['none', 'clip', 'video'])
@pytest.mark.parametrize('temp', [.3, .005])
def test_the_loss_is_a_loop(exclude, temp):
    shares = set()
    for seed in range(8):
        zs,labels,keys,kept = problem(seed)
        options = [dict(), dict(lonely='zero'), dict(reduction='sum')][seed % 3]
        got,want = (f(zs, labels, keys, kept, temp, exclude, **options) for f in (bank_term, by_hand))
        close(got[0], want[0])
        assert got[1].item() == pytest.approx(want[1])
        shares.add(round(want[1], 3))
        for a,b in zip(*(torch.autograd.grad(o[0], zs) for o in (got, want))): close(a, b)
    assert len(shares) > 2 and max(shares) < 1

def test_which_keys_are_ignored():
    for seed in range(8):
        _,labels,_,kept = problem(seed)
        here = labels[:,3].tolist()
        want = [[k[3] < 0 or k[3] in here or k[1] == a[1] for k in kept.tolist()] for a in labels.tolist()]
        assert ignored_keys(labels, kept).tolist() == want and 0 < sum(map(sum, want)) < len(labels)*len(kept)

@pytest.mark.parametrize('exclude', ['none', 'clip', 'video'])
def test_a_bank_that_adds_nobody_is_the_plain_loss(exclude):
    for seed in range(4):
        zs,labels,keys,kept = problem(seed)
        group = dict(none=None, clip=labels[:,1], video=labels[:,2])[exclude]
        plain = dcl_term(zs, labels[:,0], group, .07)
        in_the_batch = labels[:,3][torch.randint(0, len(labels), (len(kept),))]
        banks = [(zs, labels), (keys, 0*kept-1), ([k[:0] for k in keys], kept[:0]),
            (keys, torch.cat([kept[:,:3], in_the_batch[:,None]], 1))]
        for k,rows in banks:
            got = bank_term(zs, labels, k, rows, exclude=exclude)
            close(got[0], plain[0])
            close(got[1], plain[1])
            for a,b in zip(*(torch.autograd.grad(o[0], zs, retain_graph=True) for o in (got, plain))): close(a, b)

def test_a_gradient_flows_into_the_batch_alone():
    zs,labels,keys,kept = problem(1)
    bank_term(zs, labels, keys, kept)[0].backward()
    assert all(z.grad.norm() > 0 for z in zs) and all(k.grad is None for k in keys)

def test_what_a_key_does_where_it_does_not_count_is_nothing():
    "Numbers in empty places and in keys of the own clip may even be large"
    zs,labels,keys,kept = problem(2)
    kept[0] = -1
    kept[1,1] = labels[:,1][0]
    before = bank_term(zs, labels, keys, kept)[0]
    odd = [k.detach().clone() for k in keys]
    for k in odd: k[0] = 1e6
    close(bank_term(zs, labels, odd, kept)[0], before)
    for k in odd: k[1] = -k[1]
    labels[:,1] = labels[0,1]
    moved = [bank_term(zs, labels, o, kept)[0] for o in (keys, odd)]
    close(*moved)

# What is kept

def kept_by_hand(batches, size):
    "The last occurrence of each frame, the newest first; in a batch, the first of several views"
    out = []
    for b in batches:
        once = list(dict.fromkeys(b))
        out = (once + [o for o in out if o not in once])[:size]
    return out

@pytest.mark.parametrize('size', [1, 5, 8, 30])
@pytest.mark.parametrize('views', [1, 2])
def test_each_frame_has_its_newest_key(size, views):
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        bank = LabelBank(size, 2, 3)
        batches = []
        newest = {}
        for step in range(12):
            number = torch.randperm(20, generator=g)[:6].repeat(views)
            zs = [torch.randn(len(number), 3, generator=g) for _ in range(2)]
            bank.push(zs, torch.stack([number + 100, number//3, number//6, number], 1))
            batches.append(number.tolist())
            keys = normalize(torch.stack(zs))
            newest.update({k: keys[:,i] for i,k in reversed(list(enumerate(batches[-1])))})
            want = kept_by_hand(batches, size)
            have = bank.labels.tolist()
            assert bank.keys.shape == (2, size, 3) and bank.labels.shape == (size, 4)
            assert have == [[k+100, k//3, k//6, k] for k in want] + [[-1]*4]*(size - len(want))
            for i,k in enumerate(want): assert torch.equal(bank.keys[:,i], newest[k])

def test_a_key_remembers_no_graph_and_no_half_precision():
    bank = LabelBank(4, 1, 3)
    z = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    bank.push([z], torch.arange(8).view(2, 4))
    assert bank.keys.dtype == torch.float32 and not bank.keys.requires_grad
    close(bank.keys.norm(dim=2)[0,:2], torch.ones(2), 1e-5)

def test_on_a_pretended_gpu():
    with FakeTensorMode():
        bank = LabelBank(8, 2, 3, 'cuda')
        zs = [torch.randn(6, 3, device='cuda') for _ in '12']
        labels = torch.zeros(6, 4, dtype=torch.long, device='cuda')
        bank.push(zs, labels)
        assert bank.keys.device.type == bank.labels.device.type == 'cuda'
        assert bank_term(zs, labels, bank.keys, bank.labels, exclude='clip')[0].device.type == 'cuda'

# Who finds a partner

@pytest.mark.parametrize('batch,size', [(1, 2), (2, 0), (2, 3), (3, 2)])
def test_the_probability_counts_all_draws(batch, size):
    ids,clip = [0, 0, 0, 1, 1, 2, 0],[0, 0, 1, 1, 2, 2, 3]
    n = len(ids)
    n_pos,far = (positive_mask(torch.tensor(ids), exclude=g).sum(1) for g in (None, torch.tensor(clip)))
    def alone(i, mates, bank): return not any(ids[j] == ids[i] for j in mates) and \
        not any(ids[j] == ids[i] and clip[j] != clip[i] for j in bank)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        draws = [alone(i, m, b) for m in itertools.combinations(others, batch-1)
            for b in itertools.combinations([j for j in others if j not in m], size)]
        assert bank_lonely(n_pos, far, batch, size)[i].item() == pytest.approx(sum(draws)/len(draws))

def test_a_bank_cannot_hold_more_than_there_is():
    with pytest.raises(ValueError, match='6 frames in a bank beside 2 of a batch: there are 7'):
        bank_lonely(torch.zeros(7), torch.zeros(7), 2, 6)

# A training

@pytest.fixture(scope='module')
def small(smoke): return replace(smoke, batch=12, labelled=4, epochs=4, bank=20)

class Note(Callback):
    "What the network returned, which weights there were and what the bank held when the loss was computed"
    order = 60
    def before_fit(self): self.losses,self.zs,self.batches = [],[],[]
    def after_loss(self):
        if not self.training: return
        self.losses.append(self.learn.loss.item())
        self.zs.append([z.detach().clone() for z in self.pred[2]])
        self.batches.append(self.dls.train.batches(self.dls.train.epoch)[self.iter])

def fitted(table, r, cbs=None):
    set_seed(r.seed, 1)
    learn = cwcl_learner(cwcl_dls(table, r, device='cpu'), r.method, r, cbs=[Note(), *(cbs or [])])
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    return learn

@pytest.fixture(scope='module')
def with_bank(table, small): return fitted(table, small)

@pytest.fixture(scope='module')
def without(table, small): return fitted(table, replace(small, bank=0))

def column(learn, name):
    names = learn.recorder.metric_names[1:-1]
    return [row[list(names).index(name)] for row in learn.recorder.values]

def test_until_the_bank_joins_in_the_training_is_the_one_without(with_bank, without):
    steps = len(without.note.losses)//4
    assert with_bank.note.losses[:steps] == without.note.losses[:steps]
    assert with_bank.note.losses[steps] != without.note.losses[steps]
    assert column(with_bank, 'lonely')[0] == column(without, 'lonely')[0]
    assert all(a < b for a,b in zip(column(with_bank, 'lonely')[1:], column(without, 'lonely')[1:]))

def test_the_bank_holds_the_last_frames_and_their_labels(with_bank):
    bank,data = with_bank.bank_contrast.bank,with_bank.dls.train.dataset
    number = kept_by_hand(with_bank.note.batches, 20)
    want = torch.cat([data.ids, torch.arange(len(data))[:,None]], 1)
    want[:,0] = label_set_ids(data.presence > .5, data.ids[:,0])
    assert bank.labels.tolist() == want[number].tolist()
    assert torch.equal(bank.keys[:,:12], normalize(torch.stack(with_bank.note.zs[-1])))

def test_every_loss_of_a_training_is_that_of_the_loop(table, small):
    "The contrast alone, so that the loss is the term times its weight"
    r = replace(small, method='dcl', stage='pretrain', epochs=2, exclude='clip')
    learn = fitted(table, r)
    data = learn.dls.train.dataset
    seen = learn.note
    frames = {}
    sets = label_set_ids(data.presence > .5, data.ids[:,0])
    def rows(numbers): return torch.tensor([[sets[k], *data.ids[k,1:], k] for k in numbers]).view(-1, 4)
    for step,(zs,batch,loss) in enumerate(zip(seen.zs, seen.batches, seen.losses)):
        old = kept_by_hand(seen.batches[:step], r.bank) if 4*step >= len(seen.losses) else []
        keys = [torch.stack([frames[k][s] for k in old]) if old else zs[0][:0] for s in range(r.scales)]
        want = by_hand(zs, rows(batch), keys, rows(old), r.temp, 'clip')[0]
        assert loss == pytest.approx(want.item()*r.beta/r.scales, rel=1e-4)
        frames.update({k: [z[i] for z in zs] for i,k in enumerate(batch)})

def test_the_loss_is_as_it_was_when_a_training_ends(with_bank):
    assert with_bank.loss_func.dcl is dcl_term
    cb = with_bank.bank_contrast
    assert cb.run and cb.now is None

class PowerCut(Callback):
    order = 60
    def before_step(self): raise RuntimeError('power cut')

def test_after_an_interrupt_the_next_training_begins_anew(table, small, with_bank):
    set_seed(0, 1)
    learn = cwcl_learner(cwcl_dls(table, small, device='cpu'), recipe=small, cbs=Note())
    start = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(), pytest.raises(RuntimeError): learn.fit_recipe(cbs=PowerCut())
    both = [f([torch.eye(6)], torch.arange(6) % 2, None, .07)[0] for f in (learn.loss_func.dcl, dcl_term)]
    assert torch.equal(*both)
    cb = learn.bank_contrast
    assert (cb.bank.labels[:,3] >= 0).sum() == 12
    cb.before_fit()
    assert (cb.bank.labels == -1).all()
    learn.model.load_state_dict(start)
    learn.dls.train.epoch = 0
    learn.opt = None
    for p in learn.model.parameters(): p.grad = None
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert learn.note.losses == with_bank.note.losses

@pytest.mark.parametrize('change', [dict(precision='bf16'), dict(views=2), dict(lonely='zero', exclude='video'),
    dict(reduction='sum', method='dcl'), dict(bank=500), dict(use_phase=False, sampler='pk', pk_frames=2)], ids=str)
def test_it_goes_with_other_fields(table, small, change):
    learn = fitted(table, replace(small, epochs=1, **change))
    bank = learn.bank_contrast.bank
    number = bank.labels[:,3][bank.labels[:,3] >= 0]
    assert len(number.unique()) == len(number) == min(len(bank.labels), len(set(sum(learn.note.batches, []))))
    assert all(map(math.isfinite, learn.note.losses)) and bank.keys.dtype == torch.float32

def test_chunks_are_the_same_training(table, small):
    "Without statistics of a batch, but for rounding"
    r = replace(small, norm='group', epochs=1)
    whole,parts = (fitted(table, replace(r, chunks=k)).note.losses for k in (1, 2))
    assert parts == pytest.approx(whole, rel=1e-3)

class MeanWeights(Callback):
    "Stands for the callback of that name: a network whose weights are never those in training"
    def before_fit(self): self.net = copy.deepcopy(self.model).eval().requires_grad_(False)
    def after_pred(self):
        if self.training: self.x = self.xb[0].as_subclass(torch.Tensor)

def test_averaged_weights_make_the_keys(table, small):
    learn = fitted(table, replace(small, epochs=1), [MeanWeights()])
    net = learn.mean_weights.net
    want = net.msph(net.encoder(learn.mean_weights.x)[net.levels])
    close(learn.bank_contrast.bank.keys[:,:12], normalize(torch.stack(want)), 1e-6)
    assert not torch.allclose(learn.bank_contrast.bank.keys[:,:12], normalize(torch.stack(learn.note.zs[-1])), atol=.01)

def test_a_bank_knows_equal_label_sets_only(small):
    with pytest.raises(InputError, match="bank=20 with alike='overlap'"): replace(small, alike='overlap')

def test_a_stage_without_contrast_has_no_bank(table, small):
    r = replace(small, method='dcl', stage='frozen', epochs=1)
    learn = cwcl_learner(cwcl_dls(table, r, device='cpu'), 'dcl', r)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert learn.bank_contrast.bank is None and learn.loss_func.dcl is dcl_term

@pytest.mark.parametrize('method', ['random', 'cls', 'simclr', 'byol'])
def test_a_method_that_compares_no_label_sets_is_refused(method):
    says = f"bank=8 with method='{method}'.*choose bank=0, or"
    with pytest.raises(InputError, match=says): recipe('smoke', method=method, bank=8)

def test_a_method_of_ones_own_may_have_it(monkeypatch):
    for k in ('mine', 'both'): monkeypatch.setitem(METHODS, k, None) # Gone again afterwards
    register_method('mine', loss=lambda *a: 0, goals=('dcl',))
    assert recipe('smoke', method='mine', bank=8).bank == 8
    register_method('both', loss=lambda *a: 0, goals=('dcl', 'simclr'), fields=dict(views=2))
    with pytest.raises(InputError, match='compares no frames'): recipe('smoke', method='both', bank=8)

@pytest.mark.parametrize('size', [0, 5])
def test_only_a_recipe_that_asks_has_the_callback(table, small, size):
    learn = cwcl_learner(cwcl_dls(table, small, device='cpu'), recipe=replace(small, bank=size))
    assert [o.recipe.bank for o in learn.cbs if isinstance(o, BankContrast)] == [5][:size]

# Several processes

def banked(table, r, averaged=False):
    "Train; return the weights, and what the bank holds"
    learn = double_learner(table, r)
    if averaged: learn.add_cb(MeanWeights())
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(): learn.fit_recipe()
    bank = learn.bank_contrast.bank
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    return weights.numpy(), bank.labels.numpy(), bank.keys.numpy()

@pytest.mark.parametrize('views,averaged', [(1, False), (2, True)])
def test_two_processes_fill_one_bank(tiny, views, averaged):
    r = replace(TINY, epochs=1, valid_step=8, bank=26, views=views)
    alone = banked(tiny, r, averaged)
    a,b = on_ranks(banked, 2, tiny, r, averaged)
    for x,y in zip(a, b): assert (x == y).all()
    assert (a[1] == alone[1]).all() and abs(a[0] - alone[0]).max() < 1e-8 and abs(a[2] - alone[2]).max() < 1e-6

def test_frames_without_a_clip_are_compared_with_all():
    torch.manual_seed(0)
    z,k = torch.randn(3, 4),torch.randn(5, 4)
    labels = torch.tensor([[7, -1, 0, 0], [7, -1, 0, 1], [8, -1, 0, 2]])
    kept = torch.tensor([[8, -1, 0, 10 + i] for i in range(5)])
    assert not ignored_keys(labels, kept).any() and bank_term([z], labels, [k], kept)[1] == 0
    assert ignored_keys(labels.clamp(min=0), kept.clamp(min=0)).all()

def test_a_bank_takes_an_embedding_for_each_label():
    bank = LabelBank(8, 1, 2)
    labels = torch.tensor([[7, 0, 0, 10], [8, 1, 0, 11]])
    with pytest.raises(ValueError, match='one for each label'): bank.push([torch.randn(4, 2)], labels)
    with pytest.raises(ValueError, match='one for each label'): bank.push([torch.randn(2, 2)]*2, labels)
    for k in ('reduction', 'lonely'):
        call = partial(bank_term, [torch.randn(2, 2)], labels, bank.keys, bank.labels, **{k: 'some'})
        with pytest.raises(ValueError, match=f"{k}='some'"): call()
    loss,lonely = bank_term([torch.randn(0, 2)], labels[:0], bank.keys, bank.labels)
    assert loss == 0 and lonely == 0
