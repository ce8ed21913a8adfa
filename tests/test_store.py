"Frames decoded once: the same bytes from every source, from memory and from a file"
import types
import numpy as np, pytest, torch
from pathlib import Path
from fastai.torch_core import TensorImage
from PIL import Image
import cwcl.data.store as store_module
from cwcl.core import InputError
from cwcl.data.files import read_png
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
    pixels = read_png(p)
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
    full = decode_mask(read_png(p))
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
    assert store.data.shape == (5, 4, 30, 50) and store.data.dtype == torch.uint8
    for i in range(5):
        assert (store.data[i,:3].numpy() == load_image(images[i], (30,50))).all()
        assert (store.data[i,3].numpy() == (load_mask(masks[i], (30,50), class_set(8)) if masks[i] else 255)).all()

def little_memory(monkeypatch):
    little = types.SimpleNamespace(available=1000)
    monkeypatch.setattr(store_module.psutil, 'virtual_memory', lambda: little)

def test_frames_that_do_not_fit_lie_in_a_file_and_are_found_again(scenes, tmp_path, monkeypatch):
    images,masks = frames_and_masks(scenes)
    ref = FrameStore(images, masks, class_set(8), (30,50)).data
    little_memory(monkeypatch)
    first = FrameStore(images, masks, class_set(8), (30,50), tmp_path)
    assert torch.equal(first.data, ref) and [p.suffix for p in tmp_path.iterdir()] == ['.npy']
    first.data[0] = 0
    def decode_again(*args): raise AssertionError('decoded twice')
    monkeypatch.setattr(FrameStore, 'fill', decode_again)
    assert torch.equal(FrameStore(images, masks, class_set(8), (30,50), tmp_path).data, ref)
    with pytest.raises(AssertionError): FrameStore(images, masks, class_set(13), (30,50), tmp_path)

def test_the_file_depends_on_everything_that_decides_its_bytes(scenes, tmp_path):
    images,masks = frames_and_masks(scenes)
    copy = tmp_path/'a.png'
    copy.write_bytes(Path(images[0]).read_bytes())
    images[0] = str(copy)
    eight = class_set(8)
    keys = [store_key(images, masks, eight, (30,50)), store_key(images[::-1], masks, eight, (30,50))]
    keys += [store_key(images, masks[::-1], eight, (30,50)), store_key(images, masks, eight, (30,51))]
    keys.append(store_key(images, masks, class_set(8, 'background'), (30,50)))
    copy.write_bytes(Path(images[1]).read_bytes() + b' ')
    assert len({*keys, store_key(images, masks, eight, (30,50))}) == 6

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
    assert not list((tmp_path/'cache').iterdir())

def test_statistics_of_all_frames(scenes):
    store = FrameStore(*frames_and_masks(scenes), class_set(8), (30,50))
    x = store.data[[0,2],:3].double()/255
    mean,std = channel_stats(store, np.array([0, 2]))
    assert np.allclose(mean, x.mean((0,2,3))) and np.allclose(std, x.std((0,2,3), correction=0))
