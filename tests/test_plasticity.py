"Dormant units, norms, learning again and erosion against closed forms, numpy and autograd; the log beside other people's callbacks."
import random
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.all import CSVLogger, GradientAccumulation, GradientClip, MixUp, SaveModelCallback
from fastai.vision.all import Callback, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat, Learner, SGD, accuracy, error_rate, partial, set_seed
from feature_erosion.callbacks import LoggedCallback
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import EvalSets, evaluate, evaluating, pattern_sets
from feature_erosion.learner import erosion_learner
from feature_erosion.mitigations import fisher, grouped
from feature_erosion.models import create_model
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import PerPhase, Phase
from feature_erosion.erosion import (Erosion, epochs_to, eri, erosion_summary, forgetting, half_life, max_forgetting,
                                     pattern_reliance, phase_table, relearning_gap)
from feature_erosion.loaders import fixed_dl, subset_dl, unaugmented
from feature_erosion.measures.attribution import grad_cam
from feature_erosion.measures.plasticity import (Dormant, PlasticityLog, dormant_units, grad_norm, hessian_rank, penultimate,
                                                 plasticity_measures, unit_scores, weight_norm, weight_norms)
from feature_erosion.unlearning import saliency

quick = settings(max_examples=60, deadline=None)
share = st.floats(0, 1, allow_subnormal=False)

def net():
    return nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(4),
                         nn.Flatten(), nn.Dropout(.2), nn.Linear(128,10))

@pytest.fixture
def dls():
    set_seed(0)
    return digits_dls(n=320, n_valid=100, bs=64)

@pytest.fixture
def images(dls):
    return tuple(torch.cat(o) for o in zip(*[(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x,y in dls.valid]))

def quiet_fit(learn, n, cbs=None):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=cbs)

def quiet_phases(learn, phases, cbs=None):
    with learn.no_bar(), learn.no_logging(): learn.fit_phases(phases, cbs=cbs)

# dormant units

@quick
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 20), st.integers(1, 7))
def test_scores_are_numpys(seed, units, n, bs):
    "Linear layer and ReLU, any batch size: the definition, written down again"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g)
    m = nn.Sequential(nn.Linear(3, units), nn.ReLU(), nn.Linear(units, 2))
    for p in m.parameters(): p.data = torch.randn(p.shape, generator=g)
    h = np.maximum(x.numpy().astype(float)@m[0].weight.data.numpy().T.astype(float) + m[0].bias.data.numpy(), 0).mean(0)
    want = h/(h.mean()+1e-9)
    batches = [(x[i:i+bs], torch.zeros(len(x[i:i+bs]), dtype=torch.long)) for i in range(0, n, bs)]
    got = unit_scores(m, batches)
    assert list(got)==['1'] and np.allclose(got['1'], want, atol=1e-5)
    assert dormant_units(m, batches).dormant['1']==(h==0).sum()

@pytest.mark.parametrize('dead', [0,3,8])
def test_known_dead_channels(dls, dead):
    m = net()
    m[1].weight.data[:dead],m[1].bias.data[:dead] = 0.,-1.
    m[1].bias.data[dead:] = 1.
    d = dormant_units(m, dls.valid)
    assert isinstance(d, Dormant) and d.dormant.tolist()==[dead] and d.units.tolist()==[8] and d.total==dead/8
    for bs in (1,33,100): assert dormant_units(m, dls.valid.new(bs=bs)).equals(d)
    alive = net()
    alive[1].bias.data[:] = 10.
    assert dormant_units({'z':m, 'a':alive}, dls.valid).total.to_dict()=={'z':dead/8, 'a':0.}

def test_quiet_channel_at_tau(dls):
    "One channel at a hundredth of the others is dormant at τ=.1, not at 0"
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.Flatten(), nn.Linear(784,10))
    m[0].weight.data.zero_()
    m[0].bias.data = torch.tensor([1.,1.,1.,.01])
    assert unit_scores(m, dls.valid)['1']==pytest.approx(np.array([1,1,1,.01])/.7525, rel=1e-5)
    assert [dormant_units(m, dls.valid, tau=t).dormant['1'] for t in (0,.013,.0134,.1)]==[0,0,1,1]

def test_functional_relu_is_measured_at_blocks(dls):
    m = create_model('resnet20', 10, width=.25)
    d = dormant_units(m, dls.valid)
    assert list(d.index)==[f'layer{i}.{j}' for i in (1,2,3) for j in (0,1,2)] and d.units.tolist()==[4]*3+[8]*3+[16]*3
    m.layer2[1].bn2.weight.data.zero_()
    m.layer2[1].bn2.bias.data.fill_(-1e6)
    assert dormant_units(m, dls.valid).dormant.tolist()==[0]*4+[8]+dormant_units(m, dls.valid).dormant.tolist()[5:]

def test_wrong_arguments(dls):
    for tau in (-1, 1, 2, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='tau='): dormant_units(net(), dls.valid, tau=tau)
    with pytest.raises(ValueError, match='layers=None: no activations'):
        dormant_units(nn.Sequential(nn.Flatten(), nn.Linear(768,10)), dls.valid)
    with pytest.raises(ValueError, match='no linear layer'):
        penultimate(nn.Sequential(nn.Conv2d(3,10,16), nn.Flatten()), dls.valid)
    with pytest.raises(ValueError, match='frozen'): grad_norm(net().requires_grad_(False), dls.valid)
    with pytest.raises(ValueError, match='reduction'): grad_norm(net(), dls.valid, nn.CrossEntropyLoss(reduction='none'))
    with pytest.raises(ValueError, match="measures=\\['rank'\\]"): plasticity_measures(net(), dls.valid, measures=['rank'])

# norms and features

def test_norms_add_up():
    m = create_model('vgg19', 10, width=.125)
    table = weight_norms(m)
    assert (table['norm']**2).sum()**.5==pytest.approx(weight_norm(m), rel=1e-6)
    assert table.params.sum()==sum(p.numel() for p in m.parameters())
    for p in m.parameters(): p.data.mul_(3)
    assert weight_norm(m)==pytest.approx(3*(table['norm']**2).sum()**.5, rel=1e-5)

def test_shared_weights_count_once():
    m = nn.Sequential(nn.Linear(3,3,bias=False), nn.Linear(3,3,bias=False))
    m[1].weight = m[0].weight
    assert weight_norm(m)==pytest.approx(m[0].weight.norm().item(), rel=1e-6) and len(weight_norms(m))==1

@pytest.mark.parametrize('bs', [1,7,64,100])
def test_gradient_is_autograds(dls, images, bs):
    set_seed(0)
    m,(x,y) = net(),images
    m.eval()
    F.cross_entropy(m(x), y).backward()
    want = sum(p.grad.double().pow(2).sum().item() for p in m.parameters())**.5
    m.zero_grad()
    m.train()
    assert grad_norm(m, dls.valid.new(bs=bs))==pytest.approx(want, rel=1e-4) and all(p.grad is None for p in m.parameters())

class Recurrent(nn.Module):
    "Notes for each pass, forward and backward, whether cuDNN may be used"
    def __init__(self, rnn):
        super().__init__()
        self.conv,self.rnn,self.out,self.seen = nn.Conv2d(3, 4, 3, 8),rnn,nn.Linear(8, 10),[]
    def note(self, *args): self.seen.append(torch.backends.cudnn.enabled)
    def forward(self, x):
        self.note()
        x = self.conv(x).flatten(2).movedim(1, 2)
        if x.requires_grad: x.register_hook(self.note)
        x = self.rnn(x)
        return self.out((x[0] if isinstance(x, tuple) else x)[:,-1])

@pytest.mark.parametrize('enabled', [True,False])
@pytest.mark.parametrize('measure', [fisher, grad_norm, partial(hessian_rank, steps=2), saliency, grad_cam])
def test_gradients_of_recurrent_networks_without_cudnn(measure, enabled, monkeypatch):
    "It has none in eval mode (`cudnn RNN backward can only be called in training mode`); nothing else goes without it"
    monkeypatch.setattr(torch.backends.cudnn, 'enabled', enabled)
    x,y = torch.randn(6,3,16,16),torch.arange(6)
    data = x if measure is grad_cam else [(x,y)]
    for rnn,used in (nn.LSTM(4, 8, batch_first=True), False), (nn.Linear(4, 8), enabled):
        m = Recurrent(rnn)
        measure(m, data)
        assert len(m.seen)>1 and m.seen[-1] is used and torch.backends.cudnn.enabled is enabled
        assert measure is grad_cam or {*m.seen}=={used}   # it finds a layer without gradients
    with pytest.raises(RuntimeError): measure(Recurrent(nn.LSTM(5, 8, batch_first=True)), data)
    assert torch.backends.cudnn.enabled is enabled

def test_gradient_under_no_grad_and_with_fastais_loss(dls):
    set_seed(0)
    m = net()
    with torch.no_grad(): assert grad_norm(m, dls.valid, CrossEntropyLossFlat())==pytest.approx(grad_norm(m, dls.valid), rel=1e-6)

@pytest.mark.parametrize('kind', [torch.int32, torch.int8, torch.uint8, torch.int64])
def test_labels_of_any_kind_of_integer(images, kind):
    "Also in a column, and those that the loss leaves out; `F.cross_entropy` takes none of these but int64, in a row"
    set_seed(0)
    m,(x,y) = net().eval(),images
    if kind!=torch.uint8: y = y.where(torch.arange(len(y))%5>0, -100)
    gs = torch.autograd.grad(F.cross_entropy(m(x), y), list(m.parameters()))
    want = sum(g.double().square().sum().item() for g in gs)**.5
    for y2 in (y.to(kind), y.to(kind)[:,None]):
        batches = [(x[:64],y2[:64]),(x[64:],y2[64:])]
        assert grad_norm(m, batches)==pytest.approx(want, rel=1e-4)
        assert plasticity_measures(m, batches, measures='grad_norm')['grad_norm']==pytest.approx(want, rel=1e-4)

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, FocalLossFlat, nn.CrossEntropyLoss])
def test_gradient_of_the_first_target(dls, loss):
    "Of image, class and group, as `grouped` makes them, the loss is that of the class"
    m,dl = net(),grouped(dls.inject(ColorSquare(4))).train
    with unaugmented(dl): two = [(x,y) for x,y,*_ in fixed_dl(dl)]
    assert grad_norm(m, dl, loss())==pytest.approx(grad_norm(m, two, loss()), rel=1e-6)

def test_penultimate_times_head_is_the_output(dls, images):
    for m,head in ((create_model('resnet20', 10, width=.25), 'linear'), (create_model('vgg19', 10, width=.125), 'classifier'),
                   (create_model('torchvision/mobilenet_v3_small', 10), 'classifier.3')):
        with evaluating(m): want = m(images[0][:30])
        got = m.get_submodule(head)(penultimate(m, [(images[0][:30], images[1][:30])]))
        assert torch.allclose(got, want, atol=1e-4), head

def test_effective_rank_is_numpys(dls, images):
    "Of centred features: exp of the entropy of the shares of singular values"
    set_seed(0)
    m = net()
    with evaluating(m): x = m[:-1](images[0]).double().numpy()
    s = np.linalg.svd(x-x.mean(0), compute_uv=False)
    p = s[s>1e-9*s[0]]/s.sum()
    assert plasticity_measures(m, dls.valid)['effective_rank']==pytest.approx(np.exp(-(p*np.log(p)).sum()), rel=1e-3)

def test_measures_leave_no_trace(dls):
    m = net().train()
    m[1].eval()
    for p in m.parameters(): p.grad = torch.full_like(p, 3.)
    modes,state,py,rng,npy = [o.training for o in m.modules()],{k:v.clone() for k,v in m.state_dict().items()},random.getstate(),torch.get_rng_state(),np.random.get_state()[1].copy()
    a = plasticity_measures(m, dls.train, n=90)
    assert random.getstate()==py and torch.equal(torch.get_rng_state(), rng) and (np.random.get_state()[1]==npy).all()
    assert a==plasticity_measures(m, dls.train, n=90) and dls.train_ds.split_idx==0                     # no augmentation
    assert [o.training for o in m.modules()]==modes and all((p.grad==3).all() for p in m.parameters())
    assert all(torch.equal(v, state[k]) for k,v in m.state_dict().items())
    assert not any(o._forward_hooks or o._forward_pre_hooks for o in m.modules())

def test_a_dead_network_is_measured(dls):
    "Nothing fires, all features are alike: the log of a run must survive that"
    m = nn.Sequential(nn.Flatten(), nn.Linear(768,8), nn.ReLU(), nn.Linear(8,10))
    m[1].weight.data.zero_()
    m[1].bias.data.fill_(-1.)
    got = plasticity_measures(m, dls.valid)
    assert got['dormant']==1 and got['effective_rank']==0 and set(got)=={'dormant','weight_norm','grad_norm','effective_rank'}
    for p in m.parameters(): p.data.fill_(float('nan'))
    assert np.isnan(plasticity_measures(m, dls.valid)['effective_rank'])

# the log

def trained(dls_kw, *cbs, n=2, **kw):
    set_seed(1)
    learn = Learner(digits_dls(n=320, n_valid=100, **dls_kw), net(), opt_func=SGD, lr=.1, metrics=accuracy, **kw)
    set_seed(1)
    quiet_fit(learn, n, list(cbs))
    return learn

@pytest.mark.parametrize('others', [list, lambda: [GradientAccumulation(n_acc=150), GradientClip(1.)], lambda: [MixUp()]],
                         ids=['alone','accumulate','mixup'])
def test_same_training_bit_for_bit(others):
    "Crops, dropout, BatchNorm; gradients that outlive an epoch; other random callbacks"
    with_,without = (trained(dict(bs=64), *others(), *log) for log in ([PlasticityLog(n=60)],[]))
    a,b = with_.model.state_dict(),without.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert with_.recorder.losses==without.recorder.losses and len(with_.recorder.plasticity)==3

def test_beside_eval_sets_and_csv(dls, tmp_path):
    "In either order, with phases, with a phase that ends inside an epoch"
    easy,cols = dls.inject(ColorSquare(4)),['dormant','weight_norm','grad_norm','effective_rank']
    got = []
    for flip in (1,-1):
        set_seed(0)
        for d in (dls,easy): d.train.rng = random.Random(0)
        learn = Learner(dls, net(), opt_func=SGD, lr=.1, metrics=accuracy, path=tmp_path)
        cbs = [PlasticityLog(n=60), EvalSets(pattern_sets(easy))][::flip]
        quiet_phases(learn, [Phase('a', 2), Phase('b', iters=7, dls=easy)],
                     cbs=[*cbs, CSVLogger(), SaveModelCallback(monitor='weight_norm')])
        h,p = learn.recorder.history,learn.recorder.plasticity
        assert h[[*cols, 'clean']].notna().all().all() and list(learn.metrics.attrgot('name'))==['accuracy']
        assert p[cols].iloc[1:].values.tolist()==h[cols].values.tolist() and p.total_iter.tolist()==[0,5,10,15,17]
        assert p.phase.tolist()==['a']*3+['b']*2
        csv = pd.read_csv(tmp_path/'history.csv')
        assert np.allclose(csv[cols], h[cols].astype(float), atol=1e-5)
        got.append(h[[*cols, 'clean']])
    assert got[0].equals(got[1])

def test_measured_on_clean_images_that_stay_the_same(dls):
    "Also where the Learner's own data wear squares"
    easy = dls.inject(ColorSquare(4))
    learn = Learner(easy, net(), opt_func=SGD, lr=.1)
    quiet_fit(learn, 1, PlasticityLog(n=60, measures='grad_norm'))
    assert learn.recorder.plasticity.grad_norm.iloc[-1]==pytest.approx(grad_norm(learn.model, dls.valid, n=60), rel=1e-6)
    mine = [dls.valid.one_batch()]
    quiet_fit(learn, 1, PlasticityLog(mine, measures='grad_norm'))
    assert learn.recorder.plasticity.grad_norm.iloc[-1]==pytest.approx(grad_norm(learn.model, mine), rel=1e-6)

def test_validation_keeps_the_history(dls):
    learn = Learner(dls, net(), opt_func=SGD, lr=.1, metrics=accuracy, cbs=PlasticityLog(n=60))
    quiet_fit(learn, 2)
    h,p = learn.recorder.history,learn.recorder.plasticity
    with learn.no_bar(), learn.no_logging(): assert len(learn.validate())==2; learn.get_preds()
    assert learn.recorder.history.equals(h) and learn.recorder.plasticity.equals(p)

def test_a_log_of_ones_own(dls):
    class Bias(LoggedCallback):
        columns,table = 'bias','biases'   # one may do without a list
        def look(self): return dict(bias=self.model[-1].bias.abs().max().item())
    learn = Learner(dls, net(), opt_func=SGD, lr=.1)
    quiet_fit(learn, 2, [Bias(), PlasticityLog(measures='weight_norm')])
    assert learn.recorder.history.bias.iloc[-1]==learn.model[-1].bias.abs().max().item()
    assert 'weight_norm' in learn.recorder.history

def test_network_without_a_linear_layer_says_so(dls):
    conv = nn.Sequential(nn.Conv2d(3,8,3,2), nn.ReLU(), nn.Conv2d(8,10,7), nn.Flatten())
    learn = Learner(dls, conv, opt_func=SGD, lr=.1)
    with pytest.raises(ValueError, match='no linear layer'): quiet_fit(learn, 1, PlasticityLog())
    assert len(learn.metrics)==0
    quiet_fit(learn, 1, PlasticityLog(measures=['dormant','grad_norm']))
    assert learn.recorder.history[['dormant','grad_norm']].notna().all().all()

# learning again

curves = st.lists(share, min_size=2, max_size=12)

@quick
@given(curves, curves, share)
def test_gap(a, b, level):
    T = min(len(a), len(b))
    g,back = relearning_gap(a, b, level),relearning_gap(b, a, level)
    assert g.gap==pytest.approx(np.trapezoid(a[:T])-np.trapezoid(b[:T]), abs=1e-9) and g.gap==pytest.approx(-back.gap, abs=1e-9)
    assert relearning_gap(a, a, level).gap==0 and g.attrs['left_out']==(len(a)-T, len(b)-T)
    for c,e in zip((a,b), g.epochs_to):
        assert np.isnan(e)==(max(c[:T])<level)
        if e>1: assert np.interp(e, range(1, T+1), c[:T])==pytest.approx(level, abs=1e-9) and max(c[:int(np.ceil(e))-1])<level

def test_gap_of_lines():
    "Slopes .1 and .05 over nine epochs: a triangle of base 8 and height .4, and a rectangle"
    t = np.arange(9)
    assert relearning_gap(.1*t, .05*t, .2).gap==pytest.approx(8*.4/2)
    assert relearning_gap(.1*t+.2, .1*t, .2).gap==pytest.approx(8*.2)
    assert relearning_gap(.1*t, .05*t, .25).epochs_to.tolist()==pytest.approx([3.5, 6])
    with pytest.raises(ValueError, match=r'level=80.*try 0\.8'): relearning_gap(.1*t, .05*t, 80)
    with pytest.raises(ValueError, match='scratch: accuracies must be in 0…1; got 0…80. Divide percentages by 100'): relearning_gap(10*t, 5*t, 25)
    assert relearning_gap(.1*t, .05*t).attrs['level']==pytest.approx(.95*.8)

# erosion

@quick
@given(st.floats(.2, 1), st.floats(0, .19), st.floats(.06, .3),
       st.lists(st.integers(1, 10**6), min_size=1, max_size=30, unique=True))
def test_half_life_of_a_line_in_log_iterations(before, chance, slope, its):
    "Falling by `slope` a decade from iteration 1 on: half-way after 10**(half/slope), wherever one looks, if not before the first look"
    want = 10**((before-chance)/2/slope)
    its = np.array([1, *its, np.ceil(want)+1])
    acc = before-slope*np.log10(its)
    assert half_life(its[acc>=0], acc[acc>=0], before, chance)==pytest.approx(want, rel=1e-6)

@quick
@given(st.lists(share, min_size=1, max_size=20), st.floats(.2, 1), st.floats(0, .19))
def test_half_life_is_where_the_curve_first_crosses(acc, before, chance):
    acc,its = [before, *acc],[0, *np.cumsum(range(1, len(acc)+1))]
    h,half = half_life(its, acc, before, chance),(before+chance)/2
    assert np.isnan(h)==(min(acc)>half)
    if not np.isnan(h):
        i = next(k for k,a in enumerate(acc) if a<=half)
        assert its[i-1]<=h*(1+1e-9) and h<=its[i]*(1+1e-9)

@quick
@given(st.floats(.2, 1), share, st.floats(0, .19))
def test_forgetting(before, after, chance):
    assert forgetting(before, chance, chance)==pytest.approx(1) and forgetting(before, before, chance)==0
    assert forgetting(before, after, chance)==pytest.approx((before-after)/(before-chance))
    assert np.isnan(forgetting(chance, after, chance))

def evals_of(base, share, end, n_all=10000, n_some=1000, c=.1, epoch=100):
    "As EvalSets logs a phase 'b' after a phase 'a' of 500 iterations: `base` is what all and some of the images start from, `share(t)` what is left of it above chance"
    acc = lambda n,t: c+(base[n]-c)*share(t)
    rows = [dict(phase='a', when='epoch', iter=500, total_iter=500, n=n_all, clean=base[n_all])]
    rows += [dict(phase='b', when='iter', iter=t, total_iter=500+t, n=n_some, clean=acc(n_some, t))
             for t in (0,1,2,3,4,6,10,16,25,40,63,100)]
    rows += [dict(phase='b', when='epoch', iter=t, total_iter=500+t, n=n_all, clean=acc(n_all, t))
             for t in range(epoch, end+1, epoch)]
    return pd.DataFrame(sorted(rows, key=lambda r: (r['total_iter'], r['when']=='epoch' if r['phase']=='b' else 0)))

@pytest.mark.parametrize('some', [.72,.80,.88])
@pytest.mark.parametrize('decay', [.2,.27,.249,.2505])
def test_half_life_when_some_images_are_easier_than_all(some, decay):
    "Half-way before or after the end of the first epoch, where the one set ends and the other begins: the same half-life, however different the sets"
    base,share = {10000:.8, 1000:some},lambda t: 1-decay*np.log10(max(t, 1))
    e = erosion_summary(evals_of(base, share, 1000), .1)
    assert e.half_life['b']==pytest.approx(10**(.5/decay), rel=1e-6)
    assert (e.before['b'], e.n['b'])==(.8, 10000) and e.forgetting['b']==pytest.approx(3*decay)
    assert e.lost['b']==pytest.approx(70*3*decay)
    if some==.88 and decay==.27:                                                        # what mixing the sets would give
        ev = evals_of(base, share, 1000).query("phase=='b'")
        assert abs(half_life(ev.iter, ev.clean, .8, .1)/10**(.5/decay)-1)>.3

def test_summary_of_a_phase_cut_short():
    "Interrupted before an epoch ended: before and after are both on the images that were seen last"
    ev = evals_of({10000:.8, 1000:.7}, lambda t: 1-.2*np.log10(max(t, 1)), 0)
    e = erosion_summary(ev, .1)
    assert (e.before['b'], e.n['b'])==(.7, 1000) and e.after['b']==pytest.approx(.1+.6*.6)

def test_nothing_to_compare_with():
    ev = evals_of({10000:.8, 1000:.9}, lambda t: 1-.2*np.log10(max(t, 1)), 1000)
    # some of the images were not looked at when the phase began: all of them count
    e = erosion_summary(ev[ev.iter!=0], .1)
    assert e.before['b']==.8 and e.half_life['b']==pytest.approx(10**2.5)
    first = erosion_summary(ev[ev.phase=='b'].query('iter!=0'), .1)
    assert np.isnan(first.before['b']) and np.isnan(first.forgetting['b']) and np.isnan(first.half_life['b'])
    assert first.after['b']==pytest.approx(.1+.7*.4)

def test_summary_of_a_run(dls, tmp_path):
    "Fewer images at iterations than at ends of epochs; saved and read again"
    set_seed(0)
    learn = erosion_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,128), nn.ReLU(), nn.Linear(128,10)), lr=.05)
    easy = dls.inject(ColorSquare(4))
    quiet_phases(learn, [Phase('pretrain', 12), Phase('erode', 25, easy)], cbs=EvalSets(pattern_sets(easy), n_at=40))
    e,h = erosion_summary(learn),learn.recorder.history.groupby('phase').last()
    assert isinstance(e, Erosion) and e.attrs=={'chance':.1} and e.n.tolist()==[100,100]
    assert e.before['erode']==h.clean['pretrain'] and e.after['erode']==h.clean['erode']
    assert e.follows['erode']==h.conflict_picture['erode']
    assert e.reliance['erode']==pytest.approx(pattern_reliance(h.conflict_picture['erode'], h.conflict['erode']))
    assert e.forgetting['erode']>.2
    learn.recorder.evals.to_csv(tmp_path/'evals.csv', index=False)
    pd.testing.assert_frame_equal(erosion_summary(pd.read_csv(tmp_path/'evals.csv'), .1), e)

def small(dls, tmp_path):
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10)), opt_func=SGD, metrics=accuracy, path=tmp_path)

@pytest.mark.parametrize('at', ['log',[],[2]])
def test_before_is_what_the_phase_began_with(dls, tmp_path, at):
    "Something changes the weights between two phases, as `PerPhase(SaveModelCallback())` and mitigations do: on all images and on some"
    class Zero(Callback):
        def before_phase(self):
            for p in self.model.parameters() if self.learn.phase.name=='b' else []: p.data.zero_()
    learn,some = small(dls, tmp_path),subset_dl(dls.valid, 40)
    quiet_phases(learn, [Phase('a', 3, lr=.05), Phase('b', 1, lr=0.), Phase('c', 1, lr=0.)],
                 cbs=[EvalSets(dict(clean=dls.valid), n_at=40, at=at), Zero()])
    ev,e = learn.recorder.evals,learn.erosion()
    # all scores are zero: the first class
    want = {len(o.get_idxs()):evaluate(learn.model, o)['accuracy'] for o in (dls.valid,some)}
    begin = ev.query("phase=='b' and iter==0").set_index('n').clean
    assert begin.to_dict()==want and e.before['b']==e.after['b']==want[100] and e.after['a']>.3
    # nothing changed: the last epoch's is enough
    assert len(ev.query("phase=='c' and iter==0 and n==100"))==0

class Unlearns(Callback):
    "In the last epoch of each phase, all weights become 0"
    def after_train(self):
        if self.learn.phase_schedule.epochs==self.learn.phase.epochs: [p.data.zero_() for p in self.model.parameters()]

class TakesBack(Callback):
    "As `SaveModelCallback` at the end of a fit: weights of its first epoch"
    order = 60
    def before_fit(self): self.kept = None
    def after_validate(self): self.kept = self.kept or {k:v.clone() for k,v in self.model.state_dict().items()}
    def after_fit(self): self.model.load_state_dict(self.kept)

@pytest.mark.parametrize('make', [partial(SaveModelCallback, monitor='accuracy'), TakesBack])
def test_a_phase_ends_with_the_weights_that_it_leaves(dls, tmp_path, make):
    learn = small(dls, tmp_path)
    quiet_phases(learn, [Phase('a', 2, lr=.05), Phase('b', 2, lr=.01)],
                 cbs=[EvalSets(dict(clean=dls.valid), n_at=40), PerPhase(make()), Unlearns()])
    want = {p:evaluate(m, dls.valid)['accuracy'] for p,m in learn.models_at('a', 'b').items()}
    e,t = learn.erosion(),phase_table(learn).clean
    assert min(want.values())>.3 and want['b']==evaluate(learn.model, dls.valid)['accuracy']
    assert t[['a','b']].to_dict()==e.after.to_dict()==want and e.before['b']==want['a']
    ends = learn.recorder.evals.query("when=='epoch'")
    assert ends.epoch.tolist()==[1,2,2,3,4,4] and ends.phase.tolist()==[*'aaabbb'] and ends.iter.tolist()==[5,10,10]*2

def test_losses_on_sets_can_be_seen(dls, tmp_path):
    "The loss of ten equal scores is log 10 at first: above 100%, and no share"
    learn = small(dls, tmp_path)
    nn.init.zeros_(learn.model[-1].weight), nn.init.zeros_(learn.model[-1].bias)
    sets = pattern_sets(dls, ColorSquare(4), ('clean','conflict'))
    for metrics,columns,label in ((F.cross_entropy, None, 'cross entropy'),
                                  ([accuracy, F.cross_entropy], ['clean_cross_entropy','conflict_picture_cross_entropy'], '')):
        quiet_phases(learn, [Phase('a', 1, lr=0.)], cbs=EvalSets(sets, metrics=metrics))
        for ax in (learn.recorder.plot_phases(columns), learn.recorder.plot_collapse(sets=columns)):
            assert all(np.allclose(o.get_ydata(), np.log(10)) for o in ax.lines) and ax.get_ylim()[1]>np.log(10)
            assert ax.get_ylabel()==label and '%' not in ax.yaxis.get_major_formatter()(1.)
            assert (ax.lines[0].get_linestyle(),ax.lines[-1].get_linestyle())==('-','--')

def test_plain_names_that_are_no_accuracy(dls, tmp_path):
    learn = small(dls, tmp_path)
    phases = [Phase('pretrain', 2, lr=.05), Phase('erode', 2, lr=.01)]
    quiet_phases(learn, phases, cbs=EvalSets(dict(clean=dls.valid), metrics=error_rate))
    want,two = pytest.raises(ValueError, match="'clean' is error_rate, and accuracy is needed"),('pretrain','erode')
    for f in (Learner.erosion, partial(relearning_gap, phases=two),
              partial(max_forgetting, tasks=dict(pretrain='clean', erode='clean')),
              lambda l: eri(l, l, columns=('clean','clean'))):
        with want: f(learn)
    assert set(learn.recorder.evals.metric)=={'error_rate'} and list(phase_table(learn))==['clean']
    quiet_phases(learn, phases, cbs=EvalSets(dict(clean=dls.valid), metrics=[accuracy, error_rate]))
    assert learn.erosion().after.to_dict()==phase_table(learn).clean_accuracy[1:].to_dict()
    assert 'metric' not in learn.recorder.evals

def test_sets_of_different_sizes(dls, tmp_path):
    "A small set beside a large one: before and after are on the same images of the large one"
    learn = small(dls, tmp_path)
    quiet_phases(learn, [Phase('a', 2, lr=.05), Phase('b', 1, lr=.05)],
                 cbs=EvalSets(dict(clean=dls.valid, few=subset_dl(dls.train, 30)), n_at=40))
    e,h = learn.erosion(),learn.recorder.history.groupby('phase').clean.last()
    assert e.n.tolist()==[100,100] and (e.before['b'],e.after['b'])==(h['a'],h['b']) and set(learn.recorder.evals.n)=={40,100}

def test_two_evaluation_sets(dls, tmp_path):
    "One beside the other: each has its numbers"
    learn = small(dls, tmp_path)
    quiet_phases(learn, [Phase('a', 1, lr=.05), Phase('b', 1, lr=.05)],
                 cbs=[EvalSets(dict(clean=dls.valid)), EvalSets(dict(train=dls.train), n=50)])
    h,t,e = learn.recorder.history.set_index('phase')[['clean','train']],phase_table(learn),learn.erosion()
    assert t.loc[['a','b']].equals(h.astype(float)) and t.loc['start'].notna().all() and e.after.tolist()==h.clean.tolist()
    assert e.before['b']==h.clean['a']
    lines = {o.get_label():o.get_ydata() for o in learn.recorder.plot_phases().get_lines()}
    assert {*lines}=={'clean','train'} and not any(np.isnan(o).any() for o in lines.values())
    assert learn.recorder.plot_collapse().get_xlabel() in [f'iteration of phase “{p}”' for p in 'ab']   # where clean falls

@pytest.mark.parametrize('end', [.05,.0999,.1,.2])
def test_no_half_life_of_chance(end):
    "A tenth in single precision is not quite .1: nothing was above chance that could be halved"
    tenth = float(np.float32(.1))
    e = erosion_summary(evals_of({10000:tenth, 1000:tenth}, lambda t: 1 if t<5 else (end-.1)/(tenth-.1), 200), .1)
    assert np.isnan(e.forgetting['b']) and np.isnan(e.half_life['b']) and np.isnan(half_life([1,2], [.09,.08], tenth, .1))

def test_one_curve_has_no_gap():
    for o in ([.1,.2,.3], pd.DataFrame(dict(accuracy=[.1,.2,.3]))):
        with pytest.raises(ValueError, match='`scratch` has no phases.*give the other run'): relearning_gap(o)
    both = pd.DataFrame(dict(phase=['pretrain']*2+['relearn']*2, clean=[.2,.6,.1,.3]))
    assert relearning_gap(both).gap==pytest.approx(.4-.2)
    assert relearning_gap(both, both[2:], phases='relearn').gap==0
    with pytest.raises(ValueError, match='must be two names'): relearning_gap(both, phases=['relearn'])

def test_a_history_holds_no_evaluations():
    h = pd.DataFrame(dict(phase=['erode']*2, iters=[4,8], clean=[.9,.5]))
    with pytest.raises(ValueError, match="without 'iter' is none of evaluations"): erosion_summary(h, .1)

@quick
@given(share, share)
def test_reliance(picture, own):
    r = pattern_reliance(picture, own)
    if picture+own>0: assert 0<=r<=1 and r==pytest.approx(1-pattern_reliance(own, picture))
    else: assert np.isnan(r)
