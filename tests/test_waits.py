"What makes the processor wait for a GPU in a step, with tensors that hold no data in the place of a GPU"
import pytest, torch
from contextlib import nullcontext
from dataclasses import replace
from fastai.callback.core import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from cwcl.core import find_method, method_recipe
from cwcl.data.streams import cwcl_dls
from test_multitask import caller

META = torch.device('meta')

class Waits(TorchDispatchMode):
    "Note what is read from the device, and what is sent to it while the processor waits"
    def __init__(self, monkeypatch):
        super().__init__()
        self.found,self.sent,self.largest = [],0,0
        self.watching = False
        make = torch.tensor
        def tensor(*args, device=None, **kwargs):
            if device is not None and torch.device(device) == META: self.note() # Its copy cannot be told not to wait
            return make(*args, device=device, **kwargs)
        def cpu(x):
            self.note()
            return torch.zeros(x.shape, dtype=x.dtype)
        monkeypatch.setattr(torch, 'tensor', tensor)
        monkeypatch.setattr(torch.Tensor, 'cpu', cpu)

    def note(self):
        if self.watching: self.found.append(caller())
    def __enter__(self):
        self.watching = True
        return super().__enter__()
    def __exit__(self, *args):
        self.watching = False
        return super().__exit__(*args)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        out = f(*args, **kwargs or {})
        if name in ('_to_copy', 'copy_'):
            source,asynchronous = (args[0], (kwargs or {}).get('non_blocking')) if name == '_to_copy' else \
                (args[1], len(args) > 2 and args[2])
            crosses = source.device != out.device
            self.sent += int(crosses)
            if crosses: self.largest = max(self.largest, source.nbytes)
            if crosses and not asynchronous: self.note()
        return out

class Seen(Exception):
    "Raised after two steps that were watched"

class Watched(Callback):
    "Watch from after the first batch to after the third"
    order = 200
    def after_batch(self):
        if self.iter == 0: self.waits.__enter__()
        if self.iter == 2:
            self.waits.__exit__(None, None, None)
            raise Seen('enough')

CASES = {**{k: dict(method=k) for k in ('random', 'cls', 'dcl', 'dcl+cls', 'simclr', 'byol', 'masked')},
    'weights of classes': dict(pos_weight=True), 'chunks': dict(chunks=2), 'levels': dict(recompute=True),
    'colors': dict(colors=.3), 'teacher': dict(teacher=1., average=.9), 'absent': dict(absent=1.),
    'paste': dict(paste=.5), 'bank': dict(bank=16), 'overlap': dict(alike='overlap'), 'regions': dict(regions=.1),
    'strong': dict(method='simclr', views=2, strong=True)}

@pytest.mark.parametrize('case', CASES)
def test_a_step_waits_for_the_gpu_once(case, table, smoke, monkeypatch):
    "Gathering, augmentation, network, losses, backward pass, guard and optimizer"
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr('cwcl.beyond.teacher.ramp_up', lambda done: 1.)
    change = dict(CASES[case])
    r = method_recipe(replace(smoke, widths=(4, 4, 8, 8), scales=1, batch=8), change.pop('method', 'dcl+cls'))
    r = replace(r, **change)
    dls = cwcl_dls(table, r, device='cpu')
    learn = find_method(r.method).make(dls, cbs=Watched())
    store = dls.train.dataset.store
    store.frames,store.masks = store.frames.to(META),store.masks.to(META)
    for o in (dls, *dls.loaders): o.device = META
    learn.model.to(META)
    learn.watched.waits = waits = Waits(monkeypatch)
    with pytest.raises(Seen), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert waits.sent >= 2*4 and waits.largest < 10_000, (waits.sent, waits.largest) # More would have to be pinned
    smoothed = [o for o in waits.found if 'torch_core.py' in o] # fastai's loss, for the bar
    assert len(waits.found) == len(smoothed) <= 2, waits.found
