"Picture files, folders and zips as people have them: read alike everywhere, or refused in one line"
import errno, io, json, os, re, shutil, struct, types, zipfile, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from cwcl.core import InputError
from cwcl.data import folders as folders_module
from cwcl.data.cholec import audit, frame_table, read_frame
from cwcl.data.classes import OwnClasses
from cwcl.data.files import scan
from cwcl.data.folders import data_files, data_root, unpacked
from cwcl.data.images import ENDINGS, picture_size, plain_png, read_image, read_mask
from cwcl.data.labels import CLASSES, class_set, decode_mask, encode_mask, unknown_values
from cwcl.data.store import FrameStore, load_image, load_mask
from cwcl.data.streams import cwcl_dls
from cwcl.ready import license_of
from cwcl.results import evaluate, native_confusion, plot_iou

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
CODES = RNG.choice(CLASSES.code.to_numpy(np.uint8), (12, 20))

def facts(t): return t.drop(columns=['image', 'mask'])

def one_line(f, *args):
    with pytest.raises(InputError) as e: f(*args)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)

def palette(codes):
    "Codes as a program that saves space writes them: numbered in any order, with a palette of the colors"
    values = np.unique(codes)[::-1]
    im = Image.fromarray(np.searchsorted(-values.astype(int), -codes.astype(int)).astype(np.uint8))
    im.putpalette(np.repeat(values, 3).tolist())
    return im

MASKS = dict(gray=Image.fromarray, palette=palette, deep=lambda a: Image.fromarray(a.astype(np.uint16)),
    **{k: lambda a, k=k: Image.fromarray(a).convert(k) for k in ('RGB', 'RGBA', 'LA')})

# Masks

@pytest.mark.parametrize('kind', MASKS)
@pytest.mark.parametrize('ending', ['png', 'bmp', 'tif'])
def test_a_mask_is_the_same_in_every_depth_and_format(tmp_path, kind, ending):
    if ending == 'bmp' and kind in ('LA', 'deep'): pytest.skip('no such BMP')
    MASKS[kind](CODES).save(tmp_path/f'm.{ending}')
    assert (decode_mask(read_mask(tmp_path/f'm.{ending}')) == decode_mask(CODES)).all()
    assert not unknown_values(read_mask(tmp_path/f'm.{ending}'))

@pytest.mark.parametrize('kind', MASKS)
def test_training_and_the_score_at_full_size_read_one_mask_alike(tmp_path, kind):
    "A perfect prediction is perfect at every depth of the mask's file"
    eight = class_set(8)
    MASKS[kind](CODES).save(tmp_path/'m.png')
    truth = torch.tensor(load_mask(tmp_path/'m.png', CODES.shape, eight)).long()
    assert (truth.numpy() == eight.read(CODES)).all()
    logits = 9.*torch.nn.functional.one_hot(truth.clamp(max=7), 8).permute(2, 0, 1)
    cm = native_confusion(logits, tmp_path/'m.png', eight)
    assert cm.sum() == (truth != 255).sum() > 0 and cm.sum() == cm.diagonal().sum()

def test_masks_of_one_bit(tmp_path):
    own = OwnClasses('nothing=0, tool=255')
    bits = RNG.random((12, 20)) < .5
    Image.fromarray(bits).save(tmp_path/'m.png')
    assert (own.read(read_mask(tmp_path/'m.png')) == bits).all() and Image.open(tmp_path/'m.png').mode == '1'
    assert native_confusion(torch.zeros(2, 12, 20), tmp_path/'m.png', own)[1].sum() == bits.sum()

def test_a_value_above_255_is_no_class_and_counted(tmp_path):
    deep = CODES.astype(np.uint16)
    deep[0,:3] = 1000,256 + 50,65535
    Image.fromarray(deep).save(tmp_path/'m.png')
    pixels = read_mask(tmp_path/'m.png')
    assert (decode_mask(pixels)[0,:3] == 255).all() and (decode_mask(pixels)[1:] == decode_mask(CODES)[1:]).all()
    assert unknown_values(pixels) == {306: 1, 1000: 1, 65535: 1}
    own = OwnClasses(', '.join(f'c{i}={i}' for i in (*CLASSES.code, 255)))
    assert (own.read(pixels)[0,:3] == 255).all() and own.unknown(pixels) == {'306': 1, '1000': 1, '65535': 1}

@pytest.mark.parametrize('lack', [MemoryError(), RuntimeError("can't allocate read lock")])
@pytest.mark.parametrize('read', [read_image, read_mask, picture_size])
def test_a_lack_of_memory_is_not_the_fault_of_a_file(tmp_path, monkeypatch, read, lack):
    Image.fromarray(CODES).save(tmp_path/'m.png')
    def fail(*_, **__): raise lack
    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(MemoryError, match='m.png'): read(tmp_path/'m.png')

def test_masks_that_would_change_their_values_are_refused(tmp_path):
    path = tmp_path/'m.png'
    for kind in ('JPEG', 'WEBP'):
        Image.fromarray(CODES).convert('RGB').save(path, kind)
        assert f'a mask as {kind}' in one_line(read_mask, path)
    Image.fromarray(CODES).convert('RGB').save(tmp_path/'m.tif', compression='jpeg')
    assert 'a mask as TIFF' in one_line(read_mask, tmp_path/'m.tif')
    for mode in ('CMYK', 'YCbCr', 'LAB'):
        Image.new(mode, (4, 3)).save(tmp_path/'m.tif')
        says = one_line(read_mask, tmp_path/'m.tif')
        cut = mode == 'YCbCr' and 'unreadable' in says # Pillow 11 cuts its own file of this kind short
        assert f'a mask of mode {mode}' in says or cut
    path.write_bytes(deep_rgb(50))
    assert 'more than 8 bits' in one_line(read_mask, path) and read_image(path).shape == (1, 1, 3)

def chunk(name, content):
    checksum = struct.pack('>I', zlib.crc32(name + content))
    return struct.pack('>I4s', len(content), name) + content + checksum

def deep_rgb(v):
    "A PNG of one pixel with 16 bits a channel"
    head = struct.pack('>IIBBBBB', 1, 1, 16, 2, 0, 0, 0)
    rows = zlib.compress(b'\0' + struct.pack('>HHH', v, v, v))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')

# Frames

def test_frames_of_every_kind_show_the_same(tmp_path):
    flat = NOISE[...,:1].repeat(3, -1)
    gray,rgb = Image.fromarray(flat[...,0]),Image.fromarray(flat)
    made = dict(rgb=rgb, gray=gray, alpha=rgb.convert('RGBA'), deep=Image.fromarray(flat[...,0].astype(np.uint16)*257))
    for name,im in made.items():
        im.save(tmp_path/f'{name}.png')
        assert (read_image(tmp_path/f'{name}.png') == flat).all(), name
        assert (load_image(tmp_path/f'{name}.png', (12, 20)) == flat.transpose(2, 0, 1)).all()
        assert (load_image(im, (12, 20))[0] == flat[...,0]).all()
    for ending in ENDINGS:
        Image.fromarray(np.full((9, 9, 3), 77, np.uint8)).save(tmp_path/f'f{ending}')
        assert abs(read_image(tmp_path/f'f{ending}').astype(int) - 77).max() < 3
    Image.new('CMYK', (9, 9), (77, 77, 77, 77)).save(tmp_path/'inks.jpg')
    assert read_image(tmp_path/'inks.jpg').shape == (9, 9, 3)

def test_gray_of_16_bits_is_scaled_and_not_cut(tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path/'ramp.png')
    assert abs(load_image(tmp_path/'ramp.png', (256, 256)).mean() - 127.5) < .5
    assert (read_image(tmp_path/'ramp.png')[...,0] == np.round(ramp/257)).all()

@pytest.mark.parametrize('ending', ['png', 'jpg', 'tif', 'webp'])
@pytest.mark.parametrize('tag', range(1, 9))
def test_pictures_lie_as_viewers_show_them(tmp_path, tag, ending):
    "The corner that a viewer shows in the upper left is there, and the size agrees"
    shown = np.zeros((24, 40, 3), np.uint8)
    shown[:12,:20],shown[12:,:20] = 250,120
    back = [np.array, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.transpose(1, 0, 2), np.rot90,
        lambda a: np.rot90(a, 2).transpose(1, 0, 2), lambda a: np.rot90(a, -1)]
    exif = Image.Exif()
    exif[0x0112] = tag
    path = tmp_path/f'f.{ending}'
    Image.fromarray(np.ascontiguousarray(back[tag-1](shown))).save(path, exif=exif)
    assert picture_size(path) == (40, 24)
    loaded = [load_image(o, (24, 40)).transpose(1, 2, 0) for o in (path, Image.open(path))]
    for seen in (read_image(path), *loaded):
        corners = [seen[o].astype(int) for o in (np.s_[2:10,4:16], np.s_[14:22,4:16], np.s_[4:20,26:36])]
        assert [round(o.mean()/10) for o in corners] == [25, 12, 0]

def test_a_remark_that_cannot_be_read_does_not_matter(tmp_path):
    Image.fromarray(NOISE).save(tmp_path/'f.png')
    whole = (tmp_path/'f.png').read_bytes()
    wrong = struct.pack('>I4s', 5, b'tEXt') + b'a\0b c' + bytes(4)
    huge = chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(3_000_000)))
    for extra in (wrong, huge, chunk(b'iCCP', b'x\0\0junk'), chunk(b'tRNS', b'\0\1\0\1\0\1')):
        (tmp_path/'f.png').write_bytes(whole[:33] + extra + whole[33:])
        for f in (read_image, read_mask): assert (f(tmp_path/'f.png') == NOISE).all()
        assert picture_size(tmp_path/'f.png') == (20, 12)

def test_what_is_wrong_with_a_picture_is_named(tmp_path):
    path = tmp_path/'f.png'
    Image.fromarray(NOISE).save(path)
    whole = path.read_bytes()
    frames = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]
    damaged = bytearray(whole)
    damaged[60] ^= 1
    gif,apng,webp,float_ = [io.BytesIO() for _ in range(4)]
    frames[0].save(gif, 'GIF')
    frames[0].save(apng, 'PNG', save_all=True, append_images=frames[1:])
    frames[0].save(webp, 'WEBP', save_all=True, append_images=frames[1:], lossless=True)
    Image.fromarray(np.ones((4, 4), np.float32)).save(float_, 'TIFF')
    for content,says in {bytes(damaged): 'wrong checksum in its chunk IDAT); fetch', whole[:-20]: 'cut short after',
        b'': '(empty)',
        gif.getvalue(): 'another kind of file (a GIF)', b'<html>404': "begins with '<html>404'",
        apng.getvalue(): 'an animated PNG',
        webp.getvalue(): '2 pictures in one WEBP', float_.getvalue(): 'no agreed white', b'\0\1\xff'*50: 'no picture',
        bytes(128) + b'DICM': 'a DICOM', whole[:8] + chunk(b'CgBI', b'1234') + whole[8:]: 'chunk of its own, CgBI',
        whole[:8] + chunk(b'IEND', b''): 'header is damaged'}.items():
        path.write_bytes(content)
        assert says in one_line(read_image, path) and one_line(read_mask, path)
        if says != 'no agreed white': one_line(picture_size, path)
    assert 'cannot be opened (No such file' in one_line(read_image, tmp_path/'none.png')
    assert 'cannot be opened' in one_line(picture_size, tmp_path)

def test_only_pixels_are_kept():
    out = io.BytesIO()
    Image.fromarray(NOISE).save(out, 'PNG', dpi=(72, 72))
    kept = plain_png(out.getvalue())
    assert len(kept) < len(out.getvalue())
    assert plain_png(kept) == kept
    assert (np.array(Image.open(io.BytesIO(kept))) == NOISE).all()

# Folders

def test_which_files_are_data(tmp_path):
    for name in ('b/2.PNG', 'b/._2.png', 'a/1.png', 'a/1.jpg', 'b/__MACOSX/1.png', 'a/.ipynb_checkpoints/1.png',
        'a/@eaDir/1.png',
        'elsewhere/3.png', 'a/Thumbs.db'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    home = tmp_path/'home'
    home.mkdir()
    for name in ('a', 'b'): (home/name).symlink_to(tmp_path/name, target_is_directory=True)
    (tmp_path/'b'/'round').symlink_to(home, target_is_directory=True)
    (tmp_path/'b'/'self').symlink_to(tmp_path/'b'/'self')
    (home/'gone.png').symlink_to(tmp_path/'nosuch.png')
    assert [p.relative_to(home).as_posix() for p in data_files(home)] == ['a/1.png', 'b/2.PNG', 'gone.png']
    assert [p.name for p in data_files(home, ('.png', '.jpg'))][:2] == ['1.jpg', '1.png']
    assert [p.name for p in data_files(home, deep=False)] == ['gone.png']
    assert 'cannot be opened' in one_line(read_image, home/'gone.png')

def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(folders_module.os, 'scandir', refuse)
    for f in (data_files, data_root): assert f'{tmp_path}: cannot be read (Permission denied)' in one_line(f, tmp_path)

@pytest.fixture
def clips(tmp_path):
    "Three clips of two videos, two frames each, in CholecSeg8k's layout"
    rng = np.random.default_rng(1)
    root = tmp_path/'clips'
    for clip in ('video01_00080', 'video01_00160', 'video52_00000'):
        folder = root/clip[:7]/clip
        folder.mkdir(parents=True)
        for f in (0, 1):
            name = f'frame_{int(clip[8:]) + f}_endo'
            Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(folder/f'{name}.png')
            mask = Image.fromarray(encode_mask(rng.integers(0, 3, (16, 24), dtype=np.uint8))).convert('RGB')
            for kind in ('watershed_mask', 'mask'): mask.save(folder/f'{name}_{kind}.png')
    (root/'phase_annotations').mkdir()
    (root/'phase_annotations'/'video01-phase.txt').write_text(''.join(f'{i}\tPreparation\n' for i in range(200)))
    return root

def copy(r, of, to): (shutil.copytree if (r/of).is_dir() else shutil.copy)(r/of, r/to)
def color_masks(r):
    color = Image.new('RGB', (24, 16), (210, 140, 140))
    for o in (r/'video52').rglob('*watershed_mask.png'): color.save(o)

CLIP52,NAME,OTHER = 'video52/video52_00000','a folder of another name','frames of another video'
FRAME0,MASK0 = f'{CLIP52}/frame_0_endo.png',f'{CLIP52}/frame_0_endo_watershed_mask.png'
DAMAGE = {}
DAMAGE['video'] = ('video52', 'video52 copy'), 'video52 copy/video52_00000', NAME
DAMAGE['clip'] = ('video01/video01_00080', 'video01/video01_00080 - Copy'), 'video01/video01_00080 - Copy', NAME
DAMAGE['astray'] = (CLIP52, 'video01/video52_00000'), 'video01/video52_00000', NAME
DAMAGE['renamed'] = (CLIP52, 'video53/video53_00000'), CLIP52, OTHER
DAMAGE['frame'] = (FRAME0, 'video01/video01_00080/frame_81_endo.png'), 'video01/video01_00080', OTHER
DAMAGE['twice'] = (FRAME0, f'{CLIP52}/frame_00_endo.png'), FRAME0, 'a second file of a frame'
DAMAGE['color'] = None, MASK0, 'mask without a class'

@pytest.mark.parametrize('damage', DAMAGE)
def test_copies_and_wrong_masks_stop_and_are_named(clips, damage):
    files,file,problem = DAMAGE[damage]
    copy(clips, *files) if files else color_masks(clips)
    n = 1 if files else 2
    assert one_line(frame_table, clips).startswith(f'{clips/file}: {problem} (')
    report = audit(clips)
    assert report.attrs['stops'] == n == (report.problem == problem).sum() == report.attrs['summary'][problem]
    assert report.file[0] == file
    assert one_line(frame_table, clips).startswith(f'{clips/file}: {problem} (')

def test_masks_in_which_nothing_was_drawn_are_no_fault(clips):
    empty = Image.fromarray(np.uint8([[0, 255]]*8).repeat(12, 1).repeat(2, 0))
    for o in (clips/'video52').rglob('*watershed_mask.png'): empty.save(o)
    assert len(frame_table(clips)) == 6 and audit(clips).attrs['stops'] == 0

def test_capitals_and_litter_do_not_matter(clips):
    want = frame_table(clips)
    (clips/'video52').rename(clips/'Video52')
    first = clips/'video01'/'video01_00080'/'frame_80_endo.png'
    first.rename(first.with_suffix('.PNG'))
    first.with_name('._frame_80_endo.png').write_bytes(b'mac')
    (clips/'__MACOSX'/'video52 copy'/'video52_00000').mkdir(parents=True)
    (clips/'__MACOSX'/'video52 copy'/'video52_00000'/'frame_0_endo.png').touch()
    t = frame_table(clips)
    assert facts(t).equals(facts(want)) and Path(t.image[0]).exists() and t.image.str.contains('Video52').sum() == 2

def test_a_frame_may_be_a_jpeg_that_is_called_png(clips):
    path = clips/'video52'/'video52_00000'/'frame_0_endo.png'
    Image.open(path).save(path, 'JPEG')
    row = frame_table(clips).query('video == "video52"').iloc[0]
    assert read_frame(row)[0].shape == (16, 24, 3) and audit(clips).attrs['stops'] == 0

@pytest.mark.parametrize('way', ['.', 'video01', 'video01/video01_00080', '..'])
def test_a_folder_too_high_or_too_low_is_found(clips, way, monkeypatch):
    want = frame_table(clips)
    assert facts(frame_table(clips/way)).equals(facts(want)) and set(want.phase) == {0, -1}
    monkeypatch.chdir(clips/way)
    t = frame_table('.')
    assert facts(t).equals(facts(want)) and Path(t.image[0]).exists() and len(audit('.')) == len(audit(clips))

def test_two_data_sets_are_not_guessed_at(clips):
    shutil.copytree(clips, clips.parent/'old'/'clips')
    assert 'holds several data sets' in one_line(frame_table, clips.parent)
    assert 'holds no videoNN' in one_line(data_root, clips/'phase_annotations')

# Zips

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "What is unpacked goes here"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path/'cache'/'cwcl'

def pack(root, path, prefix='', **kwargs):
    with zipfile.ZipFile(path, 'w', **kwargs) as z:
        for o in sorted(root.rglob('*.*')):
            if o.name != 'cwcl_index.csv': z.write(o, f'{prefix}{o.relative_to(root).as_posix()}')
    return path

@pytest.mark.parametrize('prefix', ['', 'CholecSeg8k/'])
def test_a_zip_is_as_good_as_the_folder(scenes, tmp_path, cache, prefix):
    "Equal tables, stores equal to the bit, whether the zip or the folder it lies in is given"
    for o in ('video17', 'video52', 'phase_annotations'): shutil.copytree(scenes/o, tmp_path/'plain'/o)
    shutil.copy(scenes/'scenes.json', tmp_path/'plain')
    (tmp_path/'data').mkdir()
    path = pack(tmp_path/'plain', tmp_path/'data'/'archive.zip', prefix)
    want = frame_table(tmp_path/'plain')
    for given in (path, path.parent): assert facts(frame_table(given)).equals(facts(want))
    assert len(list(cache.iterdir())) == 1 and license_of(path, want) == 'embedded' and (want.phase >= 0).all()
    tables = [t[:9] for t in (want, frame_table(path))]
    stores = [FrameStore(t.image.tolist(), t['mask'].tolist(), class_set(8), (30, 50)) for t in tables]
    for k in ('frames', 'masks'): assert torch.equal(*[getattr(o, k) for o in stores])
    assert not [o for o in cache.rglob('*color_mask.png')] and audit(path).attrs['stops'] == 0

def test_a_broken_member_is_for_the_audit_to_find(clips, tmp_path, cache):
    path = pack(clips, tmp_path/'a.zip', compression=zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as z: at = z.getinfo('video52/video52_00000/frame_1_endo.png').header_offset + 120
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    report = audit(path)
    assert report.attrs['stops'] == 1 and report.file[0] == 'video52/video52_00000/frame_1_endo.png'
    assert report.value[0] == "no picture, it begins with 'broken in a.zip'"
    assert 'unreadable (no picture' in one_line(frame_table, path)

def test_an_error_that_passes_leaves_nothing_behind(clips, tmp_path, cache, monkeypatch):
    "A network disk stumbles once; the zip is sound"
    path = pack(clips, tmp_path/'a.zip')
    real = shutil.copyfileobj
    def stumble(*args):
        monkeypatch.setattr('shutil.copyfileobj', real)
        raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr('shutil.copyfileobj', stumble)
    assert 'Input/output error' in one_line(frame_table, path)
    assert audit(path).attrs['stops'] == 0

@pytest.mark.parametrize('workers', [-1, 0])
def test_workers_are_counted_from_one(clips, workers):
    said = one_line(scan, clips, workers)
    assert f'workers={workers}: give 1 or more' in said

def marked(at, value):
    "What writes a byte into the header of every member, in the file and in its directory"
    def change(path):
        b = bytearray(path.read_bytes())
        for mark,more in ((b'PK\3\4', 0), (b'PK\1\2', 2)):
            for m in list(re.finditer(re.escape(mark), bytes(b))): b[m.start()+at+more] = value
        path.write_bytes(b)
    return change

def test_zips_that_cannot_be_unpacked_are_one_line(clips, tmp_path, cache, monkeypatch):
    def made(name, change=None):
        path = pack(clips, tmp_path/name)
        if change: change(path)
        return path
    cut = made('cut.zip', lambda p: p.write_bytes(p.read_bytes()[:-300]))
    secret,deflate64 = made('secret.zip', marked(6, 1)),made('64.zip', marked(8, 9))
    bad = (cut, 'cut short or damaged'),(secret, 'asks for a password'),(deflate64, 'unpack it yourself')
    for path,says in bad:
        assert says in one_line(frame_table, path)
        assert not cache.exists() or not list(cache.iterdir())
    for name in ('../../evil.png', '/evil.png', 'C:\\evil.png', 'video01\\..\\..\\evil.png'):
        def slip(path):
            with zipfile.ZipFile(path, 'a') as z: z.writestr(name, b'')
        assert 'would land outside' in one_line(frame_table, made('slip.zip', slip))
    monkeypatch.setattr(folders_module.shutil, 'disk_usage', lambda p: types.SimpleNamespace(free=10))
    assert '0.0 GB free' in one_line(frame_table, made('full.zip')) and not list(cache.iterdir())
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(clips/'video01'/'video01_00080'/'frame_80_endo.png'))
    assert 'cannot be written' in one_line(frame_table, made('nowhere.zip'))

def test_another_download_is_unpacked_anew(clips, tmp_path, cache):
    path = pack(clips, tmp_path/'a.zip')
    first = unpacked(path)
    shutil.rmtree(clips/'video52')
    os.utime(pack(clips, path), (0, 0))
    assert unpacked(path) != first
    assert frame_table(path).video.unique().tolist() == ['video01']
    assert len(scan(first)) == 6

def test_two_who_unpack_at_the_same_time_agree(clips, tmp_path, cache, monkeypatch):
    path = pack(clips, tmp_path/'a.zip')
    want = []
    real = folders_module._write_member
    def meanwhile(z, o, to):
        monkeypatch.setattr(folders_module, '_write_member', real)
        want.append(unpacked(path))
        monkeypatch.undo()
        return real(z, o, to)
    monkeypatch.setattr(folders_module, '_write_member', meanwhile)
    got = unpacked(path, cache_dir=cache)
    assert [got] == want and len(list(cache.iterdir())) == 1 and len(frame_table(got)) == 6

# Masks of nothing

@pytest.fixture
def blank(table, tmp_path):
    "The drawn frames, some with masks in which every pixel is ignored"
    Image.new('L', (107, 60), 255).save(tmp_path/'blank.png')
    return lambda which: table.assign(mask=table['mask'].mask(which & (table['mask'] != ''), str(tmp_path/'blank.png')))

@pytest.mark.parametrize('what', ['labelled', 'valid'])
def test_a_training_on_masks_of_nothing_does_not_start(table, smoke, blank, what):
    rows = table.labelled if what == 'labelled' else table.part == 'valid'
    assert 'holds a pixel of black background, abdominal wall' in one_line(cwcl_dls, blank(rows), smoke)
    one = rows & (np.arange(len(table)) == np.flatnonzero(rows)[0])
    cwcl_dls(blank(rows & ~one), smoke)

class Guess(torch.nn.Module):
    "A network that says the first class everywhere"
    classes = class_set(8)
    def forward(self, x): return torch.eye(8)[0].view(1, 8, 1, 1).expand(len(x), 8, *x.shape[2:])

def test_scores_of_nothing_are_json(table, dls, blank):
    "A file of results holds no NaN, which is not JSON"
    out = evaluate(Guess(), dls, blank(table.part == 'test').query('part == "test"'))
    assert json.loads(json.dumps(out, allow_nan=False)) == out
    means = [out[k] for k in ('mean_iou', 'mean_image_iou', 'mean_surface_dice')]
    assert [*means, out['native']['mean_iou'], *set(out['class_iou'].values())] == [None]*5
    assert out['ignored_share'] == 1
    assert plot_iou(out, Guess.classes.colors).axes[0].get_title() == 'test: mean of nothing'
