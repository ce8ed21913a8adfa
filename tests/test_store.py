"Frames decoded once: the same bytes from every source, from memory and from a file"
import os, time, types
import numpy as np, pytest, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from fastai.torch_core import TensorImage
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
import cwcl.data.store as store_module
from cwcl.core import InputError
from cwcl.data.images import read_mask
from cwcl.data.labels import class_set, decode_mask, encode_mask
from cwcl.data.store import FrameStore, channel_stats, load_image, load_mask, store_key
from cwcl.data.synth import render_scene

@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "Five frames and their masks: lists of paths"
    root = tmp_path_factory.mktemp('scenes')
    images,masks = [[str(root/f'{k}{i}.png') for i in range(5)] for k in ('frame', 'mask')]
    for i in range(5):
        frame,ids = render_scene('video12', 'video12_15830', 15830 + i, (107,60))
        Image.fromarray(frame).save(images[i])
        Image.fromarray(encode_mask(ids)).save(masks[i])
    return images, masks

def test_every_kind_of_frame_gives_the_same_bytes(scenes):
    p = scenes[0][0]
    pixels = read_mask(p)
    chw = torch.tensor(pixels).permute(2, 0, 1)
    arrays = [pixels, pixels/255, pixels.astype(np.float32)/255]
    kinds = [p, Path(p), Image.open(p), *arrays, chw, chw/255, TensorImage(chw)]
    ref = np.asarray(Image.open(p).convert('RGB').resize((50,30), Image.BILINEAR)).transpose(2, 0, 1)
    for o in kinds: assert (load_image(o, (30,50)) == ref).all()
    gray = load_image(pixels[...,0], (60,107))
    assert (gray[0] == pixels[...,0]).all() and (gray[0] == gray[2]).all()

def test_shrinking_averages_and_does_not_skip():
    stripes = np.tile(np.array([0, 255], np.uint8), (40,40))
    assert abs(load_image(stripes, (20,20)).astype(int)[:,2:-2,2:-2] - 127).max() <= 1

@pytest.mark.parametrize('bad,message', [
    (np.ones((4,4,3)), None), (np.full((4,4,3), 2.), 'floats in 0..1'), (np.ones((4,4), int), 'type int64'),
    (np.ones((4,4,7), np.uint8), r'\(4, 4, 7\)'), (torch.full((3,4,4), -1.), 'floats in 0..1'),
    (7, 'int is not a frame'), (None, 'NoneType'), (torch.zeros(1, 3, 4, 4), r'\(1, 3, 4, 4\)'),
    (torch.zeros(4, 4).int(), r'\(4, 4\) and type int32')])
def test_what_is_not_a_frame(bad, message):
    if message is None: assert load_image(bad, (4,4)).min() == 255
    else:
        with pytest.raises(InputError, match=message): load_image(bad, (4,4))

def test_a_torn_jpeg_is_named(tmp_path):
    path = tmp_path/'a.jpg'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    assert load_image(path, (20, 20)).shape == (3, 20, 20)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InputError, match='a.jpg: unreadable .*fetch the file again'): load_image(path, (20, 20))

@pytest.mark.parametrize('n,left_out', [(8,'ignore'), (13,'ignore'), (8,'background')])
def test_masks_are_resized_by_nearest_neighbor(scenes, n, left_out):
    classes = class_set(n, left_out)
    p = scenes[1][0]
    full = decode_mask(read_mask(p))
    rows = ((np.arange(30) + .5)*60/30).astype(int)
    cols = ((np.arange(50) + .5)*107/50).astype(int)
    assert (load_mask(p, (30,50), classes) == classes.encode(full[rows][:,cols])).all()

def test_real_masks_keep_their_known_pixels(real):
    p = real/'cholecseg8k/video52/video52_00080/frame_120_endo_watershed_mask.png'
    count = np.bincount(load_mask(p, (240,427), class_set(13)).ravel(), minlength=256)
    assert count[[0, 1, 2, 4, 5, 10, 255]].tolist() == [27777, 43703, 6024, 18102, 2628, 3580, 666]
    assert load_image(p.with_name('frame_120_endo.png'), (240,427)).shape == (3, 240, 427)

def frames_and_masks(scenes): return list(scenes[0]), [*scenes[1][:3], '', '']

def test_store_holds_image_and_mask(scenes):
    images,masks = frames_and_masks(scenes)
    store = FrameStore(images, masks, class_set(8), (30,50))
    assert store.frames.shape == (5, 3, 30, 50) and store.masks.shape == (5, 30, 50)
    assert store.frames.dtype == store.masks.dtype == torch.uint8 and store.frames.is_contiguous()
    for i in range(5):
        assert (store.frames[i].numpy() == load_image(images[i], (30,50))).all()
        assert (store.masks[i].numpy() == (load_mask(masks[i], (30,50), class_set(8)) if masks[i] else 255)).all()

def little_memory(monkeypatch):
    little = types.SimpleNamespace(available=1000)
    monkeypatch.setattr(store_module.psutil, 'virtual_memory', lambda: little)

def equal(a, b): return torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks)

def decode_again(*args): raise AssertionError('decoded twice')

def kinds(folder): return sorted(p.name.split('-')[0] for p in folder.glob('*.npy'))

def test_frames_that_do_not_fit_lie_in_a_file_and_are_found_again(scenes, tmp_path, monkeypatch):
    images,masks = frames_and_masks(scenes)
    ref = FrameStore(images, masks, class_set(8), (30,50))
    little_memory(monkeypatch)
    first = FrameStore(images, masks, class_set(8), (30,50), tmp_path)
    assert equal(first, ref) and kinds(tmp_path) == ['frames', 'masks']
    first.frames[0] = 0
    first.masks[0] = 0
    monkeypatch.setattr(store_module, 'load_image', decode_again)
    monkeypatch.setattr(store_module, 'load_mask', decode_again)
    assert equal(FrameStore(images, masks, class_set(8), (30,50), tmp_path), ref)
    with pytest.raises(AssertionError): FrameStore(images, masks, class_set(13), (30,50), tmp_path)

def test_the_file_depends_on_everything_that_decides_its_bytes(scenes, tmp_path):
    images,masks = frames_and_masks(scenes)
    copy = tmp_path/'a.png'
    copy.write_bytes(Path(images[0]).read_bytes())
    images[0] = str(copy)
    eight = class_set(8)
    keys = [store_key(images, (30,50)), store_key(images[::-1], (30,50)), store_key(images, (30,51))]
    keys += [store_key(masks, (30,50), o) for o in (eight, class_set(8, 'background'))]
    keys.append(store_key(masks[::-1], (30,50), eight))
    copy.write_bytes(Path(images[1]).read_bytes() + b' ')
    assert len({*keys, store_key(images, (30,50))}) == 7

def test_runs_of_a_study_share_frames_and_hide_their_own_masks(scenes, tmp_path, monkeypatch):
    images,masks = frames_and_masks(scenes)
    some = ['', masks[1], '', '', '']
    refs = [FrameStore(images, o, class_set(8), (30,50)) for o in (masks, some)]
    with store_module.shared_frames(tmp_path):
        assert FrameStore(images, masks, class_set(8), (20,40)).frames.shape[2:] == (20, 40)
        first = FrameStore(images, masks, class_set(8), (30,50))
        monkeypatch.setattr(store_module, 'load_image', decode_again)
        second = FrameStore(images, some, class_set(8), (30,50))
    assert equal(first, refs[0]) and equal(second, refs[1]) and kinds(tmp_path) == ['frames']*2
    with pytest.raises(AssertionError, match='decoded twice'): FrameStore(images, masks, class_set(8), (30,50))

def test_pictures_in_memory_are_not_shared(scenes, tmp_path):
    pixels = read_mask(scenes[0][0])
    with store_module.shared_frames(tmp_path):
        for o in ([pixels], []): assert len(FrameStore(o, ['']*len(o), class_set(8), (30,50)).frames) == len(o)
    assert not list(tmp_path.iterdir())

def test_of_two_that_need_one_file_one_decodes(tmp_path):
    filled = []
    def fill(out):
        time.sleep(.2)
        filled.append(1)
        out[:] = 7
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: store_module.mapped_array(tmp_path/'a.npy', (3, 4), fill), range(4)))
    assert filled == [1] and all((o == 7).all() for o in found)

@pytest.mark.parametrize('how', ['cut', 'flipped', 'empty', 'other'])
def test_a_damaged_file_is_made_again(tmp_path, how):
    def fill(out): out[:] = np.arange(12).reshape(3, 4)
    file = tmp_path/'a.npy'
    store_module.mapped_array(file, (3, 4), fill)
    content = file.read_bytes()
    if how == 'other': np.save(file, np.zeros((3, 5), np.uint8))
    else: file.write_bytes(dict(cut=content[:-5], flipped=content[:-1] + b'!', empty=b'')[how])
    with pytest.warns(UserWarning, match='a.npy: damaged; its pictures are decoded again'):
        again = store_module.mapped_array(file, (3, 4), fill)
    assert (again == np.arange(12).reshape(3, 4)).all() and file.read_bytes() == content

def test_a_file_of_an_older_kit_has_no_checksum(tmp_path):
    np.save(tmp_path/'a.npy', np.full((3, 4), 7, np.uint8))
    assert (store_module.mapped_array(tmp_path/'a.npy', (3, 4), decode_again) == 7).all()

@pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='this system cannot reserve space')
def test_space_is_taken_before_the_first_byte(tmp_path, monkeypatch):
    "Memory that is mapped to a file on a full disk would kill the process"
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(InputError, match='a.npy: cannot be written: the disk is full; make room there'):
        store_module.mapped_array(tmp_path/'a.npy', (3, 4), decode_again)
    assert not list(tmp_path.iterdir())

def on_a_pretended_gpu(scenes, monkeypatch, times):
    "A store that was sent to a GPU with so many times its size in free memory, in a mode of fake tensors"
    store = FrameStore(*frames_and_masks(scenes), class_set(8), (30,50))
    size = store.frames.nbytes + store.masks.nbytes
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (int(times*size), 10**12))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode: assert store.to('cuda') is store
    return store, mode

def test_frames_that_fit_live_on_the_pretended_gpu(scenes, monkeypatch):
    store,mode = on_a_pretended_gpu(scenes, monkeypatch, 6)
    assert store.frames.is_cuda and store.masks.is_cuda
    with mode: x,y = store.gather(torch.tensor([3, 0, 2]), 2)
    assert x.is_cuda and y.is_cuda and x.shape == (3, 3, 30, 50) and y.shape == (2, 30, 50)

def test_frames_that_do_not_fit_are_pinned_for_a_pretended_gpu(scenes, monkeypatch):
    store,mode = on_a_pretended_gpu(scenes, monkeypatch, 5.9)
    assert store.frames.device.type == 'cpu' and store.sent_to == torch.device('cuda')
    pinned,sent = [],[]
    empty,to = torch.empty,torch.Tensor.to
    def new(*args, pin_memory=False, **kwargs):
        pinned.append(pin_memory)
        return empty(*args, **kwargs)
    def move(self, device, non_blocking=False):
        if device == store.sent_to: sent.append(non_blocking)
        return to(self, device)
    monkeypatch.setattr(torch, 'empty', new)
    monkeypatch.setattr(torch.Tensor, 'to', move)
    with mode: x,y = store.gather(torch.tensor([3, 0, 2]))
    assert x.is_cuda and y.is_cuda and sum(pinned) == 2 and sent == [True, True]

def test_a_failure_or_a_full_disk_leaves_no_file(scenes, tmp_path, monkeypatch):
    images,masks = frames_and_masks(scenes)
    (tmp_path/'torn.png').write_bytes(Path(images[0]).read_bytes()[:500])
    little_memory(monkeypatch)
    with pytest.raises(InputError, match='torn.png: unreadable'):
        FrameStore([*images[:4], str(tmp_path/'torn.png')], masks, class_set(8), (30,50), tmp_path/'cache')
    monkeypatch.setattr(store_module.shutil, 'disk_usage', lambda p: types.SimpleNamespace(free=10))
    with pytest.raises(InputError, match='another cache_dir'):
        cache = tmp_path/'cache'
        FrameStore(images, masks, class_set(8), (30,50), cache)
    assert not kinds(tmp_path/'cache')

def test_statistics_of_all_frames(scenes):
    store = FrameStore(*frames_and_masks(scenes), class_set(8), (30,50))
    x = store.frames[[0,2]].double()/255
    mean,std = channel_stats(store, np.array([0, 2]))
    assert np.allclose(mean, x.mean((0,2,3))) and np.allclose(std, x.std((0,2,3), correction=0))

def test_pictures_in_memory_need_no_file(monkeypatch):
    "Also where memory is short: they have no name by which a file of them could be found again"
    monkeypatch.setattr('psutil.virtual_memory', lambda: types.SimpleNamespace(available=10))
    store = FrameStore([np.zeros((8, 8, 3), np.uint8)]*2, ['', ''], class_set(8), (8, 8))
    assert store.frames.shape == (2, 3, 8, 8)

@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_frame_may_be_a_tensor_of_any_floats(kind):
    x = torch.arange(2, dtype=kind).expand(3, 2, 2)
    assert (load_image(x, (2, 2)) == 255*x.float().numpy()).all()

def test_another_pillow_makes_another_store(monkeypatch):
    before = store_key([], (8, 8))
    monkeypatch.setattr(store_module, 'PILLOW', '1.0')
    assert store_key([], (8, 8)) != before
