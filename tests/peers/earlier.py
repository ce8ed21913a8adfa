"Earlier, plain forms of what the kit computes faster now; what they return has not changed."
import numpy as np, torch
from scipy import ndimage
from cwcl.metrics import class_edges, fill_ignored

def surface_dice(pred, target, n_classes, tolerance=2.):
    "Two distance transforms of the whole frame for every class"
    scores = torch.full((len(pred), n_classes), torch.nan, dtype=torch.float64)
    for i,(p,t) in enumerate(zip(pred, target)):
        p,t = (o.numpy() for o in (p, t))
        scored = ndimage.binary_dilation(t != 255)
        filled = [fill_ignored(o, t == 255) for o in (p, t)]
        valid = t != 255
        for c in np.union1d(p[valid], t[valid]):
            edges = [class_edges(o, c) for o in filled]
            far = [ndimage.distance_transform_edt(~e) if e.any() else np.full(e.shape, np.inf) for e in edges]
            near = sum((d[e & scored] <= tolerance).sum() for d,e in zip(far[::-1], edges))
            total = sum((e & scored).sum() for e in edges)
            if total: scores[i,c] = near/total
    return scores
