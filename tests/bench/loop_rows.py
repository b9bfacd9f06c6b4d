"What a training step costs besides arithmetic, and what each change to the hot path gives: 5,000 CIFAR-10 images in batches of 128."
import torch, torch.nn.functional as F
from functools import partial
from fastai.data.load import DataLoader
from fastai.vision.all import Learner, Normalize, SGD, TensorImage, accuracy
from common import alternate, quiet
from data_rows import bs, images
from train_rows import bare
from feature_erosion.data import CropFlip, NormalizeRows, TensorImages, paper_stats, tensor_dls
from feature_erosion.learner import erosion_learner
from feature_erosion.phases import Phase

class Nothing(torch.nn.Module):
    "As many weights as ResNet-20 has, and hardly any arithmetic"
    def __init__(self):
        super().__init__()
        self.w,self.b = torch.nn.Linear(3,10),torch.nn.ParameterList([torch.zeros(10) for _ in range(64)])
    def forward(self, x): return self.w(x[:,:,0,0])+sum(self.b)

def pixels(x, pad=4):
    "Crop and flip with channels first: views of single pixels"
    x = x.as_subclass(torch.Tensor)
    b,_,h,w = x.shape
    top,left = torch.randint(2*pad+1, (2,b))
    x = F.pad(x, (pad,)*4).unfold(2,h,1).unfold(3,w,1)[torch.arange(b),:,top,left]
    return TensorImage(torch.where(torch.rand(b)[:,None,None,None]<.5, x.flip(-1), x))

def walk(dl, loop=iter):
    for _ in loop(dl): pass

def rows(repeats=3):
    x,y = images()
    dls = tensor_dls(TensorImages(x, y, range(10)), TensorImages(x[:bs], y[:bs], range(10)), bs=bs, stats=paper_stats)
    learn,plain,other = erosion_learner(dls, Nothing()),erosion_learner(dls, Nothing()),Learner(dls, Nothing(),
        opt_func=partial(SGD, mom=.9), lr=.1, wd=1e-4, metrics=accuracy)
    idx,crop = torch.randperm(len(x))[:bs],CropFlip()
    batch = dls.train.dataset[idx][0]
    floats,norm = batch.float().div_(255),Normalize.from_stats(*paper_stats, cuda=False)
    by_rows = NormalizeRows(norm.mean, norm.std)
    def times(f, n=200): return lambda: [f() for _ in range(n)]
    n = f'{len(dls.train)} steps of a model that computes nothing'
    for name,f,peer,g in (
        (f'fit_phases, {n}', quiet(lambda: learn.fit_phases(Phase('a', 1, sched='constant'))), 'a bare loop, our loader',
         bare(Nothing(), dls.train)),
        (f'Learner.fit, {n}', quiet(lambda: plain.fit(1)), 'a bare loop, our loader', bare(Nothing(), dls.train)),
        (f"Learner.fit, PyTorch's SGD, {n}", quiet(lambda: plain.fit(1)), "Learner.fit, fastai's SGD",
         quiet(lambda: other.fit(1))),
        (f'{len(dls.train)} batches by our iteration', lambda: walk(dls.train), "by fastai's",
         lambda: walk(dls.train, DataLoader.__iter__)),
        ('gathering a batch of 128, 200 times', times(lambda: dls.train.dataset.x.index_select(0, idx)), 'x[idx]',
         times(lambda: x[idx])),
        ('crop and flip of a batch, 200 times', times(lambda: crop(batch, split_idx=0)), 'channels first',
         times(lambda: pixels(batch))),
        ('Normalize by rows, 200 times', times(lambda: by_rows(floats)), "fastai's Normalize", times(lambda: norm(floats)))):
        fs = {'ours':f, 'peer':g}
        for o in fs.values(): o()
        t = alternate(fs, max(repeats, 7))
        yield dict(name=name, peer=peer, ours_s=t['ours'], peer_s=t['peer'], target=None, check='')
