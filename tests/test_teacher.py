"The class-constrained teacher against literal loops over pixels and boxes, and the step that it is part of"
import pytest, torch, torch.nn.functional as F
from dataclasses import replace
from math import sqrt
from fastai.callback.core import Callback
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.beyond.average import draw_recolor, recolor
from cwcl.beyond.teacher import ClassTeacher, absent_loss, allowed_classes, draw_boxes, in_boxes, pasted, ramp_up
from cwcl.beyond.teacher import teacher_loss, teacher_masks
from cwcl.core import InputError, method_recipe, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.tasks import bare
from cwcl.multitask import cwcl_learner, step_rng
from cwcl.recompute import frozen_running_stats

def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol)

def case(seed, n=4, c=5, h=6, w=7):
    "Logits and presence; the last frame has no label"
    g = torch.Generator().manual_seed(seed)
    presence = (torch.rand(n, c, generator=g) < .6).float()
    presence[0,0],presence[-1] = 1,0
    return 3*torch.randn(n, c, h, w, generator=g), presence

def literal_masks(logits, presence, sure):
    "Target of each pixel from the classes of its frame; every class without a presence"
    n,c,h,w = logits.shape
    y = torch.zeros(n, h, w, dtype=torch.long)
    for k in range(n):
        there = [i for i in range(c) if presence is None or presence[k,i] > .5] or list(range(c))
        for i in range(h):
            for j in range(w):
                e = {o: logits[k,o,i,j].exp().item() for o in there}
                best = max(e, key=e.get)
                y[k,i,j] = best if e[best]/sum(e.values()) >= sure else 255
    return y

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('sure', [0., .6, .95])
def test_masks_are_the_literal_loop(seed, sure):
    logits,presence = case(seed)
    bound = teacher_masks(logits, allowed_classes(presence), sure)
    assert torch.equal(bound, literal_masks(logits, presence, sure))
    free = teacher_masks(logits, None, sure)
    assert torch.equal(free, literal_masks(logits, None, sure)) and not torch.equal(free, bound)
    assert torch.equal(free[-1], bound[-1])
    kept = bound != 255
    assert kept.all() if sure == 0 else 0 < kept.float().mean() < 1

def test_a_pixel_exactly_as_sure_as_asked_is_kept():
    logits = torch.tensor([.5, .5]).log()[None,:,None,None]
    assert teacher_masks(logits, None, .5).item() == 0 and teacher_masks(logits, None, .5001).item() == 255

@pytest.mark.parametrize('size', [(40, 60), (64, 64)])
def test_boxes_are_the_literal_loop(size):
    n,batch = 300,305
    rng = torch.Generator().manual_seed(0)
    u = torch.rand(n, 6, generator=torch.Generator().manual_seed(0))
    boxes = draw_boxes(n, batch, size, .5, rng)
    for k,((top,bottom,left,right,source),o) in enumerate(zip(boxes.tolist(), u.tolist())):
        area,ratio = .1 + .3*o[0],4**(o[1] - .5)
        assert source == (batch-n+k + 1 + int(o[4]*(batch-1))) % batch != batch-n+k
        assert abs(right-left - size[1]*sqrt(area/ratio)) <= .51 and 0 <= left and right <= size[1]
        if o[5] >= .5: assert top == bottom
        else: assert abs(bottom-top - size[0]*sqrt(area*ratio)) <= .51 and 0 <= top and bottom <= size[0]
    used = boxes[boxes[:,1] > boxes[:,0]]
    assert used[:,0].min() < 3 and used[:,1].max() > size[0]-3 and len(set(boxes[:,4].tolist())) > 150

@pytest.mark.parametrize('p', [0., 1.])
def test_all_frames_or_none_have_a_box(p):
    boxes = draw_boxes(200, 250, (40, 60), p)
    assert ((boxes[:,1] > boxes[:,0]) == bool(p)).all()

@pytest.mark.parametrize('channels', [(), (3,)])
def test_pasting_is_the_literal_loop(channels):
    every = torch.randn(7, *channels, 12, 16)
    boxes = draw_boxes(4, 7, (12, 16), .8, torch.Generator().manual_seed(2))
    got = pasted(every, boxes, in_boxes(boxes, (12, 16)))
    want = every[3:].clone()
    for k,(top,bottom,left,right,source) in enumerate(boxes.tolist()):
        want[k,...,top:bottom,left:right] = every[source,...,top:bottom,left:right]
    assert torch.equal(got, want) and not torch.equal(got, every[3:])

def test_losses_are_the_literal_loops():
    logits,presence = case(3)
    logits = logits.double().requires_grad_()
    target = teacher_masks(logits, allowed_classes(presence), .6)
    p = logits.softmax(1)
    allowed = allowed_classes(presence)[:,:,None,None]
    n,c,h,w = logits.shape
    teacher = absent = 0
    for k in range(n):
        for i in range(h):
            for j in range(w):
                if target[k,i,j] != 255: teacher = teacher - p[k,target[k,i,j],i,j].log()
                absent = absent - sum(p[k,o,i,j] for o in range(c) if allowed[k,o]).log()
    for got,want in ((teacher_loss(logits, target), teacher/(n*h*w)), (absent_loss(logits, allowed), absent/(n*h*w))):
        close(got, want)
        close(*[torch.autograd.grad(o, logits, retain_graph=True)[0] for o in (got, want)])
    peer = F.cross_entropy(logits, target, ignore_index=255, reduction='sum')
    close(teacher_loss(logits, target)*target.numel(), peer)
    small = logits[:,:,:2,:2].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda o: teacher_loss(o, target[:,:2,:2]), small)
    assert torch.autograd.gradcheck(lambda o: absent_loss(o, allowed), small)

def test_half_precision_is_computed_in_single():
    logits,presence = case(1)
    target = teacher_masks(logits)
    allowed = allowed_classes(presence)[:,:,None,None]
    half = (30*logits).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for f,o in ((teacher_loss, target), (absent_loss, allowed)):
            got = f(half, o)
            assert got.dtype == torch.float32 and torch.equal(got, f(half.float(), o)) and got.isfinite()

def test_nothing_sure_is_a_differentiable_zero():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = teacher_loss(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()

def test_the_teacher_is_heard_after_a_while():
    assert [ramp_up(o) for o in (0, .1, .15)] == [0, 0, 0]
    close([ramp_up(o) for o in (.18, .225, .3, .7, 1)], [.2, .5, 1., 1., 1.])

# In a training

@pytest.fixture(scope='session')
def small(smoke): return replace(smoke, method='random', batch=10, labelled=4, epochs=1, average=.8, colors=.5,
    teacher=1., sure=.6, absent=.3, crop=32)

def learner(table, r, *cbs):
    "A Learner whose network is sure of something before it has learned anything"
    set_seed(r.seed, r.threads)
    learn = cwcl_learner(cwcl_dls(table, r, device='cpu'), r.method, r, cbs=cbs)
    learn.model.decoder.head.weight.data *= 20
    return learn

def quiet(learn, f=lambda o: o.fit_recipe()):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return learn

class Before(Callback):
    "The loss of a step before the class-only frames have taught, and the running averages"
    order = -4
    def before_fit(self): self.losses,self.norms = [],[]
    def before_batch(self): self.given = torch.Tensor(self.xb[0]).clone()
    def after_loss(self):
        if not self.training: return
        self.losses.append(self.loss_grad.detach())
        self.norms.append([b.clone() for b in bare(self.model).buffers()])

class Oracle(Callback):
    "What the step should have added, from its batch, pixel by pixel"
    order = 4
    def before_fit(self): self.rows = []
    def after_loss(self):
        if not self.training or self.iter not in (0, 2, self.n_iter-1): return
        cb = self.learn.class_teacher
        net = bare(self.model)
        r = cb.r
        done = (self.epoch*self.n_iter + self.iter)/(self.n_epoch*self.n_iter)
        weight = r.teacher*min(max((done - .15)/.15, 0), 1)
        o = cb.seen
        n = len(self.yb[0])
        boxes,inside = o.cut
        self.check_view(o, boxes.tolist(), n, r)
        presence = torch.Tensor(self.yb[1])
        with torch.no_grad(), torch.autocast('cpu', enabled=r.precision == 'bf16', dtype=torch.bfloat16):
            seen = self.learn.mean_weights.net.segment(o.frames[n:]).float()
            with frozen_running_stats(net): logits = net.segment(o.view).float()
        own = literal_masks(seen, presence[n:] if r.allowed else None, r.sure)
        target = own.clone()
        there = presence[n:,:,None,None].expand(-1, -1, *own.shape[1:]).clone()
        for k,(top,bottom,left,right,source) in enumerate(boxes.tolist()):
            other = self.yb[0][source] if source < n else own[source-n]
            target[k,top:bottom,left:right] = torch.as_tensor(other)[top:bottom,left:right]
            there[k,:,top:bottom,left:right] = presence[source][:,None,None]
        teacher = F.cross_entropy(logits, target, ignore_index=255, reduction='sum')/target.numel()
        absent = -(logits.softmax(1)*there).sum(1).log().mean()
        added = self.learn.loss_grad.detach() - self.learn.before.losses[-1]
        want = weight*teacher + r.absent*absent
        self.rows.append((weight, added, want, (own != 255).float().mean(), dict(self.loss_func.terms)))

    def check_view(self, o, boxes, n, r):
        "The batch as it was given, with other colors on every frame, and boxes"
        assert torch.equal(o.frames, self.learn.before.given)
        net = self.model
        rng = step_rng(self.learn, 82)
        strong = o.frames
        if r.colors: strong = recolor(strong, draw_recolor(len(strong), r.colors, 1., rng), -net.mean/net.std)
        assert draw_boxes(len(strong)-n, len(strong), strong.shape[2:], r.boxes, rng).tolist() == boxes
        view = strong[n:].clone()
        for k,(top,bottom,left,right,source) in enumerate(boxes):
            place = slice(None), slice(top, bottom), slice(left, right)
            view[k][place] = strong[source][place]
        close(o.view, view)
        assert not r.colors or (view != o.frames[n:]).flatten(1).any(1).all()

@pytest.mark.parametrize('change', [{}, dict(allowed=False, boxes=1., method='dcl+cls'), dict(boxes=0., colors=0.),
    dict(precision='bf16'), dict(stage='frozen', method='cls', sure=0.)], ids=str)
def test_a_step_is_the_literal_one(table, small, change):
    r = replace(small, **change)
    learn = quiet(learner(table, r, Before(), Oracle()))
    weights = [o[0] for o in learn.oracle.rows]
    assert weights[0] == 0 < weights[1] < 1 == weights[2]
    half = r.precision == 'bf16'
    for weight,added,want,sure,terms in learn.oracle.rows:
        close(added, want, 2e-2 if half else 1e-5)
        close(terms['sure'], sure if weight else 0., 2e-2 if half else 1e-6)
        if not weight: assert terms['teacher'] == 0
    seen = torch.stack([o[3] for o in learn.oracle.rows])
    assert 0 < seen.mean() < 1 if r.sure else seen.mean() == 1
    assert learn.recorder.metric_names[-5:-1] == ['teacher', 'sure', 'absent', 'mean_iou']

def test_only_the_student_learns_and_batch_norm_forgets_the_view(table, small):
    "The running averages of a first step are those without class-only frames; the teacher's move once a step"
    class Grads(Callback):
        order = 40
        def before_step(self):
            if hasattr(self, 'grad') or self.learn.class_teacher.weight < 1: return
            self.grad = True
            assert all(p.grad is None and not p.requires_grad for p in self.learn.mean_weights.net.parameters())
            norms = [o for o in self.learn.mean_weights.net.modules() if isinstance(o, torch.nn.BatchNorm2d)]
            assert {o.training for o in norms} == {False}
            assert {o.num_batches_tracked.item() for o in norms} == {self.train_iter}
    plain = replace(small, teacher=0., absent=0.)
    on,off = quiet(learner(table, small, Before(), Grads())),quiet(learner(table, plain, Before()))
    assert on.grads.grad
    for a,b in zip(on.before.norms[0], off.before.norms[0]): assert torch.equal(a, b)
    assert on.before.losses[0] == off.before.losses[0] and on.before.losses[-1] != off.before.losses[-1]

def grads(table, r):
    "Gradients of the decoder that the second half of a step adds"
    found = []
    class Look(Callback):
        order = -2.5
        def after_loss(self):
            if not self.training or not self.learn.class_teacher.weight: return
            weights = [p for p in self.model.parameters() if p.requires_grad]
            loss = self.learn.loss_grad - self.plain
            found.append([o is not None and bool(o.abs().sum()) for o in
                torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)])
    class Earlier(Callback):
        order = -3.5
        def after_loss(self): self.learn.look.plain = self.learn.loss_grad
    quiet(learner(table, r, Earlier(), Look()))
    return found

def test_encoder_and_decoder_learn_from_class_only_frames(table, small):
    found = grads(table, replace(small, absent=0.))
    assert len(found) > 3 and sum(found[-1]) > .9*len(found[-1])

def test_without_its_weights_nothing_changes(table, small):
    off = dict(teacher=0., absent=0.)
    runs = [quiet(learner(table, replace(small, **off, **o))) for o in ({}, dict(sure=.1, allowed=False, boxes=1.))]
    assert list(runs[0].recorder.losses) == list(runs[1].recorder.losses)
    assert not hasattr(runs[0], 'class_teacher') and 'sure' not in runs[0].recorder.metric_names

def test_labelled_frames_are_those_without_a_teacher(table, small):
    on,off = (cwcl_dls(table, replace(small, teacher=t, absent=0.), device='cpu').train for t in (1., 0.))
    for a,b in zip(on, off):
        assert len(a[0]) == 10 and len(b[0]) == 4 == len(b[1])
        for p,q in zip(a, b): assert torch.equal(p[:4], q)

def test_absent_classes_need_no_average(table, small):
    learn = quiet(learner(table, replace(small, teacher=0., average=0., absent=1.)))
    assert not hasattr(learn, 'mean_weights') and learn.recorder.metric_names[-3:-1] == ['absent', 'mean_iou']
    assert [type(o) for o in learner(table, small).cbs].count(ClassTeacher) == 1

def test_the_filter_and_the_boxes_can_be_switched_off(table, small):
    losses = [tuple(quiet(learner(table, replace(small, absent=0., **o))).recorder.losses) for o in
        ({}, dict(allowed=False), dict(boxes=0.), dict(sure=.9), dict(colors=0.))]
    assert len(set(losses)) == 5

def test_a_first_stage_has_nothing_to_teach(table, small):
    r = replace(small, method='cls', stage='pretrain')
    learn = quiet(learner(table, r))
    assert learn.class_teacher.columns == [] and learn.class_teacher.seen is None
    assert not {'teacher', 'sure', 'absent'} & set(learn.recorder.metric_names)

def test_the_rate_finder_and_validation_are_left_out(table, small):
    learn = learner(table, small)
    with learn.no_bar(): learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    with learn.no_bar(): learn.validate()
    assert 'teacher' not in learn.loss_func.terms and learn.class_teacher.seen is None

@pytest.mark.parametrize('change,says', [
    (dict(average=0.), 'teacher=1.0 with average=0.0: the teacher is the averaged'),
    (dict(batch=4), 'teacher=1.0 with batch=4, labelled=4'), (dict(teacher=0., batch=4), 'absent=0.3 with batch=4'),
    (dict(views=2), 'teacher=1.0 with views=2'), (dict(chunks=2), 'teacher=1.0 with chunks=2'),
    (dict(sure=2.), 'sure=2'),
    (dict(method='simclr', views=2), 'views=2: it takes each frame once'), (dict(boxes=-.1), 'boxes=-0.1')], ids=str)
def test_what_does_not_go_together_is_one_line(small, change, says):
    with pytest.raises(InputError, match=says) as e: replace(small, **change)
    assert '\n' not in str(e.value)

def test_two_stages_may_have_two_views_first(small):
    for stage in ('pretrain', 'frozen'): assert replace(method_recipe(small, 'byol'), stage=stage).teacher == 1

def test_several_processes_are_refused(table, small, monkeypatch):
    learn = learner(table, small)
    monkeypatch.setattr('cwcl.beyond.teacher.ranks', lambda: (0, 2))
    with pytest.raises(InputError, match='teacher with 2 processes: boxes come from the whole batch'): quiet(learn)

def test_a_pretended_gpu():
    with FakeTensorMode():
        with torch.device('cuda'):
            logits = torch.randn(3, 5, 16, 16)
            presence,mask = torch.ones(3, 5),torch.zeros(2, 16, 16).long()
        allowed = allowed_classes(presence)
        boxes = draw_boxes(3, 5, (16, 16)).cuda()
        inside = in_boxes(boxes, (16, 16))
        masks = pasted(torch.cat([mask, teacher_masks(logits, allowed)]), boxes, inside)
        assert masks.device.type == inside.device.type == 'cuda'
        assert teacher_loss(logits, masks).device.type == 'cuda'
        assert absent_loss(logits, allowed[:,:,None,None]).device.type == 'cuda'

def test_a_target_of_another_size_is_refused():
    logits = torch.randn(2, 3, 8, 8)
    target = torch.randint(0, 3, (2, 8, 8))
    for bad in (target[:1], target[:,:4]):
        with pytest.raises(ValueError, match='expected \\(N,C,H,W\\) and \\(N,H,W\\)'): teacher_loss(logits, bad)
    assert teacher_loss(logits, target.to(torch.uint8)) == teacher_loss(logits, target)
    assert teacher_loss(logits[:0], target[:0]) == 0
