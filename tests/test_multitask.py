"The Learner of all tasks: what it computes, what it repeats, what it refuses"
import sys, traceback, numpy as np, pytest, torch
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from fastai.callback.core import Callback, CancelFitException, CancelStepException
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from cwcl.arithmetic import check_compiler
from cwcl.baselines.byol import byol_recipe
from cwcl.core import InputError, loss_weights, recipe, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.losses.contrastive import deep_contrastive_loss
from cwcl.losses.segmentation import focal_loss, generalized_dice_loss, presence_loss
from cwcl.multitask import LossGuard, LossTerms, MeanIoU, Precision, cwcl_learner
from cwcl.results import evaluate
from cwcl.tasks import CWCLLoss, CWCLNet, gradient_norms
from cwcl.pairs import label_set_ids, positive_mask

METHODS = ('random', 'dcl', 'cls', 'dcl+cls')

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f(learn)

def train(table, r, epochs=2, method='dcl+cls', look=False):
    "Weights after a short training, and its Learner"
    set_seed(r.seed, r.threads)
    dls = cwcl_dls(table, r, device='cpu')
    learn = cwcl_learner(dls, method)
    if look:
        dls.show_batch()
        dls.train.one_batch()
    quiet(learn, lambda o: o.fit_one_cycle(epochs, 1e-2))
    return learn

def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

def test_a_column_is_the_mean_over_the_steps_of_training():
    terms = LossTerms()
    def step(training=True, **values):
        terms.learn = SimpleNamespace(training=training, loss_func=SimpleNamespace(terms=values))
        terms.after_loss()
    for epoch in (1, 2):
        terms.before_train()
        for k in (1., 2., 6.): step(gdl=torch.tensor(epoch*k))
        step(dcl=5.)
        step(training=False, gdl=100., dcl=100.)
        assert (terms.mean('gdl'), terms.mean('dcl'), terms.mean('focal')) == (3*epoch, 5, None)

def outputs(dls, r):
    x,mask,presence,ids = dls.train.one_batch()
    net = CWCLNet(r).train()
    net.n_labelled = len(mask)
    return net, x, mask, presence, ids

def test_loss_is_equation_8(dls, smoke):
    for change in (dict(), dict(alpha=0.03, beta=0.1, per_scale='alpha'), dict(reduction='sum'), dict(use_phase=False)):
        r = replace(smoke, **change)
        net,x,mask,presence,ids = outputs(dls, r)
        out = net(x)
        a,b = loss_weights(r)
        pos = positive_mask(label_set_ids(presence > 0.5, ids[:, 0] if r.use_phase else None))
        seg = generalized_dice_loss(out[0], mask) + focal_loss(out[0], mask)
        cls = presence_loss(out[1], presence, reduction=r.reduction)
        dcl = deep_contrastive_loss(out[2], pos, r.temp, r.reduction)
        torch.testing.assert_close(CWCLLoss(r)(out, mask, presence, ids), seg + a*cls + b*dcl)

def test_decoder_sees_the_labelled_part_alone(dls, smoke):
    net,x,mask,_,_ = outputs(dls, smoke)
    sizes = dict(encoder=[], decoder=[])
    net.encoder.register_forward_hook(lambda m, i, o: sizes['encoder'].append(len(o[0])))
    net.decoder.register_forward_hook(lambda m, i, o: sizes['decoder'].append(len(o)))
    net(x)
    assert sizes == dict(encoder=[len(x)], decoder=[len(mask)])

def test_random_never_encodes_a_frame_without_a_mask(dls, smoke):
    net,x,mask,_,_ = outputs(dls, replace(smoke, method='random'))
    logits,presence,zs = net(x)
    assert (presence, zs) == (None, [])
    spoiled = torch.cat([x[:len(mask)], torch.full_like(x[len(mask):], torch.nan)])
    assert torch.equal(net.train()(spoiled)[0], logits)

def test_every_method_makes_as_many_steps_with_as_many_masks(table, smoke):
    seen = {}
    for method in METHODS:
        r = replace(smoke, method=method)
        set_seed(0, 1)
        dls = cwcl_dls(table, r, device='cpu')
        seen[method] = len(dls.train),dls.n_labelled,len(dls.train.one_batch()[1])
    assert len(set(seen.values())) == 1, seen

@pytest.mark.parametrize('method', METHODS)
def test_training_improves_and_the_recorder_shows_every_term(table, smoke, method):
    learn = train(table, replace(smoke, method=method), 3, method)
    names = list(learn.recorder.metric_names)
    log = {k: [row[i-1] for row in learn.recorder.values] for i,k in enumerate(names) if 0 < i < len(names)-1}
    assert log['train_loss'][-1] < log['train_loss'][0]
    want = {'gdl', 'focal', 'mean_iou'}
    if 'cls' in method: want |= {'presence'}
    if 'dcl' in method: want |= {'dcl', 'lonely'}
    assert want == set(log) - {'train_loss', 'valid_loss'}
    assert np.isfinite(np.array([log[k] for k in want])).all()

def test_a_validation_shows_no_terms_of_a_training(table, smoke):
    learn = train(table, smoke, 1)
    with learn.no_bar(): loss,*metrics = learn.validate()
    shown = {m.name: v for m,v in zip(learn.metrics, metrics)}
    assert shown.pop('mean_iou') > 0 and loss > 0
    assert set(shown.values()) == {None}

def test_two_trainings_agree_to_the_bit_also_after_looking(table, smoke):
    a,b,c = (train(table, smoke, look=look).model.state_dict() for look in (False, False, True))
    assert same(a, b)
    assert same(a, c)
    assert not same(a, train(table, replace(smoke, seed=1)).model.state_dict())

@pytest.mark.slow
def test_two_trainings_agree_to_the_bit_at_demo_size(scenes, table):
    r = recipe('demo', budget=0.5, epochs=3)
    a,b = (train(table, r, 3, look=look).model.state_dict() for look in (False, True))
    assert same(a, b)

def test_batch_norm_statistics_without_class_only_frames(dls, smoke):
    r = replace(smoke, bn_frames='labelled')
    state = {}
    for factor in (1, 5):
        set_seed(0)
        net,x,mask,_,_ = outputs(dls, r)
        x[len(mask):] *= factor
        out = net(x)
        state[factor] = net.state_dict(),out[0]
    assert same(state[1][0], state[5][0])
    assert torch.equal(state[1][1], state[5][1])

def test_two_views_double_the_batch(table, smoke):
    r = replace(smoke, views=2)
    learn = train(table, r, 1)
    x,mask,presence,ids = learn.dls.train.one_batch()
    assert (len(x), len(mask), len(presence), len(ids)) == (2*r.batch, r.labelled, 2*r.batch, 2*r.batch)

def test_left_out_pairs_are_not_positives(dls, smoke):
    net,x,mask,presence,ids = outputs(dls, smoke)
    ids = torch.zeros_like(ids)
    presence = torch.ones_like(presence)
    for exclude,share in (('none', 0.), ('clip', 1.), ('video', 1.)):
        terms = CWCLLoss(replace(smoke, exclude=exclude)).weighted_terms(net(x), mask, presence, ids)
        assert terms['lonely'][1] == share

def test_plateau_lowers_the_learning_rate(dls, smoke):
    learn = cwcl_learner(dls, recipe=replace(smoke, norm='group', schedule='plateau', patience=1, lr=1e-20, epochs=3))
    quiet(learn, lambda o: o.fit_recipe())
    lrs = sorted(set(learn.recorder.lrs), reverse=True)
    assert lrs[1] == lrs[0]*smoke.factor

class Spoil(Callback):
    "Spoil a term or a gradient in one step, or in no step"
    order = -10
    def __init__(self, what, at, value=torch.nan):
        self.what,self.at,self.value = what,at,value
        self.dcl = self.hook = None
    def before_batch(self):
        now = self.training and (self.epoch,self.iter) == self.at
        if self.dcl is None: self.dcl = self.loss_func.dcl
        def spoilt(zs, *a): return zs[0].sum()*self.value, torch.tensor(0.)
        self.loss_func.dcl = spoilt if now and self.what == 'dcl' else self.dcl
        weight = next(self.model.parameters())
        if now and self.what == 'gradient': self.hook = weight.register_hook(lambda g: g*self.value)
    def after_batch(self):
        if self.hook: self.hook.remove()

@pytest.mark.parametrize('what, said', [('dcl', 'loss term dcl became infinite or NaN'),
    ('gradient', '\tgradient became infinite or NaN')])
@pytest.mark.parametrize('value', (torch.nan, torch.inf))
@pytest.mark.parametrize('step', (0, 7))
def test_what_is_not_finite_is_named_with_its_step(dls, smoke, what, said, value, step):
    "Also if it spreads to all terms before anybody looks; the weights are those from before the epoch"
    set_seed(0, 1)
    learn = cwcl_learner(dls, recipe=smoke)
    before = {}
    class Keep(Callback):
        def before_train(self): before.update({k: v.clone() for k,v in self.model.state_dict().items()})
    where = f'in epoch 2, step {step+1} of {len(dls.train)}, at learning rate 0.01'
    with pytest.raises(InputError, match=f'{said} {where}'):
        quiet(learn, lambda o: o.fit(3, 1e-2, cbs=[Spoil(what, (1, step), value), Keep()]))
    assert same(before, learn.model.state_dict())
    assert all(not {'grad_avg', 'step'} & set(o[2]) for o in learn.opt.all_params())

def test_nobody_looks_before_the_twentieth_step(dls, smoke, monkeypatch):
    "The notes are read at steps 20 and 40, at the end of an epoch, and where a training is called off"
    learn = cwcl_learner(dls, recipe=smoke)
    looks = []
    monkeypatch.setattr(type(learn.loss_guard), 'look', lambda o: looks.append((o.epoch, o.iter)))
    monkeypatch.setattr(type(learn.loss_guard), 'every', 5)
    quiet(learn, lambda o: o.fit(1, 1e-3))
    assert looks == [(0, 4), (0, 9), (0, len(dls.train)-1)]
    class CallOff(Callback):
        def after_batch(self):
            if self.iter == 2: raise CancelFitException
    quiet(learn, lambda o: o.fit(1, 1e-3, cbs=CallOff()))
    assert looks[3:] == [(0, 2)]

def test_best_weights_on_validation_are_put_back(table, smoke):
    set_seed(0, 1)
    learn = cwcl_learner(cwcl_dls(table, smoke, device='cpu'), recipe=smoke)
    quiet(learn, lambda o: o.fit(4, 1e-2))
    best = max(row[-1] for row in learn.recorder.values)
    assert quiet(learn, lambda o: o.validate())[-1] == pytest.approx(best, abs=1e-6)

OPTIONS = [dict(precision='bf16'), dict(channels_last=True), dict(precision='bf16', channels_last=True),
    dict(norm='group'),
    dict(projection='mlp'), dict(pos_weight=True), dict(bn_frames='labelled'), dict(up='bilinear'),
    dict(gdl_pool='batch'),
    dict(sampler='pk', pk_frames=2), dict(presence_from='crop'), dict(class_set=13),
    dict(class_set=10, left_out='background')]

@pytest.mark.parametrize('change', OPTIONS, ids=str)
def test_options_train(table, smoke, change):
    r = replace(smoke, **change)
    learn = train(table, r, 1)
    assert np.isfinite(learn.recorder.values[-1][0])

def test_bfloat16_runs_the_convolutions_in_bfloat16(dls, smoke):
    learn = cwcl_learner(dls, recipe=replace(smoke, precision='bf16'))
    seen = set()
    convolution = next(o for o in learn.model.modules() if isinstance(o, nn.Conv2d))
    convolution.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    quiet(learn, lambda o: o.fit(1, 1e-3))
    assert seen == {torch.bfloat16}

def test_fp16_needs_cuda(dls, smoke):
    with pytest.raises(InputError, match='fp16 needs CUDA'): cwcl_learner(dls, recipe=replace(smoke, precision='fp16'))

def test_it_is_an_ordinary_learner(dls, smoke, tmp_path):
    learn = cwcl_learner(dls, recipe=smoke, path=tmp_path)
    assert 0 < quiet(learn, lambda o: o.lr_find(num_it=20, show_plot=False)).valley < 1
    quiet(learn, lambda o: o.fit_one_cycle(1, 1e-2))
    learn.save('a')
    before = quiet(learn, lambda o: o.validate())
    quiet(learn, lambda o: o.fit_one_cycle(1, 1e-2))
    learn.load('a')
    assert list(quiet(learn, lambda o: o.validate())[:1]) == pytest.approx(list(before[:1]))
    preds,targs,losses = quiet(learn, lambda o: o.get_preds(with_loss=True))
    assert preds.shape == (len(targs), 8, 60, 107)
    assert losses.shape == (len(targs),)
    torch.testing.assert_close(preds.sum(1), torch.ones(targs.shape))
    quiet(learn, lambda o: o.show_results(max_n=2))
    mask,_,probs = quiet(learn, lambda o: o.predict(dls.valid_ds.table.image.iloc[0]))
    assert mask.shape == (60, 107)
    assert torch.equal(torch.as_tensor(mask), probs.argmax(0))

def test_gradient_norms_leave_the_network_alone(dls, smoke):
    net,x,mask,presence,ids = outputs(dls, smoke)
    before = {k: v.clone() for k,v in net.state_dict().items()}
    norms = gradient_norms(net, CWCLLoss(smoke), (x, mask, presence, ids))
    assert same(before, net.state_dict())
    assert set(norms) == {'gdl', 'focal', 'presence', 'dcl'}
    assert all(v > 0 for v in norms.values())
    shallow = replace(smoke, skip=2, scales=1)
    assert set(gradient_norms(CWCLNet(shallow), CWCLLoss(shallow), (x, mask, presence, ids))) == set(norms)

def test_network_and_loss_on_pretended_cuda(smoke):
    with FakeTensorMode():
        with torch.device('cuda'): net = CWCLNet(smoke).train()
        def zeros(*shape, dtype=torch.int64): return torch.zeros(*shape, dtype=dtype, device='cuda')
        net.n_labelled = 2
        out = net(zeros(4, 3, 64, 64, dtype=torch.float32))
        loss = CWCLLoss(smoke)(out, zeros(2, 64, 64), zeros(4, 8, dtype=torch.float32), zeros(4, 3))
        assert loss.device.type == 'cuda'
        assert net.eval()(zeros(1, 3, 60, 107, dtype=torch.float32)).device.type == 'cuda'

def test_the_validation_score_is_over_what_the_truth_shows():
    "A pixel called a class that is not there costs its own class, and does not add a class of IoU 0"
    score = MeanIoU(3)
    score.cm = torch.tensor([[4, 0, 0], [0, 3, 1], [0, 0, 0]])
    assert score.value == pytest.approx((1 + 3/4)/2)

@torch.no_grad()
def test_an_evaluating_network_takes_as_many_windows_at_once_as_it_is_told(smoke):
    net = CWCLNet(smoke).eval()
    x = torch.rand(3, 3, smoke.height, smoke.width)
    sizes = []
    net.encoder.register_forward_pre_hook(lambda m, o: sizes.append(len(o[0])))
    want = net(x)
    assert sizes == [6]
    for windows,passes in ((1, [1]*6), (5, [4, 2])):
        sizes.clear()
        net.windows = windows
        torch.testing.assert_close(net(x), want)
        assert sizes == passes

class Step(TorchDispatchMode):
    "Count the kernels of an operation and note who reads a number back from the device; a CPU plays the device"
    FREE = ('empty', 'new_empty', 'detach', '_unsafe_view', 'scalar_tensor', '_record_function')
    def __init__(self):
        super().__init__()
        self.kernels = 0
        self.reads = []
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        view = any(o.alias_info is not None and not o.alias_info.is_write for o in f._schema.returns)
        if name in ('_local_scalar_dense', 'nonzero'): self.reads.append(caller())
        elif not view and not name.startswith(self.FREE): self.kernels += 1
        return f(*args, **kwargs or {})

def caller():
    "The line of the kit or of fastai that is being run"
    lines = [o for o in traceback.extract_stack() if '/cwcl/' in o.filename or '/fastai/' in o.filename]
    return f'{Path(lines[-1].filename).name}: {lines[-1].line}'

class Watched(Callback):
    "Count two steps in the middle of an epoch, from after a batch to after the next but one"
    order = 200
    def after_batch(self):
        if self.training and self.iter == 2: self.step.__enter__()
        if self.training and self.iter == 4: self.step.__exit__(None, None, None)

def test_a_step_waits_at_most_twice_and_is_at_most_600_kernels(table, smoke, monkeypatch):
    "Gathering, augmentation, network, losses, guard and optimizer, at the widths of the demo"
    learn = cwcl_learner(cwcl_dls(table, replace(smoke, widths=(8, 16, 32, 64, 128)), device='cpu'), cbs=Watched())
    learn.watched.step = step = Step()
    def spied(f):
        def g(x, *args, **kwargs):
            if _get_current_dispatch_mode() is step: step.reads.append(caller())
            return f(x, *args, **kwargs)
        return g
    for name in ('cpu', 'tolist', 'numpy'): monkeypatch.setattr(torch.Tensor, name, spied(getattr(torch.Tensor, name)))
    quiet(learn, lambda o: o.fit(1, 1e-3))
    assert 0 < len(step.reads) <= 2*2, step.reads
    assert all('to_detach' in o or 'torch_core' in o for o in step.reads), step.reads # fastai's smoothed loss alone
    assert 2*400 < step.kernels <= 2*600, step.kernels/2

def test_the_arithmetic_of_a_recipe_holds_in_training_and_validation_and_ends(dls, smoke):
    flags = lambda: [getattr(torch.backends.cudnn, k) for k in ('allow_tf32', 'benchmark')]
    before,seen = flags(),set()
    learn = cwcl_learner(dls, 'dcl+cls', replace(smoke, precision='fp32'))
    learn.model.register_forward_hook(lambda m, *a: seen.add((m.training, *flags())))
    quiet(learn, lambda o: o.fit(1, 1e-3))
    assert seen == {(True, False, True), (False, False, False)} and flags() == before
    seen.clear()
    rows = learn.dls.valid_ds.table[:2]
    evaluate(learn.model, learn.dls, rows, native=False)
    assert seen == {(False, False, False)}
    def stop(*args): raise KeyboardInterrupt
    learn.model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda o: o.fit(1, 1e-3))
    assert flags() == before

def test_without_a_compiler_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.10.0')
    monkeypatch.setenv('CXX', 'no-such-compiler')
    monkeypatch.setattr('cwcl.arithmetic.find_spec', lambda name: None)
    with pytest.raises(InputError, match=r'on cpu: lacks a C\+\+ compiler \(g\+\+\); install'): check_compiler('cpu')
    with pytest.raises(InputError, match='compiler .* and triton'): check_compiler('cuda')
    monkeypatch.setenv('CXX', sys.executable)
    check_compiler('cpu')
    monkeypatch.setattr(torch, '__version__', '2.6.0+cu124')
    with pytest.raises(InputError, match='lacks PyTorch 2.7; install'): check_compiler('cpu')

@pytest.mark.skipif(torch.__version__ < '2.7', reason='PyTorch 2.6 cannot compile a subclass of a tensor')
def test_a_compiled_network_learns_the_same_and_is_tested_as_it_is(dls, smoke, monkeypatch):
    "With a compiler that only counts the graphs"
    graphs = []
    def backend(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph
    compiled = nn.Module.compile
    monkeypatch.setattr('cwcl.multitask.check_compiler', lambda device: None)
    monkeypatch.setattr(nn.Module, 'compile', lambda self: compiled(self, backend=backend))
    found = []
    for o in (False, True):
        set_seed(0, 1)
        dls.train.epoch = 0
        learn = cwcl_learner(dls, 'dcl+cls', replace(smoke, compile=o))
        quiet(learn, lambda o: o.fit(1, 1e-3))
        evaluate(learn.model, learn.dls, learn.dls.valid_ds.table[:3], native=False)
        found.append(learn.model.state_dict())
    assert graphs and all(graphs)
    assert found[0].keys() == found[1].keys()
    for k,v in found[0].items(): torch.testing.assert_close(v, found[1][k], rtol=1e-5, atol=1e-6)

def test_a_learner_takes_the_method_of_its_recipe(table, smoke):
    r = replace(smoke, method='cls')
    dls = cwcl_dls(table, r, device='cpu')
    assert cwcl_learner(dls).model.recipe.method == cwcl_learner(dls, recipe=r).model.recipe.method == 'cls'
    assert cwcl_learner(dls, 'dcl', r).model.recipe.method == 'dcl'

def test_a_learner_refuses_loaders_of_other_frames_and_classes(table, smoke):
    dls = cwcl_dls(table, smoke, device='cpu')
    "Its file would say that it had trained on the crops and batches of another recipe"
    for k,v in dict(class_set=13, left_out='background', views=2, crop=32, batch=4, flip=0., fold=1).items():
        method = 'simclr' if k == 'views' else 'random'
        with pytest.raises(InputError, match=f'{k}={v!r}, but the loaders were made for {k}='):
            cwcl_learner(dls, recipe=replace(smoke, method=method, **{k: v}))
    alone = cwcl_dls(table, replace(smoke, method='random'), device='cpu')
    with pytest.raises(InputError, match="method='random' give those with masks"): cwcl_learner(alone, 'dcl')
    taught = replace(smoke, method='random', teacher=1., average=.9)
    with pytest.raises(InputError, match="method='random' give those with masks"): cwcl_learner(alone, recipe=taught)
    with pytest.raises(InputError, match='take byol_learner'): cwcl_learner(dls, recipe=byol_recipe(smoke))

def test_a_loss_guard_remembers_when_terms_come_and_go():
    guard = LossGuard()
    guard.first,guard.learn = {},SimpleNamespace(iter=3)
    guard.note(loss=torch.tensor(torch.nan), gdl=torch.tensor(torch.nan))
    guard.learn.iter = 4
    guard.note(loss=torch.tensor(1.), gdl=torch.tensor(1.), teacher=torch.tensor(1.))
    guard.stop = lambda what, step: (_ for _ in ()).throw(InputError(f'{what} in step {step}'))
    with pytest.raises(InputError, match='loss term gdl in step 3'): guard.look()

def test_a_training_whose_every_step_is_skipped_ends():
    "In fp16 a gradient that is never finite halves the scale and leaves the weights as they were"
    guard = LossGuard()
    guard.stop = lambda what, step: (_ for _ in ()).throw(InputError(f'{what}, {step}'))
    for enabled,scale in ((True, 1.), (False, .5), (True, .5)):
        scaler = SimpleNamespace(is_enabled=lambda: enabled, get_scale=lambda: scale)
        guard.first,guard.learn = {},SimpleNamespace(iter=19, scaler=scaler)
        guard.note(loss=torch.tensor(1.))
        if enabled and scale < 1:
            with pytest.raises(InputError, match='gradient of every step, 19'): guard.look()
        else: guard.look()

@pytest.mark.parametrize('finite', [True, False])
def test_a_step_in_half_precision_reads_no_scale(finite):
    p = Precision('fp16')
    def step(optimizer): optimizer.step() if finite else None
    def read(): raise AssertionError('was read from the device')
    p.learn = SimpleNamespace(scaler=SimpleNamespace(step=step, get_scale=read))
    with nullcontext() if finite else pytest.raises(CancelStepException): p.before_step()
    assert p.skipped != finite
