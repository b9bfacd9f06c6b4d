"What the benchmarks share: networks before and after erosion, images, alternating timers, memory of a fresh process."
import gc, io, os, subprocess, sys, tempfile, time, warnings
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from statistics import median
warnings.filterwarnings('ignore')
import torch
from scipy.stats import binom
from fastai.data.external import fastai_path
from fastai.vision.all import imagenet_stats, set_seed
from feature_erosion.data import cifar10_dls, tensor_dls, TensorImages
from feature_erosion.learner import erosion_learner
from feature_erosion.models import create_model
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import Phase

checkpoint = os.environ.get('FEATURE_EROSION_RESNET20')
real = (fastai_path('data')/'cifar10').exists() and bool(checkpoint)

def data(bs=128):
    "CIFAR-10, or noise of the same shape where it is not on this machine"
    set_seed(0)
    if real: return cifar10_dls(stats=imagenet_stats, bs=bs)
    x,y = torch.randint(0, 256, (10_000,32,32,3), dtype=torch.uint8),torch.arange(10_000)%10
    return tensor_dls(TensorImages(x, y, range(10), 0), TensorImages(x, y, range(10)), bs=bs)

def networks(iters=60):
    "A trained ResNet-20 and the same after `iters` iterations on squares"
    store = Path(os.environ.get('BENCH_TMP') or tempfile.gettempdir())/f'bench_networks_{os.getuid()}_{real}.pt'
    after = create_model('resnet20', 10)
    if store.exists(): before,sd = torch.load(store, weights_only=True)
    else:
        dls = data()
        learn = erosion_learner(dls, 'resnet20', weights=checkpoint if real else None, channels_last=False)
        before = deepcopy(learn.model.state_dict())
        with learn.no_bar(), learn.no_logging():
            learn.fit_phases([Phase('erode', iters=iters, dls=dls.inject(ColorSquare(4)), sched='constant')], cbs=[])
        sd = learn.model.state_dict()
        torch.save([{k:v.cpu() for k,v in o.items()} for o in (before,sd)], store)
        before,sd = torch.load(store, weights_only=True)
    first = create_model('resnet20', 10)
    first.load_state_dict(before)
    after.load_state_dict(sd)
    return first.eval(),after.eval()

def batches(n=2000, bs=128):
    "Normalised test images and labels, in the default memory layout"
    store = Path(os.environ.get('BENCH_TMP') or tempfile.gettempdir())/f'bench_images_{os.getuid()}_{real}_{n}.pt'
    if not store.exists():
        from feature_erosion.loaders import subset_dl
        dl = subset_dl(data().valid, n)
        torch.save([torch.cat([b[i].as_subclass(torch.Tensor) for b in dl]).contiguous() for i in (0,1)], store)
    x,y = torch.load(store, weights_only=True)
    return list(zip(x.split(bs), y.split(bs)))

def quiet(f):
    "With everything a user has, the progress bar too, but nothing on the screen"
    def g():
        with redirect_stdout(io.StringIO()): f()
    return g

def timed(f):
    gc.collect()
    t = time.perf_counter()
    f()
    return time.perf_counter()-t

def alternate(fs, repeats=3, more=7):
    "Seconds of each function of a dict, in turns, forwards and backwards; at least `more` turns where one of them varies by over 10%"
    res = {k:[] for k in fs}
    def turns(start, stop):
        for i in range(start, stop):
            for k in list(fs)[::1 if i%2==0 else -1]: res[k].append(timed(fs[k]))
    turns(0, repeats)
    if any(max(v)>1.1*min(v) for v in res.values()): turns(repeats, more)
    return res

def compared(ours, peer):
    "Median of peer ÷ ours, turn by turn, and an interval that holds the true one in 95 of 100 cases; with few turns their range: in 75 for three"
    x = sorted(p/o for o,p in zip(ours, peer, strict=True))
    k = max(1, int(binom.ppf(.025, len(x), .5)))   # order statistics: the number of pairs below the true median is binomial
    return dict(ratio=median(x), low=x[k-1], high=x[-k])

def peak_mb(module, name):
    "Megabytes by which running `module.cases()[name]` in a fresh process raises its resident memory at most"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import common, {module} as m; f = m.cases()[{name!r}]; print(common.peak_of(f))"
    out = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                         check=True).stdout
    return float(out.split()[-1])

def _status(key):
    return next(int(l.split()[1])/1024 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key))

def peak_of(f):
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')    # forget the peak so far; Linux only
    start = _status('VmRSS')
    f()
    return _status('VmHWM')-start
