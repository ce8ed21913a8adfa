"What is live on the site, where no kernel answers: pairs, windows over a frame, folds by hand, what networks said."
import base64, io
from pathlib import Path
import matplotlib as mpl, numpy as np, torch
from PIL import Image
from cwcl.data.labels import CLASSES, class_set
from cwcl.data.splits import TEST_VIDEOS
from cwcl.widgets.board import PairBoard, _script, demo_networks, page_part, script_text
from cwcl.widgets.folds import SplitExplorer
from cwcl.widgets.frames import PredictionBrowser, WindowExplorer
from cwcl.widgets.scales import ScaleExplorer, _mosaic

FIRST = 34 # An anchor that has positives, and none if the phase counts

def encoded(data): return base64.b64encode(data).decode()

def webp(image, quality=80):
    "Return the address of a picture that is part of the page"
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'WEBP', quality=quality)
    return f'data:image/webp;base64,{encoded(file.getvalue())}'

def color_map():
    "Return 256 colors from dark to light"
    return encoded((255*mpl.colormaps['cividis'](np.arange(256))[:,:3]).round().astype(np.uint8).tobytes())

def windows():
    "What the page needs for windows: a frame, and a color map"
    frame = WindowExplorer().frame
    return dict(height=frame.shape[0], width=frame.shape[1], picture=webp(frame), colors=color_map())

def folds():
    "What the page needs for folds: frames of each video and class, and the folds to start from"
    explorer = SplitExplorer()
    start = {k: list(v) for k,v in explorer.controls['valid'].options if v}
    names = list(CLASSES.name)
    sets = {f'{k} classes': [names.index(o) for o in class_set(k).names] for k in (8, 10, 13)}
    counts = explorer.counts.to_numpy().tolist()
    videos = list(explorer.counts.index)
    return dict(videos=videos, counts=counts, test=list(TEST_VIDEOS), names=names, sets=sets, folds=start)

def runs(mask):
    "Return a mask as runs of pixels: a byte for the length, one for the class id"
    ids = mask.flatten()
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    out = bytearray()
    for a,b in zip(starts, [*starts[1:], len(ids)]):
        for k in range(a, b, 255): out += bytes((min(b - k, 255), ids[a]))
    return encoded(bytes(out))

def predictions():
    "What the page needs for predictions: frames, and masks as runs"
    o = PredictionBrowser()
    def frame(i): return dict(name=o.names[i], picture=webp(o.images[i]), truth=runs(o.truths[i]),
        masks=[runs(m[i]) for m in o.masks.values()])
    h,w = o.truths[0].shape
    return dict(height=h, width=w, classes=o.classes.names, colors=o.classes.colors.tolist(), methods=list(o.masks),
        frames=[frame(i) for i in range(len(o.images))])

def neighbors(o):
    "Return neighbors, cosines and sentences of an explorer of scales, for other videos and for all"
    both = [o.at(others=k) for k in (True, False)]
    near = torch.stack([k.near for k in both])
    cosine = (100*torch.stack([o.cosine.gather(3, k.near) for k in both])).round()
    near,cosine = near.numpy().astype(np.uint8),cosine.numpy().astype(np.int8)
    return dict(near=encoded(near), cosine=encoded(cosine), summaries=[k.summary() for k in both])

CHANNELS,COLUMNS = 3,10 # Feature maps of each frame; pictures in a row of the sheet

def scales(explorer=None):
    "What the page needs for two networks and three scales: pictures, feature maps and neighbors, computed once"
    o = explorer or ScaleExplorer()
    n,h,w,_ = o.images.shape
    assert n <= 256, 'a neighbor is one byte'
    tiles = [*o.images, *np.zeros((-n % COLUMNS, h, w, 3), np.uint8)]
    sheet = _mosaic([tiles[k:k+COLUMNS] for k in range(0, n, COLUMNS)], 0)
    def gray(m):
        low,high = m.amin((2, 3), True),m.amax((2, 3), True)
        return (255*(m - low)/(high - low).clamp(min=1e-9)).byte().numpy().tobytes()
    maps = [[m[:,:CHANNELS] for m in net] for net in o.all_maps]
    shows = [[k for k,there in zip(class_set(8).names, row) if there] for row in o.shows]
    return dict(neighbors(o), sheet=webp(sheet, 65), width=w, height=h, columns=COLUMNS, channels=CHANNELS,
        names=o.videos.tolist(), shows=shows, sets=o.ids.tolist(), first=o.now.frame, colors=color_map(),
        maps=[list(m.shape[2:]) for m in maps[0]], values=encoded(b''.join(gray(m) for net in maps for m in net)))

def script():
    parts = (Path(__file__).with_name(o).read_text(encoding='utf-8') for o in ('live.js', 'live_networks.js'))
    return '\n'.join((_script(), *parts))

def page(mount, data, name):
    "Return a page's part: an element, the style, and the script that fills it"
    fill = f'{mount}({script_text(data)}, document.getElementById({script_text(name)}))'
    return page_part(script(), fill, name)

def places():
    "Make everything that is live, by the name of its place"
    return dict(board=PairBoard(None, demo_networks(), anchor=FIRST, net=1, scale=2).page('board-live'),
        pairs=PairBoard(size=40, anchor=FIRST).page('pairs-live'),
        windows=page('mountWindows', windows(), 'windows-live'),
        folds=page('mountSplit', folds(), 'folds-live'),
        predictions=page('mountPredictions', predictions(), 'predictions-live'),
        scales=page('mountScales', scales(), 'scales-live'))

def with_live(
    text:str, # A page
    made:dict, # From `places`
)->str:
    "Put what is live where a page asks for it, with all that it needs"
    for name,part in made.items(): text = text.replace(f'<div id="live-{name}"></div>', part)
    return text
