"CKA against the published definitions in numpy's float64, on random and nasty features, and on networks in all-float64."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.vision.all import DataLoader
from feature_erosion.measures.cka import cka, hsic, layer_cka, linear_cka, rbf_cka
from feature_erosion.measures.inside import look_inside
from feature_erosion.measures.probes import layer_probe
from feature_erosion.models import create_model

def hsic0(K, L):
    "Gretton et al. 2005: tr(KHLH)/(n-1)²"
    n = len(K)
    H = np.eye(n)-1/n
    return np.trace(K@H@L@H)/(n-1)**2

def hsic1(K, L):
    "Song et al. 2012, eq. 5, term by term"
    n,K,L,one = len(K),K-np.diag(np.diag(K)),L-np.diag(np.diag(L)),np.ones(len(K))
    return (np.trace(K@L) + (one@K@one)*(one@L@one)/((n-1)*(n-2)) - 2/(n-2)*(one@K@L@one))/(n*(n-3))

def reference(X, Y, h):
    "CKA from centred features: HSIC₁ does not see the mean, but a computer does"
    K,L = ((Z-Z.mean(0))@(Z-Z.mean(0)).T for Z in (X/np.abs(X).max(), Y/np.abs(Y).max()))
    return h(K, L)/np.sqrt(h(K, K)*h(L, L))

def feature_form(X, Y):
    "Kornblith et al. 2019, eq. 5"
    X,Y = X-X.mean(0),Y-Y.mean(0)
    return np.linalg.norm(X.T@Y)**2/np.linalg.norm(X.T@X)/np.linalg.norm(Y.T@Y)

@st.composite
def features(draw, n):
    "Samples × features: any scale, rank-deficient, with duplicated and constant columns or a large common mean"
    d,scale,rng = draw(st.integers(2, 30)),10.**draw(st.integers(-6, 6)),np.random.default_rng(draw(st.integers(0, 2**31)))
    X = rng.normal(size=(n, d))
    if draw(st.booleans()): X = rng.normal(size=(n, 2))@rng.normal(size=(2, d))
    if draw(st.booleans()): X = np.c_[X, X[:,:1], np.full(n, 3.)]
    return scale*(X+draw(st.sampled_from([0,0,1,100])))

@st.composite
def pairs(draw):
    n = draw(st.integers(5, 40))
    return draw(features(n)),draw(features(n))

def close(a, b, tol=1e-8): assert abs(a-b) < tol, (a, b)

@given(pairs())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_definitions(XY):
    (X,Y),(A,B) = XY,map(torch.tensor, XY)
    close(linear_cka(A, B), reference(X, Y, hsic1))
    close(linear_cka(A, B, debiased=False), reference(X, Y, hsic0))
    close(linear_cka(A, B, debiased=False), feature_form(X, Y))

@given(pairs(), st.integers(0, 2**31), st.sampled_from([1e-6, 1e-3, 7, 1e6]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_invariances(XY, seed, scale):
    A,B = map(torch.tensor, XY)
    Q = torch.linalg.qr(torch.randn(A.shape[1], A.shape[1], generator=torch.Generator().manual_seed(seed), dtype=A.dtype)).Q
    perm = torch.randperm(len(A), generator=torch.Generator().manual_seed(seed))
    for f in (linear_cka, lambda X, Y: linear_cka(X, Y, debiased=False), rbf_cka):
        want = f(A, B)
        close(f(scale*A@Q, B), want, 1e-7)
        close(f(A[perm], B[perm]), want, 1e-7)
        close(f(A, B), f(B, A), 1e-9)
        close(f(A, A), 1, 1e-9)

def test_not_invariant_to_other_maps():
    "Stretching one feature, or shuffling the samples of one side, must show"
    A = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    stretched = A*torch.tensor([30.,1,1,1,1])
    assert linear_cka(A, stretched)<.8 and abs(linear_cka(A, A.flip(0)))<.2

@pytest.mark.parametrize('debiased', [True, False])
def test_dead_features_give_zero_not_nan(debiased):
    A = torch.randn(20, 4)
    for const in (torch.zeros(20, 0), torch.zeros(20, 3), torch.full((20, 3), 1e6), torch.full((20, 3), 1e-6)):
        assert linear_cka(A, const, debiased)==rbf_cka(A, const, debiased=debiased)==0

def shifted_net(x, mean):
    "Three linear layers whose features share a mean of `mean` standard deviations, and their activations"
    layers,acts = [nn.Linear(50, 200), nn.Linear(200, 100), nn.Linear(100, 300)],[]
    with torch.no_grad():
        for l in layers:
            l.bias.zero_()
            h = l(x)
            l.bias += mean*h.std(0).mean() - h.mean(0)
            acts.append(x := l(x))
    return nn.Sequential(*layers),acts

def double_stream(acts, bs):
    "Mini-batch HSIC₁ in float64, batches weighted by n(n-3)"
    H = 0
    for i in range(0, len(acts[0]), bs):
        K = [(a-a.mean(0))@(a-a.mean(0)).T for a in (o[i:i+bs].double().flatten(1).numpy() for o in acts)]
        n = len(K[0])
        H = H + n*(n-3)*np.array([[hsic1(k, l) for l in K] for k in K])
    s = np.sqrt(np.diag(H))
    return H/np.outer(s, s)

@pytest.mark.parametrize('mean', [0, 1, 2.9, 3.1, 10, 100])
def test_error_to_the_same_estimator_in_float64(mean):
    "From the same float32 activations; means on both sides of where features are centred first"
    torch.manual_seed(0)
    x = torch.randn(160, 50)
    net,acts = shifted_net(x, mean)
    res = layer_cka(net, list(zip(x.split(64), x.split(64))), ['0','1','2'], progress=False)
    assert np.abs(res.values-double_stream(acts, 64)).max() < 1e-6
    full = layer_cka(net, list(zip(x.split(64), x.split(64))), ['0','1','2'], estimator='full', progress=False)
    assert np.abs(full.values-double_stream(acts, 160)).max() < 1e-6

def test_a_resnet_in_float32_and_float64():
    torch.manual_seed(0)
    nets = [create_model('resnet20', 10, width=.25).eval() for _ in range(2)]
    x = torch.randn(96, 3, 16, 16)
    batches = [(o, o) for o in x.split(32)]
    single = layer_cka(nets, batches, progress=False)
    double = layer_cka([o.double() for o in nets], [(o.double(), o) for o,_ in batches], progress=False)
    assert np.abs(single.values-double.values).max() < 1e-6
    assert np.abs(np.diag(single)-1).max() < 1e-12 and not np.isnan(single.values).any()

def sorted_by_class(kind):
    "1,200 samples of ten classes, one class after the other, as folders list them"
    y = torch.arange(10).repeat_interleave(120)
    x = 2*torch.randn(10, 30, generator=torch.Generator().manual_seed(0))[y]+torch.randn(1200, 30, generator=torch.Generator().manual_seed(1))
    ds = torch.utils.data.TensorDataset(x, y)
    return x,y,(DataLoader if kind=='fastai' else torch.utils.data.DataLoader)(ds, 100)

@pytest.mark.works(kind='loaders', what='data sorted by class, as folders list them: CKA from batches',
                   how='works: each batch has samples of all classes')
@pytest.mark.parametrize('kind', ['fastai','torch'])
def test_data_sorted_by_class(kind):
    "Batches of one or two classes each do not show how classes differ; what is right follows from all samples at once"
    x,y,dl = sorted_by_class(kind)
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(30,64), nn.ReLU(), nn.Linear(64,10))
    models = dict(a=net(0), b=net(1))
    with torch.no_grad(): want = linear_cka(models['a'](x), models['b'](x))
    in_order = layer_cka(models, list(zip(x.split(100), y.split(100))), progress=False).loc[('a','2'),('b','2')]   # left as it is
    assert abs(in_order-want)>.1
    for n in (None,800):
        got = layer_cka(models, dl, n=n, progress=False).loc[('a','2'),('b','2')]
        assert abs(got-want)<.03 and got==layer_cka(models, dl, n=n, progress=False).loc[('a','2'),('b','2')]
    inside = look_inside(models, dl, dl, '2', n_test=None, C=1., progress=False)
    assert abs(inside.cka.loc[('a','2'),('b','2')]-want)<.03
    probes = layer_probe(models, dl, dl, '2', C=1., progress=False)
    assert np.allclose(inside.probe.accuracy, probes.accuracy, atol=2e-3) and inside.probe.accuracy.min()>.8

def test_shuffling_loader_shows_both_models_the_same_images():
    torch.manual_seed(0)
    net,x = nn.Linear(10, 5),torch.randn(64, 10)
    dl = torch.utils.data.DataLoader(list(zip(x, range(64))), batch_size=16, shuffle=True)
    assert np.allclose(layer_cka([net, net], dl, estimator='full', progress=False), 1)

# features in which debiased CKA sees nothing

def one_active(n): return torch.eye(n)[:,:1]

@pytest.mark.parametrize('n', [4, 5, 8, 33])
@pytest.mark.parametrize('kernel', ['linear', 'rbf'])
def test_samples_equally_far_apart_give_zero(n, kernel):
    """One-hot features, and a unit that is active on one sample: U-centring leaves nothing of their kernels, by hand: all off-diagonal
    entries are the same, and so are the row sums that are taken away. What was left were rounding errors, whose square root may be imaginary"""
    other = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    for X in (torch.eye(n), 3.7*torch.eye(n)+.3, torch.cat([torch.eye(n)]*2, 1),
              *([one_active(n), -5*one_active(n)] if kernel=='linear' else [])):
        assert [cka(a, b, kernel) for a,b in ((X, other), (other, X), (X, X), (X.half(), other))]==[0]*4
        assert cka(X, X, kernel, debiased=False)==pytest.approx(1)
        assert cka(other, other, kernel)==pytest.approx(1)

class Same(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Identity(),nn.Linear(8, 3)
    def forward(self, x): return self.b(self.a(x))

@pytest.mark.parametrize('estimator', ['minibatch', 'full'])
@pytest.mark.parametrize('kernel', ['linear', 'rbf'])
def test_layers_whose_samples_are_equally_far_apart(estimator, kernel):
    with pytest.warns(UserWarning, match='all equally far apart, their CKA is given as 0: model/a'):
        r = layer_cka(Same(), [torch.eye(8), torch.eye(8)[:5]] if estimator=='minibatch' else [torch.eye(8)], 'leaf',
                      estimator=estimator, kernel=kernel, progress=False)
    assert r.attrs['dead']==[('model','a')] and r.values==pytest.approx(np.array([[0,0],[0,1]]), abs=1e-6)

@pytest.mark.parametrize('estimator', ['minibatch','full'])
@pytest.mark.parametrize('power', [-110,-80,80,120])
def test_size_of_activations_does_not_matter(estimator, power):
    "CKA does not depend on scale, so not on that of one layer: signals that vanish or explode are the same signals"
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5, bias=False)),torch.randn(60, 8)
    def get(): return layer_cka(m, [(x[:40],torch.zeros(40)), (x[40:],torch.zeros(20))], estimator=estimator, progress=False)
    want = get()
    m[1].weight.data *= 2.**power
    assert np.allclose(get(), want, atol=1e-6) and want.values[0,1]>.3

def test_many_features_are_not_empty():
    "White noise in many dimensions is almost equally far apart; the little that is left is real"
    X = torch.randn(8, 300_000, generator=torch.Generator().manual_seed(0))
    assert cka(X, X)==pytest.approx(1)
    assert layer_cka([nn.Identity()]*2, [X], 'all', progress=False).values==pytest.approx(np.ones((2,2)))

class Augmented(torch.utils.data.Dataset):
    "A dataset that changes its images at random each time"
    def __init__(self): self.x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    def __len__(self): return 64
    def __getitem__(self, i): return self.x[i]+3*torch.randn(3, 8, 8),i%2

@pytest.mark.parametrize('workers', [0, 1])
def test_all_passes_see_the_same_random_images(workers):
    "Two layers that do nothing have a CKA of 1, also if memory is too small to hold both at once"
    m = nn.Sequential(nn.Identity(), nn.Identity(), nn.Flatten(), nn.Linear(192, 2))
    dl = torch.utils.data.DataLoader(Augmented(), 16, num_workers=workers)
    r = layer_cka(m, dl, ['0','1'], estimator='full', max_memory=9e-5, progress=False)
    assert r.attrs['passes']==2 and r.values==pytest.approx(np.ones((2,2)), abs=1e-6)

def test_models_named_by_tuples():
    nets = {('lr',.1):nn.Linear(5,4), ('lr',1):nn.Linear(5,4)}
    res = layer_cka(nets, [(torch.randn(20,5),)], progress=False)
    got = res.between(('lr',.1), ('lr',1))
    assert got.shape==(1,1) and got.iloc[0,0]==res.iloc[0,1]
    assert res.same_layer().size==1
