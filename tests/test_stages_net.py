"What each stage may change in the network, to the bit"
import pytest, torch
from dataclasses import replace
from cwcl.core import set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.multitask import cwcl_learner, snapshot
from cwcl.tasks import CWCLNet

def learner(table, r):
    set_seed(r.seed, r.threads)
    return cwcl_learner(cwcl_dls(table, r, device='cpu'), r.method, r)

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f(learn)

def part(net, name): return {k: v for k,v in snapshot(net).items() if k.startswith(name)}
def changed(a, b): return {k for k,v in a.items() if not torch.equal(v, b[k])}

METHODS = [dict(method='dcl+cls'), dict(method='simclr', views=2, scales=1), dict(method='byol', views=2)]

@pytest.mark.parametrize('method', METHODS, ids=str)
@pytest.mark.parametrize('schedule', ['one_cycle', 'plateau'])
def test_a_frozen_encoder_stays_to_the_bit(table, smoke, method, schedule):
    learn = learner(table, replace(smoke, stage='frozen', schedule=schedule, **method))
    net = learn.model
    before,decoder = part(net, 'encoder'),part(net, 'decoder')
    quiet(learn, lambda o: o.fit_recipe(2))
    quiet(learn, lambda o: o.validate())
    for mode in (True, False, True):
        net.train(mode)
        net.n_labelled = 2
        net(torch.randn(2, 3, 64, 64))
        assert not changed(before, part(net, 'encoder'))
    assert any('running_mean' in k for k in before) and changed(decoder, part(net, 'decoder'))

def test_a_frozen_encoder_says_the_same_in_training_and_evaluation(smoke):
    net = CWCLNet(replace(smoke, stage='frozen'))
    x = torch.randn(2, 3, 64, 64)
    training = net.train().encoder(x)
    evaluation = net.eval().encoder(x)
    assert all(torch.equal(a, b) for a,b in zip(training, evaluation))
    assert not any(p.requires_grad for p in net.train().encoder.parameters())
    assert all(p.requires_grad for p in net.decoder.parameters())

@pytest.mark.parametrize('method', METHODS, ids=str)
def test_an_unfrozen_encoder_moves(table, smoke, method):
    learn = learner(table, replace(smoke, stage='unfrozen', **method))
    before = part(learn.model, 'encoder')
    quiet(learn, lambda o: o.fit_recipe(1))
    assert changed(before, part(learn.model, 'encoder')) == set(before)

@pytest.mark.parametrize('stage', ['frozen', 'unfrozen'])
@pytest.mark.parametrize('method', METHODS, ids=str)
def test_a_second_stage_is_segmentation_alone(table, smoke, stage, method):
    r = replace(smoke, stage=stage, **method)
    learn,plain = learner(table, r),learner(table, replace(smoke, method='random'))
    heads = {**part(learn.model, 'msph'), **part(learn.model, 'presence_head')}
    quiet(learn, lambda o: o.fit_recipe(1))
    assert not changed(heads, snapshot(learn.model))
    assert len(learn.dls.train.one_batch()[0]) == r.labelled and len(learn.dls.train) == len(plain.dls.train)
    learn.dls.train.epoch = plain.dls.train.epoch = 0
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a,b in zip(learn.dls.train, plain.dls.train))
    assert set(learn.recorder.metric_names) == {'epoch', 'train_loss', 'valid_loss', 'gdl', 'focal', 'mean_iou', 'time'}

FIRST = [dict(method='dcl'), dict(method='simclr', views=2), dict(method='simclr', views=2, strong=False)]

@pytest.mark.parametrize('method', FIRST, ids=str)
def test_batch_norm_without_a_labelled_frame_sees_all_of_them(table, smoke, method):
    outs = {}
    for frames in ('all', 'labelled'):
        r = replace(smoke, stage='pretrain', bn_frames=frames, **method)
        learn = learner(table, r)
        x,mask,*_ = learn.dls.train.one_batch()
        net = learn.model.train()
        net.n_labelled = len(mask)
        assert len(mask) == 0
        before = part(net, 'encoder')
        outs[frames] = net(x)[2],part(net, 'encoder')
        assert {k for k in before if 'running' in k} <= changed(before, outs[frames][1])
        quiet(learn, lambda o: o.fit_recipe(1))
    assert all(torch.equal(a, b) for a,b in zip(outs['all'][0], outs['labelled'][0]))
    assert not changed(outs['all'][1], outs['labelled'][1])

def test_batch_norm_remembers_no_strong_view(table, smoke):
    r = replace(smoke, method='simclr', views=2, bn_frames='labelled')
    states = []
    x,mask,*_ = cwcl_dls(table, r, device='cpu').train.one_batch()
    for factor in (1, 5):
        set_seed(0, 1)
        net = CWCLNet(r).train()
        net.n_labelled = len(mask)
        net(torch.cat([x[:len(mask)], x[len(mask):]*factor]))
        states.append(part(net, 'encoder'))
    assert not changed(*states)
