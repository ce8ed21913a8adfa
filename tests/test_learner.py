"Every verb and callback of the page of verbs: what it does on batches in which only the first frames have masks"
import copy, multiprocessing, pickle, re
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from dataclasses import replace
from functools import partial
from pathlib import Path
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException
from fastai.callback.core import CancelFitException, CancelTrainException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.interpret import Interpretation, SegmentationInterpretation
from fastai.learner import load_learner
from fastai.metrics import DiceMulti, JaccardCoeffMulti, foreground_acc
from PIL import Image
from cwcl.baselines.byol import byol_learner, byol_recipe
from cwcl.baselines.simclr import simclr_learner, simclr_recipe
from cwcl.beyond.masked import masked_learner
from cwcl.core import InputError, method_recipe, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.learner import Mirror
from cwcl.metrics import confusion_matrix, mean_iou
from cwcl.multitask import cwcl_learner
from cwcl.results import evaluate
from frames import few_frames
from pages import cells, source

@pytest.fixture(scope='module')
def few(table):
    "Three batches of six frames for training, four frames for validation, three for the test"
    return few_frames(table, 6, 12)

@pytest.fixture(scope='module')
def few_smoke(smoke): return replace(smoke, valid_labels=False)

def make(few, r, learner=cwcl_learner, **kwargs):
    set_seed(0, 1)
    return learner(cwcl_dls(few, r, device='cpu'), r.method, r, **kwargs)

@pytest.fixture(scope='module')
def trained(few, few_smoke):
    "One Learner for all, after an epoch of three steps"
    learn = make(few, few_smoke)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn

@pytest.fixture
def learn(trained, tmp_path):
    "A copy of it, without bars and lines, that writes where the test does"
    learn = copy.deepcopy(trained)
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging(): yield learn
    plt.close('all')

def weights(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())
def finite(learn): return all(v.isfinite().all() for v in learn.model.state_dict().values())
def steps(learn, part='decoder'): return learn.opt.state[next(getattr(learn.model, part).parameters())].get('step', 0)
def encoder(learn): return {k: v.clone() for k,v in learn.model.encoder.named_parameters() if v.ndim > 1}

ROWS = {}
def row(*names):
    "Mark a test as that of one row, or several, of the page"
    def mark(f):
        ROWS.update({o: f.__name__ for o in names})
        return f
    return mark

# Training

@row('`fit`, `fit_one_cycle`, `fit_flat_cos`, `fit_sgdr`')
def test_schedules_train(learn):
    calls = (learn.fit, [1]),(learn.fit_one_cycle, [1]),(learn.fit_flat_cos, [1]),(learn.fit_sgdr, [1, 1])
    for fit,epochs in calls:
        before = weights(learn)
        epoch = learn.dls.train.epoch
        fit(*epochs, 1e-3)
        assert not same(before, weights(learn)) and finite(learn) and learn.dls.train.epoch == epoch + 1

@row('`lr_find`')
def test_the_search_for_a_learning_rate_changes_nothing_that_follows(learn):
    other = copy.deepcopy(learn)
    assert 0 < other.lr_find(num_it=12, show_plot=False).valley < 10
    assert other.dls.train.epoch == learn.dls.train.epoch
    for o in (learn, other): o.fit(1, 1e-3)
    assert same(weights(learn), weights(other)) and list(learn.recorder.losses) == list(other.recorder.losses)

@row('`freeze`, `unfreeze`, `fine_tune`')
def test_freezing_stops_the_encoder_also_after_a_training(learn):
    names = [k for k,_ in learn.model.named_parameters()]
    n = sum(k.startswith('encoder.') for k in names)
    assert [len(o) for o in learn.opt.param_lists] == [n, len(names) - n]
    learn.freeze()
    before = encoder(learn)
    rest = weights(learn)
    learn.fit(1, 1e-2, wd=1.)
    assert same(before, encoder(learn)) and not same(rest, weights(learn))
    learn.fine_tune(1, 1e-2)
    assert not same(before, encoder(learn)) and learn.opt.frozen_idx == 0

@row('`fit(1, slice(1e-4, 1e-2))`')
def test_learning_rates_of_encoder_and_rest(learn):
    learn.fit(1, slice(1e-4, 1e-2))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-4, 1e-2])

@row('`to_bf16`, `to_fp32`')
def test_precision_to_and_fro(learn, few, few_smoke):
    seen = set()
    learn.model.encoder.levels[0][0].register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    half,single = (learn.to_bf16, torch.bfloat16),(learn.to_fp32, torch.float32)
    for f,dtype in (half, single, half, half):
        seen.clear()
        f().fit(1, 1e-3)
        assert seen == {dtype} and len(learn._grab_cbs(MixedPrecision)) == (dtype == torch.bfloat16)
    half = make(few, replace(few_smoke, precision='bf16'))
    with half.no_bar(), half.no_logging(): half.to_fp32().fit(1, 1e-3)
    assert finite(half) and not hasattr(half, 'mixed_precision')

def test_a_batch_that_fails_leaves_no_half_precision_behind(learn):
    learn.to_bf16().model.register_forward_hook(lambda *o: 1/0)
    with pytest.raises(ZeroDivisionError): learn.fit(1, 1e-3)
    assert not torch.is_autocast_enabled('cpu')

@row('`to_fp16`')
def test_fp16_on_a_cpu_is_refused_at_once(learn):
    with pytest.raises(InputError, match="fp16 needs CUDA; choose precision='bf16'"): learn.to_fp16()

@row('`to_channelslast`, `to_contiguous`, `ChannelsLast`')
def test_memory_format_there_and_back(learn, few, few_smoke):
    assert learn.to_channelslast(use_amp=False).to_channelslast() is learn
    learn.fit(1, 1e-3, cbs=ChannelsLast())
    assert learn.model.encoder.levels[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    learn.to_channelslast(use_amp=False).to_contiguous().fit(1, 1e-3)
    assert learn.model.encoder.levels[1][0].weight.is_contiguous() and not hasattr(learn, 'channels_last')

class Stop(Callback):
    def __init__(self, ex): self.ex = ex
    def after_pred(self):
        if self.training and self.iter == 1: raise self.ex

@row('`CancelFitException` and the like')
@pytest.mark.parametrize('ex', [CancelFitException, CancelEpochException, CancelTrainException, CancelBatchException])
def test_a_training_that_is_called_off_can_continue(learn, ex):
    learn.to_bf16().fit(1, 1e-3, cbs=Stop(ex))
    assert not torch.is_autocast_enabled('cpu')
    learn.fit(1, 1e-3)
    assert finite(learn)

@row('`to_distributed`, `detach_distributed`, `distrib_ctx`')
def test_in_one_process_nothing_is_dealt(learn):
    with learn.distrib_ctx(): learn.fit(1, 1e-3)
    assert finite(learn) and not hasattr(learn, 'rank_trainer')
    learn.to_distributed().detach_distributed().fit(1, 1e-3)
    assert finite(learn)

def test_a_training_that_was_stopped_by_nan_continues_at_a_lower_learning_rate(learn):
    handle = next(learn.model.encoder.parameters()).register_hook(lambda g: g*torch.inf)
    with pytest.raises(InputError, match='lower the learning rate'): learn.fit(1, 1e-3)
    handle.remove()
    learn.fit(1, 1e-4)
    assert finite(learn)

# Evaluation

@row('`validate`')
def test_validation_is_on_whole_frames(learn):
    preds,masks = learn.get_preds()
    cm = confusion_matrix(preds.argmax(1), masks, 8)
    assert learn.validate()[-1] == pytest.approx(float(mean_iou(cm, truth=True)), abs=1e-6)

@row('`validate(ds_idx=0)`, `validate(dl=dls.train)`')
def test_numbers_of_the_training_set_are_those_of_its_labelled_frames(learn):
    rows = learn.dls.train_ds.table
    want = learn.validate(dl=learn.dls.test_dl(rows[rows.labelled]))
    for got in (learn.validate(ds_idx=0), learn.validate(dl=learn.dls.train)):
        assert (got[0], got[-1]) == pytest.approx((want[0], want[-1]), abs=1e-6)
    assert len(learn.get_preds(ds_idx=0)[0]) == len(learn.get_preds(dl=learn.dls.train)[0]) == rows.labelled.sum()
    learn.show_results(dl=learn.dls.train, max_n=2)
    with pytest.raises(InputError, match='ds_idx=0'): learn.dls.train.new(get_idxs=lambda: [0])

@row('`get_preds`, `loss_not_reduced`')
def test_predictions_keep_the_order(learn, few):
    paths = few.image.tolist()[::-1][:4]
    probs = learn.get_preds(dl=learn.dls.test_dl(paths))[0]
    for p,path in zip(probs, paths): torch.testing.assert_close(p, learn.predict(path)[2], rtol=1e-4, atol=1e-5)
    x,probs,masks,ids,losses = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    assert (len(x), len(masks), tuple(losses.shape)) == (4, 4, (4,)) and torch.equal(ids, probs.argmax(1))
    assert (losses > 0).all() and losses.isfinite().all()

@row('`predict`')
def test_any_picture_is_predicted_and_anything_else_is_named(learn, few):
    path = few.image.iloc[0]
    image = Image.open(path).convert('RGB')
    pixels = np.asarray(image)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    same_frame = [path, Path(path), image, pixels, tensor, image.convert('RGBA'), few.iloc[0]]
    masks = [learn.predict(o)[0] for o in same_frame]
    assert all(torch.equal(o, masks[0]) for o in masks) and masks[0].shape == (60, 107)
    others = [*map(image.convert, ('L', 'P', 'LA')), pixels[..., 0], pixels[:7, :9]]
    assert {learn.predict(o)[0].shape for o in others} == {(60, 107)}
    for o in (None, 7, np.zeros((2, 3, 4, 5), np.uint8), np.zeros((9, 9, 3), int), torch.zeros(9, 9, 3), 'nowhere.png'):
        with pytest.raises(InputError): learn.predict(o)

@row('`tta`')
def test_mirrored_predictions_are_turned_back(learn, few):
    preds,masks = learn.tta(n=2)
    x,truth = learn.dls.valid.one_batch()
    net = learn.model.eval()
    with torch.no_grad(): want = ((net(x) + net(x.flip(-1)).flip(-1))/2).softmax(1)
    torch.testing.assert_close(preds, want.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-5)
    assert torch.equal(masks, truth.as_subclass(torch.Tensor))
    torch.testing.assert_close(learn.tta(n=1)[0], learn.get_preds()[0])
    frame = np.asarray(Image.open(few.image.iloc[0]).convert('RGB'))
    a,b = learn.tta(dl=learn.dls.test_dl([frame, frame[:, ::-1].copy()]))[0]
    torch.testing.assert_close(a, b.flip(-1), rtol=1e-3, atol=1e-4)
    assert learn.validate(cbs=Mirror())[0] != learn.validate()[0]
    rows = learn.dls.valid_ds.table
    cm = confusion_matrix(preds.argmax(1), masks, 8)
    flipped = torch.tensor(evaluate(learn.model, learn.dls, rows, native=False, flip=True)['confusion'])
    assert (flipped - cm).abs().sum() <= .01*cm.sum()
    for k in ('item_tfms', 'batch_tfms', 'beta', 'use_max'):
        with pytest.raises(InputError, match=k): learn.tta(**{k: None})

@row('`DiceMulti`, `JaccardCoeffMulti`, `foreground_acc`')
def test_metrics_of_fastai(learn):
    learn.metrics = learn.metrics + [DiceMulti(), JaccardCoeffMulti(), foreground_acc]
    assert all(0 <= o <= 1 for o in learn.validate()[-3:])

@row('`recorder.train_metrics`')
def test_the_score_in_training_is_that_of_the_labelled_crops(learn):
    learn.recorder.train_metrics = True
    learn.fit(1, 1e-3)
    names = list(learn.recorder.metric_names)
    assert 0 < learn.recorder.values[-1][names.index('train_mean_iou') - 1] < 1

# Looking

@row('`summary`')
def test_summary_counts_the_weights(learn):
    learn.add_cb(SaveModelCallback(monitor='mean_iou'))
    before = weights(learn)
    said = str(learn.summary())
    total = sum(p.numel() for o in (learn.model.encoder, learn.model.decoder) for p in o.parameters())
    assert f'Total params: {total:,}' in said
    assert same(before, weights(learn)) and 'SaveModelCallback' in said and not list(learn.path.rglob('*.pth'))

@row('`dls.show_batch`, `show_batch(unique=True)`')
def test_one_frame_is_shown_as_often_as_there_are_places(learn):
    dls,epoch = learn.dls,learn.dls.train.epoch
    first = dls.train.one_batch()
    for o in (dict(), dict(max_n=1), dict(unique=True), dict(b=first)): dls.show_batch(**o)
    dls.valid.show_batch(unique=True)
    for dl,n in ((dls.train, 6), (dls.valid, 6)):
        x,*_ = dl.peek(unique=True)
        assert len(x) == n and (dl is dls.train) == (not torch.equal(x[0], x[1]))
    ids = dls.train.peek(unique=True)[3]
    assert (ids == ids[0]).all() and dls.train.epoch == epoch and torch.equal(dls.train.one_batch()[0], first[0])

@row('`show_results`')
def test_results_of_either_set_are_shown(learn):
    for o in (dict(), dict(ds_idx=0), dict(dl=learn.dls.train)):
        learn.show_results(max_n=2, **o)
        titles = [a.get_title() for a in plt.gcf().axes]
        assert titles == ['truth', 'prediction']*2

@row('`Interpretation`, `SegmentationInterpretation`')
@pytest.mark.parametrize('kind', [Interpretation, SegmentationInterpretation])
def test_the_worst_frames_are_found_and_shown(learn, kind):
    worst = kind.from_learner(learn)
    losses,idx,rows = worst.top_losses(3, items=True)
    assert rows.image.tolist() == learn.dls.valid_ds.table.image.iloc[idx.tolist()].tolist() and losses[0] >= losses[-1]
    worst.plot_top_losses(2)
    assert f'loss = {losses[0]:.4f}' in plt.gcf().axes[2].get_title()
    limits = {o.get_clim() for a in plt.gcf().axes for o in a.images[:1] if o.get_cmap().name == 'tab20'}
    assert limits == {(0, 8)}
    worst.show_results([0, 1])
    assert [a.get_title() for a in plt.gcf().axes[:2]] == ['truth', 'prediction']
    assert len(kind.from_learner(learn, ds_idx=0).losses) == len(learn.dls.train.labelled)

@row('`recorder.plot_loss`, `recorder.plot_sched`, `show_training_loop`')
def test_curves_of_a_training(learn, capsys):
    learn.fit_one_cycle(1, 1e-3)
    learn.recorder.plot_loss(skip_start=0)
    learn.recorder.plot_sched()
    learn.show_training_loop()
    assert 'LossGuard' in capsys.readouterr().out

# Loaders

@row('`dls.test_dl`')
def test_loaders_of_other_frames(learn, few):
    path = few.image.iloc[0]
    dls = learn.dls
    pixels = np.asarray(Image.open(path).convert('RGB'))
    row = few.iloc[0]
    given = [path, Path(path), Image.open(path), row, [path], [row], pixels[None], few[:1], few[['image']][:1]]
    batches = [dls.test_dl(o).one_batch()[0] for o in given]
    assert all(len(o) == 1 and torch.equal(o, batches[0]) for o in batches)
    with_mask,without = (dls.test_dl(o).one_batch()[1] for o in (row, pixels[None]))
    assert (with_mask != 255).any() and (without == 255).all()

@row('`dls.cpu`, `dls.cuda`, `pickle`')
def test_loaders_travel(learn):
    assert learn.dls.cpu().device == torch.device('cpu') and len(learn.dls.cuda().one_batch()) == 4
    again = pickle.loads(pickle.dumps(learn.dls.cpu()))
    assert torch.equal(again.train.one_batch()[0], learn.dls.train.one_batch()[0])

@row('`cwcl_dls(workers=1)`')
@pytest.mark.parametrize('part, kind, n', [('train', 'spawn', 3), ('valid', 'spawn', 1), ('valid', 'forkserver', 1)])
def test_a_spawned_worker_gives_the_batches_of_none(few, few_smoke, monkeypatch, part, kind, n):
    "As on Windows and macOS, and on Linux from Python 3.14: nothing is inherited, the loader is sent"
    if kind not in multiprocessing.get_all_start_methods(): pytest.skip(f'no {kind} here')
    loader = getattr(cwcl_dls(few, few_smoke, device='cpu', workers=1), part)
    monkeypatch.setattr(type(loader.fake_l), 'multiprocessing_context', multiprocessing.get_context(kind))
    got = list(loader)
    monkeypatch.undo()
    want = list(getattr(cwcl_dls(few, few_smoke, device='cpu'), part))
    assert len(got) == len(want) == n and all(torch.equal(a, b) for x,y in zip(got, want) for a,b in zip(x, y))

# Keeping

@row('`save`, `load`')
def test_weights_and_optimizer_are_put_back(learn):
    learn.save('a')
    before = weights(learn)
    learn.fit(1, 1e-2)
    learn.load('a')
    assert same(before, weights(learn)) and steps(learn) == 3

@row('`export`, `load_learner`')
def test_an_exported_learner_predicts_as_before(learn, few):
    learn.to_bf16().fit(1, 1e-3, cbs=CSVLogger())
    learn.add_cb(CSVLogger())
    learn.fit(1, 1e-3)
    learn.export('net.pkl')
    with pytest.warns(UserWarning, match='pickle'): again = load_learner(learn.path/'net.pkl')
    assert hasattr(learn, 'csv_logger') and not hasattr(again, 'mixed_precision') and not hasattr(again, 'csv_logger')
    with again.no_bar(), again.no_logging(): mask = again.predict(few.image.iloc[0])[0]
    assert torch.equal(mask, learn.to_fp32().predict(few.image.iloc[0])[0])

@row('`copy.deepcopy`, `add_cb`, `remove_cb`')
def test_a_copy_is_independent(learn):
    other = copy.deepcopy(learn)
    before = weights(learn)
    other.remove_cb(other.loss_guard).remove_cb(ProgressCallback).fit(1, 1e-2)
    assert same(before, weights(learn)) and not same(before, weights(other)) and hasattr(learn, 'loss_guard')

# Callbacks

PRE = dict(joint=(cwcl_learner, replace), random=(cwcl_learner, lambda r: replace(r, method='random')),
    simclr=(simclr_learner, simclr_recipe), byol=(byol_learner, byol_recipe),
    **{k: (cwcl_learner, partial(replace, method=k)) for k in ('dcl', 'cls')},
    masked=(masked_learner, partial(method_recipe, method='masked')))

@row('`GradientAccumulation`')
@pytest.mark.parametrize('method', PRE)
def test_gradients_are_accumulated_over_frames(few, few_smoke, method):
    maker,recipe = PRE[method]
    made = [make(few, recipe(few_smoke), maker) for _ in range(2)]
    for o,n in zip(made, (12, 18)):
        with o.no_bar(), o.no_logging(): o.fit(1, 1e-3, cbs=GradientAccumulation(n))
        assert steps(o, 'encoder') == -(-18//n), 'the last one with the batches that there are'
    assert not hasattr(made[0], 'gradient_accumulation') and len(made[0].recorder.losses) == 3

def test_an_accumulated_gradient_is_the_mean_over_its_batches(few, few_smoke):
    learn = make(few, replace(few_smoke, norm='group'))
    seen,apart = [],[]
    class Look(Callback):
        order = 50
        def before_step(self): seen.append([p.grad.clone() for p in self.model.encoder.parameters()])
    class Alone(Callback):
        order = -50
        def before_step(self):
            apart.append([p.grad.clone() for p in self.model.encoder.parameters()])
            self.opt.zero_grad()
            raise CancelBatchException
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=Alone())
        learn.dls.train.epoch = 0
        learn.fit(1, 1e-3, cbs=[GradientAccumulation(15), Look()])
    assert (len(seen), len(apart)) == (1, 3)
    for got,*want in zip(*seen, *apart): torch.testing.assert_close(got, sum(want)/3, rtol=1e-4, atol=1e-6)

def test_no_gradient_crosses_an_epoch(learn):
    "So nothing is lost where a training is stopped and resumed"
    seen,apart = [],[]
    class Look(Callback):
        order = 50
        def before_train(self): assert all(p.grad is None or not p.grad.any() for p in self.model.parameters())
        def before_step(self): seen.append([p.grad.clone() for p in self.model.encoder.parameters()])
    class Alone(Callback):
        order = -50
        def before_backward(self):
            grads = torch.autograd.grad(self.loss_grad*2, [*self.model.encoder.parameters()], retain_graph=True)
            apart.append(grads)
    learn.fit(2, 1e-3, cbs=[GradientAccumulation(12), Look(), Alone()])
    assert (len(seen), len(apart)) == (4, 6)
    for got,want in zip(seen[1], apart[2]): torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

@row('`SaveModelCallback`, `EarlyStoppingCallback`')
def test_the_best_weights_are_kept_and_no_validation_overwrites_them(learn):
    learn.add_cb(SaveModelCallback(monitor='valid_loss', reset_on_fit=False))
    learn.fit(2, 1e-3, cbs=EarlyStoppingCallback(monitor='mean_iou', patience=1))
    def kept(): return learn.save_model.best,(learn.path/'models'/'model.pth').stat().st_mtime_ns
    before = kept()
    learn.validate()
    learn.validate(ds_idx=0)
    assert kept() == before

@row('`CSVLogger`')
def test_a_log_has_a_line_for_each_epoch(learn):
    learn.fit(2, 1e-3, cbs=CSVLogger())
    log = pd.read_csv(learn.path/'history.csv')
    assert len(log) == 2 and {'gdl', 'focal', 'presence', 'dcl', 'lonely', 'mean_iou'} < set(log.columns)

@row('`TerminateOnNaNCallback`, `GradientClip`, `ActivationStats`, `BnFreeze`')
@pytest.mark.filterwarnings('ignore:You are shadowing an attribute')
def test_callbacks_that_watch(learn):
    stats = ActivationStats(with_hist=True)
    learn.fit(1, 1e-3, cbs=[TerminateOnNaNCallback(), GradientClip(.1), stats, BnFreeze()])
    assert len(stats.stats) == 3 and finite(learn)

@row('`ShortEpochCallback`')
def test_a_part_of_an_epoch(learn):
    epoch = learn.dls.train.epoch
    learn.fit(1, 1e-3, cbs=ShortEpochCallback(.3))
    assert len(learn.recorder.losses) == 1 and learn.dls.train.epoch == epoch

@row('`ShowGraphCallback`')
def test_a_graph_rests_where_there_is_no_bar(learn, few, few_smoke):
    learn.fit(1, 1e-3, cbs=ShowGraphCallback())
    learn.add_cb(ProgressCallback())
    drawn = []
    graph = ShowGraphCallback()
    learn.add_cb(graph)
    class Spy(Callback):
        order = 62
        def before_fit(self): self.progress.mbar.update_graph = lambda *o: drawn.append(o)
    learn.fit(1, 1e-3, cbs=Spy())
    assert len(drawn) == 1 and learn.show_graph is graph
    pre = make(few, byol_recipe(few_smoke), byol_learner)
    with pre.no_logging(): pre.fit(1, 1e-3, cbs=ShowGraphCallback())

@row('`TensorBoardCallback`')
def test_tensorboard_gets_numbers_and_pictures(learn, few, few_smoke):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn.fit(1, 1e-3, cbs=TensorBoardCallback(learn.path/'logs'))
    seen = EventAccumulator(str(learn.path/'logs')).Reload().Tags()
    assert 'mean_iou' in seen['scalars'] and seen['images'] and seen['graph']
    pre = make(few, byol_recipe(few_smoke), byol_learner)
    with pytest.raises(InputError, match='leave it out'): pre.add_cb(TensorBoardCallback(learn.path/'logs'))

@row('`WandbCallback`')
def test_wandb_gets_numbers_and_pictures(learn, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    wandb = pytest.importorskip('wandb', reason='wandb is not installed')
    from fastai.callback.wandb import WandbCallback
    with wandb.init(mode='offline', dir=learn.path) as run:
        learn.fit(1, 1e-3, cbs=WandbCallback(n_preds=2))
        seen = dict(run.summary)
    assert {'mean_iou', 'train_loss', 'Prediction_Samples'} <= set(seen)

# What is refused

def refused(cb, learn, words):
    with pytest.raises(InputError, match=words) as e: learn.fit(1, 1e-3, cbs=cb)
    assert '\n' not in str(e.value) and not learn._grab_cbs(type(cb))

def test_an_evaluation_that_cannot_begin_leaves_the_learner_free(learn):
    class Bad(Callback):
        def before_fit(self): raise InputError('no')
    for o in (MixUp(), Bad()):
        with pytest.raises(InputError): learn.validate(cbs=o)
        assert not learn.lock.locked() and o not in learn.cbs
    assert learn.validate()[0] > 0

@row('`MixUp`, `CutMix`')
def test_frames_are_not_mixed(learn):
    for o in (MixUp(), CutMix()): refused(o, learn, 'only the first frames of a batch have masks')
    with pytest.raises(InputError): learn.add_cb(MixUp)

@row('`RNNCallback`, `RNNRegularizer`, `ModelResetter`')
def test_nothing_here_is_recurrent(learn):
    for o in (RNNCallback(), RNNRegularizer(), ModelResetter()): refused(o, learn, 'recurrent networks; leave it out')

@row('`to_non_native_fp16`')
def test_weights_stay_whole(learn):
    with pytest.raises(InputError, match='to_bf16'): learn.to_non_native_fp16()

@row('`to_parallel`')
def test_a_batch_stays_whole(learn):
    for name in ('ParallelTrainer', 'DistributedTrainer'):
        wrapper = type(name, (Callback,), {})
        refused(wrapper(), learn, 'cuts a batch into pieces.*call to_distributed')

@row('`tta`, `show_results`, `Interpretation` in pre-training')
@pytest.mark.parametrize('method,change', [('byol', dict()), ('dcl', dict(stage='pretrain'))])
def test_an_encoder_alone_gives_no_masks(few, few_smoke, method, change):
    r = byol_recipe(few_smoke) if method == 'byol' else replace(few_smoke, method=method, **change)
    learn = make(few, r, byol_learner if method == 'byol' else cwcl_learner)
    with learn.no_bar(), learn.no_logging():
        def interpret(): SegmentationInterpretation.from_learner(learn)
        def mirrored(): learn.validate(cbs=Mirror())
        for f in (learn.tta, learn.show_results, interpret, mirrored):
            with pytest.raises(InputError, match='an encoder alone'): f()
        assert len(learn.get_preds()[0]) == 4 and learn.validate()[0] is None
        assert 'Total params' in str(learn.summary())
        learn.fine_tune(1)
        learn.recorder.plot_loss(skip_start=0)
    plt.close('all')

# The page

def test_every_row_of_the_page_has_its_test():
    lines = [l for c in cells('34a_verbs.ipynb') if c['cell_type'] == 'markdown' for l in source(c).splitlines()]
    assert [m[1] for l in lines if (m := re.match(r'\| (`.*?) \|', l))] == list(ROWS)
