"A training epoch of ResNet-20 on 2,560 CIFAR-10 images in batches of 128; evaluation on three named sets of 2,000."
import tempfile
from functools import partial
import torch, torch.nn.functional as F
from fastai.vision.all import Learner, SGD
from common import alternate, data, networks, quiet
from data_rows import bs, fastai_dls, files, images
from feature_erosion.data import TensorImages, paper_stats, tensor_dls
from feature_erosion.evalsets import evaluate, pattern_sets
from feature_erosion.loaders import subset_dl
from feature_erosion.learner import erosion_learner
from feature_erosion.models import create_model
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import Phase

def bare(model, dl):
    "What is left when the library is taken away"
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=1e-4)
    def f():
        model.train()
        for x,y in dl:
            F.cross_entropy(model(x.as_subclass(torch.Tensor)), y.as_subclass(torch.Tensor)).backward()
            opt.step(); opt.zero_grad()
    return f

def epochs(folder):
    x,y = images(2560+bs)
    files(folder, x.numpy(), y)
    dls = tensor_dls(TensorImages(x[bs:], y[bs:], range(10)), TensorImages(x[:bs], y[:bs], range(10)), bs=bs, stats=paper_stats)
    learn,other = erosion_learner(dls, 'resnet20'),Learner(fastai_dls(folder, bs/(2560+bs)), create_model('resnet20', 10), opt_func=partial(SGD, mom=.9), lr=.1, wd=1e-4)
    twin = create_model('resnet20', 10).to(memory_format=torch.channels_last)
    return {'ours': quiet(lambda: learn.fit_phases(Phase('pretrain', 1, sched='constant'))), 'bare': bare(twin, dls.train), 'fastai': quiet(lambda: other.fit(1))}

def sets(n=2000):
    model,dls = networks()[0].to(memory_format=torch.channels_last),data()
    named = {k:subset_dl(dl, n) for k,dl in pattern_sets(dls, ColorSquare(4)).items()}
    ready = {k:[b[0].as_subclass(torch.Tensor) for b in dl] for k,dl in named.items()}
    def forwards():
        with torch.no_grad():
            for xs in ready.values():
                for x in xs: model(x)
    return {'ours': lambda: [evaluate(model, dl) for dl in named.values()], 'forwards': forwards}

def rows(repeats=3):
    with tempfile.TemporaryDirectory() as tmp:
        fs = epochs(tmp)
        for f in fs.values(): f()
        t = alternate(fs, repeats)
    name = 'a training epoch of ResNet-20, 2,560 images'
    yield dict(name=name, peer='fastai: ImageDataLoaders, SGD, defaults', ours_s=t['ours'], peer_s=t['fastai'], target=2.5, check='JPEG files there, decoded images here')
    yield dict(name=name, peer='a bare loop, our loader, channels-last', ours_s=t['ours'], peer_s=t['bare'], target=.97, check='at most 3% more')
    fs = sets()
    for f in fs.values(): f()
    t = alternate(fs, max(repeats, 5))
    yield dict(name='three named sets, 2,000 images each', peer='forward passes, batches ready', ours_s=t['ours'], peer_s=t['forwards'], target=round(1/1.1, 2), check='at most 1.1 times')
