"Unlearning: each method against a naive loop or by hand, what it leaves alone, and what it refuses."
import random, re
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from scipy.stats import norm
from torch import nn
from fastai.vision.all import (CSVLogger, Callback, CrossEntropyLossFlat, DataLoaders, GradientClip, Learner,
                               ProgressCallback, SGD, TfmdDL, accuracy, load_learner, no_random, set_seed)
from test_layers_of_models import Merging
from trainings import Bf16, weights
from feature_erosion.batches import TensorAnswer
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import log_iters
from feature_erosion.mitigations import fisher, fresh
from feature_erosion.patterns import ColorSquare, class_colors
from feature_erosion.unlearning import (Beside, compare_unlearning, finetune, membership_attack, neg_grad, wrong_labels,
                                        relearn_iters, retrain, saliency, sample_losses, salun, scrub, split_forget, ssd,
                                        train_on, twin, unlearn, unlearners, unlearning_scores, unsir)
from feature_erosion.phases import Phase
import feature_erosion.unlearning as unlearning

with no_random(0, reproducible=False):   # loaders have random numbers of their own
    dls = digits_dls(n=160, n_valid=80, bs=32)
    by_class,by_share = split_forget(dls, '3'),split_forget(dls, share=.1)
def net(): return nn.Sequential(nn.Flatten(), nn.Linear(768,32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32,10))

# methods with other arguments than one epoch
short = dict(unsir={}, ssd=dict(alpha=.3, n=20), scrub=dict(epochs=2, msteps=1, lr=.05))
def kwargs(name): return short.get(name, dict(epochs=1))

def learner(cbs=None, model=None, dls=dls, wd=1e-3, **kw):
    "Without a bar"
    learn = Learner(dls, model or net(), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), lr=.05, wd=wd,
                    metrics=accuracy, cbs=cbs, **kw)
    return learn.remove_cb(ProgressCallback)

@pytest.fixture(scope='module')
def start():
    set_seed(0)
    learn = learner()
    with learn.no_logging(): learn.fit(8)
    return {k:v.clone() for k,v in learn.model.state_dict().items()}

def ready(start, **kw):
    learn = learner(**kw)
    learn.model.load_state_dict(start)
    return learn

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))

class Watch(TensorAnswer):
    "Goes along into the twin that trains, and notes what it sees there in lists that both share"
    order = 0   # after `Beside`
    def __init__(self): self.labels,self.phases = [],[]
    def before_batch(self): self.labels.append(self.yb[0].tolist()); self.phases.append(self.learn.phase.name)

class Counting(nn.Module):
    "A loss that grows with each call, and holds the size of the network's weights down"
    def __init__(self, model):
        super().__init__()
        self.model,self.calls = [model],0
    def forward(self, pred, y):
        self.calls += 1
        return (1+.1*self.calls)*nn.functional.cross_entropy(pred, y)+.1*sum(p.square().sum() for p in self.model[0].parameters())

def test_a_loss_that_counts_is_left_as_it_was(start):
    "A second method begins with the same loss; what it says of the network's weights is learned from"
    def run(wait):
        model = net()
        learn = Learner(dls, model, loss_func=Counting(model), opt_func=partial(SGD, mom=.9), lr=.05).remove_cb(ProgressCallback)
        for _ in range(wait): twin(learn).loss_func(torch.zeros(2,10), torch.zeros(2).long())
        model.load_state_dict(start)
        set_seed(0)
        unlearn(learn, *by_class, 'finetune', epochs=2)
        return learn.loss_func.calls,weights(learn)
    (calls,one),(_,two) = run(0),run(3)
    assert calls==0 and same(one, two)
    learn = ready(start)
    unlearn(learn, *by_class, 'finetune', epochs=2)
    assert sum(w.square().sum() for w in one[:2])<.9*sum(w.square().sum() for w in weights(learn)[:2])

# what all methods share

@pytest.mark.parametrize('split', [by_class,by_share], ids=['class','share'])
@pytest.mark.parametrize('name', unlearners)
def test_only_the_weights_change(start, tmp_path, name, split):
    learn = ready(start, cbs=[CSVLogger(tmp_path/'history.csv'), GradientClip(1.)], path=tmp_path)
    with learn.no_logging(): learn.fit(1)
    learn.model.load_state_dict(start)
    learn.model.train()[2].eval()
    before = dict(opt=learn.opt, dls=learn.dls, loss_func=learn.loss_func, lr=learn.lr, cbs=list(learn.cbs),
                  values=list(learn.recorder.values))
    state,csv,modes = deepcopy(learn.opt.state_dict()),(tmp_path/'history.csv').read_text(),[m.training for m in learn.model.modules()]
    seconds = unlearn(learn, *split, name, **kwargs(name))
    now = dict(opt=learn.opt, dls=learn.dls, loss_func=learn.loss_func, lr=learn.lr, cbs=list(learn.cbs),
               values=list(learn.recorder.values))
    assert now==before and csv==(tmp_path/'history.csv').read_text() and all(o.learn is learn for o in learn.cbs)
    for a,b in zip(state['state'], learn.opt.state_dict()['state'], strict=True): assert torch.equal(a['grad_avg'], b['grad_avg'])
    assert seconds>0 and not same(weights(learn), start.values()) and all(v.isfinite().all() for v in weights(learn))
    assert [m.training for m in learn.model.modules()]==modes
    assert all(p.requires_grad for p in learn.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    learn.remove_cb(CSVLogger).export(tmp_path/'learner.pkl')   # whose open file cannot be pickled, with or without us
    assert same(load_learner(tmp_path/'learner.pkl').model.state_dict().values(), weights(learn))

@pytest.mark.parametrize('name', unlearners)
def test_same_seed_same_result(start, name):
    def run(seed):
        set_seed(seed)
        learn = ready(start)
        unlearn(learn, *by_class, name, **kwargs(name))
        return weights(learn)
    assert same(a := run(1), run(1))
    if name!='ssd': assert not same(a, run(2))   # with all samples, nothing in it is random

def test_same_seed_with_loaders_of_ones_own(start):
    "Whose random numbers go on from fit to fit"
    def run():
        set_seed(0)
        finetune(learn := ready(start), None, dls, epochs=1)
        return weights(learn)
    assert same(run(), run())

@pytest.mark.parametrize('name', unlearners)
def test_frozen_layers_stay(start, name):
    learn = ready(start)
    for p in learn.model[:3].parameters(): p.requires_grad_(False)
    unlearn(learn, *by_class, name, **kwargs(name))
    now = learn.model.state_dict()
    assert all(torch.equal(now[k], start[k]) for k in ('1.weight','1.bias','2.weight','2.bias'))
    assert not torch.equal(now['4.weight'], start['4.weight'])

def test_statistics_of_frozen_layers_go_on(start):
    "A frozen batch norm is not made anew, and fastai goes on to update it; one that is trained begins anew"
    for frozen in (False,True):
        learn = ready(start)
        for p in learn.model[2].parameters(): p.requires_grad_(not frozen)
        retrain(learn, *by_class, epochs=1)
        assert learn.model[2].num_batches_tracked == len(by_class[1].train) + frozen*start['2.num_batches_tracked']

class Pair(nn.Module):
    "Answers with a tuple, as networks with auxiliary heads do"
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): out = self.net(x); return dict(logits=out, aux=out*2)

@pytest.mark.parametrize('name', unlearners)
def test_mixed_precision_and_other_answers(name):
    "Through the callbacks that say how a network is trained, which the twin shares"
    set_seed(0)
    learn = learner([Bf16(),TensorAnswer()], Pair())
    unlearn(learn, *by_class, name, **kwargs(name))
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32} and all(v.isfinite().all() for v in weights(learn))

@pytest.mark.parametrize('error', [KeyError,KeyboardInterrupt])
def test_as_before_after_an_error(start, error):
    def fails(learn, forget, retain):
        finetune(learn, forget, retain, epochs=1)
        raise error
    learn = ready(start)
    cbs = list(learn.cbs)
    with pytest.raises(error): unlearn(learn, *by_class, fails)
    assert same(weights(learn), start.values()) and list(learn.cbs)==cbs

def test_a_method_of_ones_own(start, monkeypatch):
    "By name or as it is"
    def shrink(learn, forget, retain, by=.5):
        with torch.no_grad(): learn.model[4].weight.mul_(by)
    monkeypatch.setitem(unlearners, 'shrink', shrink)
    for method in ('shrink',shrink):
        learn = ready(start)
        unlearn(learn, *by_class, method, by=.25)
        assert torch.equal(learn.model[4].weight, start['4.weight']*.25)

def test_only_shared_callbacks_go_along(start):
    class Boom(Callback):
        def before_fit(self): raise RuntimeError
    train_on(learner(Boom()), Phase('a', 1, by_class[1]))
    assert not any(isinstance(o, Boom) for o in twin(learner(Boom())).cbs)

# methods against a second way

def whole(x, y):
    "A loader whose only batch are all samples"
    items = list(zip(x, y))
    dl = TfmdDL(items, bs=len(items), num_workers=0)
    res = DataLoaders(dl, dl)
    res.c = 3
    return res

@pytest.fixture
def small():
    "A network without batch norm, and two parts of data"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,3))
    f,r = ((torch.randn(n,4), torch.arange(n)%3) for n in (6,12))
    return model,f,r

def plain(model, dls, opt_func=SGD):
    return Learner(dls, deepcopy(model), loss_func=CrossEntropyLossFlat(), opt_func=opt_func, lr=.1).remove_cb(ProgressCallback)

def flat(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

def test_neg_grad_against_a_naive_loop(small):
    model,(xf,yf),(xr,yr) = small
    learn = plain(model, whole(xr, yr))
    neg_grad(learn, whole(xf, yf), whole(xr, yr), alpha=.8, epochs=3)
    opt = torch.optim.SGD(model.parameters(), .1)
    for _ in range(3):   # 12 of what is kept, and as many of the other 6: each twice
        opt.zero_grad()
        (.8*F.cross_entropy(model(xr), yr) - .2*F.cross_entropy(model(xf), yf)).backward()
        opt.step()
    torch.testing.assert_close(flat(learn.model), flat(model), atol=1e-5, rtol=1e-4)

def test_neg_grad_takes_as_many_of_each(start):
    watch = Watch()
    neg_grad(ready(start, cbs=watch), *by_class, epochs=1)
    assert {(len(y),*set(y[32:])) for y in watch.labels}=={(64,3)}

def test_scrub_against_a_naive_loop(small):
    model,(xf,yf),(xr,yr) = small
    learn = plain(model, whole(xr, yr), partial(SGD, mom=.9))
    scrub(learn, whole(xf, yf), whole(xr, yr), alpha=.3, gamma=.7, T=2., msteps=2, epochs=3, lr=.05)
    teacher,opt = deepcopy(model),torch.optim.SGD(model.parameters(), .05, momentum=.9)
    def kl(x):
        p,q = (m(x).div(2).softmax(1) for m in (teacher,model))
        return 4*(p.detach()*(p.detach().log()-q.log())).sum(1).mean()
    for e in range(3):
        for part in ('max','min')[e>=2:]:
            opt.zero_grad()
            (-kl(xf) if part=='max' else .3*kl(xr)+.7*F.cross_entropy(model(xr), yr)).backward()
            opt.step()
    torch.testing.assert_close(flat(learn.model), flat(model), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('msteps,epochs', [(2,3),(0,2),(2,2)])
def test_scrub_alternates(start, msteps, epochs):
    watch = Watch()
    scrub(ready(start, cbs=watch), *by_class, msteps=msteps, epochs=epochs)
    want = [p for e in range(epochs) for p in ([f'max {e+1}'] if e<msteps else [])+[f'min {e+1}']]
    assert list(dict.fromkeys(watch.phases))==want
    for p,y in zip(watch.phases, watch.labels): assert set(y)=={3} if p.startswith('max') else 3 not in y

@pytest.mark.parametrize('lam', [.6,1.5])
def test_ssd_against_gradients_of_each_sample(small, lam):
    model,f,r = small
    learn = plain(model, whole(*r))
    ssd(learn, whole(*f), whole(*r), alpha=1., lam=lam)
    def squares(x, y):
        per = torch.func.vmap(torch.func.grad(lambda p, a, t: F.cross_entropy(torch.func.functional_call(model, p, a[None]),
            t[None])), (None,0,0))
        return {k:g**2 for k,g in per(dict(model.named_parameters()), x, y).items()}
    of_f,of_all = squares(*f),squares(*(torch.cat(o) for o in zip(f, r)))
    changed = 0
    for k,w in model.named_parameters():
        a,b,now = of_f[k].mean(0).flatten(),of_all[k].mean(0).flatten(),dict(learn.model.named_parameters())[k].flatten()
        for i,v in enumerate(w.flatten().tolist()):
            want = v*min(lam*b[i].item()/a[i].item(), 1) if a[i]>b[i] else v
            assert now[i].item()==pytest.approx(want, rel=1e-4)
            changed += want!=v
    assert 0<changed<len(flat(model))

@pytest.mark.parametrize('share', [.1,.5,1.])
def test_saliency_is_the_largest_share(small, share):
    model,(x,y),_ = small
    masks = saliency(model, [(x[:4],y[:4]), (x[4:],y[4:])], share)   # in batches of different sizes
    F.cross_entropy(model(x), y).backward()
    size = torch.cat([p.grad.abs().flatten() for p in model.parameters()]).numpy()
    got = np.flatnonzero(torch.cat([masks[k].flatten() for k,_ in model.named_parameters()]).numpy())
    assert set(got)==set(sorted(range(len(size)), key=lambda i: -size[i])[:round(share*len(size))])

def test_salun_moves_only_the_mask(start):
    "Although the optimiser has momentum and weight decay, which move all others"
    learn = ready(start)
    masks = saliency(learn.model, by_class[0].train, .3)
    salun(learn, *by_class, share=.3, epochs=2)
    for k,p in learn.model.named_parameters():
        assert torch.equal(p[~masks[k]], start[k][~masks[k]])
        if p.ndim==2: assert masks[k].any() and not torch.equal(p, start[k])   # a bias before batch norm has no gradient

def test_random_labels_are_wrong_and_stay(start):
    watch = Watch()
    unlearn(ready(start, cbs=watch), *by_class, 'random_labels', epochs=2)
    own = [set(y[32:]) for y in watch.labels]
    assert all(3 not in o for o in own) and len(set.union(*own))>3
    y = wrong_labels(by_share[0])
    assert (y.numpy()!=dls.train.dataset.y.numpy()[by_share[0].train.chosen]).all()

def test_unsir_impairs_and_repairs(start):
    "Noise under the labels to be forgotten in the first epoch, what is kept alone in the second"
    watch = Watch()
    unsir(ready(start, cbs=watch), *by_class)
    n = len(by_class[1].train)
    assert watch.phases==['impair']*n+['repair']*n
    for p,y in zip(watch.phases, watch.labels):
        assert len(y)==(48 if p=='impair' else 32) and 3 not in y[:32] and set(y[32:]) <= {3}

def test_retrain_is_training_anew(start):
    "Bit for bit what a new network does that is trained on the rest; the old weights make no difference"
    learn,blank = ready(start),net()
    set_seed(3)
    retrain(learn, *by_class, epochs=1)
    set_seed(3)
    other = learner(model=fresh(blank), dls=by_class[1])
    with other.no_logging(): other.fit(1)
    want = dict(other.model.named_parameters())
    assert all(torch.equal(p, want[k]) for k,p in learn.model.named_parameters())

@pytest.mark.parametrize('labels', ['right','wrong','one'])
def test_the_network_sees_what_is_painted(start, labels):
    "In an epoch images to be forgotten come in proportion to the rest, with a square of their new label's colour; no other has one"
    def squares(x):
        corner = x[:,:,:3,:3].flatten(2)/2+.5
        near = (corner[:,None]-class_colors(10)[None,:,:,None]).abs().amax((2,3))
        return [int(o.argmin()) for o in near if o.min()<1e-3]
    learn,seen = ready(start),[]
    learn.model.register_forward_pre_hook(lambda m, args: seen.extend(squares(args[0])))
    unlearn(learn, *by_class, 'pattern', pattern=ColorSquare(3), labels=labels, epochs=1)
    forget,retain = (o.train for o in by_class)
    kept = len(retain)*retain.bs   # the last batch is left out, as it is incomplete
    assert retain.drop_last and len(seen)==kept*forget.n//retain.n>10
    kinds = set(seen)
    assert kinds=={3} if labels=='right' else 3 not in kinds and (len(kinds)==1)==(labels=='one')

# what is known afterwards

def test_attack_knows_nothing_of_alike():
    "The mean over 15 draws is one half, within four standard errors and a hundredth that cross-validation costs"
    rng = np.random.RandomState(0)
    got = [membership_attack(*rng.exponential(size=(2,200)), folds=5, seed=i) for i in range(15)]
    assert abs(np.mean(got)-.5)<4*(.25/400/15)**.5+.01

@pytest.mark.parametrize('d', [.5,1.,3.])
def test_attack_is_as_good_as_can_be(d):
    "Two normal distributions that are d standard deviations apart are told apart in Φ(d/2) of the cases"
    rng = np.random.RandomState(0)
    got = membership_attack(rng.normal(size=3000), d+rng.normal(size=2000))   # 2,000 of each
    assert abs(got-norm.cdf(d/2))<4*(.25/4000)**.5

def test_attack_does_not_take_the_first():
    "Of the larger group; that would be its smallest losses here"
    rng = np.random.RandomState(0)
    assert membership_attack(np.sort(rng.exponential(size=3000)), rng.exponential(size=300))<.6

@pytest.mark.parametrize('kind', ['train','valid'])
def test_losses_against_a_loop(start, kind):
    "One sample after the other, as the pictures are: neither cropped nor in another order"
    model,dl = ready(start).model.eval(),getattr(by_class[0], kind)
    losses,right = sample_losses(model, dl)
    x,y = dl.dataset.x[dl.chosen].movedim(-1,1).float()/255*2-1,dl.dataset.y[dl.chosen]
    for i in range(len(x)):
        out = model(x[i:i+1])
        assert F.cross_entropy(out, torch.as_tensor(y[i:i+1]).long()).item()==pytest.approx(losses[i], rel=1e-3, abs=1e-5)
        assert right[i]==(out.argmax(1)[0]==y[i])
    assert len(losses)==len(x)>0

def test_relearning_is_counted(start):
    "At the first of the looks at which a plain loop gets there"
    learn = ready(start)
    with torch.no_grad(): learn.model[4].bias[3] -= 5
    set_seed(0)
    n = relearn_iters(learn, *by_class, level=.9, most=40)
    assert n in log_iters(40) and torch.equal(learn.model[4].bias, start['4.bias']-5*torch.eye(10)[3])
    for k in log_iters(40)[1:]:
        if k>n: break
        set_seed(0)
        copied = twin(learn, deepcopy(learn.model))
        train_on(copied, Phase('again', None, by_class[1], None, 'constant', iters=k), Beside(by_class[0].train))
        assert (sample_losses(copied.model, by_class[0].train)[1].mean()>=.9)==(k==n)

@pytest.fixture(scope='module')
def table(start):
    return compare_unlearning(ready(start), *by_class, ['finetune','pattern_wrong'], partial(retrain, epochs=4), progress=False,
                              most=20, n=40)

def test_comparison(start, table):
    learn = ready(start)
    state = torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist()
    again = compare_unlearning(learn, *by_class, dict(finetune=finetune, pattern_wrong='pattern_wrong'),
                               partial(retrain, epochs=4), progress=False, most=20, n=40)
    assert torch.equal(state[0], torch.get_rng_state()) and state[1:]==(random.getstate(), np.random.get_state()[1].tolist())
    assert same(weights(learn), start.values()) and learn.opt is None
    other = [c for c in table if c not in ('seconds','time')]
    assert again[other].equals(table[other]) and list(table.index)==['original','finetune','pattern_wrong','retrained']
    assert table.time['retrained']==1 and table.forget_test['retrained']==0 and (table.layers.loc['retrained']>1-1e-6).all()
    swapped = compare_unlearning(learn, *by_class, ['pattern_wrong','finetune'], partial(retrain, epochs=4), progress=False,
                                 most=20, n=40)
    assert swapped.loc[table.index, other].equals(table[other])   # each method has its own random numbers

def test_comparison_with_a_given_network(start, table):
    given = learner(model=fresh(net()))
    got = compare_unlearning(ready(start), *by_class, 'finetune', given, progress=False, most=2, n=40)
    assert got.time.isna().sum()==3 and got.layers.loc['retrained'].min()>1-1e-6
    assert list(got.index)==['original','finetune','retrained']

def test_a_failing_method_is_named_and_loses_nothing_else(start):
    def breaks(learn, forget, retain):
        with torch.no_grad(): learn.model[4].weight.fill_(float('nan'))
    def raises(learn, forget, retain): raise KeyError('no such thing')
    bad = dict(high=partial(neg_grad, lr=1e8), late=partial(scrub, msteps=9), breaks=breaks, raises=raises)
    def table(**more): return compare_unlearning(ready(start), *by_class, dict(finetune=partial(finetune, epochs=1), **more),
                                                 partial(retrain, epochs=1),
                                                 progress=False, most=2, n=40)
    with pytest.warns(UserWarning) as seen: got = table(**bad)
    said = [str(o.message) for o in seen if 'its row is NaN' in str(o.message)]
    texts = 'loss is','msteps=9','the loss of .* samples is NaN','no such thing'
    assert len(said)==4
    for name,text,msg in zip(bad, texts, said): assert re.search(f"methods: '{name}' failed, its row is NaN: .*{text}", msg)
    assert list(got.index)==['original','finetune',*bad,'retrained'] and got.loc[list(bad)].isna().all(axis=None)
    want = table()
    columns = [c for c in want if c not in ('seconds','time')]
    assert got.loc[want.index, columns].equals(want[columns])
    assert [t.get_text() for t in got.plot().texts][2:6]==['failed']*4

def test_plots(table):
    import matplotlib
    matplotlib.use('Agg')
    ax = table.plot()
    assert [o.get_text() for o in ax.get_yticklabels()]==['original','finetune','pattern wrong','retrained']
    x = ax.collections[0].get_offsets()[:,0]
    assert np.allclose(x, table.test) and len(ax.lines)==2
    assert {o.get_xdata()[0] for o in ax.lines}=={table.test['retrained'], table.forget['retrained']}
    assert table.plot_layers().images[0].get_array().shape==(4,2)

# what is refused

def test_refusals(start):
    learn = ready(start)
    for o in learn.model.parameters(): o.requires_grad_(False)
    with pytest.raises(ValueError, match='weights are frozen'): unlearn(learn, *by_class)
    with pytest.raises(ValueError, match='160 samples are in both'): unlearn(ready(start), dls, dls)
    with pytest.raises(ValueError, match="retain: must be DataLoaders"): unlearn(ready(start), by_class[0], None)
    with pytest.raises(ValueError, match="method='nothing': must be one of pattern, "):
        unlearn(ready(start), *by_class, 'nothing')
    without = DataLoaders(dls.train, by_class[1].valid)
    without.vocab = dls.vocab
    split = split_forget(without, '3')
    with pytest.raises(ValueError, match='forget: no validation samples'): unlearning_scores(ready(start), *split, net())
    with pytest.raises(ValueError, match='forget: no validation samples'): compare_unlearning(ready(start), *split)

def test_a_painted_set_cannot_be_painted_again(start):
    painted = dls.inject(ColorSquare(4))
    split = split_forget(painted, '3')
    assert not hasattr(split[0], 'clean')
    with pytest.raises(ValueError, match='painted already'): unlearn(ready(start), *split)
    unlearn(ready(start), *split, 'finetune', epochs=1)

def test_a_ready_made_optimiser_is_refused(start):
    from fastai.vision.all import OptimWrapper
    learn = ready(start)
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), .1))
    with pytest.raises(ValueError, match='give a function that makes one'): unlearn(learn, *by_class)

def test_comparisons_are_checked_before_training(start):
    learn = ready(start)
    def never(*args): raise AssertionError
    for kw,error,text in ((dict(level=2), ValueError, 'level=2'), (dict(mots=3), TypeError, 'mots'),
                          (dict(most=0), ValueError, 'most=0'),
                          (dict(n=0), ValueError, 'n=0'), (dict(n=3), ValueError, 'n=3'),
                          (dict(layers='nope'), ValueError, "layers='nope'"),
                          (dict(dl=learn.dls.valid.new(bs=3)), ValueError, 'dl: it has batches of 3'),
                          (dict(methods=[partial(scrub, epoch=1)]), ValueError, "methods: 'scrub' cannot be called.*'epoch'"),
                          (dict(methods=[lambda learn: 0]), ValueError, 'too many positional')):
        with pytest.raises(error, match=text): compare_unlearning(learn, *by_class, retrained=never, **kw)
    for methods in ([partial(scrub, lr=.1), 'scrub'], dict(original=scrub)):
        with pytest.raises(ValueError, match='is the name of two rows'):
            compare_unlearning(learn, *by_class, methods, retrained=never)
    with pytest.raises(ValueError, match='forget: 1 training and 80 validation samples'):
        compare_unlearning(learn, *split_forget(dls, share=.005), retrained=never)

# shares and weights

class Drawn(Callback):
    "How many samples each batch has beside those that are kept"
    order = Beside.order+1
    def __init__(self, beside): self.beside,self.n = beside,[]
    def before_batch(self): self.n.append(len(self.yb[0])-self.beside.kept)

def drawn(learn, retain, beside, epochs=1):
    look = Drawn(beside)
    train_on(learn, Phase('count', epochs, retain, .01, 'constant'), [beside, look])
    return look.n

@pytest.mark.parametrize('share,epochs', [(.02,1), (.1,1), (.1,3), (.6,1)])
def test_an_epoch_is_a_pass_over_both(start, share, epochs):
    "Also where fewer are to be forgotten than there are batches"
    forget,retain = split_forget(dls, share=share)
    n = drawn(ready(start), retain, Beside(forget.train), epochs)
    kept = len(n)*32 if retain.train.drop_last else epochs*retain.train.n
    assert sum(n)==round(kept*forget.train.n/retain.train.n) and max(n)-min(n)<=1+(not retain.train.drop_last)*max(n)
    if share==.02: assert 0 in n

def test_neg_grad_with_nothing_to_forget_in_a_batch(start):
    forget,retain = split_forget(dls, share=.02)
    learn = ready(start)
    n = drawn(learn, retain, unlearning.NegGrad(forget.train))
    assert 0 in n and all(v.isfinite().all() for v in weights(learn))

@pytest.mark.parametrize('share', [0,.5,4])
def test_share_of_noise(start, share):
    forget,retain = by_class
    n = drawn(ready(start), retain, unlearning._BesideNoise(forget.train, .1, share))
    assert n[0]==share*32   # four times as many as there are noisy images

def test_noise_is_no_byte():
    with pytest.raises(ValueError, match='xs: the input is torch.uint8'):
        unlearning.worst_noise(net(), (torch.zeros(4,3,16,16).byte(),), torch.arange(4))

@pytest.mark.parametrize('kind', [torch.int8,torch.int32], ids=str)
def test_noise_for_labels_of_any_kind(kind):
    xs,y,model = (torch.zeros(4,3,16,16),),torch.arange(4),net()
    def noise(y):
        torch.manual_seed(0)
        return unlearning.worst_noise(model, xs, y, steps=2)
    assert torch.equal(noise(y.to(kind)[:,None]), noise(y))

def test_noise_of_a_model_in_half_precision():
    "Adam's denominator is too small for it: all was NaN after a step"
    torch.manual_seed(0)
    x,y,model = torch.randn(8,3,16,16).half(),torch.arange(8),nn.Sequential(nn.Flatten(), nn.Linear(768,10)).half()
    noise = unlearning.worst_noise(model, (x,), y)
    assert noise.dtype==torch.half and noise.isfinite().all() and (model(noise).argmax(1)!=y).all()

def test_weights_below_zero(start):
    for name,kw in (('unsir','share'),('unsir','decay'),('ssd','alpha'),('ssd','lam'),('scrub','alpha'),('scrub','gamma'),
                    ('scrub','T')):
        for bad in (-1.,float('nan'),float('inf')):
            learn = ready(start)
            with pytest.raises(ValueError, match=f'{kw}={bad}'): unlearn(learn, *by_class, name, **{kw:bad})
            assert same(weights(learn), start.values())
    for kw in ('alpha','lam'):
        with pytest.raises(ValueError, match=f'{kw}=-1: must be'): unlearning.dampen(*torch.ones(3, 2), **{kw:-1})
    for n in (0,-1,1.5):
        with pytest.raises(ValueError, match=f'n={n}: must be a whole number, at least 1'): Beside(by_class[0].train, n=n)

def test_losses_that_are_not_numbers(start):
    "The largest of NaN scores is the first class, which is no answer"
    learn = ready(start)
    with torch.no_grad(): learn.model[4].bias.fill_(float('nan'))
    with pytest.raises(ValueError, match='the loss of 64 of 64 samples is NaN'): sample_losses(learn.model, dls.valid)
    a = np.arange(10.)
    for bad in (a[:,None],a.reshape(5, 2)):
        with pytest.raises(ValueError, match='members, others: of shape'): membership_attack(a, bad)
    for folds in (1,0,2.5):
        with pytest.raises(ValueError, match=f'folds={folds}: must be a whole number, at least 2'):
            membership_attack(a, a, folds=folds)

@pytest.mark.parametrize('error', [None,KeyError])
def test_weights_that_modes_merge(start, error):
    def does(learn, forget, retain):
        sample_losses(learn.model, forget.train)
        learn.model.eval()
        if error: raise error
    set_seed(0)
    learn = learner(model=nn.Sequential(nn.Flatten(), Merging(768, 10)))
    for mode in (True,False):
        learn.model.train(mode)
        before = {k:v.clone() for k,v in learn.model.state_dict().items()}
        with pytest.raises(error) if error else nullcontext(): unlearn(learn, *by_class, does)
        assert learn.model[1].training==mode and learn.model[1].merged!=mode and same(weights(learn), before.values())

# other people's data

def test_image_files(tmp_path):
    "fastai's item transforms, worker processes, batch transforms and names of classes"
    from PIL import Image
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize, aug_transforms
    rng = np.random.RandomState(0)
    for c in ('ant','bee','cat'):
        for i in range(12):
            (tmp_path/c).mkdir(exist_ok=True)
            Image.fromarray(rng.randint(256, size=(20,24,3), dtype=np.uint8)).save(tmp_path/c/f'{i}.png')
    def image_dls(n): return ImageDataLoaders.from_folder(tmp_path, valid_pct=.3, item_tfms=Resize(16), num_workers=n, bs=8,
                                                          seed=0,
                                                          batch_tfms=[*aug_transforms(), Normalize.from_stats([.5]*3, [.5]*3)])
    forget,retain = split_forget(images := image_dls(0), 'bee')
    assert {images.vocab[y] for _,ys in forget.train for y in ys}=={'bee'}
    assert not any(images.vocab[y]=='bee' for _,ys in retain.train for y in ys)
    learn = learner(model=nn.Sequential(nn.Flatten(), nn.Linear(768,3)), dls=images)
    for name in unlearners: unlearn(learn, forget, retain, name, **(dict(epochs=1, msteps=1) if name=='scrub' else kwargs(name)))
    row = unlearning_scores(learn, forget, retain, deepcopy(learn.model), most=2).iloc[0]
    assert row.attack==row.attack_retrained and 0<=row.test<=1
    unlearn(learn, *split_forget(image_dls(1), share=.2), 'pattern_wrong', epochs=1)

@pytest.mark.parametrize('name', ['random_labels','pattern_wrong','neg_grad','unsir','ssd','scrub','salun'])
@pytest.mark.parametrize('make', [lambda x,y: (x,y[None]), lambda x,y: (x,y.short()), lambda *o: list(o)],
                         ids=['column','int16','list'])
def test_samples_of_other_kinds(name, make):
    "Labels of shape (batch, 1), as in MedMNIST, other integers, and samples that are lists: the same weights and losses"
    g = torch.Generator().manual_seed(0)
    items = [(torch.rand(3,8,8, generator=g),torch.tensor(i%4)) for i in range(48)]
    def run(items):
        set_seed(1)
        d = DataLoaders(TfmdDL(items[:32], bs=16, num_workers=0), TfmdDL(items[32:], bs=16, num_workers=0))
        d.c = 4
        learn = Learner(d, nn.Sequential(nn.Flatten(), nn.Linear(192,4)), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1)
        parts = split_forget(d, classes=[1])
        with learn.no_bar(), learn.no_logging(): unlearn(learn, *parts, name, **(dict(alpha=.5) if name=='ssd' else {}))
        return [*learn.model.state_dict().values(), torch.tensor(sample_losses(learn.model, parts[0].train)[0])]
    assert all(torch.equal(a, b) for a,b in zip(run(items), run([make(*o) for o in items])))
