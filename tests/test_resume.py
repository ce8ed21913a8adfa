"A training that was stopped and resumed is the same training, to the bit"
import itertools, json, pytest, torch
from dataclasses import replace
from types import SimpleNamespace
from fastai.callback.core import Callback, CancelFitException
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.amp import GradScaler
from cwcl import resume
from cwcl.core import InputError, find_method, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.multitask import MeanIoU
from cwcl.resume import ResumeCallback, pack, read_checkpoint, unpack
from cwcl.whole import read_tensors, save_tensors
from frames import few_frames

PLATEAU = dict(schedule='plateau', patience=1, lr=1e-2)
PRE = dict(method='dcl', stage='pretrain')
HALF = dict(precision='bf16', epochs=2, crop=32)
RUNS = dict(last=dict(), best=dict(select='best'), bf16=HALF, plateau=PLATEAU, pretrain=PRE,
    waiting=dict(PLATEAU, patience=2, select='best'), sinking=dict(PLATEAU, **PRE) | dict(lr=1e-20),
    views=dict(views=2),
    channels_last=dict(channels_last=True), pk=dict(sampler='pk', pk_frames=2), random=dict(method='random'),
    bank=dict(HALF, bank=20), paste=dict(paste=.5), positives=dict(alike='overlap', regions=.1),
    masked=dict(method='masked', stage='pretrain'),
    average=dict(average=.9, colors=.5), average_best=dict(average=.9, select='best'),
    teacher=dict(method='random', average=.9, colors=.5, teacher=1., sure=.1, absent=.2))
SHORT = [('last', 1), ('last', 2), ('best', 1), ('best', 2), ('bf16', 1), ('plateau', 1), ('plateau', 2),
    ('waiting', 2), ('channels_last', 2), ('pk', 1), ('views', 1), ('random', 2), ('pretrain', 1), ('sinking', 2),
    ('bank', 1), ('paste', 1), ('positives', 2), ('masked', 2),
    ('average', 1), ('average_best', 2), ('teacher', 2)]

class PowerCut(Callback):
    "The power fails after a step, when the weights have moved beyond the file"
    def __init__(self, epoch, step=2): self.at = (epoch,step)
    def after_step(self):
        if (self.epoch,self.iter) == self.at: raise RuntimeError('power cut')

class Scaled(Callback):
    "A scale for gradients, as fp16 has it on a GPU"
    order = 11
    def __init__(self, scale): self.scale = scale
    def before_fit(self): self.learn.scaler = GradScaler('cpu', init_scale=self.scale)

@pytest.fixture
def falling(monkeypatch):
    "Validation scores that fall from the first epoch on, so the best weights are early and the learning rate must fall"
    def accumulate(self, learn): self.cm = learn.epoch
    monkeypatch.setattr(MeanIoU, 'accumulate', accumulate)
    monkeypatch.setattr(MeanIoU, 'value', property(lambda self: 1/(2 + self.cm)))

@pytest.fixture(scope='module')
def table(table):
    "Three steps of sixteen frames an epoch"
    return few_frames(table, 16, 32)

@pytest.fixture(scope='session')
def small(smoke): return replace(smoke, batch=16, labelled=4, epochs=4)

def learner(table, r, seed=0):
    set_seed(seed, r.threads)
    return find_method(r.method).make(cwcl_dls(table, r, device='cpu'), r.method, r)

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return learn

def stop(table, r, epoch, folder, **kwargs):
    with pytest.raises(RuntimeError, match='power cut'):
        quiet(learner(table, r), lambda o: o.fit_recipe(cbs=[ResumeCallback(folder), PowerCut(epoch, **kwargs)]))

def equal(a, b):
    "Two Learners with the same weights, optimizer, log and loader"
    for k,v in a.model.state_dict().items(): assert torch.equal(v, b.model.state_dict()[k]), k
    states = [o.opt.state_dict() for o in (a, b)]
    assert list(states[0]['hypers']) == list(states[1]['hypers'])
    for s,t in zip(*(o['state'] for o in states)):
        assert s.keys() == t.keys()
        for k,v in s.items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(t[k])), k
    for k in ('values', 'losses', 'lrs', 'iters'):
        ours,theirs = (list(getattr(o.recorder, k)) for o in (a, b))
        assert ours == theirs, k
    assert a.dls.train.epoch == b.dls.train.epoch
    assert a.train_iter == b.train_iter

@pytest.fixture(scope='module')
def wholes():
    "Undisturbed trainings by name, each done once"
    return {}

@pytest.mark.parametrize('name,after', SHORT)
def test_a_stop_leaves_no_trace(table, small, falling, tmp_path, wholes, name, after):
    r = replace(small, **RUNS[name])
    if name not in wholes: wholes[name] = quiet(learner(table, r), lambda o: o.fit_recipe())
    whole = wholes[name]
    stop(table, r, after, tmp_path)
    resumed = quiet(learner(table, r, seed=1), lambda o: o.fit_resumed(tmp_path))
    equal(resumed, whole)
    assert len(resumed.recorder.values) == r.epochs
    assert len(resumed.recorder.losses) == r.epochs*len(whole.dls.train)
    if name in ('plateau', 'waiting'): assert whole.recorder.lrs[-1] < whole.recorder.lrs[0]

def test_the_best_weights_are_those_from_before_the_stop(table, small, falling, tmp_path):
    r = replace(small, select='best')
    stop(table, r, 1, tmp_path)
    kept = load_file(tmp_path/'last.safetensors')
    best = {k.removeprefix('model.'): v for k,v in kept.items() if k.startswith('model.')}
    resumed = quiet(learner(table, r, seed=1), lambda o: o.fit_resumed(tmp_path))
    assert all(torch.equal(v, best[k]) for k,v in resumed.model.state_dict().items())

def test_a_real_score_and_every_epoch_a_stop(table, small, tmp_path):
    r = replace(small, epochs=3, select='best')
    whole = quiet(learner(table, r), lambda o: o.fit_resumed(tmp_path/'whole'))
    for epoch in range(3): stop(table, r, epoch, tmp_path/'cut', step=0)
    resumed = quiet(learner(table, r, seed=1), lambda o: o.fit_resumed(tmp_path/'cut'))
    equal(resumed, whole)
    assert dict(resumed.recorder.hps) == dict(whole.recorder.hps)
    equal(whole, quiet(learner(table, r), lambda o: o.fit_recipe()))

def test_a_finished_training_is_there_at_once(table, small, tmp_path):
    r = replace(small, epochs=2, select='best')
    whole = quiet(learner(table, r), lambda o: o.fit_resumed(tmp_path))
    again = learner(table, r, seed=1)
    again.model.forward = None
    equal(quiet(again, lambda o: o.fit_resumed(tmp_path)), whole)

def test_the_same_learner_resumes_after_an_interrupt(table, small, tmp_path):
    whole = quiet(learner(table, small), lambda o: o.fit_recipe())
    learn = learner(table, small)
    with pytest.raises(RuntimeError): quiet(learn, lambda o: o.fit_recipe(cbs=[ResumeCallback(tmp_path), PowerCut(2)]))
    equal(quiet(learn, lambda o: o.fit_resumed(tmp_path)), whole)

def test_epochs_after_others_keep_their_frames(table, small, tmp_path):
    def later(seed, cbs=None):
        learn = learner(table, small, seed)
        learn.dls.train.epoch = 7
        return quiet(learn, lambda o: o.fit_recipe(cbs=cbs))
    whole = later(0)
    with pytest.raises(RuntimeError): later(0, [ResumeCallback(tmp_path), PowerCut(2)])
    equal(quiet(learner(table, small, 1), lambda o: o.fit_resumed(tmp_path)), whole)

def test_bars_and_rows_are_shown(table, small, tmp_path, capsys):
    r = replace(small, epochs=2)
    stop(table, r, 1, tmp_path)
    learner(table, r).fit_resumed(tmp_path)
    learner(table, r).fit_resumed(tmp_path)
    assert 'Traceback' not in capsys.readouterr().err

def test_a_stop_while_writing_leaves_the_epoch_before(table, small, tmp_path, monkeypatch):
    whole = quiet(learner(table, small), lambda o: o.fit_recipe())
    tries = []
    def write(state, p, metadata):
        tries.append(p)
        if len(tries) < 3: return save_file(state, p, metadata=metadata)
        p.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr('cwcl.whole.save_file', write)
        with pytest.raises(InputError, match='the disk is full; make room there'):
            quiet(learner(table, small), lambda o: o.fit_resumed(tmp_path))
    assert names(tmp_path) == ['before.safetensors', 'last.safetensors']
    resumed = learner(table, small, seed=1)
    assert read_checkpoint(tmp_path/'last.safetensors', resumed.model, 4)['epoch'] == 2
    equal(quiet(resumed, lambda o: o.fit_resumed(tmp_path)), whole)

def test_the_scale_of_gradients_is_kept(table, small, tmp_path):
    def scaled(scale):
        learn = learner(table, replace(small, epochs=1))
        return quiet(learn, lambda o: o.fit_recipe(cbs=[Scaled(scale), ResumeCallback(tmp_path)]))
    learn,again = scaled(8.),scaled(2.)
    assert again.scaler.state_dict() == learn.scaler.state_dict()
    assert again.scaler.state_dict()['scale'] == 8.

def test_averages_lie_as_their_weights_do(table, small, tmp_path):
    r = replace(small, channels_last=True, epochs=1)
    for _ in range(2): learn = quiet(learner(table, r), lambda o: o.fit_resumed(tmp_path))
    weights = [p for p in learn.model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert {learn.opt.state[p]['sqr_avg'].stride() == p.stride() for p in weights} == {True}

def test_it_is_one_file_without_pickles(table, small, tmp_path):
    quiet(learner(table, replace(small, epochs=1)), lambda o: o.fit_resumed(tmp_path))
    assert names(tmp_path) == ['last.safetensors']
    with safe_open(tmp_path/'last.safetensors', framework='pt') as f: header = f.metadata()
    assert json.loads(header['state'])['epoch'] == 1
    assert json.loads(header['recipe'])['epochs'] == 1

def test_packing_keeps_every_bit():
    x = torch.randn(3, 4).T
    plain = [1, 2.5, None, True, 'b', float('inf'), 0.1+0.2]
    nest = dict(a=plain, b=[dict(c=x, d=torch.tensor(3))], e=[], f=[x[0], x[1]])
    tensors = {}
    again = unpack(json.loads(json.dumps(pack(nest, tensors))), tensors)
    assert again['a'] == nest['a']
    assert again['e'] == []
    assert again['b'][0]['d'].shape == ()
    assert torch.equal(again['b'][0]['c'], x)
    assert all(torch.equal(a, b) for a,b in zip(again['f'], nest['f'], strict=True))
    assert all(o.is_contiguous() for o in tensors.values())

@pytest.fixture(scope='module')
def kept(table, small, tmp_path_factory):
    "A checkpoint of a finished training, as bytes, and its recipe"
    folder = tmp_path_factory.mktemp('kept')
    r = replace(small, epochs=1)
    quiet(learner(table, r), lambda o: o.fit_resumed(folder))
    return (folder/'last.safetensors').read_bytes(),r

def names(folder): return sorted(o.name for o in folder.iterdir())

def refusal(table, r, file, epochs=None):
    with pytest.raises(InputError) as e: learner(table, r).fit_resumed(file.parent, epochs)
    text = str(e.value)
    assert str(file) in text
    assert 'delete its folder, and training starts from the beginning' in text
    assert '\n' not in text
    return text

@pytest.mark.parametrize('how', ['empty', 'cut', 'pickle', 'long'])
def test_a_damaged_file_is_refused(table, kept, tmp_path, how):
    content,r = kept
    file = tmp_path/'last.safetensors'
    if how == 'pickle': torch.save(dict(a=1), file)
    else: file.write_bytes(dict(empty=b'', cut=content[:len(content)//2], long=content + b'0')[how])
    assert 'not a whole safetensors file' in refusal(table, r, file)

@pytest.mark.parametrize('name', ['last', 'before', 'both'])
def test_a_flipped_bit_costs_an_epoch_at_most(table, small, tmp_path, name):
    r = replace(small, epochs=3)
    whole = quiet(learner(table, r), lambda o: o.fit_resumed(tmp_path))
    for o in tmp_path.iterdir():
        if o.stem != name != 'both': continue
        content = bytearray(o.read_bytes())
        content[-1000] ^= 1
        o.write_bytes(content)
    said = []
    again = learner(table, r, seed=1)
    if name == 'both':
        says = 'before.safetensors: damaged.*delete its folder'
        with pytest.raises(InputError, match=says): again.fit_resumed(tmp_path)
        return
    equal(quiet(again, lambda o: o.fit_resumed(tmp_path, tell=said.append)), whole)
    told = ['going on from the checkpoint of the epoch before']
    assert [o.rsplit('; ', 1)[1] for o in said] == (told if name == 'last' else [])

def test_a_kill_between_two_renamings_loses_nothing(table, small, tmp_path):
    r = replace(small, epochs=2)
    whole = quiet(learner(table, r), lambda o: o.fit_resumed(tmp_path))
    (tmp_path/'last.safetensors').unlink()
    equal(quiet(learner(table, r, seed=1), lambda o: o.fit_resumed(tmp_path)), whole)

@pytest.mark.parametrize('change', [dict(state='{"epoch": 1}'), dict(state='[1]'), dict(recipe='7'), dict(state='{'),
    dict(state='{"epoch": {"#tensor": "nowhere"}, "epochs": 1}')], ids=str)
def test_a_state_that_another_hand_wrote_is_refused(table, kept, tmp_path, change):
    file = tmp_path/'last.safetensors'
    file.write_bytes(kept[0])
    tensors,header = read_tensors(file, '')
    save_tensors(file, tensors, header | change)
    refusal(table, kept[1], file)

def test_a_state_sets_nothing_but_what_was_kept(table, kept, tmp_path):
    file = tmp_path/'last.safetensors'
    file.write_bytes(kept[0])
    tensors,header = read_tensors(file, '')
    state = json.loads(header['state'])
    state['parts']['dls'] = dict(device='nowhere')
    state['parts']['recorder']['learn'] = 1
    save_tensors(file, tensors, header | dict(state=json.dumps(state)))
    learn = quiet(learner(table, kept[1]), lambda o: o.fit_resumed(tmp_path))
    assert learn.recorder.learn is learn and str(learn.dls.device) == 'cpu'

def test_another_format_is_refused(table, kept, tmp_path):
    file = tmp_path/'last.safetensors'
    for header in (dict(checkpoint='0'), None):
        save_file(dict(a=torch.ones(1)), file, metadata=header)
        assert f'checkpoint of format {(header or {}).get("checkpoint")}, this version' in refusal(table, kept[1], file)

@pytest.mark.parametrize('change,epochs,says', [(dict(seed=5), None, 'of a training with seed=0, this one has seed=5'),
    (dict(widths=(4, 8, 8, 16, 32)), None, 'widths=[4, 8, 8, 16, 16], this one has widths=[4, 8, 8, 16, 32]'),
    (dict(method='dcl'), None, "method='dcl+cls', this one has method='dcl'"),
    ({}, 3, 'epochs to train=1, this one has epochs to train=3')], ids=str)
def test_another_training_is_refused(table, kept, tmp_path, change, epochs, says):
    (tmp_path/'last.safetensors').write_bytes(kept[0])
    assert says in refusal(table, replace(kept[1], **change), tmp_path/'last.safetensors', epochs)

def test_a_file_from_before_a_field_is_resumed(table, kept, tmp_path):
    (tmp_path/'last.safetensors').write_bytes(kept[0])
    tensors = load_file(tmp_path/'last.safetensors')
    with safe_open(tmp_path/'last.safetensors', framework='pt') as f: header = f.metadata()
    old = {k: v for k,v in json.loads(header['recipe']).items() if k not in ('average', 'bank')}
    header.pop('digest')
    save_file(tensors, tmp_path/'last.safetensors', metadata=header | dict(recipe=json.dumps(old)))
    net = learner(table, kept[1]).model
    assert read_checkpoint(tmp_path/'last.safetensors', net, 1)['epoch'] == 1
    net.recipe = replace(kept[1], average=.9)
    says = 'average=0.0, this one has average=0.9'
    with pytest.raises(InputError, match=says): read_checkpoint(tmp_path/'last.safetensors', net, 1)

def test_other_frames_are_refused(table, kept, tmp_path):
    (tmp_path/'last.safetensors').write_bytes(kept[0])
    learn = learner(table, kept[1])
    learn.model.mean += 0.01
    with pytest.raises(InputError, match='on other frames'): learn.fit_resumed(tmp_path)

def test_the_seconds_of_all_sessions_are_added(table, small, tmp_path, monkeypatch):
    "A clock that goes on by ten seconds at each look: begun, and at the end of each epoch"
    clock = SimpleNamespace(monotonic=lambda now=itertools.count(0, 10): next(now))
    monkeypatch.setattr(resume, 'time', clock)
    net = learner(table, small)
    for epochs,earlier,spent in ((1, 0, 10), (2, 10, 20), (4, 20, 40)):
        r = replace(small, epochs=4)
        learn = learner(table, r)
        class Stop(Callback):
            order = 200
            def after_epoch(self):
                if self.epoch == epochs-1: raise CancelFitException
        learn.add_cb(Stop())
        quiet(learn, lambda o: o.fit_resumed(tmp_path))
        assert learn.earlier_seconds == earlier
        assert read_checkpoint(tmp_path/'last.safetensors', net.model, 4)['seconds'] == spent

def test_no_file_is_a_fresh_start(table, small, tmp_path):
    assert read_checkpoint(tmp_path/'none'/'last.safetensors', learner(table, small).model, 4) is None

def test_too_little_memory_is_not_a_strange_checkpoint(monkeypatch, tmp_path):
    "Its cure would be to delete a good one"
    cb = ResumeCallback(tmp_path)
    cb.learn = SimpleNamespace(model=None, n_epoch=1)
    monkeypatch.setattr('cwcl.resume.bare', lambda o: o)
    monkeypatch.setattr('cwcl.resume.read_checkpoint', lambda *a: {})
    def full(*args): raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')
    monkeypatch.setattr('cwcl.resume._load_state', full)
    with pytest.raises(RuntimeError, match='^CUDA out of memory'): cb.before_fit()
