'Videos, folders and broken files through `cwcl_predict`.'
import gc, struct, subprocess, sys, tracemalloc, types, weakref
import av, numpy as np, pytest, torch
from fastcore.script import CliError, anno_parser
from fractions import Fraction
from matplotlib import font_manager, get_data_path
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from cwcl.checkpoint import check_device, find_weights, save_model
from cwcl.core import InputError, data_file, recipe
from cwcl.data.classes import OwnClasses
from cwcl.data.labels import CLASSES, class_set, decode_mask
from cwcl.film import _ends_with_packet, _frame_rate, _frame_times, open_video, probe_video, read_film, read_frames
from cwcl.film import video_writer
from cwcl.infer import sliding_window
from cwcl.tasks import CWCLNet
from cwcl.video import (cwcl_predict, draw_overlay, legend_strip, legend_text, list_images, read_images, segment_frames,
    segment_images, segment_video, write_mask)

class Bright(nn.Module):
    "Class 7 (gallbladder of the 8) where red is bright, class 0 elsewhere"
    def __init__(self, width=107, height=60):
        super().__init__()
        self.recipe = recipe('smoke', width=width, height=height)
        self.classes = class_set(8)
        self.mean,self.std = [.5]*3,[.25]*3
        self.w = nn.Parameter(torch.ones(1))
        self.seen = []
    def forward(self, x):
        self.seen.append(tuple(x.shape))
        out = torch.zeros(len(x), 8, *x.shape[2:], device=x.device)
        out[:,7] = self.w*x[:,0]
        return out

@pytest.fixture
def model(): return Bright().eval()

def frame(i, h=48, w=86):
    "Dark frame with a bright square that moves to the right"
    f = np.full((h,w,3), 30, np.uint8)
    f[10:30, 2*i:2*i+20] = 250
    return f

def write(path, n=12, h=48, w=86, rate=25, codec='libx264', times=None, title='', pixels='yuv420p', **options):
    "A video written by PyAV alone; `times` in thousandths of a second"
    with av.open(str(path), 'w', options=options) as c:
        c.metadata.update(dict(title=title) if title else {})
        s = c.add_stream(codec, rate=rate)
        s.width,s.height = w,h
        s.pix_fmt = pixels
        if times is not None: s.codec_context.time_base = Fraction(1, 1000)
        for i in range(n):
            f = av.VideoFrame.from_ndarray(frame(i % 30, h, w), format='rgb24')
            if times is not None:
                f.pts = int(times[i])
                f.time_base = Fraction(1, 1000)
            c.mux(s.encode(f))
        c.mux(s.encode())
    return path

def copy(path, out, sound=0, cover=False):
    "The packets of a video in another file, with seconds of sound, or a cover, beside them"
    with av.open(str(path)) as a, av.open(str(out), 'w') as b:
        film = b.add_stream_from_template(a.streams.video[0])
        still = b.add_stream('mjpeg', rate=25, width=64, height=64, pix_fmt='yuvj420p') if cover else None
        if cover: still.disposition = av.stream.Disposition.attached_pic.value
        noise = b.add_stream('pcm_s16le', rate=8000, layout='mono') if sound else None
        packets = [p for p in a.demux(video=0) if p.size]
        for p in packets: p.stream = film
        b.mux(packets)
        black = av.VideoFrame.from_ndarray(np.zeros((64,64,3), np.uint8), format='rgb24')
        if cover: b.mux(still.encode(black) + still.encode())
        if sound: b.mux(silence(noise, sound))
    return out

def silence(stream, seconds):
    quiet = av.AudioFrame.from_ndarray(np.zeros((1, 8000*seconds), np.int16), format='s16', layout='mono')
    quiet.sample_rate,quiet.pts = 8000,0
    quiet.time_base = Fraction(1, 8000)
    return [*stream.encode(quiet), *stream.encode()]

def boxes(data):
    "(kind, content) of the boxes of an mp4, or of one box"
    while data:
        n = int.from_bytes(data[:4], 'big')
        yield data[4:8],data[:n]
        data = data[n:]

def shown_times(path):
    with av.open(str(path)) as c: return [float((f.pts*f.time_base)) for f in c.decode(video=0)]

def names(folder): return sorted(o.name for o in folder.iterdir()) if folder.exists() else []

def test_segments_a_video(tmp_path, model):
    done = segment_video(model, write(tmp_path/'op.mp4'), tmp_path/'out', progress=False)
    assert done['frames'] == 12 and done['seconds'] >= 0 and done['path'] == tmp_path/'out'/'op_overlay.mp4'
    assert names(tmp_path/'out') == [f'op_{i:06d}_mask.png' for i in range(12)] + ['op_overlay.mp4']
    assert set(s[2:] for s in model.seen) == {(60,107)}
    for i in range(12):
        codes = np.asarray(Image.open(tmp_path/'out'/f'op_{i:06d}_mask.png'))
        assert codes.shape == (48,86,3) and set(codes.ravel().tolist()) == {50, 22}
        got = decode_mask(codes) == 10
        want = frame(i)[...,0] > 127
        assert (got & want).sum()/(got | want).sum() > .9
    with av.open(str(done['path'])) as c:
        s = c.streams.video[0]
        assert (s.codec_context.name, s.format.name, s.average_rate) == ('h264', 'yuv420p', 25)
        assert s.width % 2 == 0 and s.height % 2 == 0 and s.width > 86
        shown = [f.to_ndarray(format='rgb24') for f in c.decode(s)]
    strip = legend_strip(model.classes, 48)
    for i,f in enumerate(shown):
        mask = np.where(frame(i)[...,0] > 127, 7, 0).astype(np.uint8)
        want = draw_overlay(frame(i), mask, model.classes, .5, strip)
        assert np.abs(f[:48,:86].astype(int) - want[:48,:86]).mean() < 12
    assert len(shown) == 12

@pytest.mark.parametrize('every', [2, 5, 100])
def test_every(tmp_path, model, every):
    done = segment_video(model, write(tmp_path/'op.mp4'), tmp_path/'out', every=every, progress=False)
    kept = list(range(0, 12, every))
    assert names(tmp_path/'out')[:-1] == [f'op_{i:06d}_mask.png' for i in kept] and done['frames'] == len(kept)
    info = probe_video(done['path'])
    assert info['frames'] == len(kept) and float(info['rate']) == pytest.approx(25/every, rel=.01)

@pytest.mark.parametrize('h,w,rate', [(121,215,25), (120,214,Fraction(30000, 1001)), (33,47,10)])
def test_written_videos_read_back(tmp_path, h, w, rate):
    with video_writer(tmp_path/'a.mp4', rate) as add:
        for i in range(9): add(frame(i, h, w))
    info = probe_video(tmp_path/'a.mp4')
    assert (info['frames'], info['height'], info['width']) == (9, h+h%2, w+w%2) and info['rate'] == rate
    for i,f in read_frames(tmp_path/'a.mp4'):
        off = [np.abs(f[:h,:w].astype(int) - frame(j, h, w)).mean() for j in range(9)]
        assert np.argmin(off) == i and off[i] < 6
        assert np.abs(f[-1].astype(int) - f[h-1]).mean() < 6 and np.abs(f[:,-1].astype(int) - f[:,w-1]).mean() < 6

@pytest.mark.parametrize('name,codec', [('a.mkv', 'libx264'), ('a.avi', 'mpeg4'), ('a.mov', 'mpeg4')])
def test_other_containers(tmp_path, model, name, codec):
    done = segment_video(model, write(tmp_path/name, codec=codec), tmp_path/'out', every=4, progress=False)
    assert done['frames'] == 3 and probe_video(tmp_path/name)['frames'] == 12

def cut(path, share, ending='.mp4', **options):
    path = path.with_suffix(ending)
    whole = write(path, n=60, **options).read_bytes()
    path.write_bytes(whole[:int(len(whole)*share)])
    return path

def holed(path):
    data = bytearray(write(path, n=60).read_bytes())
    data[len(data)//3:len(data)//2] = bytes(len(data)//2 - len(data)//3)
    path.write_bytes(data)
    return path

def text(path, content='this is not a video\n'*50):
    path.write_text(content)
    return path

def fast(path, share): return cut(path, share, movflags='faststart')

BROKEN = dict(text=text, empty=lambda p: text(p, ''), hole=holed)
BROKEN |= dict(half=lambda p: cut(p, .5), nearly=lambda p: cut(p, .97))
BROKEN |= dict(front=lambda p: fast(p, .7), end=lambda p: fast(p, .95), matroska=lambda p: cut(p, .6, '.mkv'))
BROKEN |= dict(late=lambda p: cut(p, .6, '.mkv', times=100_000+40*np.arange(60)))
BROKEN |= dict(stream=lambda p: cut(p, .6, '.ts'), blueray=lambda p: cut(p, .43, '.m2ts'))

@pytest.mark.parametrize('kind', BROKEN)
def test_broken_videos_leave_one_line_and_no_overlay(tmp_path, model, kind):
    path = BROKEN[kind](tmp_path/'bad.mp4')
    with pytest.raises(InputError) as e: segment_video(model, path, tmp_path/'out', progress=False)
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert all(o.endswith('_mask.png') for o in names(tmp_path/'out'))
    if kind != 'hole': assert names(tmp_path/'out') == []
    else: assert all(Image.open(tmp_path/'out'/o).load() for o in names(tmp_path/'out'))

@pytest.mark.parametrize('e', [av.error.MemoryError(12, 'Cannot allocate memory'),
    av.error.BlockingIOError(11, 'Resource temporarily unavailable')], ids=['array', 'thread'])
def test_a_lack_of_memory_is_not_the_fault_of_a_film(tmp_path, monkeypatch, e):
    "In reading and in writing"
    path = tmp_path/'a.mp4'
    path.write_bytes(b'a')
    def refused(*args, **kwargs): raise e
    monkeypatch.setattr(av, 'open', refused)
    with pytest.raises(MemoryError, match=f'a.mp4: {e.strerror}'): probe_video(path)
    with pytest.raises(MemoryError, match=f'a.mp4: {e.strerror}'):
        with video_writer(path, 25): pass

VARIABLE = np.r_[np.arange(25)*1000//30, 25000//30 + np.arange(25)*100]
EVEN = 40*np.arange(50)

def longer(path, length):
    "A Matroska whose header names another length, in thousandths of a second"
    data = path.read_bytes()
    at = data.index(b'\x44\x89\x88') + 3
    path.write_bytes(data[:at] + struct.pack('>d', length) + data[at+8:])
    return path

LATE = dict(times=100_000+EVEN)
WHOLE = dict(live=('mkv', dict(live='1')), late=('mkv', LATE), late_mp4=('mp4', LATE), late_ts=('ts', LATE),
    browser=('mkv', dict(rate=1000, times=EVEN)), said=('mkv', dict(rate=30, times=100*np.arange(50))),
    variable=('mkv', dict(times=VARIABLE)), variable_mp4=('mp4', dict(times=VARIABLE)))

def is_whole(path):
    "Check that all frames of a film of 50 are found, the first at second 0, and return its frame rate"
    info = probe_video(path)
    film = [second for (_,second),_ in read_film(path)]
    assert info['frames'] == 50 == len(film) and film[0] == pytest.approx(0, abs=1e-3)
    return info['rate']

@pytest.mark.parametrize('kind', WHOLE)
def test_whole_films_are_read_whatever_their_header_says(tmp_path, kind):
    ending,options = WHOLE[kind]
    rate = is_whole(write(tmp_path/f'a.{ending}', 50, **options))
    assert 'variable' in kind or rate == (10 if kind == 'said' else 25)

CODECS = dict(tenbit=('mkv', 'libx264', 'yuv420p10le'), hevc=('mkv', 'libx265', 'yuv420p10le'),
    wide=('mov', 'prores_ks', 'yuv422p10le'), mjpeg=('avi', 'mjpeg', 'yuvj420p'),
    mpeg2=('mpg', 'mpeg2video', 'yuv420p'), vp9=('webm', 'libvpx-vp9', 'yuv420p'),
    av1=('mkv', 'libsvtav1', 'yuv420p'), gray=('mkv', 'ffv1', 'gray'), deep=('mkv', 'ffv1', 'gray16le'),
    alpha=('mov', 'png', 'rgba'), colors=('mov', 'png', 'rgb48be'),
    odd=('mkv', 'libx264', 'yuv444p'), raw=('h264', 'libx264', 'yuv420p'), gif=('gif', 'gif', 'rgb8'))

@pytest.mark.parametrize('kind', CODECS)
def test_films_of_many_codecs_are_read_and_shown(tmp_path, model, kind):
    "All frames, nearly their colors, and an overlay of as many"
    ending,codec,pixels = CODECS[kind]
    if codec not in av.codecs_available: pytest.skip(f'no {codec} in this build of FFmpeg')
    h,w = (47, 85) if kind == 'odd' else (64, 86)
    film = write(tmp_path/f'a.{ending}', h=h, w=w, codec=codec, pixels=pixels)
    seen = list(read_frames(film))
    assert [i for i,_ in seen] == [*range(12)] and probe_video(film)['frames'] == 12
    for i,o in seen:
        assert o.shape == (h, w, 3) and o.dtype == np.uint8
        assert np.median(np.abs(o.astype(int) - frame(i, h, w))) <= 8
    done = segment_video(model, film, tmp_path/'out', progress=False)
    assert done['frames'] == 12 == len(shown_times(done['path']))

@pytest.mark.parametrize('rate', [600, 1])
def test_a_film_may_claim_any_number_of_frames_a_second(tmp_path, model, rate):
    film = write(tmp_path/'a.avi', 30, rate=rate, codec='mjpeg', pixels='yuvj420p')
    done = segment_video(model, film, tmp_path/'out', progress=False)
    assert probe_video(film)['rate'] == rate and shown_times(done['path']) == pytest.approx(shown_times(film), abs=2e-3)

def test_whole_films_may_have_more_sound_or_a_last_picture_that_stays(tmp_path):
    assert is_whole(copy(write(tmp_path/'a.mkv', 50), tmp_path/'b.mkv', sound=6)) == 25
    is_whole(longer(write(tmp_path/'c.mkv', 50, times=[*EVEN[:-1], 9000]), 16_000))

def test_a_stream_may_begin_anywhere_and_lose_a_packet(tmp_path):
    whole = write(tmp_path/'a.ts', 100).read_bytes()
    for name,data in dict(middle=whole[188*9+77:], lost=whole[:188*40] + whole[188*41:]).items():
        (tmp_path/f'{name}.ts').write_bytes(data)
        assert probe_video(tmp_path/f'{name}.ts')['frames'] >= 40 and next(read_frames(tmp_path/f'{name}.ts'))

@pytest.mark.parametrize('size,last', [(188, 188), (192, 188), (204, 204)])
def test_packets_of_a_stream_are_found_at_its_end(tmp_path, size, last):
    packet = bytes(size-last) + b'\x47' + bytes(last-1)
    for cut,want in ((0, True), (5, False), (size, True)):
        (tmp_path/'a.ts').write_bytes((packet*30)[:30*size-cut])
        assert _ends_with_packet(tmp_path/'a.ts') == want

@pytest.mark.parametrize('every', [1, 5])
@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv'])
def test_the_overlay_shows_each_frame_when_the_source_does(tmp_path, model, every, name):
    source = shown_times(write(tmp_path/name, 50, times=VARIABLE))
    done = segment_video(model, tmp_path/name, tmp_path/'out', every=every, progress=False)
    assert shown_times(done['path']) == pytest.approx(source[::every], abs=1e-4)
    assert [t for (_,t),_ in read_film(tmp_path/name, every)] == pytest.approx(source[::every], abs=1e-6)

def test_time_stamps_that_do_not_advance(tmp_path):
    with video_writer(tmp_path/'a.mp4', 25) as add:
        for i,t in enumerate((0, .04, .04, .02, .2)): add(frame(i), t)
    assert shown_times(tmp_path/'a.mp4') == pytest.approx([0, .04, .04, .04, .2], abs=1e-3)
    assert np.all(np.diff(shown_times(tmp_path/'a.mp4')) > 0)

def covered(path, order):
    "A film with a cover, the boxes of its header sorted and chosen"
    top = list(boxes(copy(write(path.with_name('b.mp4')), path, cover=True).read_bytes()))
    moov = [o for o in boxes(dict(top)[b'moov'][8:]) if o[0] in order]
    moov = b''.join(o for _,o in sorted(moov, key=lambda o: order.index(o[0])))
    path.write_bytes(b''.join((8+len(moov)).to_bytes(4, 'big') + k + moov if k == b'moov' else o for k,o in top))
    return path

@pytest.mark.parametrize('order,place', [((b'mvhd', b'trak', b'udta'), 0), ((b'mvhd', b'udta', b'trak'), 1)])
def test_a_cover_is_not_the_film(tmp_path, model, order, place):
    path = covered(tmp_path/'a.mp4', order)
    with open_video(path) as (c, film): assert (film.index, film.width, len(c.streams.video)) == (place, 86, 2)
    assert segment_video(model, tmp_path/'a.mp4', tmp_path/'out', progress=False)['frames'] == 12

def test_a_cover_alone_is_no_film(tmp_path):
    path = covered(tmp_path/'a.mp4', (b'mvhd', b'udta'))
    with av.open(str(path)) as c: assert len(c.streams.video) == 1
    with pytest.raises(InputError, match='has no pictures'): probe_video(path)

def test_the_size_of_pictures_changes_within_a_film(tmp_path, model):
    small,large = (write(tmp_path/f'{h}.h264', h=h, w=w).read_bytes() for h,w in ((48, 86), (96, 128)))
    parts = small,large,small
    (tmp_path/'a.h264').write_bytes(b''.join(parts))
    said = []
    done = segment_video(model, tmp_path/'a.h264', tmp_path/'out', progress=False, tell=said.append)
    assert done['frames'] == 36 and {Image.open(o).size for o in (tmp_path/'out').glob('*.png')} == {(86,48)}
    assert len(said) == 2 and 'frame 12 is 128x96' in said[0] and '86x48' in said[0] and 'frame 24 is 86x48' in said[1]
    bright = decode_mask(np.asarray(Image.open(tmp_path/'out'/'a_000014_mask.png'))) == 10
    want = np.asarray(Image.fromarray(frame(2, 96, 128)).resize((86, 48), Image.BILINEAR))[...,0] > 127
    assert (bright & want).sum()/(bright | want).sum() > .85

def matrix(a, b, c, d): return struct.pack('>9i', a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

def right(frame): return np.rot90(frame, -1)
def over(frame): return np.rot90(frame, 2)
def along(frame): return frame.swapaxes(0, 1)

TURNS = {right: (0, 1, -1, 0), np.rot90: (0, -1, 1, 0), over: (-1, 0, 0, -1), np.fliplr: (-1, 0, 0, 1),
    np.flipud: (1, 0, 0, -1), along: (0, 1, 1, 0)}

@pytest.mark.parametrize('want', TURNS, ids=lambda o: o.__name__)
def test_a_turned_film_is_seen_as_a_player_shows_it(tmp_path, want):
    data = bytearray(write(tmp_path/'lying.mp4', n=2).read_bytes())
    at = data.index(b'tkhd') + 44
    data[at:at+36] = matrix(*TURNS[want])
    (tmp_path/'a.mp4').write_bytes(data)
    (_,lying),(_,seen) = (next(read_frames(tmp_path/o)) for o in ('lying.mp4', 'a.mp4'))
    assert np.array_equal(seen, want(lying))
    info = probe_video(tmp_path/'a.mp4')
    assert (info['height'], info['width']) == want(lying).shape[:2]

def test_masks_of_a_turned_film_are_upright(tmp_path, model):
    data = bytearray(write(tmp_path/'lying.mp4', n=2).read_bytes())
    at = data.index(b'tkhd') + 44
    data[at:at+36] = matrix(0, 1, -1, 0)
    (tmp_path/'a.mp4').write_bytes(data)
    segment_video(model, tmp_path/'a.mp4', tmp_path/'out', progress=False)
    bright = decode_mask(np.asarray(Image.open(tmp_path/'out'/'a_000000_mask.png'))) == 10
    want = np.rot90(frame(0)[...,0] > 127, -1)
    assert bright.shape == (86, 48) and (bright & want).sum()/(bright | want).sum() > .85

def test_titles_in_an_old_encoding(tmp_path):
    data = write(tmp_path/'a.avi', codec='mpeg4', title='QQQQ').read_bytes()
    assert b'QQQQ' in data
    (tmp_path/'a.avi').write_bytes(data.replace(b'QQQQ', b'\xdcber'))
    assert probe_video(tmp_path/'a.avi')['frames'] == 12

def test_what_has_no_pictures(tmp_path):
    with av.open(str(tmp_path/'a.wav'), 'w') as c:
        s = c.add_stream('pcm_s16le', rate=8000)
        f = av.AudioFrame.from_ndarray(np.zeros((1,800), np.int16), format='s16', layout='mono')
        f.sample_rate = 8000
        c.mux(s.encode(f))
        c.mux(s.encode())
    with pytest.raises(InputError, match='has no pictures'): probe_video(tmp_path/'a.wav')
    with pytest.raises(InputError, match='no such file'): probe_video(tmp_path/'b.mp4')
    with pytest.raises(InputError, match='no such file'): probe_video(tmp_path)

@pytest.mark.parametrize('exc', [KeyboardInterrupt, OSError, RuntimeError])
def test_an_interrupted_run_leaves_whole_files_only(tmp_path, model, exc):
    path = write(tmp_path/'op.mp4', n=20)
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'op_overlay.mp4').write_bytes(b'older')
    def stop(x):
        if len(model.seen) == 3: raise exc('stop')
    model.register_forward_hook(lambda m,a,o: stop(o))
    with pytest.raises(exc): segment_video(model, path, tmp_path/'out', progress=False, overwrite=True)
    assert names(tmp_path/'out') == [f'op_{i:06d}_mask.png' for i in range(8)] + ['op_overlay.mp4']
    assert (tmp_path/'out'/'op_overlay.mp4').read_bytes() == b'older'

def test_memory_does_not_grow_with_length(tmp_path, model):
    paths = [write(tmp_path/f'{n}.mp4', n=n, h=120, w=160) for n in (16, 16, 96)]
    peaks = []
    for p in paths: # the first run pays for what is made once
        tracemalloc.start()
        segment_video(model, p, tmp_path/'out', progress=False, overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        model.seen.clear()
    assert peaks[2] < 1.2*peaks[1] and peaks[2] < 14*120*160*3*4

@pytest.mark.parametrize('batch', [1, 4])
def test_few_frames_are_held(model, batch):
    alive = set()
    most = []
    def stream():
        for i in range(60):
            f = frame(i % 12)
            alive.add(i)
            weakref.finalize(f, alive.discard, i)
            yield i,f
            del f
            gc.collect(0)
            most.append(len(alive))
    keys = [k for k,_,_ in segment_frames(model, stream(), batch)]
    assert keys == list(range(60)) and max(most) <= 2*batch+2

def test_frames_stay_beside_their_masks(model):
    sizes = [(48,86)]*5 + [(60,107)] + [(48,86)]*3
    frames = [(f'k{i}', frame(i, *s)) for i,s in enumerate(sizes)]
    got = list(segment_frames(model, iter(frames), batch=4))
    for (key,f),(k,g,m) in zip(frames, got, strict=True):
        assert key == k and f is g and m.shape == f.shape[:2]
        assert ((m == 7) == (f[...,0] > 127)).mean() > .97

def pictures(folder, *files, **kw):
    folder.mkdir(exist_ok=True)
    for i,name in enumerate(files): Image.fromarray(frame(i, **kw)).save(folder/name)
    return folder

def test_segments_a_folder_in_counting_order(tmp_path, model):
    ours = 'frame_80_endo_mask.png', 'frame_80_endo_color_mask.png', 'x_overlay.png'
    folder = pictures(tmp_path/'in', 'frame_80_endo.png', 'frame_9_endo.jpg', 'frame_120_endo.bmp', *ours)
    (folder/'notes.txt').write_text('no image')
    assert [o.name for o in list_images(folder)] == ['frame_9_endo.jpg', 'frame_80_endo.png', 'frame_120_endo.bmp']
    assert [o.name for o in list_images(folder, 2)] == ['frame_9_endo.jpg', 'frame_120_endo.bmp']
    done = segment_images(model, folder, tmp_path/'out', progress=False)
    assert done['frames'] == 3 and done['path'] == tmp_path/'out'
    assert names(tmp_path/'out') == sorted(f'frame_{i}_endo_{k}.png' for i in (9, 80, 120) for k in ('mask', 'overlay'))
    seen = np.asarray(Image.open(tmp_path/'out'/'frame_80_endo_overlay.png'))
    mask = class_set(8).encode(decode_mask(np.asarray(Image.open(tmp_path/'out'/'frame_80_endo_mask.png'))))
    assert np.array_equal(seen, draw_overlay(frame(0), mask, model.classes))

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK', '1'])
def test_image_modes(tmp_path, model, mode):
    name = 'a.tif' if mode == 'CMYK' else 'a.png'
    Image.fromarray(frame(3)).convert(mode).save(tmp_path/name)
    done = segment_images(model, tmp_path/name, tmp_path/'out', progress=False)
    assert done['frames'] == 1
    assert (decode_mask(np.asarray(Image.open(tmp_path/'out'/'a_mask.png'))) == 10)[15:25,10:20].all()

def test_bad_folders_and_images(tmp_path, model):
    folder = pictures(tmp_path/'in', 'a_mask.png')
    with pytest.raises(InputError, match='holds no image'): list_images(folder)
    with pytest.raises(InputError, match='no such file or folder'): list_images(tmp_path/'nowhere')
    pictures(folder, 'a.png', 'a.m.png', 'a.jpg')
    with pytest.raises(InputError, match='one name'): list_images(folder)
    (folder/'a.jpg').unlink()
    (folder/'a.m.png').unlink()
    for out in (folder, tmp_path/'in'/'..'/'in'):
        with pytest.raises(InputError, match='another folder'): segment_images(model, folder, out, progress=False)
    one = folder/'a.png'
    with pytest.raises(InputError, match='another folder'): segment_images(model, one, folder, progress=False)
    whole = (folder/'a.png').read_bytes()
    for content in (b'', b'text', whole[:60], whole[:-40]):
        (folder/'b.png').write_bytes(content)
        with pytest.raises(InputError, match='b.png: unreadable') as e: list(read_images([folder/'b.png']))
        assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='b.png'): segment_images(model, folder, tmp_path/'out', progress=False)
    assert all(not o.startswith('.') for o in names(tmp_path/'out'))

def test_two_predictions_are_not_mixed(tmp_path, model):
    out = tmp_path/'out'
    for o in 'ab': (tmp_path/o).mkdir()
    films = [write(tmp_path/k/'op.mp4', n) for k,n in dict(a=6, b=3).items()]
    write(tmp_path/'op_2.mp4', 2)
    segment_video(model, films[0], out, progress=False)
    segment_video(model, tmp_path/'op_2.mp4', out, progress=False)
    before = {o: (out/o).read_bytes() for o in names(out)}
    again = dict(model=model, path=films[1], out=out, progress=False)
    with pytest.raises(InputError, match='op_000000_mask.png: is there already.*--overwrite'): segment_video(**again)
    assert {o: (out/o).read_bytes() for o in names(out)} == before
    segment_video(**again, overwrite=True)
    assert set(names(out)) == set(before) - {f'op_{k:06d}_mask.png' for k in (3, 4, 5)}
    for k in 'cd': pictures(tmp_path/k, 'x.png')
    segment_images(model, tmp_path/'c', out, progress=False)
    again['path'] = tmp_path/'d'
    with pytest.raises(InputError, match='x_mask.png: is there already'): segment_images(**again)
    segment_images(**again, overwrite=True)

def test_names_that_look_like_a_protocol(tmp_path, model, monkeypatch):
    film = write(tmp_path/'12.mp4').rename(tmp_path/'12:30.mp4')
    monkeypatch.chdir(tmp_path)
    assert segment_video(model, film, 'run:1', progress=False)['path'].exists()
    with pytest.raises(InputError, match='a.mp4: FFmpeg cannot write it .odd.'), video_writer(tmp_path/'a.mp4', 25):
        raise av.FFmpegError(1234, 'odd')
    with pytest.raises(InputError, match='mostly memory is short'), video_writer(tmp_path/'a.mp4', 25):
        raise av.error.ExternalError(1234, 'of a coder')
    assert not (tmp_path/'a.mp4').exists()

def test_one_stamp_for_several_frames():
    "Packets of a broadcast may hold several frames, of which the first alone has a stamp"
    def picture(pts): return types.SimpleNamespace(pts=pts, time_base=Fraction(1, 25))
    def packet(k): return types.SimpleNamespace(pts=2*k, size=1, decode=lambda: [picture(2*k), picture(None)])
    film = types.SimpleNamespace(average_rate=25, guessed_rate=25)
    c = types.SimpleNamespace(start_time=0, demux=lambda film: map(packet, range(5)))
    assert [s for _,s in _frame_times(c, film)] == pytest.approx(np.arange(10)/25)
    assert _frame_rate(film, np.arange(50)*.08, 100) == 25

def test_the_overlay_never_replaces_its_own_video(tmp_path, model):
    path = write(tmp_path/'a_overlay.mp4')
    before = path.read_bytes()
    link = tmp_path/'a.mp4'
    link.symlink_to(path)
    with pytest.raises(InputError, match='overwritten'): segment_video(model, link, tmp_path, progress=False)
    assert path.read_bytes() == before

@pytest.mark.parametrize('n', [8, 10, 13])
def test_masks_in_codes_and_legends(tmp_path, n):
    classes = class_set(n)
    ids = np.arange(n, dtype=np.uint8).repeat(6).reshape(2, -1)
    write_mask(tmp_path/'a_mask.png', ids, classes)
    codes = np.asarray(Image.open(tmp_path/'a_mask.png'))
    assert np.array_equal(codes[...,0].ravel()[::6], CLASSES.code[list(classes.ids)]) and (codes == codes[...,:1]).all()
    for h in (20, 120, 480, 1080):
        strip = legend_strip(classes, h)
        assert len(strip) >= h and strip.shape[1] < max(200, h)
        for color in classes.colors: assert (strip == color).all(-1).sum() > 20
        seen = draw_overlay(np.zeros((h,50,3), np.uint8), np.zeros((h,50), np.uint8), classes, 1.)
        assert seen.shape == (len(strip), 50+strip.shape[1], 3) and (seen[:h,:50] == classes.colors[0]).all()

def label(name): return legend_strip(OwnClasses(f'{name}=1, bg=0'), 240)[:12]

def test_names_in_any_alphabet_can_be_told_apart():
    plain = ['Übergang', 'Ubergang', 'größe', 'niño', 'печень', 'печенъ', 'ήπαρ', 'žluč']
    assert all(legend_text(o) == (legend_text('liver')[0], o) for o in plain)
    odd = ['肝臓', '胆嚢', '间质', 'a\u200bb', 'ab', '\U00100000', '\U00100001']
    pictures = {(o.shape, o.tobytes()) for o in map(label, plain + odd)}
    assert len(pictures) == len(plain + odd)

def test_another_font_serves_where_ours_lacks_a_character(monkeypatch):
    file = str(Path(get_data_path(), 'fonts', 'ttf', 'STIXGeneral.ttf'))
    monkeypatch.setattr(font_manager.fontManager, 'ttflist', [font_manager.FontEntry(file, 'STIX')])
    legend_text.cache_clear()
    try:
        assert legend_text('\u1d81') == (file, '\u1d81') != legend_text('é')
        assert legend_text('\u809d\u1d81é') == (legend_text('é')[0], '\\u809d\\u1d81é')
    finally: legend_text.cache_clear()

def test_pictures_are_read_as_viewers_show_them(tmp_path, model):
    im = Image.fromarray(frame(3))
    tag = Image.Exif()
    tag[0x0112] = 6
    im.save(tmp_path/'a.png', exif=tag)
    Image.fromarray((frame(3)[...,0].astype(np.uint16)*257)).save(tmp_path/'b.png')
    assert np.array_equal(next(read_images([tmp_path/'a.png']))[1], np.rot90(frame(3), -1))
    assert np.array_equal(next(read_images([tmp_path/'b.png']))[1], frame(3))
    segment_images(model, tmp_path/'a.png', tmp_path/'out', progress=False)
    assert np.asarray(Image.open(tmp_path/'out'/'a_mask.png')).shape == (86, 48, 3)

def test_litter_and_odd_digits_in_a_folder(tmp_path):
    folder = pictures(tmp_path/'in', 'a10.png', 'a9.png', '\u00b21.png')
    (folder/'._a9.png').write_bytes(b'macOS')
    (folder/'a11.png').mkdir()
    assert [o.name for o in list_images(folder)] == ['a9.png', 'a10.png', '\u00b21.png']

@pytest.fixture
def weights(tmp_path, monkeypatch, model):
    "Let the command load the stand-in network"
    asked = []
    def load_model(path, device=None):
        check_device(device)
        asked.append((str(path), device))
        return model
    stub = types.ModuleType('cwcl.checkpoint')
    stub.load_model,stub.find_weights = load_model,find_weights
    monkeypatch.setitem(sys.modules, 'cwcl.checkpoint', stub)
    return asked

def test_command(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path/'op.mp4')
    pictures(tmp_path/'in', 'a.png', 'b.png')
    cwcl_predict(str(tmp_path/'op.mp4'), 'w.safetensors', str(tmp_path/'out'), every=3)
    cwcl_predict(str(tmp_path/'in'), out=str(tmp_path/'out'), device='cpu')
    cwcl_predict(str(tmp_path/'in'/'b.png'), out=str(tmp_path/'one'), alpha=0.)
    kit = str(data_file('demo.safetensors'))
    assert weights == [('w.safetensors', None), (kit, 'cpu'), (kit, None)]
    said = capsys.readouterr()
    assert said.err.count(f'weights of {kit}') == 2
    assert [o.split(' in ')[0] for o in said.out.splitlines()] == ['4 frames', '2 frames', '1 frames']
    assert 'op: ' in said.err
    assert len(names(tmp_path/'out')) == 5+4 and names(tmp_path/'one') == ['b_mask.png', 'b_overlay.png']

@pytest.mark.parametrize('change,words', [(dict(input='nowhere.mp4'), 'nowhere.mp4: no such file'),
    (dict(input='nowhere.png'), 'nowhere.png: no such file'), (dict(input='empty'), 'holds no image'),
    (dict(input='notes.mp4'), 'notes.mp4: not a readable video'),
    (dict(input='notes.txt'), 'notes.txt: has no pictures'),
    (dict(input='notes.png'), 'notes.png: unreadable'),
    (dict(every=0), 'every=0'), (dict(every=-3), 'every=-3'), (dict(alpha=1.5), 'alpha=1.5'),
    (dict(device='tpu9'), 'device tpu9'), (dict(out='notes.txt'), 'notes.txt'),
    (dict(out='notes.txt/deep'), 'notes.txt')])
def test_bad_input_is_one_line(tmp_path, monkeypatch, weights, change, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path/'op.mp4')
    (tmp_path/'empty').mkdir()
    for name in ('notes.mp4', 'notes.txt', 'notes.png'): text(tmp_path/name)
    before = names(tmp_path)
    with pytest.raises(CliError) as e: cwcl_predict(**{'input': 'op.mp4', 'out': 'out', **change})
    assert str(e.value).startswith('cwcl_predict: ') and words in str(e.value) and '\n' not in str(e.value)
    assert set(names(tmp_path)) - set(before) <= {'out'} and names(tmp_path/'out') == []

@pytest.mark.parametrize('content', ['text', 'empty', 'shape', 'other', 'missing'])
def test_bad_weights_are_one_line(tmp_path, content):
    path = tmp_path/'model.safetensors'
    if content == 'shape': save_file({'encoder.weight': torch.zeros(2, 3)}, path)
    elif content == 'other':
        wrong = dict(format='pt', recipe=recipe('demo').to_json())
        save_file(CWCLNet(recipe('smoke')).state_dict(), path, metadata=wrong)
    elif content != 'missing': path.write_text('no weights' if content == 'text' else '')
    film = str(write(tmp_path/'op.mp4'))
    with pytest.raises(CliError) as e: cwcl_predict(film, str(path), str(tmp_path/'out'), device='cpu')
    assert str(path) in str(e.value) and '\n' not in str(e.value) and names(tmp_path/'out') == []

def test_saved_network_end_to_end(tmp_path):
    torch.manual_seed(0)
    r = recipe('smoke')
    net = CWCLNet(r, mean=(.4,.3,.2), std=(.2,.2,.3)).eval()
    for m in net.modules(): # untrained networks call every pixel alike: let the last layer lean on what it sees
        if isinstance(m, nn.Conv2d) and m.out_channels == 8 and m.kernel_size == (1,1): m.weight.data.mul_(50)
    save_model(tmp_path/'model.safetensors', net)
    pictures(tmp_path/'in', 'a.png', h=100, w=180)
    cwcl_predict(str(tmp_path/'in'), str(tmp_path/'model.safetensors'), str(tmp_path/'out'), device='cpu')
    small = np.asarray(Image.fromarray(frame(0, 100, 180)).resize((r.width, r.height), Image.BILINEAR))
    small = torch.tensor(small).permute(2,0,1)[None]/255
    x = (small - torch.tensor([.4,.3,.2]).view(3,1,1))/torch.tensor([.2,.2,.3]).view(3,1,1)
    with torch.no_grad(): logits = sliding_window(net.segment, x, r.window, r.overlap, r.blend)
    want = torch.nn.functional.interpolate(logits, (100,180), mode='bilinear', align_corners=False).argmax(1)[0].numpy()
    got = class_set(8).encode(decode_mask(np.asarray(Image.open(tmp_path/'out'/'a_mask.png'))))
    assert len(np.unique(want)) > 1 and (got == want).mean() > .999

def test_exit_code_and_help(tmp_path):
    (tmp_path/'run.py').write_text('from cwcl.video import cwcl_predict\ncwcl_predict()\n')
    bad = subprocess.run([sys.executable, 'run.py', 'nowhere.mp4'], capture_output=True, text=True, cwd=tmp_path)
    says = 'cwcl_predict: nowhere.mp4: no such file; give an image, a folder of images or a video'
    assert bad.returncode == 1 and bad.stderr.strip().splitlines() == [says]
    helped = anno_parser(cwcl_predict).format_help()
    for word in ('input', '--model', '--out', '--device', '--alpha', '--every', 'overlays'): assert word in helped

def test_real_video(real, tmp_path, model):
    path = real/'video'/'VID05_1858.mp4'
    info = probe_video(path)
    assert (info['frames'], info['height'], info['width'], info['rate']) == (800, 480, 854, 25)
    frames = read_frames(path)
    few = [next(frames) for _ in range(3)]
    assert [i for i,_ in few] == [0,1,2] and few[0][1].shape == (480,854,3)
    done = segment_video(model, path, tmp_path/'out', every=200, progress=False)
    assert done['frames'] == 4 and names(tmp_path/'out')[0] == 'VID05_1858_000000_mask.png'
    codes = np.asarray(Image.open(tmp_path/'out'/'VID05_1858_000600_mask.png'))
    assert codes.shape == (480,854,3) and set(codes.ravel().tolist()) <= {50, 22}

def test_real_frames(real, tmp_path, model):
    done = segment_images(model, real/'cholecseg8k'/'video52'/'video52_00080', tmp_path, progress=False)
    assert done['frames'] == 1 and names(tmp_path) == ['frame_120_endo_mask.png', 'frame_120_endo_overlay.png']

def test_threads_that_decode_never_wait_for_python(tmp_path):
    path = holed(tmp_path/'bad.mp4')
    av.logging.set_level(av.logging.VERBOSE)
    try:
        with av.logging.Capture() as said, pytest.raises(InputError): list(read_film(path))
    finally: av.logging.set_level(None)
    assert said == []

def test_the_command_segments_with_a_folded_network(tmp_path, model, monkeypatch):
    seen = []
    monkeypatch.setattr('cwcl.checkpoint.load_model', lambda *args, **kwargs: model)
    monkeypatch.setattr('cwcl.checkpoint.find_weights', lambda o: o)
    monkeypatch.setattr('cwcl.video.folded', lambda net: seen.append(net) or net)
    (tmp_path/'in').mkdir()
    Image.fromarray(frame(0)).save(tmp_path/'in'/'a.png')
    cwcl_predict(str(tmp_path/'in'), 'w.safetensors', str(tmp_path/'out'), device='cpu')
    assert seen == [model] and (tmp_path/'out'/'a_mask.png').exists()
