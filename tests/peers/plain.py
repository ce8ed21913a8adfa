"""The demo's method as one would write it with MONAI and pytorch-metric-learning; `make bench` measures it beside ours.

    python tests/peers/plain.py SCENES [--epochs 28] [--seed 0]

From the kit it takes what is not the method: which frames there are, their split, and how to read a file."""
import argparse, numpy as np, torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import FocalLoss, GeneralizedDiceLoss
from monai.networks.nets import BasicUNet
from monai.networks.nets.basic_unet import UpCat
from monai.networks.utils import one_hot
from monai.transforms import Compose, MapTransform, NormalizeIntensityd, RandFlipd, RandGaussianSmoothd
from monai.transforms import RandSpatialCropd, RandZoomd, SpatialPadd, ToTensord
from monai.utils import set_determinism
from pytorch_metric_learning.losses import SupConLoss
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import multiclass_confusion_matrix
from cwcl.core import recipe
from cwcl.data.cholec import frame_table, presence
from cwcl.data.labels import class_set
from cwcl.data.splits import split_frames
from cwcl.data.store import load_image, load_mask
from cwcl.data.streams import class_labelled

BATCH_NORM = 'batch'
RELU = ('relu', dict(inplace=True))
BOTH = 'image', 'mask'

class Net(nn.Module):
    "MONAI's U-Net in two halves, an embedding of each of its three deepest levels, and a presence head"
    def __init__(self, widths, n_classes, dim):
        super().__init__()
        w = list(widths)
        u = BasicUNet(2, 3, n_classes, [*w, w[0]], act=RELU, norm=BATCH_NORM, bias=False)
        u.upcat_1 = UpCat(2, w[1], w[0], w[0], act=RELU, norm=BATCH_NORM, bias=False) # Its own is wider than ours
        self.down = nn.ModuleList([u.conv_0, u.down_1, u.down_2, u.down_3, u.down_4])
        self.up = nn.ModuleList([u.upcat_4, u.upcat_3, u.upcat_2, u.upcat_1])
        self.last = u.final_conv
        self.project = nn.ModuleList(nn.Linear(k, dim) for k in w[-3:])
        self.presence = nn.Linear(3*dim, n_classes)
    def encode(self, x):
        maps = []
        for level in self.down:
            x = level(x)
            maps.append(x)
        return maps
    def decode(self, maps):
        *skips,x = maps
        for level,skip in zip(self.up, reversed(skips)): x = level(x, skip)
        return self.last(x)
    def segment(self, x): return self.decode(self.encode(x))
    def forward(self, x, n):
        maps = self.encode(x)
        zs = [f(m.mean((2, 3))) for f,m in zip(self.project, maps[-3:])]
        return self.decode([m[:n] for m in maps]), self.presence(torch.cat(zs, 1)), zs

class Loss(nn.Module):
    "Generalized Dice, focal loss, presence, and one contrast for each level"
    def __init__(self, alpha=.1, beta=.01, temp=.07):
        super().__init__()
        self.alpha,self.beta = alpha,beta
        self.dice = GeneralizedDiceLoss()
        self.focal = FocalLoss(gamma=2., use_softmax=True, to_onehot_y=True, ignore_index=255)
        self.contrast = SupConLoss(temp)
    def forward(self, logits, presence_logits, zs, mask, presence, sets):
        mask = mask[:,None]
        valid = mask != 255
        truth = one_hot(mask.where(valid, 0), logits.shape[1])*valid
        dice = self.dice(logits.softmax(1)*valid, truth)
        presence = binary_cross_entropy_with_logits(presence_logits, presence, reduction='none').sum(1).mean()
        contrast = sum(self.contrast(z, sets) for z in zs)
        return dice + self.focal(logits, mask) + self.alpha*presence + self.beta*contrast

class Decode(MapTransform):
    "Files to arrays; cached, as nothing about it is random"
    def __init__(self, size, classes):
        super().__init__(BOTH)
        self.size,self.classes = size,classes
    def __call__(self, d):
        mask = load_mask(d['mask'], self.size, self.classes) if d['mask'] else np.full(self.size, 255, np.uint8)
        return {**d, 'image': load_image(d['image'], self.size)/np.float32(255), 'mask': np.array(mask)[None]}

def transforms(r, mean, std):
    "The paper's scale, crop, flip and blur"
    size = r.crop,r.crop
    return [RandZoomd(BOTH, prob=1., min_zoom=1-r.scale, max_zoom=1+r.scale, mode=('bilinear', 'nearest'),
        padding_mode='edge', keep_size=False), SpatialPadd(BOTH, size, mode='edge'),
        RandSpatialCropd(BOTH, size, random_size=False), RandFlipd(BOTH, prob=r.flip, spatial_axis=1),
        RandGaussianSmoothd('image', (.8, 1.4), (.8, 1.4), prob=.75), *normalized(mean, std)]

def normalized(mean, std):
    "Steps that all frames take"
    return [NormalizeIntensityd('image', subtrahend=mean, divisor=std, channel_wise=True), ToTensord(BOTH)]

class Batches:
    "Numbers of the frames of each batch of an epoch, N labelled ones first"
    def __init__(self, labelled, frames, n, batch, seed=0):
        self.labelled,self.frames,self.n,self.batch = labelled,frames,n,batch
        self.rng = np.random.default_rng(seed)
    def __len__(self): return self.frames//self.batch
    def __iter__(self):
        order = self.rng.permutation(self.frames)
        for i in range(len(self)):
            first = self.rng.choice(self.labelled, self.n, replace=False)
            others = np.setdiff1d(order[i*self.batch:(i+1)*self.batch], first)
            yield [*first, *others[:self.batch-self.n]]

def items(table, classes, masks):
    "One dict for each frame: files, presence of the classes, label set with phase as a number"
    seen = presence(table, classes).astype(np.float32)
    sets = np.unique(np.c_[seen, table.phase], axis=0, return_inverse=True)[1].reshape(-1)
    columns = zip(table.image, table['mask'].where(masks, ''), seen, sets)
    return [dict(image=i, mask=m, presence=p, set=int(s)) for i,m,p,s in columns]

def training_loader(table, r):
    "Loader of augmented batches, and the mean and standard deviation of the training frames"
    pool = table[class_labelled(table, r)].reset_index(drop=True)
    classes = class_set(r.class_set, r.left_out)
    labelled = pool.labelled.to_numpy()
    decode = Decode((r.height, r.width), classes)
    data = items(pool, classes, labelled)
    some = np.stack([decode(o)['image'] for o in data[::8]])
    mean,std = (f(some, (0, 2, 3)) for f in (np.mean, np.std))
    ds = CacheDataset(data, Compose([decode, *transforms(r, mean, std)]), num_workers=1, progress=False)
    order = Batches(np.flatnonzero(labelled), len(pool), r.labelled, r.batch, r.seed)
    return DataLoader(ds, batch_sampler=order, num_workers=0),mean,std

def test_loader(table, r, mean, std):
    classes = class_set(r.class_set, r.left_out)
    steps = [Decode((r.height, r.width), classes), *normalized(mean, std)]
    data = items(table, classes, np.ones(len(table), bool))
    return DataLoader(CacheDataset(data, Compose(steps), num_workers=1, progress=False), batch_size=32, num_workers=0)

def mean_iou(net, loader, r, n_classes):
    "Mean IoU over the classes that the truth shows"
    net.eval()
    counts = 0
    with torch.no_grad():
        for b in loader:
            logits = sliding_window_inference(b['image'], (r.window, r.window), 8, net.segment, r.overlap)
            truth = b['mask'][:,0].long()
            counts = counts + multiclass_confusion_matrix(logits.argmax(1), truth, n_classes, ignore_index=255)
    hit = counts.diagonal()
    true,called = (counts.sum(k) for k in (1, 0))
    return (hit/(true + called - hit))[true > 0].mean().item()

def fit(net, loader, r, epochs, after_epoch=None):
    "Train with AdamW on one cycle; returns the losses"
    loss_func = Loss(r.alpha, r.beta/r.scales, r.temp)
    opt = torch.optim.AdamW(net.parameters(), r.lr, eps=1e-8, weight_decay=r.wd)
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, r.lr, total_steps=epochs*len(loader), pct_start=.25)
    losses = []
    for _ in range(epochs):
        net.train()
        for b in loader:
            opt.zero_grad()
            out = net(b['image'], r.labelled)
            loss = loss_func(*out, b['mask'][:r.labelled,0].long(), b['presence'], b['set'])
            loss.backward()
            opt.step()
            cycle.step()
            losses.append(loss.item())
        if after_epoch: after_epoch()
    return losses

def run(scenes, r):
    "Train and test as the demo does; returns the mean IoU on the test videos and the losses"
    set_determinism(r.seed)
    torch.set_num_threads(r.threads)
    table = split_frames(frame_table(scenes), r)
    classes = class_set(r.class_set, r.left_out)
    loader,mean,std = training_loader(table, r)
    valid,test = (table[(table.part == k) & (table['mask'] != '')] for k in ('valid', 'test'))
    looked = test_loader(valid[valid.groupby('clip').cumcount() % r.valid_step == 0], r, mean, std)
    net = Net(r.widths, len(classes), r.dim)
    losses = fit(net, loader, r, r.epochs, lambda: mean_iou(net, looked, r, len(classes)))
    return mean_iou(net, test_loader(test, r, mean, std), r, len(classes)),losses

if __name__ == '__main__':
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('scenes', help='what `cwcl_data write` wrote')
    args.add_argument('--epochs', type=int, default=recipe('demo').epochs)
    args.add_argument('--seed', type=int, default=0)
    args = args.parse_args()
    score,losses = run(args.scenes, recipe('demo', epochs=args.epochs, seed=args.seed))
    print(f'mean IoU {score:.3f}, loss {losses[0]:.2f} to {losses[-1]:.2f}')
