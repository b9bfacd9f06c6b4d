"What a fit remembers: a run that was stopped anywhere ends like one that nobody stopped, whatever its callbacks and its model hold."
import enum, os, random, re, shutil, signal, time, warnings
from collections import defaultdict, deque
from copy import deepcopy
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import MethodType
import filelock, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import StochasticDepth
from fastai.vision.all import (AvgMetric, CSVLogger, Callback, DataLoader, DataLoaders, Datasets, EarlyStoppingCallback,
                               GradientAccumulation, ImageDataLoaders, ItemGetter, Lambda, Learner, Normalize, PadMode, RandomResizedCrop,
                               ReduceLROnPlateau, Resize, ResizeMethod, SGD, SaveModelCallback, TensorImage, Transform, accuracy, aug_transforms,
                               imagenet_stats, load_learner, noop, set_seed)
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import BaseLoss, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.text.data import LMDataLoader
from run_notebooks import forked
from trainings import Boom, StopAt, weights
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import EvalSets
from feature_erosion.learner import erosion_learner   # with it, `fit_phases`
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import PerPhase, Phase
from feature_erosion.runs.keys import Untold, describe, differences, hash_tensor
from feature_erosion.loaders import subset_dl
from feature_erosion.runs.resume import KeepRun, _values, fit_settings
from feature_erosion.runs.store import RunStore, plain, unpack

class Train(Callback):
    "A callback that only trains, and may steer by what it remembers"
    run_valid = False
    def scale(self, by): self.learn.loss_grad = self.loss_grad*by

class Average(Train):
    def before_fit(self): self.avg = deepcopy(self.model)
    def after_batch(self):
        for a,p in zip(self.avg.parameters(), self.model.parameters()): a.data.lerp_(p.data, .1)

class LateAverage(Average):
    def before_fit(self): pass
    def after_batch(self):
        if not hasattr(self, 'avg'): self.avg = deepcopy(self.model)
        super().after_batch()

class Swa(Train):
    def before_fit(self): self.avg = AveragedModel(self.model)
    def after_batch(self): self.avg.update_parameters(self.model)

class Shadow(Train):
    def before_fit(self): self.avg = {k:v.detach().clone() for k,v in self.model.named_parameters()}
    def after_batch(self):
        for k,p in self.model.named_parameters(): self.avg[k].lerp_(p.detach(), .1)

class Queue(Train):
    def before_fit(self): self.losses = deque(maxlen=3)
    def after_loss(self):
        self.losses.append(self.loss.item())
        self.scale(1+.1*len(self.losses)*np.mean(self.losses))

class Counts(Train):
    def before_fit(self): self.seen = defaultdict(int)
    def after_loss(self):
        for y in self.yb[0].tolist(): self.seen[y] += 1
        self.scale(1/(1+.01*self.seen[3]))

class Set(Train):
    def before_fit(self): self.seen = set()
    def after_loss(self):
        self.seen.add(int(self.yb[0][0]))
        self.scale(1/len(self.seen))

class Generator(Train):
    def before_fit(self): self.rng = np.random.default_rng(3)
    def after_loss(self): self.scale(self.rng.random())

class TorchGenerator(Train):
    def before_fit(self): self.rng = torch.Generator().manual_seed(3)
    def after_loss(self): self.scale(torch.rand(1, generator=self.rng).item())

class Setting(Train):
    "Changes a setting of its own while it runs"
    def __init__(self, factor=1.): self.factor = factor
    def after_loss(self):
        self.scale(self.factor)
        self.factor *= .95

class Helper:
    def __init__(self): self.n,self.history = 0,[]

class WithHelper(Train):
    def __init__(self): self.helper = Helper()
    def after_loss(self):
        self.helper.n += 1
        self.helper.history.append((self.helper.n, np.float32(self.loss.item())))
        self.scale(1/(1+.1*self.helper.n))

class OnLearner(Train):
    def before_fit(self): self.learn.steps_taken = 0
    def after_loss(self):
        self.learn.steps_taken += 1
        self.scale(1/(1+.1*self.learn.steps_taken))

class Own(Train):
    def before_fit(self): self._n = 0
    def after_loss(self):
        self._n += 1
        self.scale(1/self._n)
    def state_dict(self): return dict(n=self._n)
    def load_state_dict(self, s): self._n = s['n']

Colour = enum.Enum('Colour', 'red blue')

class Mode(str, enum.Enum):
    slow = 's'
    fast = 'f'

class Stages(Train):
    "Whose behaviour hangs on members of enumerations"
    def __init__(self): self.mode,self.level,self.flags = Mode.slow,None,re.I
    def after_loss(self):
        if self.learn.train_iter==2: self.mode,self.level,self.flags = Mode.fast,signal.SIGTERM,re.I|re.M
        self.scale(.5 if self.mode=='f' and self.level is signal.SIGTERM and self.flags & re.M else 1.)

class Perturb(Train):
    "A tensor of its own, trained by an optimiser of its own"
    def before_fit(self):
        self.delta = torch.zeros(3,16,16, requires_grad=True)
        self.own_opt = torch.optim.SGD([self.delta], lr=.5, momentum=.9)
    def before_batch(self): self.learn.xb = (self.xb[0]+self.delta,)
    def after_backward(self): self.own_opt.step(), self.own_opt.zero_grad()

class Freeze(Train):
    "Thaws the first layer on the way"
    def before_fit(self): self.model[1].requires_grad_(False)
    def before_batch(self):
        if self.learn.train_iter==6: self.model[1].requires_grad_(True)

class Centre(nn.Module):
    "A buffer that is not in the state dict, a causal mask, and a number that is counted"
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(32), persistent=False)
        self.register_buffer('mask', torch.full((4,4), -float('inf')).triu(1))
        self.calls = 0
    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), .1)
            self.calls += 1
        return (x-self.mean)/(1+.01*self.calls)

class Skip(nn.Module):
    "A layer that is left out at random: its gradients are none at first, and zero later"
    def __init__(self):
        super().__init__()
        self.lin,self.drop = nn.Linear(32,32),StochasticDepth(.5, 'batch')
    def forward(self, x): return x+self.drop(self.lin(x)) if torch.rand(1)>.3 else x

def mlp(*layers): return nn.Sequential(nn.Flatten(), nn.Linear(768,32), *layers, nn.ReLU(), nn.Linear(32,10))

def fit(folder, cbs=(), layers=(), stop=None, recorder=None, name='a', **kw):
    set_seed(0)
    dls = digits_dls(n=128, n_valid=40, bs=32)
    learn = Learner(dls, mlp(*(l() for l in layers)), opt_func=lambda p, **k: SGD(p, mom=.9, **k), metrics=accuracy, lr=.05,
                    path=folder)
    if recorder: learn.recorder.train_metrics = True
    keep = KeepRun(RunStore(folder).run(name), **{'minutes':0, **kw})
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('pretrain', 2, dls), Phase('erode', 2, dls.inject(ColorSquare(4)))],
                         cbs=[keep, StopAt(stop), *(c() for c in cbs)])
    return learn

class Grown(nn.Module):
    "A buffer that grows, one that is made late, and one of each kind that a `state_dict` leaves out"
    def __init__(self):
        super().__init__()
        for k in 'kept','left':
            self.register_buffer(f'{k}_seen', torch.zeros(0), k=='kept')
            self.register_buffer(f'{k}_mean', None, k=='kept')
    def forward(self, x):
        if self.training:
            for k in 'kept','left':
                old,now = getattr(self, f'{k}_mean'),x.detach().mean(0)
                setattr(self, f'{k}_seen', torch.cat([getattr(self, f'{k}_seen'), now.mean()[None]]))
                setattr(self, f'{k}_mean', now if old is None else .9*old+.1*now)
        if self.kept_mean is None: return x
        return x-.1*self.kept_mean-.1*self.left_mean+.1*self.kept_seen.mean()+.1*self.left_seen.mean()

class Extra(nn.Module):
    "Keeps what it has counted in an extra state, which is no tensor"
    n = 0
    def forward(self, x):
        self.n += self.training
        return x*(1+.01*self.n)
    def get_extra_state(self): return dict(n=self.n)
    def set_extra_state(self, state): self.n = state['n']

cases = dict(averages=dict(cbs=[Average, LateAverage, Swa, Shadow, SaveModelCallback]),
             numbers=dict(cbs=[Queue, Counts, Set, Setting, WithHelper, OnLearner, Own, Stages]),
             generators=dict(cbs=[Generator, TorchGenerator, lambda: MixUp(.4)]), cutmix=dict(cbs=[CutMix]),
             model=dict(cbs=[Perturb, Freeze], layers=[Centre, Skip, Skip]),
             buffers=dict(layers=[Grown, Extra]),
             trackers=dict(recorder=True, cbs=[lambda: GradientAccumulation(48), lambda: EarlyStoppingCallback(patience=9),
                                               lambda: ReduceLROnPlateau(patience=1)]))

@pytest.mark.parametrize('name', cases)
def test_stopped_and_on(tmp_path, name):
    "In the middle of an epoch of the first phase, and in the second phase; weights, what the callbacks hold, and history"
    seen = []
    def keep(o):
        def make():
            seen.append(o())
            return seen[-1]
        return make
    kw = dict(cases[name], cbs=[keep(o) for o in cases[name].get('cbs', [])], strict=True)
    whole = fit(tmp_path/'whole', **kw)
    held = list(seen)
    for at in (3, 10):
        with pytest.raises(Boom): fit(tmp_path/'cut', stop=at, **kw)
    seen.clear()
    again = fit(tmp_path/'cut', **kw)
    for a,b in zip(held, seen, strict=True):
        for k in {'avg','losses','seen','factor','_n'} & set(vars(a)): assert same(vars(a)[k], vars(b)[k]), (type(a).__name__, k)
    assert same(whole.model, again.model)
    assert all(torch.equal(a, b) for a,b in zip(whole.model.buffers(), again.model.buffers(), strict=True))
    assert whole.recorder.history.equals(again.recorder.history) and whole.recorder.lrs==again.recorder.lrs

def same(a, b):
    if isinstance(a, nn.Module): return same(a.state_dict(), b.state_dict())
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a==b

class Holds(Train):
    def before_fit(self): self.file = open(os.devnull)

class MakesLate(Train):
    def after_batch(self): self.lin = nn.Linear(1,1)

def test_what_cannot_be_kept_is_named_before_training(tmp_path):
    with pytest.warns(UserWarning, match='Holds.file is a TextIOWrapper: cannot be kept; give Holds state_dict/load_state_dict'):
        fit(tmp_path/'a', [Holds])
    assert RunStore(tmp_path/'a')['a'].status=='finished'
    with pytest.raises(ValueError, match='Holds.file is a TextIOWrapper'): fit(tmp_path/'b', [Holds], strict=True)
    with pytest.warns(UserWarning, match='MakesLate.lin was made during training'): fit(tmp_path/'c', [MakesLate])

def test_loggers_only_look_on(tmp_path):
    "TensorBoard's writer is no state: no word about it, and it may come and go"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    logger = lambda: TensorBoardCallback(tmp_path/'logs', trace_model=False, log_preds=False)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*not kept.*')
        with pytest.raises(Boom): fit(tmp_path, [logger], stop=3)
        fit(tmp_path, strict=True)
    assert RunStore(tmp_path)['a'].status=='finished'

def test_infinite_buffers_are_no_fault(tmp_path):
    "A causal mask is made of -inf: checkpoints are written inside a phase all the same"
    with pytest.raises(Boom): fit(tmp_path, layers=[Centre], stop=3)
    newest = max((tmp_path/'a'/'last').iterdir(), key=lambda p: int(p.name))
    assert unpack(newest)[1]['train_iter']==2

def test_csv_logger_keeps_its_rows(tmp_path):
    import pandas as pd
    rows = lambda d: pd.read_csv(d/'history.csv').drop(columns='time')
    fit(tmp_path/'whole', [CSVLogger])
    for at in (6, 13):
        with pytest.raises(Boom): fit(tmp_path/'cut', [CSVLogger], stop=at)
    fit(tmp_path/'cut', [CSVLogger])
    assert rows(tmp_path/'cut').equals(rows(tmp_path/'whole')) and len(rows(tmp_path/'cut'))==4
    fit(tmp_path/'cut', [CSVLogger])   # finished: loaded
    assert rows(tmp_path/'cut').equals(rows(tmp_path/'whole'))

def test_a_log_that_others_append_to(tmp_path):
    "Loading a run, or going on with it, takes no row from them"
    def go(name, stop=None):
        learn = Learner(digits_dls(n=64, n_valid=40, bs=32), mlp(), opt_func=SGD, metrics=accuracy, path=tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, cbs=[CSVLogger(append=True), KeepRun(RunStore(tmp_path/'runs').run(name), minutes=0), StopAt(stop)])
    def epochs(): return [l.partition(',')[0] for l in (tmp_path/'history.csv').read_text().splitlines()]
    go('a'), go('b')
    whole = (tmp_path/'history.csv').read_text()
    go('a')
    assert (tmp_path/'history.csv').read_text()==whole and epochs()==['epoch','0','1']*2
    with pytest.raises(Boom): go('c', 3)   # in its second epoch
    go('d'), go('c')
    assert (tmp_path/'history.csv').read_text().startswith(whole) and epochs()[6:]==['epoch','0','epoch','0','1','1']

@pytest.mark.parametrize('wrap', [False, True])
def test_the_best_weights_of_another_run_are_not_taken(tmp_path, wrap):
    "Runs may share the file of a `SaveModelCallback`, which loads it at the end; or it may be gone"
    make = lambda: SaveModelCallback('accuracy', comp=np.less)   # the first epoch is the best: nothing is saved later
    cbs = [lambda: PerPhase(make()) if wrap else make()]
    def at(name, **kw): return fit(tmp_path, cbs, name=name, minutes=99, **kw)
    whole = fit(tmp_path/'elsewhere', cbs, minutes=99)
    with pytest.raises(Boom): at('a', stop=14)
    assert not alike(at('b', layers=[Late]), whole)
    assert alike(at('a'), whole)
    for p in (tmp_path/'models').iterdir(): p.unlink()
    assert alike(at('a'), whole)   # finished, and loaded

def alike(a, b): return same(a.model.state_dict(), b.model.state_dict())

class Late(nn.Identity):
    "Changes how a network is trained, not what it holds"
    def forward(self, x): return x*.5

class Swaps(Train):
    def __init__(self): self.f = self.one
    def one(self): return 1.
    def two(self): return .5
    def after_loss(self):
        if self.learn.train_iter==1: self.f = self.two
        self.scale(self.f())

def test_code_that_was_exchanged_is_named(tmp_path):
    with pytest.raises(Boom): fit(tmp_path, [Swaps], stop=3)
    with pytest.warns(UserWarning, match='swaps.f was two when it was saved, and is one now: code is not kept'):
        fit(tmp_path, [Swaps])

def test_a_finished_run_says_so(tmp_path, capsys):
    fit(tmp_path)
    capsys.readouterr()
    fit(tmp_path)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said)==1 and "run 'a' is finished and was loaded: made 20" in said[0] and 'feature_erosion' in said[0]
    assert "delete('a')" in said[0]

class Validates(Callback):
    run_valid,passive = False,True
    def after_batch(self):
        if self.learn.iter==1: self.learn.validate()

def test_a_validation_within_a_fit_ends_no_run(tmp_path, capsys):
    "It is kept to the end, goes on after the last batch, and its weights are the same"
    whole,run = fit(tmp_path/'whole', [Validates]),RunStore(tmp_path/'whole')['a']
    assert run.status=='finished' and len(run.history)==4
    with pytest.raises(Boom): fit(tmp_path/'cut', [Validates], stop=11)
    again = fit(tmp_path/'cut', [Validates])
    assert 'goes on after 10 iterations' in capsys.readouterr().out
    assert all(torch.equal(a, b) for a,b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))

def wait_for_another(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background job, and its children, would ignore it
    def acquire(self, *a, old=filelock.FileLock.acquire, **kw):
        if kw.get('timeout')==-1: (folder/'waiting').touch()
        return old(self, *a, **kw)
    filelock.FileLock.acquire = acquire
    fit(folder, wait=True)

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_are_obeyed_while_waiting(tmp_path, number):
    "For another process that works on the run"
    run = RunStore(tmp_path).run('a')
    with run.lock():
        p = forked(wait_for_another, tmp_path)
        p.start()
        while not (tmp_path/'waiting').exists() and p.is_alive(): time.sleep(.02)
        while p.is_alive():   # until it is obeyed
            os.kill(p.pid, number)
            p.join(.2)
    assert (tmp_path/'waiting').exists() and p.exitcode!=0 and run.status=='new'

def test_a_run_of_somebody_else_is_not_called_killed(tmp_path, monkeypatch):
    "Its lock may only be read"
    run = RunStore(tmp_path).run('a')
    run.update(status='running')
    def denied(self, *a, **k): raise PermissionError(13, 'Permission denied')
    with run.lock():
        other = RunStore(tmp_path)['a']
        monkeypatch.setattr(filelock.FileLock, 'acquire', denied)
        assert other.status=='running'
    assert RunStore(tmp_path)['a'].status=='killed'

@pytest.fixture(scope='module')
def trained(tmp_path_factory): return fit(tmp_path_factory.mktemp('trained'))

@pytest.mark.parametrize('phase', ['start','pretrain','erode'])
def test_export(trained, phase):
    "After any phase: small, works elsewhere, and leaves the Learner as it was"
    learn = trained
    state = {k:v.clone() for k,v in learn.model.state_dict().items()}
    names,injected,dls = list(learn.snapshots),learn.injected.value,learn.dls
    with learn.at_phase(phase):
        learn.export('x.pkl')
        want = learn.model(torch.ones(1,3,16,16))
    f = learn.path/'x.pkl'
    assert f.stat().st_size<4*sum(p.numel() for p in learn.model.parameters())+60_000
    new = load_learner(f)
    assert torch.equal(new.model(torch.ones(1,3,16,16)), want) and not new.snapshots and len(new.dls.train_ds)==0
    assert new.injected.value is None
    assert new.predict(learn.dls.valid_ds.x[0].numpy())[0] in map(str, range(10))
    assert list(learn.snapshots)==names and learn.injected.value is injected and learn.dls is dls
    assert all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items())
    learn.validate()

# fastai's own ways: folders of images, random transforms, `fine_tune`
@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    path,rng = tmp_path_factory.mktemp('photos'),np.random.default_rng(0)
    for i in range(36):
        f = path/('train' if i<24 else 'valid')/'ab'[i%2]/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40,48,3), dtype=np.uint8)).save(f)
    return path

def loaders(path, item_tfms=None, bs=8, **kw):
    return ImageDataLoaders.from_folder(path, valid='valid', item_tfms=item_tfms or Resize(16), bs=bs, num_workers=0,
                                        batch_tfms=[*aug_transforms(**kw), Normalize.from_stats(*imagenet_stats)])

@pytest.mark.works(kind='loaders', what='random transforms of fastai in a kept run',
                   how='work: what they were made with is a setting, what they have drawn is not')
def test_what_a_transform_has_drawn_is_no_setting(photos):
    dls,other = loaders(photos, RandomResizedCrop(16)),loaders(photos, RandomResizedCrop(16))
    before = describe(dls.after_item),describe(dls.after_batch)
    for dl in dls.loaders: list(dl)
    assert (describe(dls.after_item),describe(dls.after_batch))==before==(describe(other.after_item),describe(other.after_batch))

@pytest.mark.parametrize('kw',
                         [dict(max_rotate=20.), dict(max_lighting=.3), dict(max_warp=.1), dict(max_zoom=1.2), dict(p_affine=.5),
                          dict(p_lighting=.5), dict(do_flip=False),
                                dict(pad_mode=PadMode.Zeros), dict(item_tfms=Resize(18)),
                                dict(item_tfms=Resize(16, ResizeMethod.Squish)), dict(item_tfms=RandomResizedCrop(16))],
                                ids=list('abcdefghijk'))
def test_what_a_transform_was_made_with_is_a_setting(photos, kw):
    a,b = ({k:describe(getattr(d, k)) for k in ('after_item','after_batch')} for d in (loaders(photos), loaders(photos, **kw)))
    assert differences(a, b)

class StopAfter(Callback):
    "Stop in the epoch after so many, counted over all fits"
    passive,run_valid,order = True,False,2000
    def __init__(self, n): self.n = n
    def before_batch(self):
        self.n -= 1
        if self.n<0: raise Boom('stopped')

@pytest.mark.parametrize('table', [False, True])
def test_another_random_split_is_another_run(photos, tmp_path, table):
    "It would be trained on what it was validated on; where the files are does not matter"
    def train(folder, seed, stop=None):
        kw = dict(valid_pct=.3, seed=seed, item_tfms=Resize(16), bs=8, num_workers=0)
        names = pd.DataFrame(dict(name=[str(p.relative_to(photos)) for p in sorted(photos.rglob('*.png'))], label=['a','b']*18))
        dls = ImageDataLoaders.from_df(names, folder, **kw) if table else ImageDataLoaders.from_folder(folder, **kw)
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,2)), metrics=accuracy, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KeepRun(run, minutes=0), StopAt(stop)])
    run = RunStore(tmp_path).run('a')
    shutil.copytree(photos, here := tmp_path/'here')
    with pytest.raises(Boom): train(here, 1, 2)
    with pytest.raises(ValueError, match='other settings: samples.0.train: was'): train(here, 2)
    train(here.rename(tmp_path/'there'), 1)
    assert run.status=='finished'

class Brighter(Transform):
    "Holds its setting, a count and what it has made in private"
    def __init__(self, by): self._by,self._n,self._made = by,0,{}
    def encodes(self, x:TensorImage):
        self._n += 1
        return self._made.setdefault('x', x*self._by)

def test_what_is_private_is_a_setting_if_only_init_sets_it():
    a,b = Brighter(1.5),Brighter(1.5)
    before = describe(a)
    a(TensorImage(torch.ones(3,2,2)))
    assert a._n==1 and a._made and describe(a)==before==describe(b)!=describe(Brighter(2.))
    assert differences(before, describe(Brighter(2.)))==['_by: was 1.5, is 2.0']

@pytest.mark.works(kind='callbacks', what='`KeepRun` in `fine_tune`, on data with `aug_transforms`',
                   how='works: each of its two fits has a run of its own, and goes on in the middle')
@pytest.mark.parametrize('cut', [2,4,8], ids=['frozen','first','second'])
def test_fine_tune_goes_on(photos, tmp_path, cut):
    "Both of its fits, each with a run of its own; the random state in which loaders were made again does not matter"
    def tuned(folder, *more, seed=1):
        random.seed(seed)
        dls = loaders(photos)
        set_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3,4,3,2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                                            nn.Flatten()), nn.Linear(16,2))
        learn = Learner(dls, model, metrics=accuracy, path=folder, splitter=lambda m: [list(o.parameters()) for o in m])
        with learn.no_bar(), learn.no_logging():
            learn.fine_tune(2, freeze_epochs=1, cbs=[KeepRun(RunStore(folder).run('a'), minutes=0, strict=True), *more])
        return learn
    whole = tuned(tmp_path/'whole')
    with pytest.raises(Boom): tuned(tmp_path/'cut', StopAfter(cut))
    again = tuned(tmp_path/'cut', seed=2)
    assert all(torch.equal(a, b) for a,b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))
    assert whole.recorder.history.equals(again.recorder.history)
    runs = RunStore(tmp_path/'cut')
    assert {o.name:o.status for o in runs}=={'a':'finished', 'a, fit 2':'finished'}
    assert len(runs['a'].history)==1 and len(runs['a, fit 2'].history)==2

def test_a_later_fit_of_a_run_with_the_longest_name(tmp_path):
    "Two of them that differ in their last letter only stay apart"
    store,long = RunStore(tmp_path),'n'*199
    for end in 'ab':
        learn = Learner(digits_dls(n=32, n_valid=40, bs=32), mlp(), opt_func=SGD, lr=.05, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, cbs=KeepRun(store.run(long+end)))
    assert len(store)==4 and all(o.status=='finished' and len(o.history)==1 for o in store)

def plain_fit(run, stop=None, n=3, cbs=(), metrics=accuracy, dls=None, loss=None, **kw):
    set_seed(0)
    learn = Learner(dls or digits_dls(n=128, n_valid=40, bs=32), mlp(), opt_func=SGD, metrics=metrics, lr=.05,
                    path=run.path.parent, loss_func=loss)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=[KeepRun(run, minutes=0), StopAt(stop), *cbs], **kw)
    return learn

def forget(run, *names):
    "What an earlier version would have written"
    def less(o):
        if isinstance(o, list): return [less(v) for v in o]
        return {k:less(v) for k,v in o.items() if k not in names} if isinstance(o, dict) else o
    run.update(fit=less(run.info['fit']))

@pytest.mark.parametrize('was,now,says',
                         [(dict(lr=.1),dict(lr=.01),'hypers.0.lr: was 0.1, is 0.01'),
                          (dict(wd=.1),dict(wd=0.),'hypers.0.wd: was 0.1, is 0.0'),
                          (dict(lr=.1),{},'hypers.0.lr: was 0.1, is 0.05')])
def test_what_fit_is_called_with_is_a_setting(tmp_path, was, now, says):
    run = RunStore(tmp_path).run('a')
    with pytest.raises(Boom): plain_fit(run, 5, **was)
    with pytest.raises(ValueError, match=f'other settings: {says}'): plain_fit(run, **now)
    forget(run, 'hypers')
    plain_fit(run, **was)
    assert run.status=='finished'

def test_numbers_of_numpy_are_settings_like_others(tmp_path):
    "A length, a batch size and the iterations of an evaluation as `np.arange` and a set give them"
    dls,run = digits_dls(n=64, n_valid=20, bs=np.int64(32)),RunStore(tmp_path).run('a')
    def train(n, at, *cbs):
        set_seed(0)
        learn = Learner(dls, mlp(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
        with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=[EvalSets({'clean':dls.valid}, at=at), KeepRun(run), *cbs])
        return learn.recorder.evals.query("when=='iter'").iter.tolist()
    with pytest.raises(Boom): train(np.int64(2), np.array([0,3]), StopAt(3))
    assert train(2, [0,3])==train(np.int64(2), {3,0})==[0,3]
    assert run.info['fit']['epochs']==2 and run.info['fit']['evals'][0]['at']==[0,3] and run.info['fit']['data']['bs']==32

@pytest.mark.parametrize('make', [MixUp, CutMix])
def test_an_argument_that_a_callback_holds_elsewhere_is_a_setting(tmp_path, make):
    run = RunStore(tmp_path).run('a')
    with pytest.raises(Boom): plain_fit(run, 5, cbs=[make(.4)])
    with pytest.raises(ValueError, match='other settings: callbacks.[A-Za-z]*.made.distrib.is.concentration'):
        plain_fit(run, cbs=[make(8.)])
    forget(run, 'made')
    plain_fit(run, cbs=[make(.4)])
    assert run.status=='finished'

class StopAfterPhase(Callback):
    order,passive = 1001,True   # after `KeepRun`
    def __init__(self, phase): self.phase = phase
    def after_phase(self):
        if self.learn.phase.name==self.phase: raise Boom('here')

@pytest.mark.parametrize('last', ['a','b'])
def test_stopped_between_the_last_phase_and_the_end(tmp_path, last):
    "A phase that ends early leaves epochs that nothing is done in: MixUp would miss the beginning of training"
    def train(name, *cbs):
        set_seed(0)
        dls = digits_dls(n=128, n_valid=40, bs=32)
        learn = Learner(dls, mlp(), opt_func=SGD, metrics=accuracy, lr=.05, path=tmp_path)
        phases = [Phase(k, 3, until=lambda l: True) for k in 'ab']
        with learn.no_bar(), learn.no_logging(): learn.fit_phases(phases, cbs=[MixUp(), *cbs], run=RunStore(tmp_path).run(name))
        return learn
    with pytest.raises(Boom): train('x', StopAfterPhase(last))
    a,b = train('x'),train('y')
    assert [len(o.recorder.history) for o in (a,b)]==[2,2] and RunStore(tmp_path).run('x').status=='finished'
    assert all(torch.equal(*o) for o in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert a.recorder.history.equals(b.recorder.history) and not isinstance(a.loss_func, MethodType)

class Row(AvgMetric):
    "A metric that has a number for each epoch, by a count of its own"
    def __init__(self, name, by): self._name,self.by,self.n = name,by,0
    name = property(lambda self: self._name)
    def reset(self): self.n += 1
    def accumulate(self, learn): pass
    value = property(lambda self: self.by*self.n)

def test_metrics_in_another_order(tmp_path):
    "Numbers and states go by name, also for a callback that watches one; a new metric has none for the epochs that were done"
    one,two = (lambda: Row('one', 1)),(lambda: Row('two', -10))
    watch = EarlyStoppingCallback('two', comp=np.less, patience=9)
    run = RunStore(tmp_path).run('a')
    with pytest.raises(Boom): plain_fit(run, 6, metrics=[one(), two()], cbs=[watch])
    learn = plain_fit(run, metrics=[Row('more', 100), two(), one()],
                      cbs=[watch := EarlyStoppingCallback('two', comp=np.less, patience=9)])
    h = learn.recorder.history
    assert h.one.tolist()==[1,2,3] and h.two.tolist()==[-10,-20,-30] and h.more[1:].tolist()==[100,200] and np.isnan(h.more[0])
    assert run.history[['one','two']].equals(h[['one','two']].reset_index(drop=True).rename_axis('epoch')) and watch.best==-30
    assert plain_fit(run, metrics=[two(), one()], cbs=[watch]).recorder.history.one.tolist()==[1,2,3]   # finished: loaded

@pytest.mark.parametrize('kw,says',
                         [(dict(shuffle=False),'data.shuffle: was True, is False'),
                          (dict(drop_last=True),'data.drop_last: was False, is True')])
def test_how_batches_are_drawn_is_a_setting(photos, tmp_path, kw, says):
    run,model = RunStore(tmp_path).run('a'),lambda: nn.Sequential(nn.Flatten(), nn.Linear(768,2))
    def train(stop=None, **kw):
        set_seed(0)
        dls = ImageDataLoaders.from_folder(photos, valid='valid', item_tfms=Resize(16), bs=8, num_workers=0)
        if kw: dls = DataLoaders(dls.train.new(**{'drop_last':False, 'shuffle':True, **kw}), dls.valid)
        learn = Learner(dls, model(), metrics=accuracy, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KeepRun(run, minutes=0), StopAt(stop)])
    with pytest.raises(Boom): train(2, shuffle=True)
    with pytest.raises(ValueError, match=f'other settings: {says}'): train(**kw)
    forget(run, 'shuffle', 'drop_last')
    train(shuffle=True)
    assert run.status=='finished'

@pytest.mark.parametrize('old', [False, True])
def test_the_number_of_workers_is_no_setting(tmp_path, monkeypatch, old):
    "Of a loader without pipelines, too, which an earlier version described as a whole"
    items = list(zip(torch.randn(64,768), torch.arange(64)%10))
    def dls(n, seed=0): return DataLoaders(*(DataLoader(items, bs=16, shuffle=t, num_workers=n*t) for t in (True,False)))
    run = RunStore(tmp_path).run('a')
    with pytest.raises(Boom): plain_fit(run, 2, 1, dls=dls(0), loss=nn.CrossEntropyLoss())
    if old:
        told = run.info['fit']
        told['data']['transforms'] = [describe(getattr(dls(0).train, o)) for o in ('after_item','before_batch','after_batch')]
        run.update(fit=told)
    plain_fit(run, n=1, dls=dls(1), loss=nn.CrossEntropyLoss())
    assert run.status=='finished'

def test_numbers_of_a_kind_of_their_own_become_plain():
    class Own(float): pass
    class Level(int): pass
    got = plain([Own(.5), Level(2), np.float64(.25), True])
    assert got==[.5,2,.25,True] and [type(o) for o in got]==[float,int,float,bool]
    assert [type(o) for o in plain([Mode.slow, {Mode.slow:1}])]==[str,dict] and f'{plain(Mode.slow)}'==Mode.slow.value

arrays = [np.array(['a','bc']), np.arange(3)[::-1], np.arange(3, dtype='>i4'), np.array(['2020-01-01'], 'M8[D]'),
          np.array([b'x']), np.zeros((2,0)), np.array(.5)]

class Arrays(Train):
    "Holds arrays that PyTorch has no type for"
    def __init__(self, given): self.given = given
    def before_fit(self): self.held,self.sparse = [o.copy() for o in arrays],torch.zeros(2,2).to_sparse()
    def after_batch(self): self.held,self.sparse = [o[:1] if o.ndim else o for o in self.held],torch.eye(2).to_sparse()

def test_arrays_of_any_kind(tmp_path):
    "As settings, and as the state of a callback"
    described = [describe(o) for o in arrays]
    assert len(set(described))==len(arrays) and described[1]==describe(arrays[1].copy())==describe(torch.tensor([2,1,0]))
    assert described[2]==describe(np.arange(3, dtype='i4'))
    assert describe(np.array([1,'a'], object))==[1,'a'] and describe(torch.eye(2).to_sparse())==describe(np.eye(2, dtype='f4'))
    with pytest.raises(Untold): hash_tensor(np.array([1,None]))
    run = RunStore(tmp_path).run('a')
    with pytest.raises(Boom): plain_fit(run, 5, cbs=[Arrays(arrays)])
    with pytest.raises(ValueError, match='other settings: callbacks.[A-Za-z]*.given.0: was'):
        plain_fit(run, cbs=[Arrays([arrays[0][::-1], *arrays[1:]])])
    plain_fit(run, cbs=[cb := Arrays(arrays)])
    assert all(a.dtype==b.dtype and np.array_equal(a, b) for a,b in zip(cb.held, [o[:1] if o.ndim else o for o in arrays]))
    assert cb.sparse.to_dense().equal(torch.eye(2))

@pytest.mark.parametrize('dtype', ['?','u1','i1','i2','i4','i8','f2','f4','f8','c8','c16'])
@pytest.mark.parametrize('shape', [(), (0,), (6,), (2,3)])
def test_arrays_that_old_runs_name(dtype, shape):
    "As they were hashed through PyTorch, in either layout"
    a = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    for o in (a, a.T, np.asfortranarray(a)): assert hash_tensor(o)==hash_tensor(torch.as_tensor(o))

@pytest.mark.parametrize('a,b',
                         [(slice(1e-4,1e-2),slice(1e-2,1.)), (Colour.red,Colour.blue), (b'a',b'b'), (Decimal(1),Decimal(2)),
                          (date(2020,1,1),date(2021,1,1))])
def test_values_without_attributes_are_settings(a, b):
    "Among them a discriminative learning rate"
    assert differences(dict(x=describe(a)), dict(x=describe(b))) and not differences(dict(x=describe(a)), dict(x=describe(a)))

def test_a_function_with_a_variable_that_was_not_set():
    def until(patience):
        if patience: best = patience
        return lambda learn: patience>0 and best>1
    assert describe(until(0))==describe(until(0))!=describe(until(2))

@pytest.mark.parametrize('run', ['mine', Path('mine'), RunStore('runs')], ids=['name','path','store'])
def test_a_run_is_asked_for(tmp_path, monkeypatch, run):
    "A name, a path or a store in place of a run"
    monkeypatch.chdir(tmp_path)
    learn = erosion_learner(digits_dls(n=64, n_valid=40), nn.Sequential(nn.Flatten(), nn.Linear(768,10)))
    with pytest.raises(ValueError, match="run=.*must be a run of a store"): learn.fit_phases(Phase('a', 1), run=run)
    with pytest.raises(ValueError, match="after=.*must be a run of a store"): KeepRun(RunStore('runs').run('mine'), after=run)
    assert [o.name for o in tmp_path.iterdir()]==['runs']   # made by the line above

def test_a_run_is_kept_in_one_way(tmp_path):
    "A `KeepRun` of one's own is taken for the same run; for another run, or without `after`, one of the two would be ignored"
    store,dls = RunStore(tmp_path),digits_dls(n=64, n_valid=40)
    def fit(*names, run, **kw):
        set_seed(0)
        learn = erosion_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10)))
        with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase(o, 1) for o in names], run=run, **kw)
    fit('a', run=store.run('base'))
    fit('a', run=store.run('both'), cbs=KeepRun(store.run('both'), minutes=2))
    for kw in (dict(cbs=KeepRun(store.run('other'))), dict(cbs=KeepRun(store.run('new')), after=store['base'])):
        with pytest.raises(ValueError, match="the callbacks have a `KeepRun` of their own"):
            fit('a', 'b', run=store.run('new'), **kw)
    assert [store[o].status for o in ('both','new','other')]==['finished','new','new']

class ByEpoch(torch.utils.data.Sampler):
    "Counts its epochs, as PyTorch's `DistributedSampler` does, but by itself"
    def __init__(self, n): self.n,self.epoch = n,0
    def __len__(self): return self.n
    def __iter__(self):
        self.epoch += 1
        return iter(np.random.RandomState(self.epoch).permutation(self.n).tolist())

class OwnBatches(torch.utils.data.Sampler):
    "Draws whole batches with a generator of its own"
    def __init__(self, n, bs): self.n,self.bs,self.rng = n,bs,np.random.RandomState(0)
    def __len__(self): return self.n//self.bs
    def __iter__(self): return iter(self.rng.permutation(self.n).reshape(-1, self.bs).tolist())

class Reshuffled(torch.utils.data.Sampler):
    "Shuffles the order of the epoch before"
    def __init__(self, order): self.order = order
    def __len__(self): return len(self.order)
    def __iter__(self):
        if isinstance(self.order, torch.Tensor): self.order[:] = self.order[torch.randperm(len(self.order))]
        else: (random if isinstance(self.order, list) else np.random).shuffle(self.order)
        return iter([int(i) for i in self.order])

class OwnOrder(DataLoader):
    def get_idxs(self):
        if not hasattr(self, 'order'): self.order = list(range(self.n))
        if self.shuffle: random.shuffle(self.order)
        return self.order

class Counted(torch.utils.data.Dataset):
    "Each sample is another one each time it is read"
    def __init__(self, data): self.data,self.read = data,0
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        self.read += 1
        x,y = self.data[i]
        return x+self.read%7,y

Torch = torch.utils.data.DataLoader
few = torch.utils.data.TensorDataset(torch.rand(64, 768, generator=torch.Generator().manual_seed(0)), torch.arange(64)%10)

def test_texts_of_a_language_model_are_shuffled_on(tmp_path):
    "Each epoch shuffles the order of the one before it"
    texts = [torch.randint(0, 20, (n,), generator=torch.Generator().manual_seed(n)) for n in range(8,40)]
    def train(folder, stop=None):
        set_seed(0)
        dls = DataLoaders(*(LMDataLoader(texts, bs=4, seq_len=8, shuffle=s, num_workers=0) for s in (True,False)))
        learn = Learner(dls, nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 20)), opt_func=SGD, lr=.5,
                        loss_func=CrossEntropyLossFlat(), path=folder)
        with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=[KeepRun(RunStore(folder).run('a'), minutes=0), StopAt(stop)])
        return learn
    whole = train(tmp_path/'whole')
    n = whole.train_iter//3
    for at in (n+2, 2*n+1):
        with pytest.raises(Boom): train(tmp_path, at)
    assert all(torch.equal(a, b) for a,b in zip(train(tmp_path).model.parameters(), whole.model.parameters()))

@pytest.mark.parametrize('make',
                         [lambda: Torch(few, 16, sampler=ByEpoch(64)), lambda: Torch(few, batch_sampler=OwnBatches(64, 16)),
    lambda: Torch(few, batch_sampler=torch.utils.data.BatchSampler(ByEpoch(64), 16, False)),
    lambda: DataLoader(Counted(few), 16, shuffle=True, num_workers=0),
    lambda: OwnOrder(few, 16, shuffle=True, num_workers=0),
    *[lambda f=f: Torch(few, 16, sampler=Reshuffled(f(range(64)))) for f in (list,np.array,lambda o: torch.tensor(list(o)))]],
    ids=['sampler','batch sampler','sampler of a batch sampler','dataset','loader','order as a list','as an array','as a tensor'])
def test_what_draws_batches_goes_on(tmp_path, make):
    def train(folder, stop=None):
        set_seed(0)   # a loader draws a seed of its own when it is made
        return plain_fit(RunStore(folder).run('a'), stop, dls=DataLoaders(make(), Torch(few, 16)), loss=nn.CrossEntropyLoss())
    whole = train(tmp_path/'whole')
    for at in (5,9):   # in the second epoch, and in the third
        with pytest.raises(Boom): train(tmp_path, at)
    assert all(torch.equal(a, b) for a,b in zip(train(tmp_path).model.parameters(), whole.model.parameters()))

class Pictures:
    "As torchvision's datasets hold them"
    def __init__(self, transform):
        self.transform,self.data,self.targets = transform,np.arange(64*768, dtype=np.uint8).reshape(64, 768),[i%10 for i in range(64)]
    def __len__(self): return 64
    def __getitem__(self, i): return self.transform(torch.as_tensor(self.data[i])),self.targets[i]

class Scale(nn.Module):
    def __init__(self, by, how=torch.relu): super().__init__(); self.by,self.how = by,how
    def forward(self, x): return self.how(x/255*self.by)
    def extra_repr(self): return f'{self.by}, {self.how}'

def by_sampler(*weights): return Torch(few, 16, sampler=torch.utils.data.WeightedRandomSampler(np.repeat(weights, 32), 64))

@pytest.mark.parametrize('was,now,says,new',
                         [(lambda: Torch(Pictures(Scale(1)), 16), lambda: Torch(Pictures(Scale(2)), 16),
                           'samples.0.tfms.0.transform.model: was', 'tfms'),
    (lambda: Torch(torch.utils.data.Subset(Pictures(Scale(1)), range(32)), 16),
     lambda: Torch(torch.utils.data.Subset(Pictures(Scale(2)), range(32)), 16), 'samples.0.tfms.0.transform.model: was', 'tfms'),
    (lambda: by_sampler(.5,.5), lambda: by_sampler(.9,.1), 'data.weights: was', 'weights'),
    (lambda: Torch(few, batch_sampler=OwnBatches(64, 16)),
     lambda: Torch(few, batch_sampler=torch.utils.data.BatchSampler(OwnBatches(64, 16), 8, False)), 'data.bs: was None, is 8',
     'weights')],
    ids=['transform','below a subset','weights','batch size'])
def test_what_pytorchs_loaders_do_is_a_setting(tmp_path, was, now, says, new):
    run = RunStore(tmp_path).run('a')
    def train(make, stop=None): return plain_fit(run, stop, 1, dls=DataLoaders(make(), make()), loss=nn.CrossEntropyLoss())
    with pytest.raises(Boom): train(was, 1)
    with pytest.raises(ValueError, match=f'other settings: {says}'): train(now)
    forget(run, new)
    train(was)
    assert run.status=='finished'

def test_data_that_phases_share_are_a_setting(tmp_path):
    "The third phase goes on with the random numbers of the first if both train on one `DataLoaders`"
    run = RunStore(tmp_path).run('a')
    def train(share, stop=None):
        set_seed(0)
        dls,again = (digits_dls(n=64, n_valid=32, bs=16) for _ in range(2))
        phases = [Phase('clean', 1, dls), Phase('squares', 1, dls.inject(ColorSquare(4))), Phase('again', 1, dls if share else again)]
        learn = Learner(dls, mlp(), opt_func=SGD, lr=.05)
        with learn.no_bar(), learn.no_logging():
            learn.fit_phases(phases, cbs=[KeepRun(run, minutes=0), StopAt(stop)])
        return learn
    with pytest.raises(Boom): train(True, 3)
    with pytest.raises(ValueError, match="other settings: loaders.3.0: was 'the Learner', is 'again'"): train(False)
    forget(run, 'loaders')
    train(True)
    assert run.status=='finished'

def halves(m): return [list(m[1].parameters()), list(m[3].parameters())]

def freeze_layer(*ns):
    def f(learn):
        for n in ns: learn.model[n].requires_grad_(False)
    return f

def split(f):
    def g(learn): learn.splitter = f
    return g

@pytest.mark.parametrize('was,now,says', [(freeze_layer(1), freeze_layer(3), "model.frozen: was '1', is '3'"),
    (noop, lambda learn: learn.model[1].bias.requires_grad_(False), "model.trained: was 4, is 3; model.frozen: was '', is '1.bias'"),
    (split(halves), noop, 'groups: was .2, 2 .*, is .4 '), (split(halves), split(lambda m: halves(m)[::-1]), 'groups: was .2, 2 .*, is .2, 2 ')],
    ids=['another layer','a bias','groups','order of groups'])
@pytest.mark.parametrize('phases', [False, True])
def test_what_is_frozen_and_its_groups_are_settings(tmp_path, was, now, says, phases):
    run = RunStore(tmp_path).run('a')
    def train(change, stop=None):
        set_seed(0)
        learn = Learner(digits_dls(n=64, n_valid=32, bs=16), mlp(), opt_func=SGD, lr=.05, path=tmp_path)
        change(learn)
        with learn.no_bar(), learn.no_logging():
            if phases: learn.fit_phases([Phase('one', 1), Phase('two', 1)], cbs=[KeepRun(run, minutes=0), StopAt(stop)])
            else: learn.fit(1, cbs=[KeepRun(run, minutes=0), StopAt(stop)])
    with pytest.raises(Boom): train(was, 2)
    with pytest.raises(ValueError, match=f'other settings: .*{says}'): train(now)
    forget(run, 'frozen', 'groups')
    train(was)
    assert run.status=='finished'

class Scaled(nn.Module):
    "What it was made with is neither in its `repr` nor in its weights"
    def __init__(self, by, act=torch.relu):
        super().__init__()
        self.by,self.act,self.lin = by,act,nn.Linear(768,10)
    def forward(self, x): return self.act(self.lin(x.flatten(1)))*self.by

def attention(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 16, 0., batch_first=True, norm_first=norm_first)
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (48,16)), layer, nn.Flatten(), nn.Linear(768,10))

@pytest.mark.parametrize('was,now,says', [(lambda: Scaled(1.), lambda: Scaled(2.), '.*by=1.0.*by=2.0'),
    (lambda: Scaled(1.), lambda: Scaled(1., torch.tanh), '.*relu.*tanh'), (lambda: attention(False), lambda: attention(True), '.*norm_first=False.*norm_first=True')],
    ids=['a number','a function',"an argument of torch's"])
def test_what_a_model_was_made_with_is_a_setting(tmp_path, was, now, says):
    run = RunStore(tmp_path).run('a')
    def train(model, stop=None):
        set_seed(0)
        learn = Learner(digits_dls(n=64, n_valid=32, bs=16), model(), opt_func=SGD, lr=.05, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KeepRun(run, minutes=0), StopAt(stop)])
    with pytest.raises(Boom): train(was, 2)
    with pytest.raises(ValueError, match=f'other settings: .*model.made: {says}'): train(now)
    train(was)
    assert run.status=='finished'

class XY:
    def __init__(self, x, y): self.x,self.y = x,y
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i],self.y[i]

xs = torch.rand(64, 768, generator=torch.Generator().manual_seed(0))
def labels(k): return [(i+k)%10 for i in range(64)]

@pytest.mark.parametrize('make', [lambda k: list(zip(xs, labels(k))), lambda k: list(zip(xs, torch.tensor(labels(k)))),
    lambda k: XY(xs, torch.tensor(labels(k))), lambda k: XY(xs, labels(k)), lambda k: XY(list(xs), np.array(labels(k))),
    lambda k: list(zip(xs+k, labels(0))), lambda k: torch.utils.data.Subset(list(zip(xs, labels(k))), range(64)),
    lambda k: Datasets(list(zip(xs, labels(k))), [[ItemGetter(0)], [ItemGetter(1)]]),
    lambda k: Datasets(pd.DataFrame(dict(i=range(64), y=labels(k))), [[lambda o: xs[o.i]], [lambda o: o.y]])],
    ids=['numbers','tensors','x and y','a list','an array','images','subset','Datasets','table'])
def test_labels_in_memory_are_a_setting(tmp_path, make):
    run = RunStore(tmp_path).run('a')
    def train(k, stop=None):
        dls = DataLoaders(*(Torch(make(k), 16) for _ in range(2)))
        return plain_fit(run, stop, 1, dls=dls, loss=nn.functional.cross_entropy)
    with pytest.raises(Boom): train(0, 2)
    with pytest.raises(ValueError, match=r'other settings: .*samples\.0\.values\.0: was'): train(1)
    forget(run, 'values')
    train(0)
    assert run.status=='finished'

def test_values_of_samples(monkeypatch):
    "In any order; wherever the files are; of many bytes the labels alone"
    one,two = [(Path('a/1.png'),'x'), ('a/2.png',1)],[('b/2.png',1), (Path('b/1.png'),'x')]
    assert _values(one)==_values(two)!=_values([(Path('1.png'),'y'), ('2.png',1)])
    assert _values([]) is _values(XY([], [])) is None and _values([Path('a/1.png')])==_values([Path('b/1.png')])!=_values([Path('2.png')])
    large = torch.zeros(1).expand(3, 1024, 10_000)   # 123 MB
    assert _values([(large,1)])==_values([(large+1,1)])!=_values([(large,2)])

def test_another_subset_is_another_run(tmp_path):
    run = RunStore(tmp_path).run('a')
    def train(n, stop=None):
        dls = digits_dls(n=128, n_valid=32, bs=16)
        return plain_fit(run, stop, dls=DataLoaders(subset_dl(dls.train, n), dls.valid), loss=nn.functional.cross_entropy)
    with pytest.raises(Boom): train(64, 5)
    with pytest.raises(ValueError, match='other settings: samples.0.chosen.0: was'): train(48)
    forget(run, 'chosen')
    train(64)
    assert run.status=='finished'

def test_an_address_is_no_setting():
    "Where a function lies in memory is something else at each start"
    def relu(o): return o
    one = relu
    def relu(o): return o
    a,b = (fit_settings(Learner(digits_dls(n=64, n_valid=32), nn.Sequential(nn.Flatten(), Lambda(f), nn.Linear(768,10)),
                                loss_func=nn.functional.cross_entropy), []) for f in (one,relu))
    assert one is not relu and not differences(a, b)
    said = str(describe([torch.relu, Scale(1, one), [Scale(1, torch.relu)]]))
    assert 'relu' in said and ' at 0x' not in said

def test_a_second_fit_goes_on_from_the_first(tmp_path):
    "Not from one that was deleted since"
    store = RunStore(tmp_path)
    def train(shift):
        set_seed(0)
        learn = Learner(digits_dls(n=64, n_valid=32, bs=32), mlp(), opt_func=SGD, lr=.05, path=tmp_path,
                        cbs=KeepRun(store.run('a')))
        with torch.no_grad(): learn.model[1].weight += shift   # which no setting tells
        with learn.no_bar(), learn.no_logging(): learn.fit(1), learn.fit(1)
        return learn.model[1].weight.detach().clone()
    first = train(0.)
    assert torch.equal(train(.1), first)   # both are finished: loaded
    store.delete('a')
    with pytest.raises(ValueError,
                       match=r"run 'a, fit 2' began with other weights than run 'a' ends with now, .*delete\('a, fit 2'\)"):
        train(.1)
    store.delete('a, fit 2')
    assert not torch.equal(train(.1), first)

def test_members_of_a_textual_enum_as_names(tmp_path):
    "Their text names folders, also where Python shows the member as `Mode.slow`"
    store,dls = RunStore(tmp_path),digits_dls(n=32, n_valid=20, bs=16)
    learn = Learner(dls, mlp(), opt_func=SGD, lr=.01, path=tmp_path)
    phases = [Phase(Mode.slow, 1), Phase(Mode.fast, 1)]
    with learn.no_bar(), learn.no_logging(): learn.fit_phases(phases, run=store.run(Mode.fast))
    run = store['f']
    assert store[Mode.fast].path==run.path==tmp_path/'f' and list(map(str, learn.recorder.phases.phase))==['s','f']
    for a,b in ('s',Mode.slow),('f',Mode.fast):
        for k,v in run.weights(a).items(): assert torch.equal(v, run.weights(b)[k]) and torch.equal(v, learn.snapshots[a][k])

class Balanced(nn.Module):
    "A loss that weights classes by what it has seen, counts its calls, and learns a temperature"
    def __init__(self):
        super().__init__()
        self.t,self.calls = nn.Parameter(torch.tensor(1.)),0
        self.register_buffer('w', torch.ones(10))
    def forward(self, p, y):
        if p.requires_grad:
            self.w.lerp_(1+y.bincount(minlength=10).float(), .1)
            self.calls += 1
        return nn.functional.cross_entropy(p*self.t, y, self.w)*(1+.1*self.calls)

@pytest.mark.parametrize('wrap', [noop, lambda o: BaseLoss(lambda *args, **kw: o)])
def test_what_a_loss_has_seen_and_learnt_is_kept(tmp_path, wrap):
    "Stopped between two steps of accumulated gradients: model and loss end as without a stop"
    def train(run, stop=None):
        set_seed(0)
        loss,model = Balanced(),mlp()
        learn = Learner(digits_dls(n=128, n_valid=40, bs=32), model, opt_func=SGD, metrics=accuracy, lr=.05, loss_func=wrap(loss),
                        path=run.path.parent, splitter=lambda m: [list(m.parameters()), [loss.t]])
        keep = KeepRun(run, minutes=0, strict=True)
        with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=[keep, StopAt(stop), GradientAccumulation(90)])
        return *weights(learn), *loss.state_dict().values(), torch.tensor(loss.calls)
    whole = train(RunStore(tmp_path/'whole').run('a'))
    with pytest.raises(Boom): train(run := RunStore(tmp_path/'cut').run('a'), 6)
    assert all(map(torch.equal, whole, train(run))) and whole[-1]==12 and whole[-3]!=1

@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropyFlat, FocalLossFlat])
def test_fastais_losses_are_kept(tmp_path, loss):
    "They copy the annotations of a module, which are no state"
    run = RunStore(tmp_path).run('a')
    learn = Learner(digits_dls(n=32, n_valid=20, bs=16), mlp(), opt_func=SGD, lr=.01, loss_func=loss(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KeepRun(run, strict=True))
    assert run.status=='finished'
