"Every field of a recipe does what it says; `make mutants` takes each effect away and asks for a red row"
import os, pandas as pd, pytest, subprocess, sys, torch
from functools import partial
from dataclasses import fields, replace
from itertools import islice
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch
from torch import nn
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.tracker import ReduceLROnPlateau
from cwcl.arithmetic import arithmetic, used_arithmetic
from cwcl.baselines.byol import BYOLNet
from cwcl.baselines.simclr import nt_xent_loss
from cwcl.beyond.choose import cover_frames
from cwcl.beyond.bank import BankContrast
from cwcl.beyond.positives import overlap_contrast, region_contrast, region_vectors
from cwcl.checkpoint import model_card
from cwcl.core import InputError, Recipe, find_method, goals, recipe, set_seed
from cwcl.cost import _sample
from cwcl.data.augment import SegAugment, blur_frames, draw_factors, take_crops
from cwcl.data.cholec import frame_table
from cwcl.data.controls import noisy_labels, permuted_labels, whole_clips, withheld_label
from cwcl.data.labels import class_set
from cwcl.data.order import label_groups, two_streams
from cwcl.data.splits import coverage_warnings, label_budget, split_frames, video_folds
from cwcl.data.streams import batch_views, cwcl_dls
from cwcl.distrib import synced
from cwcl.infer import sliding_window
from cwcl.losses.contrastive import deep_contrastive_loss
from cwcl.losses.segmentation import focal_loss, generalized_dice_loss, presence_loss, presence_weights
from cwcl.memory import _lighter, advice, step_bytes
from cwcl.multitask import KeepBest, Precision, cwcl_learner, wired_learner
from cwcl.own import own_split
from cwcl.pairs import label_set_ids, positive_mask
from cwcl.parts import check_parts
from cwcl.ready import check_phases, run_remarks, split_table
from cwcl.stages import pretrain_run, refresh_averages, stages_run
from cwcl.tasks import CWCLLoss, CWCLNet
from cwcl.train import run_key, steps_per_epoch, train_learner, train_run

BASE = recipe('smoke', budget=.5, threads=1)
ROWS = {}

def row(*names):
    "Enter a check for the fields it is about"
    def entered(f):
        for k in names: ROWS.setdefault(k, []).append(f)
        return f
    return entered

def check(name, world):
    "All rows of a field"
    for f in ROWS[name]: f(world)

def changed(**changes): return replace(BASE, **changes)

class Stop(Exception):
    "Raised by a mock that has seen enough"

class World:
    "The little that the checks share; nothing of it is ever changed"
    def __init__(self, frames): self.frames = frames.groupby('video').head(4).reset_index(drop=True)
    def split(self, r): return split_frames(self.frames, r)
    def dls(self, r, frames=None):
        set_seed(0, 1)
        return cwcl_dls(split_frames(self.frames if frames is None else frames, r), r, device='cpu')

    def learner(self, **changes):
        r = changed(**changes)
        return cwcl_learner(self.dls(r), r.method, r)

def net(**changes):
    "A network that knows how many of six frames have a mask, and the six frames"
    set_seed(0, 1)
    net = CWCLNet(changed(**changes)).train()
    net.n_labelled = 2
    return net, torch.rand(6, 3, 32, 32)

def byol(**changes): return BYOLNet(changed(method='byol', stage='pretrain', views=2, **changes))

def outputs():
    "Outputs and labels: frames 0 to 3 show the same, in two phases, 0 and 1 in one clip; 4 and 5 are alone"
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, 16, 16, generator=g)
    mask = torch.randint(0, 7, (2, 16, 16), generator=g)
    mask[0,0,:3] = 7
    shown = torch.zeros(6, 8)
    ids = torch.tensor([[0,1,1], [0,1,1], [1,2,1], [1,3,2], [2,4,3], [-1,5,3]])
    shown[:4,:3] = 1
    shown[4,5] = shown[5,6] = 1
    seen = torch.randn(6, 8, generator=g)
    zs = [torch.randn(6, 16, generator=g) for _ in range(3)]
    return (logits, seen, zs), mask, shown, ids

def terms(**changes): return CWCLLoss(changed(**changes)).weighted_terms(*outputs())

def contrast(phase=True, group=None, **kwargs):
    "The contrastive term by hand, and its mask of positives"
    (_,_,zs),_,shown,ids = outputs()
    same = label_set_ids(shown, ids[:,0] if phase else None)
    pos = positive_mask(same, exclude=None if group is None else ids[:,group])
    out = None if group is None else positive_mask(same) & ~pos
    return deep_contrastive_loss(zs, pos, kwargs.pop('temp', BASE.temp), ignore=out, **kwargs), pos

def near(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol)

def view(**changes):
    "Ramps from left to right and noise, and what the augmentation of a recipe makes of them: (frames, crops, presence)"
    noise = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    x = torch.stack([torch.arange(60.).expand(3, 40, 60)/60, noise]*8)
    mask = torch.zeros(16, 40, 60, dtype=torch.long)
    labels = (torch.zeros(16, 8), torch.zeros(16, 3))
    crops,_,shown,_ = SegAugment(changed(crop=24, **changes))((x, mask, *labels), split_idx=0)
    return x, crops.as_subclass(torch.Tensor), shown

def slopes(x):
    "How fast the ramps rise in the middle of their crops, in pixels of the frame"
    return (x[::2,0,8,13] - x[::2,0,8,10])*20

def caught(name, f, *args, **kwargs):
    "What is handed to a function of the library before it could do anything"
    with patch(name, side_effect=Stop) as seen, pytest.raises(Stop): f(*args, **kwargs)
    return seen.call_args

# The data

@row('name', 'method', 'budget', 'fold', 'seed')
def a_run_is_called_after_its_choices(w):
    assert run_key(changed(name='mine', method='cls', budget=.2, fold=1, seed=5)) == 'mine-cls-b20-f1-s5'

@row('method')
def a_method_has_its_terms(w):
    assert set(terms(method='cls')) == {'gdl', 'focal', 'presence'} and set(terms(method='random')) == {'gdl', 'focal'}
    n,x = net(method='random')
    assert n(x)[1:] == (None, []) and w.learner(method='cls').loss_func.recipe.method == 'cls'
    assert len(w.dls(changed(method='random')).train.one_batch()[0]) == BASE.labelled

@row('stage')
def a_stage_decides_who_learns(w):
    frozen,_ = net(stage='frozen')
    assert not frozen.encoder.training and not any(p.requires_grad for p in frozen.encoder.parameters())
    assert goals(changed(stage='pretrain')) == {'dcl', 'cls'} and goals(changed(stage='frozen')) == {'seg'}
    assert type(batch_views(changed(stage='frozen', views=2), 3)) is SegAugment
    for stage,says in (('frozen', 'needs a pre-trained encoder'), ('pretrain', 'pretrain_run trains it')):
        with pytest.raises(InputError, match=says): train_run(changed(stage=stage), 'nowhere')
    table = pd.DataFrame()
    seen = caught('cwcl.stages.pretrain_run', stages_run, changed(stage='frozen'), table, out='nowhere')
    assert seen.args[1] is table

@row('method', 'precision', 'min_pixels')
def a_first_stage_is_that_of_its_method(w):
    r = changed(method='byol', stage='pretrain', views=2, precision='bf16', min_pixels=40)
    assert caught('cwcl.ready.frame_table', pretrain_run, r, 'nowhere').kwargs['min_pixels'] == 40
    with TemporaryDirectory() as out, patch('cwcl.ready.frame_table', return_value=w.frames):
        assert caught('cwcl.stages.check_precision', pretrain_run, r, 'nowhere', out=out).args[0] == 'bf16'
        made = caught('cwcl.methods.late', pretrain_run, r, 'nowhere', out=out)
        assert made.args == (find_method('byol').learner,)

@row('refresh_bn')
def running_averages_are_made_anew_before_freezing(w):
    def seen(n):
        r = changed(method='byol', stage='pretrain', views=2, refresh_bn=n)
        with TemporaryDirectory() as out, patch('cwcl.ready.frame_table', return_value=w.frames), \
                patch('cwcl.stages.update_bn') as fresh:
            fresh.side_effect = lambda *_: seen_flags.append(torch.backends.cudnn.allow_tf32)
            pretrain_run(r, 'nowhere', out=out)
            return [len(list(call.args[0])) for call in fresh.call_args_list]
    seen_flags = []
    assert seen(0) == [] and seen(3) == [3] and seen_flags == [False]
    mild = caught('cwcl.stages.cwcl_dls', refresh_averages, None, None,
        changed(method='byol', stage='pretrain', views=2)).kwargs
    assert type(mild['augment']) is SegAugment, 'frames as they will be seen, not in strong colors'

@row('valid_labels', 'lr', 'schedule', 'class_set', 'left_out', 'batch', 'labelled')
def remarks_are_those_of_the_recipe(w):
    t = w.split(BASE)
    slow_down = 'a learning rate of 0.02'
    def said(**changes): return ' '.join(run_remarks(t, changed(**changes), 'fold'))
    assert 'flatter' in said() and 'flatter' not in said(valid_labels=False)
    assert slow_down in said(schedule='plateau', lr=.02) and slow_down not in said(lr=.02)
    for o in ((13, 'ignore'), (10, 'background')):
        assert ' '.join(coverage_warnings(t, class_set(*o))) in said(class_set=o[0], left_out=o[1])
    whole = split_table(w.frames, changed(batch=8, labelled=5), 'none')[1]
    assert (whole.batch, whole.labelled) == (8, 5)

@row('seed')
def a_seed_draws_masks_order_and_crops(w):
    r = changed(seed=5)
    dls = w.dls(changed(seed=5))
    assert not w.split(r).labelled.equals(w.split(BASE).labelled)
    d = dls.train
    assert d.batches(0)[0] == next(two_streams(d.labelled, torch.zeros(len(d.dataset)), 3, 6, 5))
    assert SegAugment(r).seed == 5 and dls.train.after_batch.fs[1].seed == 5
    assert caught('cwcl.train.set_seed', train_learner, r, None, None).args == (5, 1)

@row('class_set', 'left_out')
def classes_are_those_of_the_recipe(w):
    for changes in (dict(class_set=13, left_out='ignore'), dict(class_set=10, left_out='background')):
        n = net(**changes)[0]
        dls = w.dls(changed(**changes))
        want = class_set(*changes.values())
        assert n.classes == dls.train_ds.classes == byol(**changes).classes == want
        assert n.decoder.head.out_channels == n.presence_head.fc.out_features == dls.presence.shape[1] == len(want)

@row('min_pixels')
def a_speck_is_no_structure(w):
    assert SegAugment(changed(min_pixels=40)).min_pixels == 40
    assert caught('cwcl.ready.frame_table', train_run, changed(min_pixels=40), 'nowhere').kwargs['min_pixels'] == 40

@row('height', 'width')
def frames_have_their_size(w): assert w.dls(changed(height=40, width=80)).valid.one_batch()[0].shape[2:] == (40, 80)

def masked(w, part='train'): return (w.split(BASE).part == part) & (w.frames['mask'] != '')

@row('budget')
def a_budget_is_a_share_of_the_masks(w): assert w.split(changed(budget=.2)).labelled.sum() == round(.2*masked(w).sum())

@row('budget', 'budget_unit', 'seed')
def masks_of_own_frames_are_drawn_likewise(w):
    t = w.frames.assign(source=w.frames.video)
    for changes in (dict(budget=.2), dict(budget_unit='video'), dict(seed=5)):
        r = changed(**changes)
        got = own_split(t, r, valid=['video09'], test=['video12'])
        train = t[(t['mask'] != '') & ~t.video.isin(['video09', 'video12'])]
        want = label_budget(train, r.budget, r.budget_unit, r.seed)
        assert got.index[got.labelled].tolist() == want.index[want].tolist()

@row('budget_of')
def a_budget_is_taken_of_what_it_says(w):
    assert w.split(changed(budget=.2, budget_of='all')).labelled.sum() == round(.2*(w.frames['mask'] != '').sum())
    rest = masked(w).sum() + masked(w, 'valid').sum()
    assert w.split(changed(budget=.2, budget_of='train')).labelled.sum() == round(.2*rest)

@row('budget_unit')
def whole_videos_are_drawn(w):
    t = w.split(changed(budget_unit='video'))[masked(w)]
    assert set(t.groupby('video').labelled.mean()) == {0, 1}

@row('choose', 'budget', 'seed', 'class_set', 'left_out')
def masks_can_be_chosen(w):
    own = w.frames.assign(source=w.frames.video)
    for changes in (dict(), dict(budget=.2), dict(seed=5), dict(class_set=10, left_out='background')):
        r = changed(choose='cover', **changes)
        names = class_set(r.class_set, r.left_out).names
        for t in (w.split(r), own_split(own, r, valid=['video09'], test=['video12'])):
            pool = t[(t.part == 'train') & (t['mask'] != '')]
            want = cover_frames(pool, names, round(r.budget*len(pool)), r.seed)
            assert set(t.index[t.labelled]) == set(want)

@row('label_sets', 'withheld', 'masks_of', 'seed')
def labels_lie_as_a_control_says(w):
    frames = w.frames.assign(clip=w.frames.video)
    lies = dict(label_sets='permuted'), dict(label_sets='shuffled', seed=5), dict(label_sets='noisy', seed=2)
    for changes in (*lies, dict(withheld='grasper'), dict(masks_of='clip', budget=.2)):
        r = changed(**changes)
        t = split_table(frames, r)[0]
        plain = split_frames(frames, r)
        liars = dict(permuted=permuted_labels, shuffled=partial(permuted_labels, frames=True), noisy=noisy_labels)
        want = liars.get(r.label_sets, lambda t, seed: t)(plain, r.seed)
        if r.withheld: want = withheld_label(want, r.withheld)
        pd.testing.assert_frame_equal(t, whole_clips(want) if r.masks_of == 'clip' else want)
        assert not t.equals(plain)

@row('fold', 'fold_scheme')
def a_fold_validates_its_videos(w):
    for changes in (dict(fold=1), dict(fold=2), dict(fold_scheme='partition'), dict(fold_scheme='seeds', fold=2)):
        t = w.split(changed(**changes))
        r = changed(**changes)
        assert set(t.video[t.part == 'valid']) == set(video_folds(w.frames, scheme=r.fold_scheme)[r.fold])

@row('valid_labels')
def labels_of_validation_frames_can_be_kept_out(w):
    assert set(w.dls(changed(valid_labels=False)).train_ds.table.part) == {'train'}
    assert steps_per_epoch(changed(valid_labels=False), (60, 30)) == 10

@row('crop')
def a_crop_has_its_side(w): assert w.dls(changed(crop=32)).train.one_batch()[0].shape[2:] == (32, 32)

@row('scale')
def without_scale_a_pixel_stays_a_pixel(w): near(slopes(view(scale=0., blur=False, flip=0.)[1]), torch.ones(8), 1e-4)

@row('flip')
def a_flip_mirrors_every_frame(w):
    assert (slopes(view(flip=1.)[1]) < -.8).all()
    assert (slopes(view(flip=0.)[1]) > .8).all()

@row('blur')
def frames_are_blurred_only_if_asked(w):
    for blur in (True, False):
        x,got,_ = view(blur=blur)
        d = draw_factors(16, (40, 60), 24, BASE.scale, True, BASE.flip, SegAugment(BASE).rng())
        sharp = take_crops(x, torch.zeros(16, 40, 60, dtype=torch.long), d, 24)[0]
        near(got, blur_frames(sharp, d['blur']*blur))
        assert len(d['blur'].unique()) == 4

@row('views')
def two_views_double_the_batch(w): assert [len(o) for o in w.dls(changed(views=2)).train.one_batch()] == [12, 3, 12, 12]

@row('strong', 'reduction', 'method')
def mild_views_for_the_baselines(w):
    simclr = dict(method='simclr', views=2, scales=1)
    sizes = {s: [len(o) for o in w.dls(changed(strong=s, **simclr)).train.one_batch()] for s in (True, False)}
    assert sizes == {True: [15, 3, 6, 6], False: [12, 3, 12, 12]}
    for strong,left in ((True, 4), (False, 6)):
        n,x = net(strong=strong, **simclr)
        assert len(n(x)[2][0]) == left
    (_,_,zs),mask,shown,ids = outputs()
    for reduction,times in (('mean', 1), ('sum', 6)):
        loss = CWCLLoss(changed(strong=False, reduction=reduction, **simclr))
        got = loss.weighted_terms((None, None, zs[:1]), mask, shown, ids)
        near(got['nt_xent'][1], times*nt_xent_loss(zs[0], BASE.temp))

@row('presence_from')
def presence_can_be_that_of_the_crop(w):
    assert view(presence_from='crop')[2][:,0].eq(1).all() and view()[2].eq(0).all()
    d = w.dls(changed(presence_from='crop')).train
    assert len(d.gather(d.batches(0)[0])[1]) == BASE.batch and d.dataset.store.has_mask.all()

@row('batch', 'labelled')
def a_batch_has_its_frames_and_masks(w):
    d,valid = w.dls(changed(batch=8, labelled=5)).loaders
    assert [len(o) for o in d.one_batch()] == [8, 5, 8, 8] and len(d) == len(d.dataset)//8 and valid.bs == 8
    assert steps_per_epoch(changed(batch=8), (60, 20)) == 10

@row('sampler', 'pk_frames')
def label_sets_can_come_in_groups(w):
    d = w.dls(changed(sampler='pk', pk_frames=3, batch=12)).train
    groups = label_groups(d.presence, d.ids[:,0])
    assert d.batches(0) == list(islice(two_streams(d.labelled, groups, 3, 12, 0, 'pk', 3), d.steps))

# The network

@row('widths')
def levels_have_their_widths(w):
    n,x = net(widths=(4, 8, 12, 16, 20))
    assert [o.shape[1] for o in n.encoder(x)] == [4, 8, 12, 16, 20]
    assert n.decoder.widths == (4, 8, 12, 16, 20) and n.msph.widths == (12, 16, 20)
    assert net(widths=(4, 8, 12, 16))[0].levels == slice(1, 4)
    one = byol(widths=(4, 8, 12, 16, 20))
    assert one.encoder.widths[-1] == one.projector[0].in_features == 20 and one.predictor[0].out_features == 40
    assert w.learner(widths=(8, 8, 8, 16, 16)).model.encoder.widths == (8, 8, 8, 16, 16)

class Pyramid(nn.Module):
    "Stands in for a model of timm, with one map"
    def __init__(self, name):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2, stride=2)
        self.feature_info = SimpleNamespace(reduction=lambda: [2], channels=lambda: [6])
    def forward(self, x): return [self.conv(x)]

@row('encoder')
def an_encoder_can_be_of_another_family(w):
    with patch('cwcl.beyond.encoders.timm_pyramid', side_effect=Pyramid) as made:
        n,x = net(encoder='timm:any', scales=1)
        assert made.call_args.args == ('any',) and n.decoder.widths == (4, 6) and len(n(x)[2]) == 1
        assert byol(encoder='timm:any', scales=1).projector[0].in_features == 6
    card = model_card(changed(encoder='timm:any', scales=1), ('bed',))
    assert 'encoder timm:any' in card

@row('encoder_weights')
def an_encoder_can_start_from_a_file(w):
    r = dict(encoder='timm:any', scales=1, encoder_weights='there/mine.pth')
    home = 'cwcl.beyond.encoders'
    with patch(f'{home}.timm_pyramid', Pyramid), patch(f'{home}.start_from') as started: learn = w.learner(**r)
    assert started.called and started.call_args.args[:2] == (learn.model.encoder, 'there/mine.pth')
    assert 'mine.pth' in model_card(changed(**r), ('bed',))

@row('norm')
def a_norm_is_that_of_encoder_and_decoder(w):
    for part in (net(norm='group')[0].encoder, net(norm='group')[0].decoder, byol(norm='group').encoder):
        assert {type(o) for o in part.modules() if 'Norm' in type(o).__name__} == {nn.GroupNorm}

@row('up')
def decoders_can_interpolate(w): assert any(isinstance(o, nn.Upsample) for o in net(up='bilinear')[0].decoder.modules())

@row('bn_frames')
def frames_without_masks_can_be_kept_from_the_averages(w):
    def mean(factor):
        n,x = net(bn_frames='labelled')
        n(torch.cat([x[:2], factor*x[2:]]))
        return n.encoder.levels[0][1].running_mean
    near(mean(1), mean(5))

@row('scales', 'skip')
def embeddings_come_from_their_levels(w):
    n,x = net(scales=2, skip=1)
    assert n.levels == slice(2, 4) and n.msph.widths == (8, 16) and len(n(x)[2]) == n.presence_head.n_scales == 2
    assert terms(scales=2)['dcl'][0] == BASE.beta/2
    assert terms(scales=2, per_scale='alpha')['presence'][0] == BASE.alpha/2

@row('dim')
def embeddings_have_their_length(w):
    n,x = net(dim=24)
    assert [o.shape for o in n(x)[2]] == [(6, 24)]*3 and n.presence_head.dim == 24
    assert byol(dim=24).projector[3].out_features == byol(dim=24).predictor[0].in_features == 24

@row('projection')
def projections_have_layers(w): assert {type(o) for o in net(projection='mlp')[0].msph.projections} == {nn.Sequential}

@row('alpha', 'beta', 'per_scale')
def terms_have_their_weights(w):
    t = terms(alpha=.3, beta=.6)
    assert (t['presence'][0], t['dcl'][0]) == (.3, .6/3)
    for per,a,b in (('alpha', .3/3, .6), ('none', .3, .6)):
        t = terms(alpha=.3, beta=.6, per_scale=per)
        assert (t['presence'][0], t['dcl'][0]) == (a, b)

@row('temp')
def contrast_has_its_temperature(w):
    near(terms(temp=.5)['dcl'][1], contrast(temp=.5)[0])
    (_,_,zs),mask,shown,ids = outputs()
    loss = CWCLLoss(changed(temp=.5, method='simclr', views=2, scales=1, strong=False))
    got = loss.weighted_terms((None, None, zs[:1]), mask, shown, ids)['nt_xent'][1]
    near(got, deep_contrastive_loss(zs[:1], torch.eye(6).roll(3, 0), .5))

@row('use_phase')
def the_phase_divides_positives(w):
    for use,pairs in ((True, 4), (False, 12)):
        want,pos = contrast(use)
        near(terms(use_phase=use)['dcl'][1], want)
        assert pos.sum() == pairs
    check_phases(w.frames.assign(phase=-1), changed(use_phase=False))
    d = w.dls(changed(use_phase=False, sampler='pk', pk_frames=3)).train
    assert d.batches(0) == list(islice(two_streams(d.labelled, label_groups(d.presence), 3, 6, 0, 'pk', 3), d.steps))

@row('exclude')
def a_clip_or_video_can_be_left_out(w):
    for k,(exclude,lonely) in enumerate((('clip', 4/6), ('video', 4/6)), 1):
        t = terms(exclude=exclude)
        near(t['dcl'][1], contrast(group=k)[0])
        near(t['lonely'][1], lonely)

@row('lonely')
def anchors_without_positives_can_count_as_zeros(w):
    each,pos = contrast(reduction='none')
    near(terms(lonely='zero')['dcl'][1], each.sum()/6)
    near(terms()['dcl'][1], each.sum()/pos.any(1).sum())

@row('reduction')
def losses_can_be_sums(w):
    t = terms(reduction='sum')
    ((_,seen,_),_,shown,_) = outputs()
    near(t['dcl'][1], contrast(reduction='sum')[0])
    near(t['presence'][1], presence_loss(seen, shown)*6)

@row('gdl_form', 'gdl_pool', 'gdl_min_pixels')
def overlap_has_its_form(w):
    (logits,*_),mask,*_ = outputs()
    plain = generalized_dice_loss(logits, mask)
    for k,v in dict(form='sudre', pool='batch', min_pixels=1).items():
        want = generalized_dice_loss(logits, mask, **{k: v})
        near(terms(**{f'gdl_{k}': v})['gdl'][1], want)
        assert abs(want - plain) > 1e-4

@row('gamma')
def easy_pixels_count_less(w):
    (logits,*_),mask,*_ = outputs()
    near(terms(gamma=.5)['focal'][1], focal_loss(logits, mask, .5))

@row('pos_weight')
def rare_structures_can_count_more(w):
    learn = w.learner(pos_weight=True)
    near(learn.loss_func.pos_weight, presence_weights(learn.dls.presence))
    (_,seen,_),_,shown,_ = outputs()
    three = torch.full((8,), 3.)
    near(CWCLLoss(BASE, three).weighted_terms(*outputs())['presence'][1], presence_loss(seen, shown, three))

@row('bank')
def a_bank_of_former_frames_is_kept(w):
    cb, = [o for o in w.learner(bank=7).cbs if isinstance(o, BankContrast)]
    cb.before_fit()
    assert cb.bank.keys.shape == (BASE.scales, 7, BASE.dim) and cb.contrast.dcl == cb.term
    assert not [o for o in w.learner().cbs if isinstance(o, BankContrast)]
# Beyond the paper

@row('paste')
def rare_structures_are_pasted(w):
    learn = w.learner(paste=.5)
    assert learn.paste_rare.p == .5 and not hasattr(w.learner(), 'paste_rare')

@row('alike')
def positives_can_overlap(w):
    (_,_,zs),_,shown,ids = outputs()
    shown[:4,3] = shown[1,4] = 1
    got = CWCLLoss(changed(alike='overlap')).contrast_terms(zs, shown, ids)
    loss,found = overlap_contrast(zs, shown, ids[:,0], BASE.temp)
    near(got['dcl'][1], loss/found)
    assert abs(got['dcl'][1] - CWCLLoss(BASE).contrast_terms(zs, shown, ids)['dcl'][1]) > 1e-3

@row('regions')
def classes_are_contrasted_in_the_decoder(w):
    n,x = net(regions=.3)
    out = n(x)
    (mask,*labels) = outputs()[1:]
    mask = mask.repeat(1, 2, 2)
    weight,got = CWCLLoss(changed(regions=.3)).weighted_terms(out, mask, *labels)['regions']
    loss,found = region_contrast(*region_vectors(out[3], mask, 8, BASE.min_pixels), BASE.temp)
    near(got, loss/found)
    assert weight == .3 and out[3].shape == (2, 4, 32, 32) and len(net()[0](x)) == 3
    assert 'regions' in [o.name for o in w.learner(regions=.3).metrics]
    with pytest.raises(InputError, match='regions=0.3: compares all'): check_parts(changed(regions=.3))

# The training

def asked(learn):
    "Which fit a recipe asks for: its verb, epochs, learning rate and callbacks"
    said = SimpleNamespace()
    for verb in ('fit', 'fit_one_cycle'):
        def fit(epochs, lr, cbs=None, verb=verb): vars(said).update(verb=verb, epochs=epochs, lr=lr, cbs=cbs)
        setattr(learn, verb, fit)
    learn.fit_recipe()
    return said

@row('lr', 'wd', 'epochs')
def a_fit_has_its_length_and_rates(w):
    for schedule in ('one_cycle', 'plateau'):
        learn = w.learner(lr=.02, wd=.3, epochs=7, schedule=schedule)
        said = asked(learn)
        assert (learn.lr, learn.wd, said.epochs, said.lr) == (.02, .3, 7, .02)

@row('schedule', 'patience', 'factor')
def a_plateau_has_its_patience(w):
    said = asked(w.learner(schedule='plateau', patience=4, factor=.25))
    cb, = [o for o in said.cbs if isinstance(o, ReduceLROnPlateau)]
    assert (said.verb, cb.patience, cb.factor) == ('fit', 4, 4)

@row('precision')
def half_precision_is_asked_for(w):
    assert caught('cwcl.train.check_precision', train_run, changed(precision='bf16'), 'nowhere').args[0] == 'bf16'
    cb, = [o for o in w.learner(precision='bf16').cbs if isinstance(o, Precision)]
    assert cb.amp_mode.value == 'bf16'

@row('channels_last')
def a_memory_format_is_asked_for(w): assert any(isinstance(o, ChannelsLast) for o in w.learner(channels_last=True).cbs)

def flags(): return [getattr(torch.backends.cudnn, k) for k in ('allow_tf32', 'deterministic', 'benchmark')]

def test_losses_multiply_in_single_precision_whatever_was_set():
    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    try:
        for given in (True, False):
            products.allow_tf32 = given
            for o in ('fp32', 'tf32', 'bf16'):
                with arithmetic(recipe('smoke', precision=o)): assert not products.allow_tf32
            assert products.allow_tf32 == given
    finally: products.allow_tf32 = before

NEWER_NAMES = """
import os, sys, torch, traceback
from cwcl.arithmetic import arithmetic
from cwcl.core import recipe
backends = torch.backends
cudnn,products = backends.cudnn,backends.cuda.matmul
def now(): return [o.fp32_precision for o in (cudnn.conv, cudnn.rnn, products)]
def obeyed(place, said):
    if place: place.fp32_precision = said
    before = now()
    for given,want in dict(fp32='ieee', tf32='tf32', bf16='tf32').items():
        with arithmetic(recipe('smoke', precision=given), True):
            assert now() == [want, want, 'ieee'], (given, now())
            assert cudnn.allow_tf32 == (want == 'tf32') and not products.allow_tf32
        assert now() == before, (given, now(), before)
def alone(*case): # PyTorch cannot take back what has been set
    if pid := os.fork(): return os.waitpid(pid, 0)[1]
    try: obeyed(*case)
    except BaseException: traceback.print_exc()
    else: os._exit(0)
    os._exit(1)
places = None, backends, cudnn, cudnn.conv, products
sys.exit(any([alone(o, said) for o in places for said in ('ieee', 'tf32')]))
"""

@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='PyTorch has one name for it')
def test_a_precision_that_was_set_by_a_newer_name_is_put_aside_and_put_back():
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', NEWER_NAMES], capture_output=True, text=True)
    assert not p.returncode, p.stderr[-800:]

@row('precision', 'deterministic')
def a_gpu_computes_as_it_is_told(w):
    before = flags()
    for tf32,changes in ((False, dict()), (True, dict(precision='tf32')), (True, dict(precision='bf16'))):
        for det in (False, True):
            r = changed(deterministic=det, **changes)
            for training in (False, True):
                with arithmetic(r, training): assert flags() == [tf32, det, training and not det]
            half = r.precision == 'bf16'
            for device,single in (('cuda', 'tf32' if tf32 else 'fp32'), ('cpu', 'fp32')):
                used = dict(training='bf16' if half else single, evaluation=single, losses='fp32')
                assert used_arithmetic(r, device) == used | dict(deterministic=det or device == 'cpu')
    assert flags() == before
    with patch.dict(os.environ):
        os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None)
        with arithmetic(BASE): assert 'CUBLAS_WORKSPACE_CONFIG' not in os.environ
        with arithmetic(changed(deterministic=True)): assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'

@row('precision')
def tf32_needs_what_fp32_needs(w):
    small = dict(widths=(4, 4), scales=1, crop=32)
    need = {p: step_bytes(changed(precision=p, **small)) for p in ('fp32', 'tf32', 'bf16')}
    assert need['fp32'] == need['tf32'] > need['bf16']
    for p in ('fp32', 'tf32'): assert 'precision=bf16 needs' in advice(changed(precision=p, **small), need['bf16'])
    assert not [o for o in w.learner(precision='tf32').cbs if isinstance(o, Precision)]

@row('compile')
def a_network_is_compiled(w):
    with patch('torch.nn.Module.compile') as compiled, patch('cwcl.multitask.check_compiler') as checked:
        w.learner()
        assert not compiled.called and not checked.called
        w.learner(compile=True)
        assert compiled.call_count == 1 and checked.call_args.args[0].type == 'cpu'

@row('threads')
def threads_are_set(w):
    seen = caught('cwcl.train.set_seed', train_learner, changed(threads=3), None, None)
    assert seen.args == (0, 3)

@row('sync_bn')
def batch_norm_is_synchronized_on_request(w):
    "Without several GPUs nothing can meet; the layers that would are put in place"
    for sync_bn in (False, True):
        layers = synced(net(sync_bn=sync_bn)[0], 'cuda').modules()
        assert any(isinstance(o, nn.SyncBatchNorm) for o in layers) == sync_bn

@row('recompute')
def levels_can_be_computed_twice(w):
    for again in (False, True):
        for n in (net(recompute=again)[0], byol(recompute=again)): assert ('run' in vars(n.encoder)) == again
    count = step_bytes.__wrapped__
    assert .42*count(BASE) < count(changed(recompute=True)) < .7*count(BASE)
    assert 'recompute' not in advice(changed(recompute=True), 0)

@row('chunks')
def a_batch_can_be_computed_in_chunks(w):
    for k in (1, 2):
        n,x = net(chunks=k)
        n(x)
        assert n.encoder.levels[0][1].num_batches_tracked == k
    count = step_bytes.__wrapped__
    assert .3*count(BASE) < count(changed(chunks=3)) < .7*count(BASE)
    assert [o.get('chunks') for o in _lighter(changed(chunks=2, batch=12, labelled=8))][2:] == [4, 8]
    assert 'chunks=2' in advice(changed(chunks=3), 0)
    assert _sample(recipe('paper', chunks=8), 'cpu').chunks == 2
    plain = nn.Linear(1, 1)
    plain.recipe = changed(chunks=2)
    with pytest.raises(InputError, match='chunks=2: Linear'): wired_learner(w.dls(BASE), plain, None)

@row('window', 'overlap', 'blend')
def windows_lie_as_they_should(w):
    for changes in (dict(window=32), dict(window=32, overlap=.5), dict(window=32, blend='gaussian')):
        n = net(**changes)[0].eval()
        r = changed(**changes)
        x = torch.rand(1, 3, 48, 70, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(): near(n(x), sliding_window(n.segment, x, r.window, r.overlap, r.blend))

@row('valid_step')
def some_frames_of_a_clip_are_validated_on(w):
    one_clip = w.frames.assign(clip=w.frames.video + '_00000')
    valid = one_clip.video.isin(video_folds(one_clip)[0])
    every,second = (len(w.dls(changed(valid_step=k), one_clip).valid_ds) for k in (1, 2))
    assert every == valid.sum() and second == sum(-(-n//2) for n in one_clip[valid].video.value_counts())

@row('select')
def the_best_weights_can_be_kept(w): assert any(isinstance(o, KeepBest) for o in w.learner(select='best').cbs)

# What goes beyond the paper

@row('average', 'colors')
def weights_are_averaged_and_colors_change(w):
    learn = w.learner(average=.9, colors=.3)
    assert (learn.mean_weights.decay, learn.strong_colors.strength) == (.9, .3)
    assert not hasattr(w.learner(), 'mean_weights') and not hasattr(w.learner(), 'strong_colors')

def taught(w, **changes):
    "A Learner in the middle of its training, after what class-only frames add to the loss of a batch"
    learn = w.learner(method='random', **changes)
    image,*labels = learn.dls.train.one_batch()
    place = dict(iter=0, n_iter=1, epoch=1, n_epoch=2, training=True)
    for k,v in dict(place, xb=(image,), yb=labels, loss_grad=torch.zeros(())).items(): setattr(learn, k, v)
    if 'average' in changes: learn.mean_weights.net = learn.model.eval()
    learn.class_teacher.before_batch()
    seen = learn.class_teacher.seen
    learn.class_teacher.after_loss()
    return learn, seen, learn.loss_func.terms

@row('teacher', 'absent')
def class_only_frames_have_their_losses(w):
    learn,seen,got = taught(w, average=.9, teacher=.5, absent=.2, sure=0.)
    assert learn.class_teacher.columns == ['teacher', 'sure', 'absent'] == list(got) and len(seen.frames) == 6
    near(learn.loss_grad.detach(), .5*got['teacher'] + .2*got['absent'])
    learn,seen,got = taught(w, absent=.2)
    near(learn.loss_grad.detach(), .2*got['absent'])
    assert len(seen.frames) == 6 and len(w.learner(method='random').dls.train.one_batch()[0]) == 3

@row('sure')
def a_teacher_is_heard_where_it_is_sure(w):
    for sure,kept in ((0., 1), (1., 0)): assert taught(w, average=.9, teacher=1., sure=sure)[2]['sure'] == kept

@row('allowed')
def a_teacher_may_be_bound_by_the_classes(w):
    with patch('cwcl.beyond.teacher.teacher_masks', side_effect=Stop) as seen:
        for allowed in (True, False):
            with pytest.raises(Stop): taught(w, average=.9, teacher=1., allowed=allowed)
            assert (seen.call_args.args[1] is not None) == allowed

@row('boxes')
def frames_have_boxes(w):
    for p in (0., 1.):
        top,bottom = taught(w, average=.9, teacher=1., sure=0., boxes=p)[1].cut[0][:,:2].T
        assert ((bottom > top) == bool(p)).all()

@row('colors')
def a_view_of_the_student_has_colors(w):
    plain,strong = (taught(w, average=.9, teacher=1., boxes=0., colors=s)[1] for s in (0., .5))
    assert torch.equal(plain.view, plain.frames[3:]) and not torch.equal(strong.view, plain.view)

# What runs them

@pytest.fixture(scope='module')
def world(scenes): return World(frame_table(scenes))

@pytest.mark.parametrize('name', ROWS)
def test_a_field_does_what_it_says(world, name): check(name, world)

def test_every_field_has_a_row(): assert set(ROWS) == {f.name for f in fields(Recipe)}
