"Phases and evaluation sets beside other people's callbacks, on Learners that are not ours."
import warnings
from copy import copy, deepcopy
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.all import (ChannelsLast, CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip,
                                 SaveModelCallback)
from fastai.vision.all import Callback, Learner, accuracy, load_learner, partial, set_seed
from trainings import Bf16
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import EvalSets, evaluate, pattern_sets
from feature_erosion.learner import erosion_learner
from feature_erosion.measures.attribution import grad_cam
from feature_erosion.measures.plasticity import PlasticityLog, grad_norm, hessian_rank
from feature_erosion.mitigations import DERpp, EWC, Replay, fisher
from feature_erosion.patterns import ColorSquare, CornerSquare, Stripes
from feature_erosion.phases import Phase
from feature_erosion.recover import Recovery
from feature_erosion.unlearning import saliency
from feature_erosion.watch import WatchErosion

works = partial(pytest.mark.works, kind='callbacks')

def net():
    return nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                         nn.Linear(128,10))

@pytest.fixture
def dls():
    set_seed(0)
    return digits_dls(n=320, n_valid=100)

@pytest.fixture
def learn(dls, tmp_path):
    "A plain fastai Learner"
    return Learner(dls, net(), metrics=accuracy, path=tmp_path)

def phases(dls):
    return [Phase('pretrain', 2, dls), Phase('erode', iters=7, dls=dls.inject(ColorSquare(4))), Phase('relearn', 1, dls)]

def check(learn, dls):
    "Four whole rows, three phases, and a Learner as it was before"
    h = learn.recorder.history
    assert h.phase.tolist()==['pretrain']*2+['erode']*2+['relearn'] and h.notna().all().all()
    assert list(learn.snapshots)==['start','pretrain','erode','relearn']
    assert learn.dls is dls and learn.metrics.attrgot('name')==['accuracy'] and '_call_one' not in learn.__dict__
    return h

@works(what='a plain fastai `Learner`', how='works: it is afterwards as it was')
def test_plain_learner(learn, dls):
    learn.fit_phases(phases(dls))
    check(learn, dls)
    assert learn.recorder.plot_phases().get_xlabel()=='iteration'

@works(what='`MixedPrecision` (`to_fp16`, `to_bf16`)', how='works: evaluation runs in the same precision')
@pytest.mark.parametrize('cast', ['to_fp16','to_bf16'])
def test_mixed_precision(learn, dls, cast):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # torch: no CUDA here
        getattr(learn, cast)().fit_phases(phases(dls))
    check(learn, dls)
    assert learn.mixed_precision.autocast is None

def test_bf16_on_cpu(learn, dls):
    "fastai autocasts on CUDA only; here with autocast that works on a CPU. Evaluation runs in the same precision"
    seen = []
    hook = learn.model[0].register_forward_hook(lambda m,i,o: seen.append((m.training, o.dtype)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit_phases(phases(dls), cbs=Bf16())
    hook.remove()
    check(learn, dls)
    assert {True,False}=={t for t,_ in seen} and {d for _,d in seen}=={torch.bfloat16}

def test_csv_logger(learn, dls):
    learn.fit_phases(phases(dls), cbs=CSVLogger())
    df,h = pd.read_csv(learn.path/'history.csv'),check(learn, dls)
    assert {'clean','pattern','conflict','conflict_picture'} <= set(df)
    for c in ('train_loss','valid_loss','accuracy','clean'): assert np.allclose(df[c], h[c].astype(float), atol=1e-5), c

@works(what="`SaveModelCallback(monitor='clean')` over all phases", how='works: the best are back at the end')
def test_save_model(learn, dls):
    learn.fit_phases(phases(dls), cbs=SaveModelCallback(monitor='clean', fname='best'))
    h = check(learn, dls)
    assert evaluate(learn.model, dls.valid)['accuracy']==pytest.approx(h.clean.max())   # the best weights are back
    with learn.at_phase('relearn'): assert evaluate(learn.model, dls.valid)['accuracy']==pytest.approx(h.clean.iloc[-1])
    with pytest.raises(ValueError, match='arguments of their own'): learn.look_inside(['pretrain','relearn'])

def test_early_stopping(learn, dls):
    "It ends the fit, not the phase; what was done is kept"
    learn.fit_phases([Phase('a', 2, lr=0.), Phase('b', 9, lr=0.), Phase('c', 2)],
                     cbs=EarlyStoppingCallback(monitor='train_loss', patience=3, min_delta=10.))
    h = learn.recorder.history
    assert h.phase.tolist()==['a']*2+['b']*2 and learn.recorder.phases.stop_epoch.tolist()==[2,4]
    assert list(learn.snapshots)==['start','a','b']

@works(what='the progress bar', how='works: one bar for all phases')
def test_progress(learn, dls, capsys):
    assert hasattr(learn, 'progress')
    learn.fit_phases(phases(dls))
    check(learn, dls)
    out = capsys.readouterr().out
    assert 'conflict_picture' in out and 'Epoch 1/5' in out

@works(what='`lr_find` before a fit', how='works: neither phases nor evaluation sets run in it')
def test_lr_find_before(learn, dls):
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    learn.add_cb(EvalSets(pattern_sets(dls, ColorSquare(4))))
    learn.lr_find(num_it=12, show_plot=False)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    learn.fit_phases(phases(dls))
    check(learn, dls)

@works(what='a second fit of the same Learner', how='works: a history of its own, snapshots of both')
def test_second_fit_phases(learn, dls):
    learn.fit_phases(phases(dls))
    learn.fit_phases([Phase('again', 1, dls.inject(Stripes(4)))])
    assert learn.recorder.history.phase.tolist()==['again']
    assert list(learn.snapshots)==['pretrain','erode','relearn','start','again']   # as they were taken
    learn.fit_one_cycle(1)
    assert len(learn.recorder.phases)==0 and 'clean' not in learn.recorder.history

@works(what='`validate` and `get_preds` after a fit', how='works: the history stays')
def test_history_outlives_validation(learn, dls):
    learn.fit_phases(phases(dls))
    h = learn.recorder.history
    with learn.no_bar(), learn.no_logging(): learn.validate(); learn.get_preds()
    assert learn.recorder.history.equals(h)

@works(what='`GradientAccumulation`, `GradientClip`, `ChannelsLast`', how='works: together')
def test_gradient_accumulation_and_channels_last(learn, dls):
    learn.add_cbs([ChannelsLast(), GradientAccumulation(n_acc=128), GradientClip(1.)])
    learn.fit_phases(phases(dls))
    check(learn, dls)

def test_other_models_and_shapes(dls, tmp_path):
    for arch,kw in (('resnet20', dict(width=.25)), ('torchvision/mobilenet_v3_small', {}), ('timm/resnet10t', {})):
        learn = erosion_learner(dls, arch, path=tmp_path, lr=.01, **kw)
        learn.fit_phases([Phase('a', iters=2), Phase('b', iters=2, dls=dls.inject(CornerSquare(2)))])
        assert learn.recorder.history.phase.tolist()==['a','b']

def test_same_seed_same_result(dls, tmp_path):
    def run():
        set_seed(1)
        d = digits_dls(n=320, n_valid=100)
        learn = erosion_learner(d, 'resnet20', width=.25)
        learn.fit_phases(phases(d))
        return learn.model.state_dict()
    a,b = run(),run()
    for k in a: assert torch.equal(a[k], b[k]), k

@works(what='`learn.export` after a fit', how='works: without the data; what is loaded predicts the same')
@pytest.mark.parametrize('inject', [False,True])
@pytest.mark.filterwarnings('ignore:load_learner')
def test_export(learn, dls, inject):
    "Data in memory, painted or not, are left out of the exported Learner, which predicts as before"
    learn.fit_phases(phases(dls))
    if inject: learn.dls = dls.inject(ColorSquare(4))
    im = dls.valid_ds.x[0].numpy()
    learn.export('learner.pkl')
    loaded = load_learner(learn.path/'learner.pkl')
    assert len(loaded.dls.train_ds)==0 and len(learn.dls.train_ds)==320
    assert torch.equal(loaded.predict(im)[2], learn.predict(im)[2])

holders = dict(evalsets=lambda d: EvalSets(dict(clean=d.valid)), replay=lambda d: Replay(d, 40), derpp=lambda d: DERpp(d, 40),
               ewc=lambda d: EWC(d, n=8), watch=lambda d: WatchErosion(d),
               recovery=lambda d: Recovery(d.train, d.valid, few=(1,), at=(0,), seeds=1, features='last'),
               plasticity=lambda d: PlasticityLog())

@pytest.mark.parametrize('name', holders)
@pytest.mark.filterwarnings('ignore:load_learner')
def test_export_with_callbacks_that_hold_data(name, tmp_path):
    "No image is in the file, and what is loaded predicts; to train it, such a callback is to be given anew"
    data = digits_dls(n=64, n_valid=40, bs=32)
    for ds in (data.train_ds,data.valid_ds): ds.x.random_(256, generator=torch.Generator().manual_seed(0))
    seen = [ds.x[i].flatten()[:64].numpy().tobytes() for ds in (data.train_ds,data.valid_ds) for i in range(len(ds))]
    cb = holders[name](data)
    learn = Learner(data, nn.Sequential(nn.Flatten(), nn.Linear(768,16), nn.ReLU(), nn.Linear(16,10)), metrics=accuracy, cbs=cb,
                    path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.export('l.pkl')
        file = (tmp_path/'l.pkl').read_bytes()
        assert not any(o in file for o in seen)
        loaded,im = load_learner(tmp_path/'l.pkl'),data.valid_ds.x[0].numpy()
        assert torch.equal(loaded.predict(im)[2], learn.predict(im)[2])
        for twin in (copy(cb),deepcopy(cb)): assert all(getattr(twin, k) is getattr(cb, k) for k in cb._data)
        loaded.dls = data
        if name!='plasticity':
            with loaded.no_bar(), loaded.no_logging(), pytest.raises(AttributeError,
                                                                     match='were left out when the Learner was exported'):
                loaded.fit(1)
        learn.fit(1)

@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_gradients_where_none_are_recorded(dls, context):
    "What needs gradients computes them, and the context is left as it was"
    m,dl = net(),dls.valid
    def nonzero(d): return [o.sum().item() for o in d.values()]
    fs = (lambda: grad_norm(m, dl, n=20), lambda: hessian_rank(m, dl, n=20, steps=3), lambda: nonzero(fisher(m, dl, n=20)),
          lambda: nonzero(saliency(m, dl)), lambda: grad_cam(m, dl.one_batch()[0][:4].clone()).sum().item())
    want = [f() for f in fs]
    assert all(np.sum(o)>0 for o in want)
    with context():
        before = torch.is_grad_enabled(),torch.is_inference_mode_enabled()
        assert [f() for f in fs]==want
        assert (torch.is_grad_enabled(),torch.is_inference_mode_enabled())==before

class Negates(Callback):
    "Prepares images in a way that only the Learner's own loop knows"
    def before_batch(self): self.learn.xb = (-self.xb[0],)

@works(what='a callback that changes inputs or answers in validation, too', how='warns: evaluation sets and watchers do not see it')
@pytest.mark.parametrize('cb', [lambda dls: EvalSets({'same':dls.valid}, at=[]), lambda dls: WatchErosion(dls, budget=1e6)], ids=['sets','watch'])
def test_inputs_that_a_callback_prepares(learn, dls, cb):
    with learn.no_bar(), learn.no_logging():
        with pytest.warns(UserWarning, match='negates may change inputs in `before_batch`'): learn.fit(1, cbs=[Negates(), cb(dls)])
        with warnings.catch_warnings():
            warnings.filterwarnings('error', message='.*may change inputs')
            learn.fit(1, cbs=cb(dls))
