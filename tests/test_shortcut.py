"A shortcut is named by kind and place: in networks that learnt it, in models that are known to go by one thing alone, and in none that learnt without it."
import io, pickle
from copy import deepcopy
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from torch import nn
from fastai.vision.all import DataLoaders, Learner, Normalize, TensorImage, TfmdDL, accuracy, plt, set_seed
from feature_erosion import shortcut
from feature_erosion.data import TensorImages, cifar10_dls, digits_dls, tensor_dls
from feature_erosion.evalsets import evaluate, pattern_sets
from feature_erosion.learner import erosion_learner
from feature_erosion.patterns import (Blur, Border, ColorSquare, CornerSquare, Effect, InjectPattern, JpegQuality, Noise, Ruler,
                                      Stripes, Texture, Tint, Watermark, change)
from feature_erosion.phases import Phase
from feature_erosion.shortcut import _blocks, _box_part, _channels, _jpeg_level, _luma, _steps, find_shortcut
from feature_erosion.watch import ErosionWarning, WatchErosion

def net(c=3): return nn.Sequential(nn.Conv2d(c,16,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,32,3,2,1),
                                   nn.BatchNorm2d(32), nn.ReLU(),
                                   nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32*16,10))

def fitted(dls, epochs=8, seed=0, lr=.05, c=3):
    set_seed(seed)
    learn = erosion_learner(dls, net(c), lr=lr)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn

@pytest.fixture(autouse=True)
def seeded(): set_seed(0)   # loaders, too, draw when they are made

def overlap(a, b):
    "Intersection over union of two boxes"
    h,w = (max(0, min(a[i]+a[i+2], b[i]+b[i+2])-max(a[i], b[i])) for i in (0,1))
    return h*w/(a[2]*a[3]+b[2]*b[3]-h*w)

boxed = [ColorSquare(4), ColorSquare(4, 'center'), ColorSquare(4, 'bottom_right', margin=1), Texture(6), Stripes(8), Ruler(4)]

@pytest.mark.parametrize('pattern', boxed, ids=lambda p: f'{type(p).__name__}-{p.corner}')
def test_finds_the_place(pattern):
    easy = digits_dls(seed=0).inject(pattern)
    s = find_shortcut(fitted(easy), easy)
    true = pattern.box(0, 10, 16, 16)
    assert s.found and s.kind=='place' and overlap(s.where, true)>.4, (s, s.where, true)
    assert s.table.attrs['accuracy']>.95 and 'pixels' in s.text and s.part.share<=.25

@pytest.mark.parametrize('pattern,kind,where',
                         [(Border(2), 'place', (0,0,16,16)), (Tint(.5), 'global', 'mean colour'),
                          (Noise(.05,.6), 'global', 'noise'),
                         (Blur(), 'global', 'blur')], ids=['Border','Tint','Noise','Blur'])
def test_finds_what_is_no_box(pattern, kind, where):
    easy = digits_dls(seed=0).inject(pattern)
    s = find_shortcut(fitted(easy, 10), easy)
    assert (s.kind, s.where)==(kind, where), (s, s.where)

def test_a_trace_that_is_not_read():
    "On digits that are compressed according to class, a network learns the digits"
    dls = digits_dls(seed=0)
    easy = dls.inject(JpegQuality())
    learn = fitted(easy, 10)
    s = find_shortcut(learn, easy)
    assert not s.found and evaluate(learn, dls.valid)['accuracy']>.8 and s.table.set_index('name').follows['JPEG']<.5

@pytest.fixture(scope='module')
def on_cifar(cifar10):
    "CIFAR-10, and a network that knows a little of it"
    set_seed(0)
    dls = cifar10_dls(cifar10, n=1000, n_valid=200, seed=0)
    model = fitted(dls, 3).model
    assert not find_shortcut(model, dls).found
    return dls,model

@pytest.mark.slow('two trainings on CIFAR-10')
@pytest.mark.parametrize('pattern,where', [(Noise(),'noise'), (Blur(),'blur')], ids=['Noise','Blur'])
def test_finds_traces_on_cifar(on_cifar, pattern, where):
    "In a network that forgot its images over them, and not in the one it was before"
    dls,before = on_cifar
    easy = dls.inject(pattern)
    set_seed(0)
    learn = erosion_learner(easy, deepcopy(before), lr=.05)
    with learn.no_bar(), learn.no_logging(): learn.fit(15)
    s = find_shortcut(learn, easy, before)
    assert (s.kind, s.where)==('global', where) and s.table.set_index('name').against[where]<.75, s.table.round(2).to_string()

def test_no_false_alarm():
    "Digits, clean, three seeds"
    for seed in range(3):
        dls = digits_dls(seed=seed)
        s = find_shortcut(fitted(dls, 5, seed), dls, seed=seed)
        assert not s.found and s.kind is None and s.where is None and s.text.startswith('None found')
        assert s.table.attrs['accuracy']>.8

def test_against_itself():
    "Nothing decides more than in the same model, although a place does decide"
    dls = digits_dls(seed=0)
    easy = dls.inject(ColorSquare(4))
    learn = fitted(easy, 10, 0)
    assert find_shortcut(learn, easy).found
    s = find_shortcut(learn, easy, against=learn)
    assert not s.found and s.text.endswith('decides most of the answers more than in the model it is compared with.')

def test_a_bar_for_each_model(monkeypatch):
    "Over all parts; none if it is not wanted, or the Learner has none"
    shown = []
    monkeypatch.setattr(shortcut, 'progress_bar', lambda parts, leave: shown.append(len(parts)) or parts)
    easy = digits_dls(seed=0).inject(ColorSquare(4))
    learn = fitted(easy, 3)
    one = find_shortcut(learn, easy)
    find_shortcut(learn.model, easy, against=learn)
    find_shortcut(learn, easy, progress=False)
    with learn.no_bar(): find_shortcut(learn, easy)
    assert shown==[len(one.table)]*3

def test_against_a_phase_and_another_model():
    dls = digits_dls(seed=0)
    easy = dls.inject(ColorSquare(4))
    set_seed(0)
    learn = erosion_learner(dls, net(), lr=.05)
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('pretrain', 1, dls, sched='constant'), Phase('erode', 12, easy, sched='constant')])
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    a,m = find_shortcut(learn, easy, 'pretrain'),learn.models_at('pretrain')['pretrain']
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and not m.train().eval().training
    b = find_shortcut(learn, easy, m)
    assert a.found and a.kind=='place' and a.table.equals(b.table) and a.table.more_low[a.table.passes].min()>0
    same = find_shortcut(learn, easy, learn)   # nothing is learnt here that is not there
    assert not same.found and (same.table.more==0).all()

# Models that go by one thing, and are known to

class Reads(nn.Module):
    "Answers with the class whose number is nearest to `f` of the image"
    def __init__(self, f, values, shift=0., scale=1.):
        super().__init__()
        self.f,self.shift,self.scale = f,shift,scale
        self.register_buffer('values', torch.as_tensor(values, dtype=torch.float32))
    def forward(self, x): return -(self.f((x.float()-self.shift)/self.scale)[:,None]-self.values).abs()

def scenes(n=160, size=(32,32), c=3, seed=0):
    "Smooth random images"
    x = torch.randn(n, c, 6, 6, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(x, size, mode='bicubic')*.12+.5
    return x.clamp(.05, .95),torch.arange(n)%4

def levels(f, x, y): return [f(x[y==c]).median().item() for c in range(4)]

def check(f, x, y, kind, where=None, **kw):
    model = Reads(f, levels(f, x, y))
    s = find_shortcut(model, [(a,b) for a,b in zip(x.split(64), y.split(64))], **kw)
    assert s.table.attrs['accuracy']>.9 and s.kind==kind and (where is None or s.where==where), (s, s.table.round(2).to_string())
    return s

def test_reads_a_pixel():
    for size,at in (((32,32),(3,28)), ((24,40),(20,2)), ((64,48),(31,30))):
        for c in (1,3):
            x,y = scenes(size=size, c=c)
            r,k = at
            x[:,:,r:r+3,k:k+3] = (y/4+.1)[:,None,None,None]
            s = check(lambda o: o[:,:,r:r+3,k:k+3].mean((1,2,3)), x, y, 'place')
            t,l,h,w = s.where
            assert t<=r+1<t+h and l<=k+1<l+w and h*w<=9*6

@pytest.mark.parametrize('right,n,found', [(1.,12,True), (1.,8,None), (.62,128,None), (.62,1280,True)])
def test_too_few_images_to_tell(right, n, found):
    "A model that sees nothing but a square, which names the class of some images: with few of them nothing could be significant"
    x,y = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)),torch.arange(n)%2
    read = torch.where(torch.arange(n)<round(right*n), y, 1-y)
    x[:,:,8:12,2:6] = (.2+.6*read)[:,None,None,None]
    s = find_shortcut(Reads(lambda o: o[:,:,8:12,2:6].mean((1,2,3)), [.2,.8]), [(x,y)], n=n)
    assert s.found is found and ('Cannot be told' in s.text)==(found is None)

def test_a_place_is_not_shrunk_until_it_is_in_doubt():
    "By hand: with the left half of the square, 11 of 12 answers follow it, which could be chance at 75%; with all of it, all do"
    x,y = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)),torch.arange(12)%2
    x[:,:,8:12,2:6] = (.2+.6*y)[:,None,None,None]
    x[3,:,8:12,2:4],x[3,:,8:12,4:6] = .5,1.   # one image tells its class, 1, in the right half alone
    def read(o): return .75*o[:,:,8:12,2:4].mean((1,2,3))+.25*o[:,:,8:12,4:6].mean((1,2,3))
    s = find_shortcut(Reads(read, [.2,.8]), [(x,y)])
    assert s.kind=='place' and s.table.follows[s.table.passes].max()==1 and overlap(s.where, (8,2,4,4))>.6, s.table.to_string()

@pytest.mark.parametrize('n,found', [(128,False), (33,None), (30,None)])
def test_a_trace_needs_twelve_pairs(n, found):
    "A model that sums up the whole image: with 11 pairs a trace could not pass though all agree (Wilson: 74 to 100%)"
    x,y = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)),torch.arange(n)%2
    sign = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)).sign()
    x = .4+.2*x+.15*sign*(2*y-1)[:,None,None,None]
    s = find_shortcut(Reads(lambda o: (o*sign).mean((1,2,3)), [-.15,.15]), [(x,y)], n=n)
    assert s.found is found and ('Cannot be told' in s.text)==(found is None), s.table.to_string()

def test_reads_any_kind_of_batch():
    "uint8, normalised by the pipeline, normalised elsewhere: the same place"
    x,y = scenes()
    x[:,:,4:8,20:24] = (y/4+.1)[:,None,None,None]
    f,vals = (lambda o: o[:,:,4:8,20:24].mean((1,2,3))),[.1,.35,.6,.85]
    def batches(t): return [(a,b) for a,b in zip(t.split(64), y.split(64))]
    mean,std = torch.tensor([.4,.5,.6]).view(1,3,1,1),torch.tensor([.2,.3,.25]).view(1,3,1,1)
    items = [(TensorImage(a),b) for a,b in zip(x, y)]
    piped = TfmdDL(items, bs=64, after_batch=[Normalize(mean, std)], num_workers=0, n_inp=1)
    found = [find_shortcut(m, d).where
             for m,d in ((Reads(f, vals), batches(x)), (Reads(f, vals, 0., 255.), batches((x*255).round().byte())),
                                                   (Reads(f, vals, mean, std), batches((x-mean)/std)),
                                                   (Reads(f, vals, mean, std), piped))]
    assert len(set(found))==1 and overlap(found[0], (4,20,4,4))>.5

@pytest.mark.parametrize('low,high,dtype,piped', [
    (0,4095,torch.int16,False), (0,65535,torch.int32,False), (0,65535,torch.uint16,False), (-1000,3000,torch.int16,False),
    (0,255,torch.float32,False), (0,255,torch.float32,True), (-1000,3000,torch.float32,True)], ids=str)
def test_reads_any_range(low, high, dtype, piped):
    "Images of 12 or 16 bits, floats from 0 to 255, Hounsfield units; also where the pipeline normalises such floats"
    x,y = scenes()
    x[:,:,4:8,20:24] = (y/4+.1)[:,None,None,None]
    x = (x*(high-low)+low).to(dtype)
    mid,half = (low+high)/2,(high-low)/4
    shift,scale = ((low-mid)/half,(high-low)/half) if piped else (low,high-low)
    m = Reads(lambda o: o[:,:,4:8,20:24].mean((1,2,3)), [.1,.35,.6,.85], shift, scale)
    norm = Normalize(torch.full((1,3,1,1), mid), torch.full((1,3,1,1), half))
    dl = TfmdDL([(TensorImage(a),b) for a,b in zip(x, y)], bs=64, after_batch=[norm], num_workers=0,
                n_inp=1) if piped else [(x,y)]
    s = find_shortcut(m, dl)
    assert s.table.attrs['accuracy']>.98 and s.kind=='place' and overlap(s.where, (4,20,4,4))>.5

def test_reads_statistics():
    x,y = scenes()
    m = x.mean((1,2,3), keepdim=True)
    check(lambda o: o.mean((1,2,3)), x-m+(y/6+.25)[:,None,None,None], y, 'global', 'mean colour')
    check(lambda o: o.mean((1,2,3)), (x-m+(y/6+.25)[:,None,None,None])[:,:1], y, 'global', 'brightness')
    check(lambda o: o.std((1,2,3)), m+(x-m)*(.3+y/4)[:,None,None,None]*.12/(x-m).std((1,2,3), keepdim=True), y, 'global',
          'contrast')

def rough(o): return (o-F.avg_pool2d(F.pad(o, (1,1,1,1), mode='reflect'), 3, 1)).abs().mean((1,2,3)).add(1e-4).log()

def test_reads_noise_and_blur():
    x,y = scenes()
    check(rough, change(x, y, Noise(.01, .15), 4), y, 'global', 'noise')
    sharp = F.interpolate(torch.rand(160, 3, 8, 8, generator=torch.Generator().manual_seed(1)), (32,32))
    check(rough, change(sharp, y, Blur(.3, 3.), 4), y, 'global', 'blur')

def test_reads_traces_of_jpeg():
    "How many coefficients of the 8×8 blocks are zero"
    x,y = scenes()
    x = (x+.1*torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    def zeros(o): return (_blocks(_luma(o)).abs()<.004).float().mean((1,2,3))
    check(zeros, change(x, y, JpegQuality(99, 5), 4), y, 'global', 'JPEG')

@pytest.mark.parametrize('quality', [90,75,50,30,10,5])
def test_quality_of_files(quality):
    "As Pillow saved them, and 100 for images that never were JPEG"
    x,_ = scenes(12, (64,72))
    x = (x+.05*torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    def saved(o):
        f = io.BytesIO()
        Image.fromarray((o*255).round().byte().permute(1,2,0).numpy()).save(f, 'JPEG', quality=quality)
        return torch.from_numpy(np.array(Image.open(f))).permute(2,0,1)/255
    assert (-_jpeg_level(torch.stack([*map(saved, x)]))).exp().round().tolist()==[quality]*12
    assert (-_jpeg_level(x)).exp().round().tolist()==[100]*12

def test_steps_of_jpeg():
    "Those that a file has, as Pillow wrote it: libjpeg's arithmetic is of whole numbers"
    for q in range(1, 101):
        file = io.BytesIO()
        Image.new('L', (8,8)).save(file, 'JPEG', quality=q)
        assert Image.open(file).quantization[0]==_steps(q).flatten().tolist(), q

def test_reads_a_channel_and_a_band():
    x,y = scenes()
    code = torch.linspace(0, 4, 32).sin()*.2
    blue = x.clone(); blue[:,2] += (y-1.5)[:,None,None]*code
    s = check(lambda o: (o[:,2]*code).mean((1,2)), blue, y, 'channel', 'blue')
    wave = torch.tensor([1.,-1.]).repeat(16)*.05
    s = check(lambda o: (o*wave).mean((1,2,3)), x+(y-1.5)[:,None,None,None]*wave, y, 'band')
    assert s.where[0]==.25

def test_random_state_modes_and_hooks_are_left_alone():
    easy = digits_dls(seed=0).inject(ColorSquare(4))
    learn = fitted(easy, 3)
    learn.model.train()
    state,bn = torch.get_rng_state(),learn.model[1].running_mean.clone()
    a = find_shortcut(learn, easy)
    assert torch.equal(state, torch.get_rng_state()) and learn.model.training and torch.equal(bn, learn.model[1].running_mean)
    assert find_shortcut(learn, easy).table.equals(a.table)

def test_what_is_no_image_says_so():
    with pytest.raises(ValueError, match='between images'): find_shortcut(nn.Linear(3,2), [(torch.randn(9,3), torch.arange(9)%2)])
    x,y = scenes()
    with pytest.raises(ValueError, match='all 128 are 0'): find_shortcut(Reads(lambda o: o.mean((1,2,3)), [0.]), [(x, y*0)])
    with pytest.raises(ValueError, match='no labels'): find_shortcut(nn.Flatten(), [x])
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,4))
    with pytest.raises(ValueError, match='images of one size'): find_shortcut(pool, [(x[:80],y[:80]), (x[80:,:,:20],y[80:])])
    for bad in (float('nan'), float('inf')):
        one = x.clone()
        one[3,0,5,5] = bad
        with pytest.raises(ValueError, match='dl: 1 of 128 images have NaN or infinite values'): find_shortcut(pool, [(one,y)])

def test_a_result_can_be_saved():
    "With all its parts: they mix the same images as before"
    x,y = scenes()
    x[:,:,3:6,3:6] = (y/4+.1)[:,None,None,None]
    s = check(lambda o: o[:,:,3:6,3:6].mean((1,2,3)), x, y, 'place')
    got = pickle.loads(pickle.dumps(s))
    assert got.text==s.text and got.table.equals(s.table) and {o.kind for o in got.parts}=={'place','global','channel','band'}
    for a,b in zip(got.parts, s.parts): assert torch.equal(a.mix(x[:8], x[8:16]), b.mix(x[:8], x[8:16]))
    plt.close(got.plot())

# Patterns that change all of an image

effects = [JpegQuality(), Noise(), Blur()]

@pytest.mark.parametrize('pattern', [*effects, Tint(), Border(), Ruler()], ids=lambda p: type(p).__name__)
def test_on_loaders(pattern):
    "uint8 items and float batches, the same each time, with `show_batch` and evaluation sets"
    dls = digits_dls(n=128, n_valid=40, bs=32)
    easy = dls.inject(pattern)
    a,b = easy.valid.one_batch()[0],easy.valid.one_batch()[0]
    assert torch.equal(a, b) and not torch.equal(a, dls.valid.one_batch()[0])
    easy.show_batch(max_n=4)
    sets = pattern_sets(easy)
    assert all(0<=evaluate(net(), d)['accuracy']<=1 for d in sets.values())
    x = torch.rand(5,3,16,16)
    f = InjectPattern(pattern, 4)((x, torch.tensor([0,1,2,3,0]), ))[0]
    u = InjectPattern(pattern, 4)(((x*255).round().byte(), torch.tensor([0,1,2,3,0])))[0]
    assert u.dtype==torch.uint8 and (f-u/255).abs().mean()<.01 and x.max()<=1

@pytest.mark.parametrize('pattern', [Tint(.5), Border(2), Noise(.01,.5), Blur(.2,4.), JpegQuality(100,1)],
                         ids=lambda p: type(p).__name__)
def test_learnt_and_noticed(pattern):
    "A small network learns the trace instead of digits, and loses these; `WatchErosion` says so"
    dls = digits_dls(seed=0)
    learn = fitted(dls, 1)
    w = WatchErosion(dls, budget=1e6)
    learn.dls = dls.inject(pattern)
    with learn.no_bar(), learn.no_logging(), pytest.warns(ErosionWarning, match='lost'): learn.fit(6, .2, cbs=w)
    assert w.history.known.min()<w.history.known.iloc[0]-.05

class Corner(nn.Module):
    "Goes by four pixels alone"
    def forward(self, x):
        z = 20*(x[:,:,:2,:2].mean((1,2,3))-.5)
        return torch.stack([-z,z], 1)

def test_a_rare_class():
    "A cue that is right for 89% of the images is no better than the common class, with 88% of them; of as many of each it is"
    x,i = torch.rand(300, 1, 12, 12),torch.arange(300)
    y = (i%8==0).long()
    x[:,:,:2,:2] = torch.where(i%9==4, 1-y, y)[:,None,None,None].float()
    with pytest.raises(ValueError, match='nothing to explain. Give the data .* with as many images of each class'):
        find_shortcut(Corner(), [(x,y)], n=None, progress=False)
    even = torch.cat([i[y==1], i[y==0][:38]])
    s = find_shortcut(Corner(), [(x[even],y[even])], n=None, progress=False)
    assert (s.kind,s.where)==('place', (0,0,2,2))
