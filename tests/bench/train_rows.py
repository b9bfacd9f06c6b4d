"A training epoch of ResNet-20 on 2,560 CIFAR-10 images in batches of 128; evaluation on named sets; a checkpoint."
import tempfile
from pathlib import Path
from functools import partial
import torch, torch.nn.functional as F
from fastai.vision.all import Callback, Learner, SGD, accuracy, noop
from common import alternate, data, networks, quiet, timed
from data_rows import bs, fastai_dls, files, images
from feature_erosion.data import TensorImages, paper_stats, tensor_dls
from feature_erosion.batches import split_batch
from feature_erosion.evalsets import EvalSets, evaluate, pattern_sets
from feature_erosion.loaders import subset_dl
from feature_erosion.learner import erosion_learner
from feature_erosion.models import create_model
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import Phase
from feature_erosion.runs.resume import KeepRun
from feature_erosion.runs.store import RunStore

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
    learn,other = erosion_learner(dls, 'resnet20'),Learner(fastai_dls(folder, bs/(2560+bs)), create_model('resnet20', 10),
                                                           opt_func=partial(SGD, mom=.9), lr=.1, wd=1e-4)
    twin = create_model('resnet20', 10).to(memory_format=torch.channels_last)
    return {'ours': quiet(lambda: learn.fit_phases(Phase('pretrain', 1, sched='constant'))), 'bare': bare(twin, dls.train),
            'fastai': quiet(lambda: other.fit(1))}

def sets(n=2000):
    model,dls = networks()[0].to(memory_format=torch.channels_last),data()
    named = {k:subset_dl(dl, n) for k,dl in pattern_sets(dls, ColorSquare(4)).items()}
    ready = {k:[b[0].as_subclass(torch.Tensor) for b in dl] for k,dl in named.items()}
    def forwards():
        with torch.no_grad():
            for xs in ready.values():
                for x in xs: model(x)
    return {'ours': lambda: [evaluate(model, dl) for dl in named.values()], 'forwards': forwards}

def look(dls, model):
    "A look of `EvalSets` as training calls it, its images read before; and the forward passes alone"
    learn = Learner(dls, model, metrics=accuracy)
    sets = EvalSets(pattern_sets(dls, ColorSquare(4)))
    learn.add_cb(sets)
    sets.log,sets.start,learn.train_iter = noop,0,0   # nobody writes it down: there is no fit
    ready = [split_batch(s.dl, b, model)[0][0] for s in sets.some.values() for b in s.batches]
    def forwards():
        with torch.no_grad():
            for x in ready: model(x)
    return {'ours': lambda: sets._look(sets.some, 0, 'iter'), 'forwards': forwards}

def looks(repeats):
    "On our loader, and on fastai's with two workers"
    model,name = networks()[0],'a look of EvalSets, 1,000 images of each of three sets'
    with tempfile.TemporaryDirectory() as tmp:
        x,y = images()
        theirs = fastai_dls(files(tmp, x.numpy(), y), .3)
        ours = tensor_dls(TensorImages(x[1500:], y[1500:], range(10)), TensorImages(x[:1500], y[:1500], range(10)), bs=bs,
                          stats=paper_stats)
        for dls,of in (ours,''),(theirs,', JPEG files, 2 workers'):
            fs = look(dls, model)
            for f in fs.values(): f()
            t = alternate(fs, repeats)
            yield dict(name=name+of, peer='forward passes, batches ready', ours_s=t['ours'], peer_s=t['forwards'],
                       target=round(1/1.1, 2), check='at most 1.1 times')

def checkpoint(repeats, steps=4, n=50_000, bs=64):
    "A checkpoint of ResNet-18 at full width, and an epoch of CIFAR-10, by a few of its steps"
    x,y = images()
    ds = TensorImages(x[:steps*bs], y[:steps*bs], range(10))
    dls = tensor_dls(ds, TensorImages(x[:10], y[:10], range(10)), bs=bs, stats=paper_stats)
    learn = erosion_learner(dls, 'resnet18')
    step = bare(learn.model, dls.train)
    with tempfile.TemporaryDirectory() as tmp:
        keep = KeepRun(RunStore(tmp).run('bench'))
        took = []
        class Save(Callback):
            order = 2000   # after `KeepRun`
            def after_epoch(self): took.extend([timed(keep.save) for _ in range(max(repeats, 7))])
        with learn.no_bar(), learn.no_logging(): learn.fit_phases(Phase('pretrain', 1, sched='constant'), cbs=[keep, Save()])
        mb = sum(f.stat().st_size for f in Path(tmp).rglob('*') if f.is_file())/2**20
    epoch = [timed(step)/steps*(n//bs) for _ in took]
    yield dict(name='a checkpoint of ResNet-18 at full width', peer=f'an epoch of CIFAR-10, by {steps} of its {n//bs} steps',
               ours_s=took, peer_s=epoch,
               target=50, check=f'at most 2% of it; {mb:.0f} MB with the one before')

def rows(repeats=3):
    with tempfile.TemporaryDirectory() as tmp:
        fs = epochs(tmp)
        for f in fs.values(): f()
        t = alternate(fs, repeats)
    name = 'a training epoch of ResNet-20, 2,560 images'
    yield dict(name=name, peer='fastai: ImageDataLoaders, SGD, defaults', ours_s=t['ours'], peer_s=t['fastai'], target=2.5,
               check='JPEG files there, decoded images here')
    yield dict(name=name, peer='a bare loop, our loader, channels-last', ours_s=t['ours'], peer_s=t['bare'], target=.97,
               check='at most 3% more')
    fs = sets()
    for f in fs.values(): f()
    t = alternate(fs, max(repeats, 5))
    yield dict(name='three named sets, 2,000 images each', peer='forward passes, batches ready', ours_s=t['ours'],
               peer_s=t['forwards'], target=round(1/1.1, 2), check='at most 1.1 times')
    yield from looks(repeats)
    yield from checkpoint(repeats)
