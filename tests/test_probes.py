"Linear probes against scikit-learn's converged logistic regression, on random and nasty features, and layer by layer on a network."
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDL
from fastai.data.core import SkipItemException
from fastai.vision.all import CategoryMap, DataLoader as FastaiDL, Learner, SGD, accuracy, set_seed
from feature_erosion.data import digits_dls
from feature_erosion.measures.probes import dl_labels, fit_probe, layer_probe, probe_features
from feature_erosion.measures.layers import Features, visit

def objective(X, y, W, b, C):
    "What scikit-learn minimises: C times the sum of cross-entropies, and half the squared norm of the weights"
    Z = X@W.T+b
    Z = Z-Z.max(1, keepdims=True)
    return C*(np.log(np.exp(Z).sum(1))-Z[np.arange(len(y)),y]).sum() + (W**2).sum()/2

@st.composite
def problems(draw):
    "Samples, labels and C: few or many features, duplicated, constant, rank-deficient"
    rng,n,d,k = np.random.default_rng(draw(st.integers(0, 2**31))),draw(st.integers(20, 80)),draw(st.integers(1, 40)),draw(st.integers(3, 5))
    y = np.r_[np.arange(k), rng.integers(0, k, n-k)]
    X = rng.normal(size=(n, d)) + .7*rng.normal(size=(k, d))[y]
    if draw(st.booleans()): X = np.c_[X, X[:,:1], np.full(n, 3.)]
    if draw(st.booleans()): X = X@rng.normal(size=(X.shape[1], 2))@rng.normal(size=(2, X.shape[1]))
    return X,y,draw(st.sampled_from([.01, 1., 100.]))

@given(problems())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_optimum_of_scikit_learn(problem):
    X,y,C = problem
    ref = LogisticRegression(C=C, solver='newton-cholesky', tol=1e-9, max_iter=300).fit(X, y)
    p = fit_probe(torch.tensor(X), y, C, tol=1e-6)
    best,ours = objective(X, y, ref.coef_, ref.intercept_, C),objective(X, y, p.weight.numpy(), p.bias.numpy(), C)
    assert p.converged and ours <= best*(1+1e-5)

@pytest.mark.parametrize('n,d', [(30,31), (60,2000), (1100,1200)])
def test_more_features_than_samples(n, d):
    rng = np.random.default_rng(n)
    y = np.arange(n)%3
    X = rng.normal(size=(n, d)) + .2*rng.normal(size=(3, d))[y]
    ref = LogisticRegression(C=.01, solver='lbfgs', tol=1e-8, max_iter=5000).fit(X, y)
    p = fit_probe(torch.tensor(X), y, .01, tol=1e-7)
    assert p.converged and np.allclose(p.weight.numpy(), ref.coef_, atol=1e-4*np.abs(ref.coef_).max())
    assert np.allclose(p.bias.numpy()-p.bias.numpy().mean(), ref.intercept_-ref.intercept_.mean(), atol=1e-4)

@given(problems(), st.sampled_from([1e-6, 1e-3, 1e6]), st.sampled_from([0, 100.]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_scale_and_mean_do_not_matter(problem, scale, mean):
    "Features times s, C over s²: the objective is the same up to a factor"
    X,y,C = problem
    X = torch.tensor(X)
    p,q = fit_probe(X, y, C, tol=1e-6),fit_probe(scale*(X+mean), y, C/scale**2, tol=1e-6)
    assert torch.allclose(p.logits(X).softmax(1), q.logits(scale*(X+mean)).softmax(1), atol=1e-2)

@pytest.fixture(scope='module')
def digits():
    set_seed(0)
    dls = digits_dls()
    net = nn.Sequential(nn.Conv2d(3,8,3,2), nn.ReLU(), nn.Conv2d(8,16,3,2), nn.ReLU(), nn.Flatten(), nn.Linear(144,32), nn.ReLU(),
                        nn.Linear(32,10))
    learn = Learner(dls, net, opt_func=SGD, lr=.1, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    return dls,net

def collect(net, dl, pool):
    got = {}
    visit(net, dl, Features(lambda m,l,X: got.update({(m,l):X}), pool=pool), progress=False)
    return got

@pytest.mark.parametrize('pool', [1, 2, None])
def test_every_layer_is_as_good_as_scikit_learn(digits, pool):
    dls,net = digits
    res = layer_probe(net, dls.train, dls.valid, pool=pool, C=1., progress=False)
    train,test = collect(net, dls.train, pool),collect(net, dls.valid, pool)
    y,y_test = dl_labels(dls.train).numpy(),dl_labels(dls.valid).numpy()
    for k,X in train.items():
        ref = LogisticRegression(solver='newton-cg', tol=1e-8, max_iter=1000).fit(X.double().numpy(), y).score(test[k].double().numpy(), y_test)
        assert res.loc[k].accuracy >= ref-.005, (k, ref)
    assert res.converged.all() and res.attrs['n']==len(y) and res.attrs['n_test']==len(y_test)

def test_C_is_chosen_without_the_test_set(digits):
    dls,net = digits
    X,y = collect(net, dls.train, 1),dl_labels(dls.train)
    one = probe_features(X, y, collect(net, dls.valid, 1), dl_labels(dls.valid), progress=False)
    noise = probe_features(X, y, {k:torch.randn_like(v) for k,v in collect(net, dls.valid, 1).items()}, dl_labels(dls.valid),
                           progress=False)
    assert (one.C==noise.C).all() and (one.accuracy>.5).any() and (noise.accuracy<.3).all()

def test_shuffled_labels_are_at_chance(digits):
    dls,net = digits
    shuffled = lambda y: y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert (layer_probe(net, dls.train, dls.valid, labels=shuffled, progress=False).accuracy<.2).all()

def test_other_labels_than_the_network_knows(digits):
    "Odd or even, two classes"
    dls,net = digits
    res = layer_probe(net, dls.train, dls.valid, labels=lambda y: y%2, progress=False)
    assert res.attrs['classes']==2 and res.accuracy.iloc[-1]>.75

def test_batch_size_seed_and_state_do_not_matter(digits):
    dls,net = digits
    rng,before = torch.get_rng_state(),{k:v.clone() for k,v in net.state_dict().items()}
    a,b = (layer_probe(net, dls.train.new(bs=bs), dls.valid.new(bs=bs), n=400, progress=False) for bs in (37, 256))
    assert (a.accuracy-b.accuracy).abs().max()<=1/360 and (a.C/b.C-1).abs().max()<1e-3
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    same = layer_probe(net, dls.train, dls.valid, n=400, progress=False)
    assert same.equals(layer_probe(net, dls.train, dls.valid, n=400, progress=False))
    torch.set_rng_state(rng)

def test_errors_name_the_layer(digits):
    dls,net = digits
    X = {('net','a'):torch.full((20,3), float('nan'))}
    with pytest.raises(ValueError, match="layer 'a' of 'net'"):
        probe_features(X, torch.arange(20)%2, X, torch.arange(20)%2, progress=False)

def test_vocabularies_in_another_order():
    "The same classes under other labels would be probed wrongly"
    a,b = digits_dls(n=64, n_valid=32),digits_dls(n=64, n_valid=32)
    b.valid_ds.vocab = CategoryMap([str(o) for o in range(9, -1, -1)], sort=False)
    with pytest.raises(ValueError, match="test has class '9' as label 0, train have it as 9"):
        layer_probe(nn.Sequential(nn.Flatten(), nn.Linear(768,4)), a.train, b.valid, progress=False)

# what has no meaning is refused

def separable(n=400):
    set_seed(0)
    y = torch.arange(n)%4
    return F.one_hot(y, 4).float()*5+torch.randn(n, 4),y

@pytest.mark.parametrize('bad', [float('nan'),float('inf')])
def test_test_features_that_are_not_finite(bad):
    "A network that is fine on the training data and not on the test data has no accuracy of 25%"
    X,y = separable()
    m = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="layer '0' of 'model': test X: 3200 of 3200 features"):
        layer_probe(m, [(X,y)], [(X*bad,y)], C=1., progress=False)
    p = fit_probe(X, y, C=1.)
    for f in (p.logits,p.predict): pytest.raises(ValueError, f, X*bad).match('1600 of 1600 features are not finite')

def test_labels_of_other_numbers():
    X,y = separable()
    p = fit_probe(X, y, C=1.)
    assert p.accuracy(X, y)==p.accuracy(X, y[:,None])==p.accuracy(X, y.tolist())>.9
    with pytest.raises(ValueError, match=r'y: labels of shape \(1,\) for 400 samples'): p.accuracy(X, [1])
    k,kw = ('m','a'),dict(C=1., progress=False)
    for test,y_test in (({k:X},[1]),({k:X[:30]},y)):
        with pytest.raises(ValueError, match="layer 'a' of 'm': test y: labels of shape"):
            probe_features({k:X}, y, test, y_test, **kw)
    for test in ({('m','b'):X},{},{k:X,('m','b'):X}):
        with pytest.raises(ValueError, match=r"\('m', '[ab]'\) is in only one of the two"):
            probe_features({k:X}, y, test, y, **kw)

def test_features_given_are_chosen_like_those_of_a_network():
    X,y = separable()
    m,kw = nn.Sequential(nn.Identity()),dict(C=1., max_features=2, seed=3, progress=False)
    got,want = probe_features({('model','0'):X}, y, {('model','0'):X}, y, **kw),layer_probe(m, [(X,y)], [(X,y)], '0', **kw)
    assert got.features.item()==2 and got.accuracy.item()==want.accuracy.item()<.9 and got.attrs['pool'] is None
    with pytest.raises(ValueError, match='pool: these features have no places'):
        probe_features({('m','a'):X}, y, {('m','a'):X}, y, pool=3)

@pytest.mark.parametrize('key', ['conv1', 'fc', 3, ('a','b','c')], ids=str)
def test_names_of_features_given(key):
    "Two letters alone are no model and layer"
    X,y = separable()
    with pytest.raises(ValueError, match=r'train, test: .* names features; must be a pair, \(model, layer\)'):
        probe_features({key:X}, y, {key:X}, y, progress=False)

def merged(y): return torch.where(y>=8, 7, y)
def merge(items):
    x,y = map(torch.stack, zip(*items))
    return x,merged(y)
class FlipFirst:
    "Changes the label of a class's second sample, and no other's"
    def __call__(self, b): return b[0],torch.where((b[1]==0) & (b[0][:,0]>5), 1, b[1])

def test_labels_changed_after_the_eighth_class():
    y = torch.arange(100)%10
    ds = list(zip(torch.arange(100.)[:,None].repeat(1, 4), y))
    for dl in (TorchDL(ds, 20, collate_fn=merge), FastaiDL(ds, bs=20, create_batch=merge),
               FastaiDL(ds, bs=20, after_batch=lambda b: (b[0],merged(b[1])))):
        assert torch.equal(dl_labels(dl), merged(y)) and torch.equal(dl_labels(dl), torch.cat([b[1] for b in dl]))
    dl = FastaiDL(ds, bs=20, after_batch=FlipFirst())
    assert dl_labels(dl).tolist()==torch.where((y==0) & (torch.arange(100)>5), 1, y).tolist()
    items = FastaiDL(ds, bs=20, after_item=lambda o: (o[0],merged(o[1])))
    assert torch.equal(dl_labels(items), merged(y))

class Skips(list):
    def __getitem__(self, i):
        if i==3: raise SkipItemException
        return super().__getitem__(i)

@pytest.mark.parametrize('make', [TorchDL,FastaiDL])
def test_samples_that_are_skipped(make):
    X,y = separable(40)
    dl = make(Skips(zip(X, y)), 8)
    with pytest.raises(ValueError, match='left out by `SkipItemException`'):
        layer_probe(nn.Sequential(nn.Linear(4, 4)), dl, dl, progress=False)

def test_arguments_of_other_types():
    X,y = separable(40)
    m,dl = nn.Sequential(nn.Linear(4, 4)),[(X,y)]
    with pytest.raises(ValueError, match='labels: got a Tensor; must be a function'):
        layer_probe(m, dl, dl, labels=y%2, progress=False)
    with pytest.raises(ValueError, match='labels: got a tuple'): layer_probe(m, dl, dl, labels=(y%2,), progress=False)
    for bad in (['a','b']*20,np.array(['a','b']*20)):
        with pytest.raises(ValueError, match='Number the classes'): fit_probe(X, bad)
    for kw in (dict(pool=0),dict(pool=-1),dict(max_features=2.5),dict(max_features=0)):
        (k,v), = kw.items()
        with pytest.raises(ValueError, match=f'{k}={v}: must be a whole number'): layer_probe(m, dl, dl, progress=False, **kw)
    with pytest.raises(ValueError, match="'model' has weights on the device 'meta'"):
        layer_probe(nn.Linear(4, 4, device='meta'), dl, dl, progress=False)

def test_arrays_and_series_are_fitted():
    rng = np.random.default_rng(0)
    y = np.arange(60)%3
    X = rng.normal(size=(60, 5))+np.eye(3, 5)[y]
    want = fit_probe(torch.tensor(X), torch.tensor(y), 1.)
    for a,b in ((X,y), (X,pd.Series(y, range(9, 69))), (torch.tensor(X),y.astype(np.uint16)), (X,y.astype(np.uint8))):
        assert torch.equal(fit_probe(a, b, 1.).weight, want.weight)
