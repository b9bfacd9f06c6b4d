"What a finetuning loses is noticed: on images, tables and token sequences, in phases, beside other callbacks, and without a trace in training."
import contextlib, io, warnings
from contextlib import suppress
from copy import deepcopy
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.all import CSVLogger, EarlyStoppingCallback, MixUp, SaveModelCallback
from fastai.callback.rnn import rnn_cbs
from fastai.tabular.all import (Categorify, CategoryBlock, Normalize, TabularPandas, tabular_learner)
from fastai.text.models import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config, get_language_model, get_text_classifier
from fastai.vision.all import (Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD,
                               TerminateOnNaNCallback, TfmdDL, accuracy, load_learner, noop, partial, set_seed)
from trainings import Bf16, Boom, StopAt, same
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import EvalSets, evaluate, pattern_sets
from feature_erosion.learner import erosion_learner
from feature_erosion.measures.cka import layer_cka
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import PerPhase, Phase
from feature_erosion.recover import Recovery
from feature_erosion.runs.resume import KeepRun
from feature_erosion.runs.store import RunStore
from feature_erosion import watch as watch_module
from feature_erosion.watch import ErosionWarning, WatchErosion, hangs_on, nearest_mean

def digits(): return digits_dls(n=320, n_valid=100)
def net():
    return nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                         nn.Linear(128,10))
Watch = partial(WatchErosion, budget=1e6, n_layers=32)   # every look is taken, however long it takes

def learner(dls, model, lr=.2, **kw):
    return Learner(dls, model, lr=lr, loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), metrics=accuracy, **kw)

def quietly(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ErosionWarning)
        return f(*args, **kw)

@pytest.fixture(scope='module')
def knows():
    "A small network that knows digits"
    set_seed(0)
    learn = learner(digits(), net())
    with learn.no_bar(), learn.no_logging(): learn.fit(12, .05)
    assert learn.validate()[1]>.8
    return learn.model

def erode(model, *cbs, epochs=3, **kw):
    set_seed(0)
    learn = learner(digits().inject(ColorSquare(4)), deepcopy(model), **kw)
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, epochs, cbs=cbs)
    return learn

class Without9(nn.Module):
    "Rules out a class, as continual learners do: its score is minus infinity"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return self.model(x).masked_fill(torch.arange(10)==9, -torch.inf)

def test_classes_that_are_ruled_out(knows):
    "They are no sign of a network that diverged: all other answers count"
    w,m = Watch(digits()),Without9(deepcopy(knows))
    want = evaluate(m, digits().valid)['accuracy']
    erode(m, w, epochs=1)
    assert want>.6 and w.history.known.iloc[0]==pytest.approx(want)   # at the start

def test_the_worst_of_small_classes():
    "Where no class has five images each class counts: here 3 of 3, 0 of 2 and 2 of 2 are right"
    y = [0,0,0,1,1,2,2]
    dls,model = DataLoaders(*[DataLoader([*zip(torch.eye(3)[y], y)], bs=7, num_workers=0)]*2),nn.Sequential(nn.Linear(3, 3))
    dls.c = 3
    with torch.no_grad(): model[0].weight.copy_(torch.tensor([[1.,2,0],[0,0,0],[0,0,1]])), model[0].bias.zero_()
    learn,w = Learner(dls, model, lr=1e-9, loss_func=CrossEntropyLossFlat(), metrics=accuracy),Watch(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=w)
    assert w.history.known.round(6).tolist()==[round(5/7, 6)]*2 and w.history.worst.tolist()==[0,0]

def test_noticed_and_training_is_the_same(knows):
    old,w = digits(),None
    w = Watch(old)
    a,b = erode(knows),erode(knows, w, Watch())
    assert same(a, b) and not any(m._forward_hooks or m._forward_pre_hooks for m in b.model.modules())
    assert w.warnings and w.history.lost.iloc[-1]>.2 and w.history.lost.iloc[0]==0
    assert f"after {w.told[0]} iteration" in w.warnings[0] and 'find_shortcut' in w.warnings[0]
    assert w.history.known.iloc[-1]==pytest.approx(evaluate(b.model, old.valid)['accuracy'])
    C = layer_cka({'a':knows, 'b':b.model}, old.valid, 'leaf', estimator='full', n=32, progress=False,
                  max_features=2000).same_layer()
    assert w.by_layer.iloc[-1].to_dict()==pytest.approx(C.to_dict(), abs=1e-6)

class Takes(Callback):
    "A batch takes three tenths of a second by the clock of the test"
    run_valid = False
    def __init__(self, now): self.now = now
    def before_batch(self): self.now[0] += .3

@pytest.mark.parametrize('budget,looks', [(1e-6, {2}), (.1, {4,5}), (1e6, None)])
def test_budget(knows, monkeypatch, budget, looks):
    "With a look of one second, and 30 epochs of one and a half: a tenth are four and a half looks"
    now = [0.]
    look = watch_module._Layers.look
    def slow_look(self, model):
        now[0] += 1.
        return look(self, model)
    monkeypatch.setattr(watch_module, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(watch_module._Layers, 'look', slow_look)
    w = WatchErosion(digits(), budget=budget, n_layers=32, n=50)
    erode(knows, Takes(now), w, epochs=30)
    assert w.cost.looks>20 if looks is None else w.cost.looks in looks, w.cost
    assert w.cost.share==pytest.approx(w.cost.looks/(.3*30*5), abs=.05)

def test_once_per_level(knows):
    "Each warning says at least twice as much as the level of the one before"
    w = Watch(digits(), tolerance=.02)
    erode(knows, w)
    lost = w.history.set_index('iter').lost
    levels = [int(np.log2(lost[i]/.02)) for i in w.told]
    assert levels==sorted(set(levels)) and len(levels)>1

def test_clean_finetuning_is_left_alone(knows):
    for seed in range(3):
        set_seed(seed)
        w = Watch(digits())
        learn = learner(digits(), deepcopy(knows), lr=.01)
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter('error', ErosionWarning)
            learn.fit_one_cycle(2, cbs=w)
        assert len(w.history)>5

def test_fine_tune_is_two_fits(knows, tmp_path):
    "One start, one history; a stop holds for the second fit; CSV has whole rows"
    set_seed(0)
    learn,w = learner(digits().inject(ColorSquare(4)), deepcopy(knows), path=tmp_path),Watch(digits())
    with learn.no_bar(), learn.no_logging(): quietly(learn.fine_tune, 2, .4, cbs=[w, CSVLogger(append=True)])
    assert w.history.fit.tolist().count(1)>2 and w.history.fit.tolist().count(2)>2 and w.history.iter.is_monotonic_increasing
    assert w.history.iter.iloc[-1]==15 and w.history.iter.tolist().count(0)==1
    rows = [r.split(',') for r in (tmp_path/'history.csv').read_text().splitlines()]
    assert len({len(r) for r in rows})==1 and rows[0][4:9]==['known','known_features','worst','cka','rank']
    g = Watch(digits(), stop=True, restore=True, tolerance=.01)
    with learn.no_bar(), learn.no_logging():
        learn.model.load_state_dict(knows.state_dict())
        quietly(learn.fine_tune, 30, .4, freeze_epochs=5, cbs=g)
    assert g.stopped and g.iters<175 and g.warnings[-1].endswith('Training ends here.')
    assert evaluate(learn.model, digits().valid)['accuracy']>=g.history.known.iloc[0]-.01-1e-6

def test_restores_the_weights_it_says(knows):
    "Those of the last look within the tolerance, to the last bit, with BatchNorm's statistics"
    class Keep(Callback):
        order = 99
        def before_fit(self): self.at = {0:deepcopy(self.model.state_dict())}
        def after_batch(self):
            if self.training: self.at[self.learn.train_iter] = deepcopy(self.model.state_dict())
    k,w = Keep(),Watch(digits(), restore=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out): learn = erode(knows, w, k)
    i = w.good['iter']
    assert f'weights after {i} iterations' in out.getvalue() and 0<=i<15
    assert all(torch.equal(a, b) for a,b in zip(k.at[i].values(), learn.model.state_dict().values()))

@pytest.mark.parametrize('n', [30,60])
def test_what_is_restored_is_within_the_tolerance(knows, n):
    "Of few samples more may be lost without a warning, since it may be chance; such weights are not taken for good ones"
    w = Watch(digits(), restore=True, n=n)
    with contextlib.redirect_stdout(io.StringIO()): erode(knows, w)
    lost = w.history.set_index('iter').lost
    assert w.now==0 and lost.iloc[-1]>.05 and lost[w.good['iter']]<=.05

def test_lr_find_validation_export(knows, tmp_path):
    w = Watch(digits())
    learn = learner(digits().inject(ColorSquare(4)), deepcopy(knows), path=tmp_path, cbs=w)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=10, show_plot=False); learn.validate(); learn.get_preds()
        assert not w.rows and w.iters==0
        quietly(learn.fit, 1)
        n = len(w.rows)
        learn.validate(); learn.lr_find(num_it=5, show_plot=False)
        assert len(w.rows)==n and list(learn.metrics.attrgot('name'))==['accuracy']
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    assert again.watch_erosion.history.equals(w.history)

def test_phases(knows):
    "Each phase has a start of its own; `EvalSets` is still added"
    set_seed(0)
    clean = digits()
    learn,w = learner(clean, net()),Watch(clean)
    with learn.no_bar(), learn.no_logging():
        quietly(learn.fit_phases,
                [Phase('pretrain', 12, clean, .05, sched='constant'),
                 Phase('erode', 3, clean.inject(ColorSquare(4)), .2, sched='constant')], cbs=w)
    h = w.history
    assert h.groupby('phase', sort=False).iter.first().to_dict()==dict(pretrain=0, erode=0) and w.by=={'known':'right'}
    assert not any(h.lost[h.phase=='pretrain']>.05) and h.lost.iloc[-1]>.1 and w.warnings
    assert {'clean','pattern','conflict'} <= set(learn.recorder.evals) and 'known' in learn.recorder.history

def test_goes_on_after_an_interrupt(knows, tmp_path):
    def fit(folder, *more):
        set_seed(0)
        clean = digits()
        learn,w = learner(clean, deepcopy(knows)),Watch(clean, restore=True, tolerance=.3)
        keep = KeepRun(RunStore(folder).run('a'), minutes=0, strict=True)
        with learn.no_bar(), learn.no_logging():
            quietly(learn.fit_phases, [Phase('erode', 4, clean.inject(ColorSquare(4)))], cbs=[w, keep, *more])
        return w.history.drop(columns='seconds')
    whole = fit(tmp_path/'whole')
    with pytest.raises(Boom): fit(tmp_path/'cut', StopAt(13))
    pd.testing.assert_frame_equal(fit(tmp_path/'cut'), whole)

def test_fine_tune_goes_on_in_its_second_fit(knows, tmp_path):
    "Which has the settings that it had after a first fit that was trained, and not loaded"
    class InSecond(StopAt):
        fits = 0
        def before_fit(self): self.fits += not self.learn.lock.locked()
        def after_batch(self):
            if self.fits==2: super().after_batch()
    def fit(folder, *more):
        set_seed(0)
        learn,w = learner(digits().inject(ColorSquare(4)), deepcopy(knows)),Watch(digits(), restore=True)
        with learn.no_bar(), learn.no_logging():
            quietly(learn.fine_tune, 2, .4, cbs=[w, KeepRun(RunStore(folder).run('a'), minutes=0, strict=True), *more])
        return w.history.drop(columns='seconds'),learn.model.state_dict()
    whole,weights = fit(tmp_path/'whole')
    with pytest.raises(Boom): fit(tmp_path/'cut', InSecond(7))
    again,same = fit(tmp_path/'cut')
    pd.testing.assert_frame_equal(again, whole)
    assert all(torch.equal(v, same[k]) for k,v in weights.items())

@pytest.mark.works(kind='callbacks', what='`WatchErosion` in a kept run',
                   how='works: an epoch that its budget left out is kept as NaN')
@pytest.mark.parametrize('phases', [True,False])
def test_a_run_keeps_epochs_that_were_not_looked_at(knows, tmp_path, phases):
    "With a budget that allows hardly any look"
    clean = digits()
    learn,w,run = learner(clean, deepcopy(knows)),Watch(clean, budget=1e-6),RunStore(tmp_path).run('a')
    with learn.no_bar(), learn.no_logging():
        if phases: quietly(learn.fit_phases, [Phase('erode', 4, clean.inject(ColorSquare(4)))], run=run, cbs=w)
        else: quietly(learn.fit, 4, cbs=[w, KeepRun(run, strict=True)])
    assert run.status=='finished' and run.history.known.notna().tolist()==[False]*3+[True]

def test_mixed_precision_mixup_and_small_last_batch(knows):
    w = Watch(digits_dls(n=320, n_valid=97, bs=48))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = erode(knows, w, Bf16(), MixUp(.4))
    assert w.history.known.notna().all() and w.history.cka.between(0,1.01).all()
    assert w.history.known.iloc[0]==pytest.approx(evaluate(knows, w.sets['known'].dl)['accuracy'], abs=.03)

def test_after_an_exception(knows):
    "Hooks and columns are gone"
    learn,w = learner(digits(), deepcopy(knows)),Watch(digits())
    class Bad(nn.Module):
        def forward(self, x):
            if not self.training: raise Boom('here')
            return x
    learn.model.insert(2, Bad())
    with pytest.raises(Boom), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=w)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    assert list(learn.metrics.attrgot('name'))==['accuracy']

def test_model_that_returns_more(knows):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.net = deepcopy(knows)
        def forward(self, x): return dict(logits=self.net(x), aux=0)
    set_seed(0)
    from feature_erosion.batches import TensorAnswer
    learn,w = learner(digits().inject(ColorSquare(4)), Two(), cbs=TensorAnswer()),Watch(digits())
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, 2, cbs=w)
    assert w.history.lost.iloc[-1]>.1

# Other kinds of data

def table(easy, n=600, seed=0):
    "Two classes told apart by `a`+`b`; where it is easy, `hint` gives the class away"
    rng = np.random.RandomState(seed)
    df = pd.DataFrame(rng.randn(n,3), columns=['a','b','c'])
    df['y'] = np.where(df.a+df.b>0, 'yes', 'no')
    df['hint'] = np.where(rng.rand(n)<.5, 'p', 'q') if not easy else np.where(df.y=='yes', 'p', 'q')
    if easy: df['y'] = np.where(rng.rand(n)<.5, 'yes', 'no'); df['hint'] = np.where(df.y=='yes', 'p', 'q')
    return TabularPandas(df, [Categorify, Normalize], ['hint'], ['a','b','c'], 'y', CategoryBlock(),
                         splits=(list(range(400)), list(range(400,n)))).dataloaders(bs=64)

def test_tabular():
    set_seed(0)
    old,new = table(False),table(True)
    learn = tabular_learner(old, layers=[32,16], metrics=accuracy)
    w = Watch(old)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(5, .02)
        learn.dls = new
        quietly(learn.fit, 5, .02, cbs=w)
    assert w.history.known.iloc[0]>.85 and w.history.known.iloc[-1]<.75 and w.warnings
    assert 'find_shortcut' not in w.warnings[0]   # it is for images
    assert w.history['rank'].notna().all() and w.by_layer.shape[1]>=3 and w.by_layer.iloc[-1].min()<.95
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning,
                                                          match='a batch has Tensor.*, and without a reference, blocks'):
        w = Watch()
        learn.fit(1, cbs=w)
    assert w.columns==['cka','rank'] and w.history.cka.notna().all()

class Reader(nn.Module):
    "Embedding, LSTM, last state"
    def __init__(self, words=20, classes=4):
        super().__init__()
        self.emb,self.lstm,self.out = nn.Embedding(words, 16),nn.LSTM(16, 32, batch_first=True),nn.Linear(32, classes)
    def forward(self, x): return self.out(self.lstm(self.emb(x))[0][:,-1])

def sentences(easy, n=512):
    "The class is the word at the end, one of four; where it is easy, the first word gives away a class that has nothing to do with it"
    g = torch.Generator().manual_seed(int(easy))
    x,y = torch.randint(4, 20, (n,9), generator=g),torch.randint(4, (n,), generator=g)
    x[:,-1] = torch.randint(4, (n,), generator=g) if easy else y
    if easy: x[:,-2] = y+10
    items = list(zip(x, y))
    return DataLoaders(TfmdDL(items[:384], bs=32, shuffle=True, n_inp=1, num_workers=0),
                       TfmdDL(items[384:], bs=50, n_inp=1, num_workers=0))

def test_text():
    set_seed(0)
    old,new = sentences(False),sentences(True)
    learn = Learner(old, Reader(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy, lr=.01)
    w = Watch(old)
    with learn.no_bar(), learn.no_logging():
        learn.fit(4)
        learn.dls = new
        quietly(learn.fit, 4, cbs=w)
    assert w.history.known.iloc[0]>.95 and w.history.known.iloc[-1]<.8 and w.warnings and 'lstm' in w.by_layer
    with pytest.raises(ValueError, match='between images'): hangs_on(learn.model, new.valid)
    torch_dl = torch.utils.data.DataLoader(new.valid.dataset, batch_size=40)
    v = Watch({'plain torch':torch_dl})
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=v)
    assert v.history['plain torch'].iloc[-1]==pytest.approx(evaluate(learn.model, torch_dl)['accuracy'])

class ViT(nn.Module):
    "A vision transformer with a class token"
    def __init__(self, d=32):
        super().__init__()
        self.patch,self.cls,self.pos = nn.Conv2d(3, d, 4, 4),nn.Parameter(torch.zeros(1,1,d)),nn.Parameter(torch.randn(1,17,d)*.02)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(d, 2, 2*d, 0., batch_first=True,
                                                                 norm_first=True) for _ in range(2)))
        self.norm,self.head = nn.LayerNorm(d),nn.Linear(d, 10)
    def forward(self, x):
        t = self.patch(x).flatten(2).transpose(1,2)
        t = torch.cat([self.cls.expand(len(t),-1,-1), t], 1)+self.pos
        return self.head(self.norm(self.blocks(t))[:,0])

def test_vision_transformer():
    set_seed(0)
    clean = digits()
    learn = Learner(clean, ViT(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=3e-3)
    w = Watch(clean)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(25, 5e-3)
        learn.dls = clean.inject(ColorSquare(4))
        quietly(learn.fit, 4, 1e-2, cbs=w)
    assert w.history.known.iloc[0]>.25 and w.history.lost.iloc[-1]>.1 and w.warnings
    assert 'blocks.0' in w.by_layer and w.sets['known'].look(learn.model, w.reads, True).X.shape==(100,32)   # the class token alone

def test_wrong_references(knows):
    learn = learner(digits(), deepcopy(knows))
    floats = DataLoaders(*[TfmdDL([(torch.randn(3,16,16), torch.rand(())) for _ in range(20)], bs=10, n_inp=1, num_workers=0)]*2)
    with pytest.raises(ValueError, match='regression'), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Watch(floats))
    with pytest.raises(ValueError, match='no labels'), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Watch([torch.randn(8,3,16,16)]))

@pytest.mark.parametrize('batches,why', [
    ([(torch.rand(8,3,16,16),torch.full((8,), 3))], 'labels: all 8 are 3, and without a reference'),
    ([(torch.rand(8,3,s,s),torch.arange(8)) for s in (16,24)], r'images have shapes \(3, 16, 16\), \(3, 24, 24\).*, and without')],
    ids=['one class','two sizes'])
def test_held_out_images_that_cannot_be_exchanged(knows, batches, why):
    "Without a reference, layers are watched, and the fit goes on"
    learn,w = learner(DataLoaders(batches, batches), deepcopy(knows), lr=.01),Watch()
    learn.metrics = []
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match=f'{why}.*only layers'): learn.fit(1, cbs=w)
    assert w.columns==['cka','rank'] and w.history.cka.notna().all()

def test_samples_that_the_model_does_not_take(knows):
    "Each reference is tried before training; the message names it, and the shape"
    clean,grey = digits(),[(torch.rand(8,1,16,16),torch.arange(8))]
    with pytest.raises(ValueError, match=r"reference 'grey': the model does not take its batches of Tensor of shape \(8, 1, 16, 16\)"):
        erode(knows, Watch(dict(clean=clean, grey=grey)))

@pytest.mark.parametrize('y', [lambda: torch.rand(()), lambda: torch.tensor([1.,0,1]), lambda: torch.ones(16, 16).long()],
                         ids=['regression','several labels','a mask'])
def test_images_without_a_class_and_no_reference(knows, y):
    "Blocks are exchanged between classes; where there are none, layers are watched, as on texts"
    dl = TfmdDL([(torch.randn(3,16,16), y()) for _ in range(20)], bs=10, n_inp=1, num_workers=0)
    learn,w = learner(DataLoaders(dl, dl), deepcopy(knows)),Watch()
    learn.loss_func,learn.metrics = lambda p,y: p.square().mean(),[]
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='samples do not have one class each.*only layers'):
        learn.fit(1, cbs=w)
    assert w.columns==['cka','rank'] and w.history.cka.notna().all()
    w.rows,w.drift = w.rows[:1],w.drift[:1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        w.plot()   # of a single look, whose axis has no length

class LogWith(Callback):
    "Hand each epoch's row to a function, as the page 'How do I' has it"
    order,run_valid = 60,False
    def __init__(self, write): self.write = write
    def after_epoch(self):
        self.write({k:float(v) for k,v in zip(self.recorder.metric_names, self.recorder.log) if k!='time'}, step=self.learn.epoch)

def to_tensorboard(path, m):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    yield TensorBoardCallback(log_dir=path, trace_model=False, log_preds=False)
    got = EventAccumulator(str(path)).Reload()
    yield lambda k: [o.value for o in got.Scalars(k)]

def to_wandb(path, m):
    wandb = pytest.importorskip('wandb')
    import fastai.callback.wandb as fw
    old,logs,plain = fw.init_args,[],wandb.sdk.wandb_run.Run.log
    m.setattr(fw, 'init_args', lambda o: old(o) if hasattr(o, '__dict__') else {})   # as in test_callbacks
    m.setattr(wandb.sdk.wandb_run.Run, 'log', lambda self, data, *a, **kw: (logs.append(data), plain(self, data, *a, **kw)))
    run = wandb.init(mode='offline', dir=str(path), settings=wandb.Settings(console='off', silent=True))
    try: yield fw.WandbCallback(log_preds=False)
    finally: run.finish()
    yield lambda k: [float(o[k]) for o in logs if k in o]

def to_mlflow(path, m):
    mlflow = pytest.importorskip('mlflow')
    m.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    mlflow.set_tracking_uri((path/'mlruns').resolve().as_uri())
    with mlflow.start_run() as run: yield LogWith(mlflow.log_metrics)
    yield lambda k: [o.value for o in mlflow.MlflowClient().get_metric_history(run.info.run_id, k)]

def to_csv(path, m):
    yield CSVLogger(path/'h.csv')
    yield lambda k: pd.read_csv(path/'h.csv')[k].tolist()

@pytest.mark.parametrize('budget', [1e6,1e-6])
@pytest.mark.parametrize('logger', [to_csv,to_tensorboard,to_wandb,to_mlflow])
def test_loggers(knows, tmp_path, monkeypatch, logger, budget):
    "Each epoch's numbers, NaN where an epoch was not looked at"
    (tmp_path/'log').mkdir()
    steps = logger(tmp_path/'log', monkeypatch)
    w = Watch({'old':digits()}, budget=budget)
    erode(knows, w, next(steps), path=tmp_path)
    read = next(steps)
    ends = w.history[w.history.iter>0].query('iter%5==0').set_index('iter')
    assert len(ends)==(3 if budget>1 else 1)
    for k in 'old','old_features','worst','cka','rank':
        assert read(k)==pytest.approx(ends[k].reindex([5,10,15]).tolist(), abs=1e-5, nan_ok=True), k

def test_columns_have_names_of_their_own(knows):
    "Where a logger would keep one of two columns, an error says so before training; two watchers share what is not about their data"
    for name in 'accuracy','rank':
        with pytest.raises(ValueError, match=f"two columns '{name}'"): erode(knows, Watch({name:digits()}))
    with pytest.raises(ValueError, match="two columns 'known'"): erode(knows, Watch(digits()), Watch(digits()))
    a,b = Watch({'a':digits()}),Watch({'b':digits()})
    learn = erode(knows, a, b, epochs=1)
    names = list(learn.recorder.metric_names)
    assert len(set(names))==len(names) and {'a','b','worst','cka','rank'}<={*names}
    assert list(learn.metrics.attrgot('name'))==['accuracy'] and b.history[['worst','cka','rank']].notna().all(axis=None)
    learn = erosion_learner(digits(), net)
    with learn.no_bar(), pytest.raises(ValueError, match="two columns 'clean'"):
        learn.fit_phases([Phase('a', 1, digits()), Phase('b', 1, digits().inject(ColorSquare(4)))], cbs=Watch({'clean':digits()}))

@pytest.mark.works(kind='loaders',
                   what='a loader that is read class by class, so that a batch has one class only, in `hangs_on` and `WatchErosion`',
                   how='works: parts are exchanged over the whole set')
def test_parts_come_from_the_whole_set():
    "A loader that is read class by class has batches of one class"
    x,y = (torch.cat([o.as_subclass(torch.Tensor) for o in part]) for part in zip(*digits_dls(n=300, n_valid=60).valid))
    one_class = [(x[y==c],y[y==c]) for c in range(10)]
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10)); model(one_class[0][0])
    whole = [(torch.cat([a for a,_ in one_class]),torch.cat([b for _,b in one_class]))]
    a,b = hangs_on(model, one_class, n=None),hangs_on(model, whole, n=None)
    assert (a.share,a.box,a.right)==(b.share,b.box,pytest.approx(b.right))

class Unsure(nn.Module):
    "Classes by their brightness, but for a fifth of all images, whatever is changed in them"
    def forward(self, x):
        m = x.mean((1,2,3))
        return nn.functional.one_hot((m.round()+((1e4*m).frac()<.2)).long()%3, 3).float()

def test_where_no_box_matters_more_than_others():
    "In theory, a fifth is lost with any box: the largest of sixteen shares of a few images each is twice that"
    y = torch.arange(120)%3
    x = y[:,None,None,None]+.02+.01*torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    got = [hangs_on(Unsure(), [(x,y)], n=None, seed=s) for s in range(20)]
    assert abs(np.mean([o.share for o in got])-.2)<.03 and np.mean([o.low<.2 for o in got])>.8
    assert .15<hangs_on(Unsure(), [(x,y)], grid=1, n=None).low<=1   # the only box

def test_what_cannot_be_exchanged():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*8*8,2))
    x = torch.rand(6,3,8,8)
    with pytest.raises(ValueError, match='all 6 are 0'): hangs_on(model, [(x,torch.zeros(6, dtype=torch.long))], n=None)
    with pytest.raises(ValueError, match='multi-label'): hangs_on(model, [(x,torch.zeros(6,4))], n=None)
    with pytest.raises(ValueError, match='images of one size'):
        hangs_on(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,2)),
                 [(x,torch.arange(6)%2), (x[...,:4],torch.arange(6)%2)], n=None)
    with pytest.raises(ValueError, match=r'answers with shape \(6, 1\)'):
        hangs_on(nn.Sequential(nn.Flatten(), nn.Linear(192,1)), [(x,torch.arange(6)%2)], n=None)
    for bad in 0,2.5:
        with pytest.raises(ValueError, match=f'grid={bad}: must be a whole number'):
            hangs_on(model, [(x,torch.arange(6)%2)], grid=bad, n=None)

def test_an_epoch_without_a_whole_batch(knows):
    few = [(x.float(),int(y)) for b in digits_dls(n=16, n_valid=40, bs=16).valid for x,y in zip(*b)]
    dls = DataLoaders.from_dsets(few, few, bs=64, num_workers=0)
    assert len(dls.train)==0 and len(dls.valid)==1
    learn,w = learner(dls, deepcopy(knows)),Watch(digits())
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, 1, cbs=w)
    assert len(w.history)>=1

def test_reference_of_one_class(knows):
    "There, always giving it is no chance: what the model knows of it is watched by its answers"
    clean = digits()
    b = [(x,y) for x,y in ((b[0].as_subclass(torch.Tensor),b[1].as_subclass(torch.Tensor)) for b in clean.valid)]
    x,y = (torch.cat(o) for o in zip(*b))
    one = [(x[y==3],y[y==3])]
    learn,w = learner(clean.inject(ColorSquare(4)), deepcopy(knows)),Watch(one)
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, 4, cbs=w)
    with learn.no_bar(): now = evaluate(learn.model, one)['accuracy']
    assert w.by=={'known':'right'} and w.history.known.iloc[-1]==pytest.approx(now)
    assert w.history.lost.iloc[-1]==pytest.approx(evaluate(knows, one)['accuracy']-now) and w.warnings
    with pytest.raises(ValueError,
                       match="does not know 'known', and fewer than two classes have two samples"), learn.no_bar(), learn.no_logging():
        learner(clean, deepcopy(knows), cbs=Watch([(x[y==3],y[y==3]+1)])).fit(1)   # which it never says of these

@pytest.mark.parametrize('wrap,prefix', [(noop,''), (PerPhase,''), (noop,'valid_')])
def test_what_is_monitored_is_measured(knows, wrap, prefix):
    "However small the budget: else an epoch without a number would count as one without progress"
    learn,w = learner(digits().inject(ColorSquare(4)), deepcopy(knows)),Watch(digits(), budget=1e-9)
    learn.recorder.train_metrics,stop = bool(prefix),EarlyStoppingCallback(monitor=f'{prefix}known', patience=9)
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, 3, cbs=[w,wrap(stop)])
    assert w.history.iter.tolist()==[len(learn.dls.train)*i for i in range(4)] and stop.best==w.history.known.iloc[1:].max()

def test_two_cannot_choose_the_last_weights(knows, tmp_path):
    def fit(**kw):
        learn = learner(digits().inject(ColorSquare(4)), deepcopy(knows), path=tmp_path)
        with learn.no_bar(), learn.no_logging():
            quietly(learn.fit, 1, cbs=[Watch(digits(), restore=True), SaveModelCallback(monitor='known', **kw)])
    with pytest.raises(ValueError, match='SaveModelCallback puts weights back after the fit, too'): fit()
    fit(every_epoch=True)

def test_text_classifier_of_fastai():
    "It answers with scores and two kinds of states"
    set_seed(0)
    config = dict(awd_lstm_clas_config, emb_sz=16, n_hid=16, n_layers=1, pad_token=0)
    model = get_text_classifier(AWD_LSTM, 20, 4, seq_len=9, config=config)
    old = sentences(False)
    learn,w = Learner(old, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=rnn_cbs(alpha=0., beta=0.)),Watch(old)
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, 1, 1e-3, cbs=w)
    assert w.history.known.iloc[-1]==pytest.approx(learn.recorder.values[-1][2])   # the Recorder's own accuracy

def test_language_model_of_fastai():
    "It remembers the last batch: where the weights stay, layers do, whatever was read before; and it reads on where it was"
    def fit(lr, *cbs):
        set_seed(0)
        some = [(x[:-1],x[1:]) for x in torch.randint(1, 20, (48,13), generator=torch.Generator().manual_seed(0))]
        config = dict(awd_lstm_lm_config, emb_sz=16, n_hid=16, n_layers=2, pad_token=0)
        learn = Learner(DataLoaders.from_dsets(some, some, bs=8, num_workers=0), get_language_model(AWD_LSTM, 20, config=config),
                        loss_func=CrossEntropyLossFlat(), cbs=rnn_cbs())
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*so only layers .* are watched')
            quietly(learn.fit, 2, lr, cbs=cbs)
        return learn
    w = Watch()
    fit(0., w)
    assert w.history.cka.tolist()==pytest.approx([1.]*len(w.history)) and w.history['rank'].nunique()==1
    assert same(fit(.01), fit(.01, Watch()))

# Fits that end early, sets of all kinds

class Ends(Callback):
    "What ends a fit: weights that are not finite, or a callback that has seen enough"
    order,run_valid = 60,False
    def __init__(self, how): self.how = how
    def after_batch(self):
        if self.how=='nan' and self.learn.train_iter==7: self.model[5].weight.data.fill_(float('nan'))
        if self.how=='batch' and self.learn.train_iter==9: raise CancelFitException
    def after_epoch(self):
        if self.how=='epoch' and self.learn.epoch==1: raise CancelFitException

@pytest.mark.parametrize('how,last', [('batch',9), ('epoch',10), ('nan',8)])
def test_a_last_look_whatever_ends_the_fit(knows, how, last):
    "However small the budget; then the weights from the start are back"
    w = WatchErosion(digits(), budget=1e-9, restore=True, tolerance=.01)
    learn = erode(knows, w, Ends(how), *([TerminateOnNaNCallback()] if how=='nan' else []), epochs=30)
    assert w.history.iter.tolist()==[0,last] and w.history.lost.iloc[-1]>.01 and w.warnings
    if how=='nan': assert w.history.known.iloc[-1]==0 and w.history.lost.iloc[-1]==w.history.known.iloc[0]
    assert all(torch.equal(a, b) for a,b in zip(learn.model.state_dict().values(), knows.state_dict().values()))

def test_weights_that_are_not_finite_without_a_reference(knows):
    w = WatchErosion(budget=1e-9, restore=True)
    learn = erode(knows, w, Ends('nan'), TerminateOnNaNCallback())
    assert 'no finite numbers' in w.warnings[-1] and all(p.isfinite().all() for p in learn.model.parameters())

def test_phases_are_drawn_one_after_another(knows):
    "Iterations begin at 0 in each; a line that went back to it would cross itself"
    set_seed(0)
    learn,watch = learner(digits(), deepcopy(knows)),Watch(digits(), tolerance=.01)
    painted = digits().inject(ColorSquare(4))
    with learn.no_bar(), learn.no_logging():
        quietly(learn.fit_phases, [Phase('a', 1, lr=.2), Phase('b', iters=7, dls=painted, lr=.5), Phase('c', 1, lr=.2)], cbs=watch)
    fig = watch.plot()
    a,n = fig.axes[0],len(watch.history)
    warned = [l for l in a.lines if len(l.get_xdata())==2 and l.get_ydata()[0]==0 and l.get_ydata()[1]==1]
    xs = [l.get_xdata().tolist() for l in a.lines if l not in warned]
    assert len(xs)==3 and all(len(x)==n and x==sorted(x) and x[-1]==17 for x in xs)
    assert {0,5,12} <= {*xs[0]} and [t.get_text() for t in a.texts]==['a','b','c']
    assert watch.warnings and all(x in xs[0] for x in watch.told)

def test_phases_end_with_a_look(knows):
    "Also one that `until` ends before its time"
    clean = digits()
    learn,w = learner(clean, deepcopy(knows)),WatchErosion(clean, budget=1e-9)
    phases = [Phase('a', 9, clean.inject(ColorSquare(4)), until=lambda l: l.epoch>=2), Phase('b', 2, clean)]
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit_phases, phases, cbs=w)
    assert w.history[['phase','iter','epoch']].values.tolist()==[['a',0,0], ['a',10,2.], ['b',0,2], ['b',10,4]]

def test_stopped_is_said_and_frozen_layers_stay(knows, capsys):
    "A later fit that trains nothing says why; weights that are put back leave the same groups frozen"
    set_seed(0)
    learn = learner(digits().inject(ColorSquare(4)), deepcopy(knows),
                    splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.freeze()
    w = Watch(digits(), stop=True, restore=True, tolerance=.01)
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, 9, cbs=w)
    assert w.stopped and learn.opt.frozen_idx==1 and 'trains nothing' not in capsys.readouterr().out
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=w)
    assert 'this fit trains nothing; `reset()`' in capsys.readouterr().out
    w.reset()
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, 1, cbs=w)
    assert len(w.rows)>1 and 'trains nothing' not in capsys.readouterr().out

@pytest.mark.parametrize('phases', [False,True])
def test_stopped_beside_mixup(knows, phases):
    "As in the second fit of `fine_tune`: fastai's MixUp cannot be ended before it has begun"
    w = Watch(digits(), stop=True, tolerance=.01)
    learn = erode(knows, w, MixUp(), epochs=9)
    now,seen = deepcopy(learn.model.state_dict()),len(w.rows)
    assert w.stopped
    with learn.no_bar(), learn.no_logging():
        if phases: learn.fit_phases([Phase('a', 1), Phase('b', 1)], cbs=[w, MixUp()])
        else: learn.fine_tune(1, cbs=[w, MixUp()])
    assert all(torch.equal(a, b) for a,b in zip(now.values(), learn.model.state_dict().values())) and len(w.rows)==seen
    assert not learn.model.training and isinstance(learn.loss_func, CrossEntropyLossFlat) and not len(learn.recorder.values)

def test_a_phase_ends_with_weights_put_back(knows, capsys):
    w = Watch(digits(), restore=True, tolerance=.01)
    learn = learner(digits(), deepcopy(knows))
    with learn.no_bar(), learn.no_logging():
        quietly(learn.fit_phases, [Phase('a', 2, digits().inject(ColorSquare(4)), sched='constant')], cbs=PerPhase(w))
    assert 'are back' in capsys.readouterr().out
    assert all(torch.equal(a, b) for a,b in zip(learn.snapshots['a'].values(), learn.model.state_dict().values()))

@pytest.mark.parametrize('make', [lambda d: Watch(d, stop=True, restore=True, tolerance=.1),
                                  lambda d: Recovery(d.train, d.valid, few=1, seeds=1, features='last', at=(0,3))])
def test_a_watcher_of_each_phase_goes_on(knows, tmp_path, make):
    "Stopped within a phase, between two, and in the second"
    def fit(name, *more):
        set_seed(0)
        clean = digits()
        learn,cb = learner(clean, deepcopy(knows), path=tmp_path),make(clean)
        keep = KeepRun(RunStore(tmp_path).run(name), minutes=0, strict=True)
        phases = [Phase('a', 2, clean), Phase('b', 2, clean.inject(ColorSquare(4)), .2), Phase('c', 1, clean)]
        with learn.no_bar(), learn.no_logging(): quietly(learn.fit_phases, phases, cbs=[PerPhase(cb), keep, *more])
        return learn,getattr(cb, 'history', learn.recorder.evals)
    whole,seen = fit('whole')
    for at in (3, 11, 13):
        with suppress(Boom): fit('cut', StopAt(at))
    again,now = fit('cut')
    columns = [c for c in seen if c!='seconds']
    pd.testing.assert_frame_equal(now[columns], seen[columns])
    assert all(torch.equal(v, again.model.state_dict()[k]) for k,v in whole.model.state_dict().items())
    assert again.recorder.recovery.equals(whole.recorder.recovery)

class Number(nn.Linear):
    "A head for regression that gives one number a sample, shape `(batch,)`"
    def forward(self, x): return super().forward(x)[:,0]

@pytest.mark.parametrize('head,k', [(lambda: nn.Linear(128,1), 5), (lambda: Number(128,1), 5), (lambda: nn.Conv2d(8,10,1), 3)],
                         ids=['a score','a number','a mask'])
def test_heads_that_choose_no_class(knows, head, k, capsys):
    "Their outputs mean nothing on the old data: features are watched, by hand what the head reads, averaged over positions"
    body = deepcopy(knows)[:k]
    learn,w = learner(digits(), nn.Sequential(*body, head())),Watch(digits())
    learn.loss_func = lambda p,y: p.square().mean()
    learn.metrics = []
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, 1, .01, cbs=w)
    assert "so its head is new: its features are watched" in capsys.readouterr().out and 'known' not in w.history
    x,y = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*w.sets['known'].dl))
    with torch.no_grad(): X = learn.model.eval()[:k](x)
    right = nearest_mean(X.mean((2,3)) if X.ndim==4 else X, y)
    assert w.history.known_features.iloc[-1]==pytest.approx(right.float().mean().item())

def test_chance_on_unequal_classes():
    "By scikit-learn's κ and by shuffling: three in a hundred found are knowledge, always the first class is none"
    from sklearn.metrics import cohen_kappa_score
    def above(y, pred): return watch_module._above_chance(SimpleNamespace(y=y, pred=pred, right=y==pred), 3)
    g = torch.Generator().manual_seed(0)
    y = torch.zeros(500, dtype=torch.long); y[:15] = 1
    # six missed, fifteen false alarms: accuracy .958, below the share of zeros, .97
    found = y.clone()
    found[2:8] = 0
    found[50:65] = 1
    assert (found==y).float().mean()<.97 and cohen_kappa_score(y, found)>0 and above(y, found)
    assert not above(y, torch.zeros_like(y)) and not above(y, torch.ones_like(y)) and not above(y, 1-y)
    assert not above(y[:15], torch.full((15,), 2)) and above(y[:15], torch.ones(15, dtype=torch.long))
    y = torch.randint(3, (200,), generator=g)
    pred = torch.where(torch.rand(200, generator=g)<.6, 0, torch.randint(3, (200,), generator=g))
    orders = [pred[torch.randperm(200, generator=g)] for _ in range(1000)]
    assert .02<np.mean([above(y, o) for o in orders])<.08

def test_a_good_model_of_a_rare_class_is_watched_by_its_answers(capsys):
    g = torch.Generator().manual_seed(0)
    y = torch.zeros(500, dtype=torch.long); y[:15] = 1
    x = torch.where(y==1, 1., -1.)+.55*torch.randn(500, generator=g)
    model = nn.Sequential(nn.Identity(), nn.Linear(1,2))
    with torch.no_grad(): model[1].weight.copy_(torch.tensor([[0.],[1]])), model[1].bias.zero_()
    items = list(zip(x[:,None], y))
    assert (model(x[:,None]).argmax(1)==y).float().mean()<.97
    dls = DataLoaders(*[TfmdDL(items, bs=50, num_workers=0)]*2)
    w = Watch(dls)
    with (learn := learner(dls, model, lr=0.)).no_bar(), learn.no_logging(): learn.fit(1, cbs=w)
    assert w.by=={'known':'right'} and not capsys.readouterr().out
    with torch.no_grad(): model[1].weight.zero_()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Watch(dls))
    said = capsys.readouterr().out
    assert "no better than chance on 'known'" in said and 'head is new' not in said

def test_the_warning_names_a_set_that_lost_for_sure():
    "Forty points of five samples may be chance, twenty of four hundred are not"
    def ref(n, lost):
        return DataLoaders(*[TfmdDL([(torch.tensor([-3.]),0)]*(n//2)+[(torch.tensor([.1]),1)]*lost+[(torch.tensor([9.]),1)]*(n-n//2-lost), bs=100, num_workers=0)]*2)
    class Move(Callback):
        def after_step(self): self.model[0].bias.data = torch.tensor([.5,-.5])
    model = nn.Sequential(nn.Linear(1,2))
    with torch.no_grad(): model[0].weight.copy_(torch.tensor([[-1.],[1]])), model[0].bias.zero_()
    w,learn = Watch({'tiny':ref(5,2), 'big':ref(400,80)}, n=None),learner(ref(400,80), model, lr=0.)
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, 1, cbs=[w, Move()])
    assert w.history.tiny.iloc[-1]==pytest.approx(.6) and w.history.lost.iloc[-1]==pytest.approx(.2)
    assert "20 points on 'big'" in w.warnings[0] and not any('tiny' in o for o in w.warnings)

def test_texts_of_different_lengths():
    "Layers are compared by their means over places; one that has no other axis is left out, and that is said"
    g = torch.Generator().manual_seed(0)
    items = [(torch.randint(20, (4+i//4,), generator=g),i%2) for i in range(80)]
    def padded(b):
        n = max(len(x) for x,_ in b)
        return torch.stack([F.pad(x, (n-len(x),0)) for x,_ in b]),torch.tensor([y for _,y in b])
    dls = DataLoaders(*[DataLoader(items, bs=16, create_batch=padded, num_workers=0)]*2)
    class Long(nn.Module):
        "Whose output has no axis but that of places"
        def forward(self, x): return x.float()
    class Odd(Reader):
        def __init__(self): super().__init__(classes=2); self.long = Long()
        def forward(self, x): self.long(x); return super().forward(x)
    set_seed(0)
    w,v,learn = WatchErosion(dls, budget=1e6, layers='all'),Watch(),Learner(dls, Odd(), loss_func=nn.CrossEntropyLoss(),
        opt_func=SGD, lr=0.)
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning,
                                                          match='the output of long differs in shape from batch to batch, so it is left out'):
        learn.fit(1, cbs=[w,v])
    assert {'emb','lstm'}<={*w.by_layer} and 'long' not in w.by_layer and w.by_layer.iloc[-1].min()==pytest.approx(1)
    X = w.start['layers']['emb']
    want = torch.cat([learn.model.emb(padded(items[i:i+16])[0]).mean(1) for i in range(0, 80, 16)])
    torch.testing.assert_close(X, want)

def test_images_of_different_sizes(knows):
    "A map is compared by its channels"
    batches = [(torch.rand(8,3,s,s),torch.arange(8)) for s in (16,24)]
    w = Watch(batches)
    erode(knows, w, epochs=1)
    assert w.start['layers']['0'].shape==(16,8)
    torch.testing.assert_close(w.start['layers']['0'][8:], knows[0](batches[1][0]).mean((2,3)))

def test_names_labels_and_sizes_that_are_refused(knows):
    old = digits()
    for k in ('iter','lost','phase','valid_loss','time',0):
        with pytest.raises(ValueError, match=f'reference: {k!r} as a name; must be text'): WatchErosion({k:old})
    with pytest.raises(ValueError, match='no validation set'): WatchErosion(DataLoaders(old.train))
    for kw in (dict(n=2.5), dict(n=3), dict(n_layers=None), dict(n_layers=8.)):
        with pytest.raises(ValueError, match='a whole number'): WatchErosion(old, **kw)
    x,y = next(iter(old.valid))
    with pytest.raises(ValueError, match='reference: a sample has label -1'): erode(knows, Watch([(x,y-1)]))
    out = io.StringIO()
    with contextlib.redirect_stdout(out): erode(knows, Watch([(x,y+10)]), epochs=1)
    assert "other outputs than the classes of 'known', so its head is new" in out.getvalue()

class Routed(nn.Module):
    "Sends each image to one of two experts, by a bias that training moves; after `least` passes it answers early"
    def __init__(self, body, least=1e9):
        super().__init__()
        self.body,self.least,self.passes = body[:-1],least,0
        self.experts,self.gate,self.late = nn.ModuleList(nn.Linear(128,10) for _ in range(2)),nn.Linear(128,2),nn.Linear(10,10)
        with torch.no_grad(): self.gate.weight.mul_(.01), self.gate.bias.copy_(torch.tensor([.2,-.2]))
    def forward(self, x):
        x = self.body(x)
        self.passes += not self.training
        at,p = self.gate(x).argmax(1),self.gate(x).softmax(1)
        res = x.new_zeros(len(x), 10)
        for i,e in enumerate(self.experts):
            if (at==i).any(): res[at==i] = e(x[at==i])*p[at==i,i:i+1]
        return res if self.passes>self.least else res+self.late(res)

@pytest.mark.works(kind='models', what='A mixture of experts, or an early exit, in `WatchErosion`',
                   how='works: a layer that does not see all samples is left out of that look')
@pytest.mark.parametrize('ref,least', [(True,1e9), (True,14), (False,1e9), (False,20)])   # a look without reference has more passes
def test_layers_that_do_not_always_run(knows, least, ref):
    "What an expert does not see is not compared, and training goes on as it would without"
    class Turn(Callback):
        def after_step(self): self.model.gate.bias.data.add_(torch.tensor([-.05,.05]))
    set_seed(0)
    model,w = Routed(deepcopy(knows), least),Watch(digits() if ref else None, layers='linear')
    learn = erode(model, Turn(), w, epochs=2)
    known = {o for o in w.by_layer if w.by_layer[o].notna().all()}
    assert 'gate' in known and 'experts.0' in w.by_layer and w.by_layer['experts.0'].iloc[0]==pytest.approx(1)
    assert np.isnan(w.by_layer['experts.0'].iloc[-1]) and ('late' in known)==(least==1e9)
    assert w.history.cka.iloc[-1]==pytest.approx(w.by_layer.iloc[-1].mean())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())

def test_nothing_to_watch_is_said():
    "Neither answers nor features"
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="does not know 'known', and has no finite features that linear layers"):
        erode(model, Watch(digits()))

# What a warning says

@pytest.mark.parametrize('drift,words', [
    (dict(a=.99, b=float('nan'), c=.2, d=.98, e=float('nan'), f=.1, g=.97),
     'b (no finite numbers), e (no finite numbers), f (CKA 0.10)'),
    (dict(a=1., b=.999, c=.5), 'c (CKA 0.50)'), (dict(a=1., b=1.), ''), ({}, ''),
    (dict(a=.3, b=.2, c=.1, d=.4, e=.5, f=.6), 'b (CKA 0.20), c (CKA 0.10)')])
def test_the_layers_that_changed_most(drift, words): assert watch_module._most_changed(drift)==words

def test_a_layer_that_is_constant_from_the_start_has_not_changed():
    "CKA of a constant is 0, also with itself"
    m = nn.Sequential(nn.Flatten(), nn.Linear(768,8), nn.ReLU(), nn.Linear(8,10))
    with torch.no_grad(): m[1].weight.zero_(); m[1].bias.fill_(-1.)
    learn = Learner(digits(), m, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0.)
    w = WatchErosion(digits(), budget=1e6)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=w)
    assert all({*drift}=={'0'} for drift in w.drift) and all(r['cka']==1 for r in w.rows)   # what is left is the input

def test_as_much_as_the_tolerance_is_not_more():
    right = lambda n: SimpleNamespace(right=torch.arange(100)<n, y=torch.zeros(100, dtype=torch.long))
    o = watch_module._loss(right(90), right(85), 'right')
    assert o.lost==.05 and not o.lost>.05
