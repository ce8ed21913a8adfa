"The fast deep contrastive loss against the plain one: values, gradients, blocks, other frames, memory"
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from cwcl.losses import fast_contrast
from cwcl.losses.contrastive import deep_contrastive_loss
from cwcl.losses.fast_contrast import contrast_sum, row_pairs
from cwcl.pairs import positive_mask
from cwcl.tasks import dcl_term, plain_dcl_term

def batch(seed, n=50, d=8, sets=6, scales=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    zs = [(torch.randn(n, d, generator=g)*5).to(dtype).requires_grad_() for _ in range(scales)]
    return zs, torch.randint(-1, sets, (n,), generator=g), torch.randint(0, 4, (n,), generator=g)

def close(a, b, tol=1e-10): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

def same_loss(got, want, zs, tol=1e-10):
    "Value and gradients of two losses agree"
    close(got, want, tol)
    grads = [torch.autograd.grad(o, zs) for o in (got, want)]
    for a,b in zip(*grads): close(a, b, tol)

def oracle(zs, ids, temp, group=None, reduction='sum'):
    pos = positive_mask(ids, exclude=group)
    ignore = None if group is None else positive_mask(ids) & ~pos
    return deep_contrastive_loss(zs, pos, temp, reduction, ignore)

@pytest.mark.parametrize('n', [1, 2, 7, 50])
@pytest.mark.parametrize('sets', [1, 5, 1000])
@pytest.mark.parametrize('grouped', [False, True])
@pytest.mark.parametrize('temp', [.5, .07, .005])
def test_rows_are_the_plain_form(n, sets, grouped, temp):
    for seed in range(3):
        zs,ids,group = batch(seed, n, sets=sets)
        group = group if grouped else None
        for block in (None, 1, 3, n):
            loss,found = contrast_sum(zs, ids, temp, group, block=block)
            assert found == positive_mask(ids, exclude=group).any(1).sum()
            same_loss(loss, oracle(zs, ids, temp, group), zs)

@pytest.mark.parametrize('change', [dict(), dict(lonely='zero'), dict(reduction='sum')])
@pytest.mark.parametrize('grouped', [False, True])
def test_a_term_is_that_of_lesson_23(change, grouped):
    for seed in range(4):
        zs,ids,group = batch(seed, 30, sets=20)
        both = [f(zs, ids, group if grouped else None, .07, **change) for f in (dcl_term, plain_dcl_term)]
        same_loss(both[0][0], both[1][0], zs)
        close(both[0][1], both[1][1])

def test_a_step_in_single_precision_differs_by_rounding():
    for seed in range(4):
        zs,ids,_ = batch(seed, 200, 128, 40, dtype=torch.float32)
        both = [f(zs, ids, None, .07)[0] for f in (dcl_term, plain_dcl_term)]
        grads = [torch.cat(torch.autograd.grad(o, zs)) for o in both]
        assert abs(both[0]/both[1] - 1) < 1e-6 and (grads[0] - grads[1]).norm() < 1e-6*grads[1].norm()

@pytest.mark.parametrize('block', [None, 4])
@pytest.mark.parametrize('grouped', [False, True])
@pytest.mark.parametrize('temp', [.2, .005])
def test_some_anchors_against_all_frames(block, grouped, temp):
    "As one of several GPUs computes it: the sums of the parts, and the gradients into anchors and others"
    zs,ids,group = batch(1, 20)
    group = group if grouped else None
    parts = []
    for a,b in ((0, 6), (6, 7), (7, 20)):
        labels = dict(group=None if group is None else group[a:b], ref_group=group)
        mine = [z[a:b] for z in zs]
        parts.append(contrast_sum(mine, ids[a:b], temp, ref=zs, ref_ids=ids, own=a, block=block, **labels)[0])
    same_loss(sum(parts), oracle(zs, ids, temp, group), zs)

def test_a_bank_is_compared_with_and_takes_no_gradient():
    zs,ids,_ = batch(0, 9)
    bank,bank_ids,_ = batch(1, 30)
    old = [o.detach() for o in bank]
    loss,found = contrast_sum(zs, ids, .1, ref=old, ref_ids=bank_ids)
    def plain(z, b):
        z,b = (torch.nn.functional.normalize(o, dim=1) for o in (z, b))
        pos = positive_mask(ids, bank_ids)
        return ((-(z @ b.T/.1).log_softmax(1)).where(pos, 0).sum(1)/pos.sum(1).clamp(min=1)).sum()
    same_loss(loss, sum(map(plain, zs, bank)), zs)
    one = contrast_sum(zs[:1], ids, .1, ref=old[:1], ref_ids=bank_ids)[0]
    same_loss(one, plain(zs[0], old[0]), zs[:1])
    loss = contrast_sum([o.detach() for o in zs], ids, .1, ref=bank, ref_ids=bank_ids)[0]
    same_loss(loss, sum(map(plain, zs, bank)), bank)
    both = contrast_sum(zs, ids, .1, ref=[torch.cat([b, z]) for z,b in zip(zs, old)],
        ref_ids=torch.cat([torch.full((30,), -1), ids]), own=30, block=2)[0]
    assert both > oracle(zs, ids, .1)
    assert found == positive_mask(ids, bank_ids).any(1).sum() and found.dtype == torch.int64

@pytest.mark.parametrize('block', [None, 3])
@pytest.mark.parametrize('grouped', [False, True])
@pytest.mark.parametrize('temp', [.2, .005])
def test_ignored_pairs_are_not_there(block, grouped, temp):
    "Anchor by anchor, against the frames that are left for it; some anchors have none"
    for seed in range(4):
        zs,ids,group = batch(seed, 12, sets=4)
        out = torch.rand(12, 12, generator=torch.Generator().manual_seed(seed)) < .5
        out[0] = True
        g = group if grouped else None
        got,found = contrast_sum(zs, ids, temp, g, zs, ids, g, own=0, ignore=out, block=block)
        each = []
        for i in range(12):
            left = [i, *(j for j in range(12) if j != i and not out[i,j])]
            labels = dict(group=group[[i]], ref_group=group[left]) if grouped else {}
            labels.update(ref=[z[left] for z in zs], ref_ids=ids[left], own=0)
            each.append(contrast_sum([z[[i]] for z in zs], ids[[i]], temp, **labels))
        want,has = (sum(o) for o in zip(*each))
        assert found == has and 0 < has < 12
        same_loss(got, want, zs)

def test_what_to_ignore_must_fit():
    zs,ids,_ = batch(0, 5)
    with pytest.raises(ValueError, match='ignore without ref'): contrast_sum(zs, ids, ignore=ids[:,None] == ids)
    with pytest.raises(ValueError, match='N=5 anchors and M=5 frames, got .5, 4'):
        contrast_sum(zs, ids, ref=zs, ref_ids=ids, own=0, ignore=torch.zeros(5, 4, dtype=torch.bool))

@pytest.mark.parametrize('grouped', [False, True])
def test_gradcheck_once_and_twice(grouped):
    zs,ids,group = batch(3, 6, 3, 2, 2)
    g = group if grouped else None
    other = [o.detach()+1 for o in zs]
    for o in other: o.requires_grad_()
    def alone(*zs): return contrast_sum(zs, ids, .3, g, block=4)[0]
    def apart(*o): return contrast_sum(o[:2], ids, .3, g, ref=o[2:], ref_ids=ids, ref_group=g, own=0)[0]
    for f,args in ((alone, zs), (apart, (*zs, *other)), (apart, (*zs, *[o.detach() for o in other]))):
        assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)

def test_without_a_gradient_nothing_of_it_is_made():
    zs,ids,_ = batch(0, 20)
    want = oracle(zs, ids, .07).item()
    with torch.no_grad(): loss = contrast_sum(zs, ids)[0]
    assert not loss.requires_grad and abs(loss.item() - want) < 1e-9
    loss = contrast_sum([z.detach() for z in zs], ids)[0]
    assert not loss.requires_grad and abs(loss.item() - want) < 1e-9

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    zs,ids,_ = batch(1, 20, dtype=dtype)
    want = oracle([z.float() for z in zs], ids, .07)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = contrast_sum(zs, ids)[0]
        grads = torch.autograd.grad(loss, zs, create_graph=True)
    assert loss.dtype == torch.float32 and abs(loss/want - 1) < 1e-6
    for a,b in zip(grads, torch.autograd.grad(want, zs)): close(a, b, 1e-2 if dtype == torch.bfloat16 else 2e-3)

def test_scales_may_differ_in_length_and_a_zero_has_a_gradient():
    g = torch.Generator().manual_seed(0)
    zs = [torch.randn(12, d, generator=g, dtype=torch.float64).requires_grad_() for d in (3, 7, 5)]
    ids = torch.arange(12) % 5
    same_loss(contrast_sum(zs, ids)[0], oracle(zs, ids, .07), zs)
    zero = torch.zeros(4, 3, requires_grad=True)
    contrast_sum([zero], torch.zeros(4).long())[0].backward()
    assert zero.grad.isfinite().all()

def test_nobody_and_nothing():
    for n in (0, 1, 4):
        zs = [torch.randn(n, 3, requires_grad=True)]
        loss,found = contrast_sum(zs, torch.arange(n))
        assert loss == 0 and found == 0 and (torch.autograd.grad(loss, zs)[0] == 0).all()
        loss,lonely = dcl_term(zs, torch.arange(n), None, .07)
        assert loss == 0 and lonely == (1 if n else 0)

def test_a_nan_is_not_hidden():
    zs,ids,_ = batch(0, 6)
    assert contrast_sum([zs[0]*torch.nan], ids)[0].isnan()

class Largest(TorchDispatchMode):
    "Remember the largest tensor that was made"
    numbers = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(o, torch.Tensor): self.numbers = max(self.numbers, o.untyped_storage().nbytes()//o.itemsize)
        return out

def test_no_table_of_all_pairs_is_ever_made():
    n = 3000
    zs,ids,group = batch(0, n, 4, dtype=torch.float32)
    with Largest() as seen: contrast_sum(zs, ids, group=group)[0].backward()
    assert seen.numbers <= 3*2**20 < n*n
    with Largest() as seen: oracle(zs, ids, .07).backward()
    assert seen.numbers >= n*n

def test_the_plain_form_is_not_taken_unasked(monkeypatch):
    "Only for a second derivative, or below the temperature at which exponentials overflow"
    zs,ids,_ = batch(0, 9)
    monkeypatch.setattr(fast_contrast, '_plain_sum', None)
    contrast_sum(zs, ids, .026)[0].backward()
    loss = contrast_sum(zs, ids)[0]
    for f in (lambda: contrast_sum(zs, ids, .024), lambda: torch.autograd.grad(loss, zs, create_graph=True)):
        with pytest.raises(TypeError): f()

def test_low_temperatures_do_not_overflow():
    zs,ids,_ = batch(0, 9, dtype=torch.float32)
    for temp in (1e-4, .005, .0249, .0251, .05, 1e4):
        loss = contrast_sum(zs, ids, temp)[0]
        assert loss.isfinite() and all(o.isfinite().all() for o in torch.autograd.grad(loss, zs))
        torch.testing.assert_close(loss, oracle(zs, ids, temp), rtol=1e-5, atol=1e-4)

def test_pairs_of_rows_are_rows_of_the_mask():
    _,ids,group = batch(0)
    whole = positive_mask(ids)
    for a,b in ((0, 50), (3, 9), (49, 50)):
        assert torch.equal(row_pairs(ids[a:b], ids, own=a)[0], whole[a:b])
        pos,ignored = row_pairs(ids[a:b], ids, group[a:b], group, a)
        assert torch.equal(pos, positive_mask(ids, exclude=group)[a:b]) and torch.equal(pos | ignored, whole[a:b])

def test_on_pretended_cuda():
    with FakeTensorMode():
        zs = [torch.randn(6, 4, device='cuda') for _ in range(2)]
        ids = torch.zeros(6, device='cuda', dtype=torch.int64)
        loss,found = contrast_sum(zs, ids, group=ids, block=4)
        assert loss.device.type == found.device.type == 'cuda' and loss.shape == found.shape == ()
        assert all(o.device.type == 'cuda' for o in dcl_term(zs, ids, None, .01))

@pytest.mark.parametrize('call, words', [
    (lambda zs, ids: contrast_sum([], ids), 'no scale'),
    (lambda zs, ids: contrast_sum(zs[0], ids), r'\(N,D\).*\(8,\)'),
    (lambda zs, ids: contrast_sum([z.long() for z in zs], ids), 'int64'),
    (lambda zs, ids: contrast_sum(zs, ids[:9]), r'zs holds 50 frames.*\(9,\)'),
    (lambda zs, ids: contrast_sum([zs[0], zs[1][:7]], ids), r'50 frames.*\(7,\)'),
    (lambda zs, ids: contrast_sum(zs, ids, group=ids[:3]), r'groups.*\(3,\)'),
    (lambda zs, ids: contrast_sum(zs, ids, 0), 'temp=0'),
    (lambda zs, ids: contrast_sum(zs, ids, ref=zs, ref_ids=ids[:2]), r'ref holds 50.*\(2,\)'),
    (lambda zs, ids: contrast_sum(zs, ids, ref=zs), 'ref_ids'),
    (lambda zs, ids: contrast_sum(zs, ids, ref=[z[:, :3] for z in zs], ref_ids=ids), 'length'),
    (lambda zs, ids: contrast_sum(zs, ids, ref=zs, ref_ids=ids, own=3), 'own=3'),
    (lambda zs, ids: contrast_sum(zs, ids, group=ids, ref=zs, ref_ids=ids), 'ref_group'),
])
def test_impossible_input_is_named(call, words):
    zs,ids,_ = batch(0)
    with pytest.raises(ValueError, match=words): call(zs, ids)

def test_what_it_cannot_do_is_said():
    z,ids = torch.randn(4, 3),torch.tensor([1, 1, 2, 2])
    temp = torch.tensor(.07, requires_grad=True)
    with pytest.raises(ValueError, match='take deep_contrastive_loss'): contrast_sum([z], ids, temp)
    with pytest.raises(ValueError, match='ids must be integers'): contrast_sum([z], ids.float())
    with pytest.raises(ValueError, match='groups must be integers'): contrast_sum([z], ids, group=ids.float())
    with pytest.raises(ValueError, match='block=0'): contrast_sum([z], ids, block=0)

def test_anchors_and_frames_of_two_types_are_named():
    zs,ids = [torch.randn(4, 8, dtype=torch.float64)],torch.arange(4)
    with pytest.raises(ValueError, match='zs and ref of torch.float32 and torch.float64: give one type'):
        contrast_sum(zs, ids, ref=[zs[0].float()], ref_ids=ids)
