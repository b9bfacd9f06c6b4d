"Grad-CAM against an implementation of its own, shares with known answers, and that nothing is left behind."
import inspect, random
import numpy as np, pandas as pd, pytest, torch, torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.vision.all import CategoryBlock, DataBlock, DataLoader, ImageBlock, IndexSplitter, TensorImage, Transform, set_seed
from PIL import Image
from feature_erosion.measures import attribution
from feature_erosion.measures.attribution import attention_share, cam_layer, compare_cams, grad_cam, max_share, pattern_attention, pattern_mask
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import pattern_sets
from feature_erosion.models import create_model
from feature_erosion.patterns import Border, ColorSquare, CornerSquare, Effect, Pattern, Ruler, Stripes, Texture, Tint, Watermark, corners, paint

def bilinear(m, h, w):
    "Pixel centres, clamped at the border: written out for one map"
    def weights(n, k):
        pos = np.clip((np.arange(k)+.5)*n/k-.5, 0, n-1)
        lo = np.minimum(pos.astype(int), max(n-2, 0))
        W = np.zeros((k, n))
        for i,(p,j) in enumerate(zip(pos, lo)):
            W[i,j] += 1-(p-j)
            if n>1: W[i,j+1] += p-j
        return W
    return weights(m.shape[0], h)@m@weights(m.shape[1], w).T

def reference(body, head, x, target=None):
    "Selvaraju et al. 2017, eq. 1 and 2, from a network cut in two"
    A = body(x).detach().clone().requires_grad_()
    y = head(A.clone())
    c = y.argmax(1) if target is None else torch.as_tensor(target).expand(len(x))
    y[range(len(x)),c].sum().backward()
    A,G = A.detach().double().numpy(),A.grad.double().numpy()
    maps = [np.maximum(sum(G[b,k].mean()*A[b,k] for k in range(A.shape[1])), 0) for b in range(len(x))]
    return np.stack([bilinear(m, *x.shape[2:]) for m in maps])

def randomise(model):
    "BatchNorm statistics and weights as after some training, in eval mode"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=.3)
            nn.init.uniform_(m.running_var, .5, 2)
            nn.init.normal_(m.weight, 1, .3)
            nn.init.normal_(m.bias, std=.3)
    return model.eval()

def close(a, b, tol=1e-5): np.testing.assert_allclose(a.double().numpy(), b, atol=tol*max(1e-30, np.abs(b).max()), rtol=0)

@st.composite
def nets(draw):
    "A body of convolutions, a head of another kind, images, a class"
    torch.manual_seed(draw(st.integers(0, 10**6)))
    ni,c,side,inplace = draw(st.sampled_from([1,3])),draw(st.integers(2, 6)),draw(st.integers(13, 16)),draw(st.booleans())
    body = [nn.Conv2d(ni, c, 3, draw(st.integers(1,2)), 1)]
    for _ in range(draw(st.integers(0, 2))):
        body += [nn.BatchNorm2d(c), nn.ReLU(inplace),
                 nn.Conv2d(c, c, draw(st.sampled_from([1,3])), padding=draw(st.integers(0, 1)))]
    body += draw(st.sampled_from([[nn.BatchNorm2d(c), nn.ReLU(inplace)], [nn.ReLU(inplace)], [nn.Tanh()], []]))
    k = draw(st.integers(1, 2))
    head = [nn.AdaptiveAvgPool2d(k), nn.Flatten(), nn.Linear(c*k*k, 7), nn.ReLU(inplace), nn.Linear(7, 4)]
    x = torch.randn(draw(st.integers(1, 5)), ni, side, side+draw(st.integers(0, 3)))
    return randomise(nn.Sequential(*body)),nn.Sequential(*head).eval(),x,draw(st.sampled_from([None,0,3]))

@settings(max_examples=60, deadline=None, derandomize=True)
@given(nets(), st.integers(1, 5))
def test_random_networks(net, bs):
    "Single precision on both sides: where terms cancel, the fifth digit differs"
    body,head,x,target = net
    want,model = reference(body, head, x, target),nn.Sequential(body, head)
    close(grad_cam(model, x, target, layer=body, bs=bs), want, 1e-4)
    close(grad_cam(model, x, target), want, 1e-4)
    for p in model.parameters(): p.requires_grad_(False)
    close(grad_cam(model, x, target, layer='0'), want, 1e-4)

def small_vgg():
    "torchvision's VGG-11 with in-place ReLUs; a small classifier in place of 120 million weights"
    with torch.device('meta'): m = torchvision.models.vgg11()
    m.classifier = nn.Linear(512*7*7, 10)
    m = m.to_empty(device='cpu')
    for p in m.parameters(): nn.init.normal_(p, std=.03)
    return m.eval()

def test_torchvision():
    torch.manual_seed(0)
    x,r,v = torch.randn(3, 3, 64, 64),randomise(torchvision.models.resnet18(num_classes=10)),small_vgg()
    parts = list(r.children())
    want = reference(nn.Sequential(*parts[:8]), nn.Sequential(parts[8], nn.Flatten(), parts[9]), x)
    close(grad_cam(r, x), want)
    close(grad_cam(r.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)), want, 1e-4)
    close(grad_cam(r, x, [1,2,3], 'layer3'),
          reference(nn.Sequential(*parts[:7]), nn.Sequential(*parts[7:9], nn.Flatten(), parts[9]), x, [1,2,3]), 1e-4)
    close(grad_cam(nn.DataParallel(r), x), want, 1e-4)
    close(grad_cam(v, x), reference(v.features[:20], nn.Sequential(v.features[20], v.avgpool, nn.Flatten(), v.classifier), x))
    close(grad_cam(v, x, layer='features.18'),
          reference(v.features[:19], nn.Sequential(*v.features[19:], v.avgpool, nn.Flatten(), v.classifier), x))

@pytest.mark.parametrize('arch,layer',
                         [('resnet20','layer3'), ('resnet18','layer4'), ('vgg19','feature'), ('torchvision/resnet50','layer4'),
                          ('torchvision/densenet121','features'),
    ('torchvision/efficientnet_b0','features'), ('torchvision/shufflenet_v2_x0_5','conv5'),
    ('torchvision/squeezenet1_1','classifier.2'), ('torchvision/alexnet','features.11')])
def test_default_layer(arch, layer):
    with torch.device('meta'): assert cam_layer(create_model(arch, 10), torch.rand(2, 3, 96, 96))[0]==layer

@pytest.mark.parametrize('arch,layer,size',
                         [('torchvision/vit_b_32','encoder.layers.encoder_layer_11.ln_1',(7,7)),
                          ('torchvision/swin_t','permute',(7,7)), ('timm/mixer_s32_224','norm',(7,7)),
    ('timm/deit_tiny_distilled_patch16_224','blocks.11.norm1',(14,14)), ('timm/levit_128','stages',(4,4)),
    ('timm/cait_xxs24_224','blocks_token_only.1.norm1',(14,14)), ('timm/vit_base_patch16_gap_224','norm',(14,14))])
def test_default_layer_of_transformers(arch, layer, size):
    with torch.device('meta'): assert cam_layer(create_model(arch, 10), torch.rand(2, 3, 224, 224))[::2]==(layer,size)

def test_windows_side_by_side_are_no_map():
    "MaxViT cuts maps into windows: 1 window of 49 places is not a map of 1×49"
    with torch.device('meta'):
        m,x = create_model('torchvision/maxvit_t', 10),torch.rand(2, 3, 224, 224)
        with pytest.raises(ValueError, match='not certain; name a `layer`'): cam_layer(m, x)
        assert cam_layer(m, x, 'blocks.3')[2]==(7,7)

def test_ties():
    "Equal scores: the explained class is the predicted one, not a mixture"
    m,x = nn.Sequential(nn.Conv2d(2,2,1,bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(2,2,bias=False)),torch.zeros(1, 2, 2, 2)
    m[0].weight.data,m[3].weight.data = torch.eye(2)[...,None,None],4*torch.eye(2)
    x[0,0,0,0] = x[0,1,1,1] = 1
    assert grad_cam(m, x).tolist()==[[[1,0],[0,0]]] and grad_cam(m, x, 1).tolist()==[[[0,0],[0,1]]]

class Fussy(nn.Module):
    "Fails after its convolutions where an image holds a 9"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(.5))
        self.head = nn.Linear(4, 3)
    def forward(self, x):
        f = self.body(x).mean((2,3))
        if (x==9).any(): raise RuntimeError('a nine')
        return self.head(f)

def trace(m):
    hooks = [getattr(o, k) for o in m.modules()
             for k in ('_forward_hooks','_forward_pre_hooks','_backward_hooks','_backward_pre_hooks')]
    return dict(modes=[o.training for o in m.modules()], hooks=sum(map(len, hooks)),
                flags=[p.requires_grad for p in m.parameters()],
                grads=[None if p.grad is None else p.grad.tolist() for p in m.parameters()],
                weights=[v.tolist() for v in m.state_dict().values()],
                rng=(torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
                grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled())

@pytest.mark.parametrize('context', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_leaves_no_trace(context):
    torch.manual_seed(0)
    m,x = Fussy().train(),torch.randn(4, 3, 8, 8)
    m.body[1].eval(); m.head.weight.requires_grad_(False); m.body[0].weight.grad = torch.ones_like(m.body[0].weight)
    bad,copy = x.clone().index_fill(0, torch.tensor(3), 9),x.clone()
    want = grad_cam(m, x)
    with context():
        before = trace(m)
        got = grad_cam(m, x)
        assert trace(m)==before and torch.equal(x, copy) and not got.requires_grad and not x.requires_grad
        for f,msg in ((lambda: grad_cam(m, bad, bs=2),'a nine'), (lambda: grad_cam(m, x, 5),'target'),
                      (lambda: grad_cam(m, x, layer='head'),'layer=')):
            with pytest.raises((RuntimeError,ValueError), match=msg): f()
            assert trace(m)==before
        assert torch.equal(grad_cam(m, x.clone()), want)
    assert torch.equal(got, want)

def test_users_graph():
    "Images that carry a gradient keep it to themselves"
    m,x = Fussy(),torch.randn(2, 3, 8, 8, requires_grad=True)
    maps = grad_cam(m, x*1)
    assert not maps.requires_grad and x.grad is None
    (x*2).sum().backward()
    assert (x.grad==2).all()

masks = st.integers(0, 2**31).map(lambda s: torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(s)))

@settings(max_examples=60, deadline=None)
@given(masks, st.floats(.05, .95), st.floats(1e-30, 1e30), st.integers(0, 10**6))
def test_shares(rand, level, value, seed):
    mask = rand<level
    share,blank = attention_share(torch.full((3,7,9), value), mask)
    assert share.tolist()==[o/63 for o in mask.sum((1,2)).tolist()] and not blank.any()
    maps = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(seed))
    inside,_ = attention_share(maps*mask, mask)
    assert inside.tolist()==[float(o) for o in mask.any(2).any(1)]
    share,_ = attention_share(maps, mask)
    other,_ = attention_share(maps, ~mask)
    np.testing.assert_allclose(share+other, 1, atol=1e-12)
    np.testing.assert_allclose(share, (maps.numpy().astype(float)*mask.numpy()).sum((1,2))/maps.numpy().astype(float).sum((1,2)))

@settings(max_examples=40, deadline=None)
@given(masks, st.floats(.05, .95), st.integers(1, 7), st.integers(1, 9))
def test_max_share(rand, level, rows, cols):
    mask = rand<level
    shares = []
    for i in range(rows*cols):
        place = bilinear(np.eye(rows*cols)[i].reshape(rows, cols), 7, 9)
        shares.append((place*mask.numpy()).sum((1,2))/place.sum())
    np.testing.assert_allclose(max_share(mask, (rows,cols)), np.max(shares, 0), atol=1e-12)

def subclasses(cls):
    return {o for c in cls.__subclasses__() if c.__module__=='feature_erosion.patterns' for o in {c,*subclasses(c)}}

@settings(max_examples=15, deadline=None)
@given(st.sampled_from(corners), st.integers(3, 7), st.integers(0, 2), st.floats(.02, 1), st.sampled_from([1,3]),
       st.integers(0, 5))
def test_masks(corner, size, margin, opacity, channels, extra):
    "All patterns there are: a pixel is in the mask if paint changes it on a black or on a white image"
    shape,stamps = (channels,30,30+extra),torch.tensor([2,-1,0,5,5,1])
    for cls in subclasses(Pattern):
        if issubclass(cls, Effect): continue   # nothing is painted
        given = dict(size=size, corner=corner, margin=margin, opacity=opacity)
        p = cls(**{k:v for k,v in given.items() if k in inspect.signature(cls).parameters})
        black,pictures = torch.zeros(6, *shape, dtype=torch.float64),p.pictures(6, shape)
        changed = ((paint(black, stamps, pictures)!=0) | (paint(black+1, stamps, pictures)!=1)).any(1)
        assert torch.equal(pattern_mask(p, stamps, 6, shape), changed), p
        assert changed[0].any() and not changed[1].any()

def test_all_patterns_are_tested():
    assert {ColorSquare,CornerSquare,Stripes,Texture,Watermark,Tint,Border,Ruler}<=subclasses(Pattern)-subclasses(Effect)

def test_masks_of_effects():
    "They change all of an image, or nothing"
    for cls in subclasses(Effect):
        assert pattern_mask(cls(), torch.tensor([0,-1,1]), 6, (3,30,35)).float().mean((1,2)).tolist()==[1,0,1]

@pytest.fixture(scope='module')
def digits():
    set_seed(0)
    return digits_dls(n=100, n_valid=60, bs=8), randomise(create_model('resnet20', 10, width=.25))

def test_batches_do_not_matter(digits):
    dls,m = digits
    m.train()
    a,b = (pattern_attention({'m':m}, dls.valid.new(bs=bs), CornerSquare(4), variant='conflict', layer='layer2', progress=bs==7)
           for bs in (7,60))
    np.testing.assert_allclose(a.values.astype(float), b.values.astype(float), rtol=1e-5)
    assert a.attrs==b.attrs and m.training and a.attrs['layers']=={'m':'layer2'} and a.n.item()==60

def test_clean_region_is_the_labels(digits):
    "The control: the same images without squares, in the same region"
    dls,m = digits
    c,p = (compare_cams(m, dls, CornerSquare(4), n=9, variant=v) for v in ('clean','pattern'))
    assert torch.equal(c.mask, p.mask) and c.share.label.equals(p.share.label)
    diff = (c.images-p.images).abs().amax(1)>.01
    assert diff.any() and not (diff & ~c.mask).any()

def test_plots_say_what_was_measured(digits):
    dls,m = digits
    cams = compare_cams({'a':m,'b':m}, dls.inject(Watermark(.5)), n=4, variant='conflict', target='picture')
    fig = cams.plot(3)
    assert [ax.get_xlabel() for ax in fig.axes[3:6]]==[f'{o:.0%}' for o in cams.share.loc['a'].share[:3]]
    assert [ax.get_title() for ax in fig.axes[6:9]]==[f'→ {o}' for o in cams.share.loc['b'].pred[:3]]
    for i,ax in enumerate(fig.axes[:3]):
        assert ax.get_title()=='{label}, wears {picture}'.format(**cams.share.loc['a'].loc[i])
        box,ys = ax.patches[0].get_bbox(),cams.mask[i].any(1).nonzero()
        assert (box.y0,box.y1)==(ys.min()-.5, ys.max()+.5)
    import matplotlib.pyplot as plt
    plt.close('all')

def test_diverged(digits):
    dls,_ = digits
    m = create_model('resnet20', 10, width=.25)
    m.linear.weight.data.fill_(float('nan'))
    with pytest.raises(ValueError, match='diverged'): pattern_attention(m, dls, ColorSquare(4), progress=False)

def test_images_that_are_enlarged_after_painting(digits):
    "Where the pattern is then, is not known; enlarged before, it is"
    _,m = digits
    for order in (90,100):
        dls = digits_dls(n=80, n_valid=20)
        class Larger(Transform):
            def encodes(self, x:TensorImage): return nn.functional.interpolate(x, scale_factor=2.)
        Larger.order = order
        dls.valid.after_batch.add(Larger())
        for d,p in ((dls,ColorSquare(4)), (dls.inject(ColorSquare(4)),None)):
            if order==90:
                assert pattern_attention(m, d, p, progress=False).area.item()==pytest.approx((4/32)**2)
                continue
            for f in (pattern_attention, compare_cams):
                with pytest.raises(ValueError, match='painted at 16×16 and come out as 32×32'): f(m, d, p)

@pytest.mark.parametrize('change,share', [(lambda x: x.flip(-1), '100%'), (lambda x: x.roll(2, -1), '50%'), (lambda x: x*.5, None)],
                         ids=['mirrored','shifted','darkened'])
def test_images_that_are_moved_after_painting(digits, change, share):
    "Half of a square of 4 pixels lies beside it after a shift of 2"
    _,m = digits
    for order in (90,100):
        dls = digits_dls(n=80, n_valid=20)
        class Change(Transform):
            def encodes(self, x:TensorImage): return change(x)
        Change.order = order
        dls.valid.after_batch.add(Change())
        for d,p in ((dls,ColorSquare(4)), (dls.inject(ColorSquare(4)),None)):
            if order==90 or share is None:
                assert pattern_attention(m, d, p, progress=False).area.item()==pytest.approx((4/16)**2)
                continue
            for f in (pattern_attention, compare_cams):
                with pytest.raises(ValueError, match=f'Change changes images, and {share} of what is painted comes out elsewhere'):
                    f(m, d, p)

def test_pictures_name_the_first_of_several_targets(tmp_path):
    for i in range(12): Image.new('RGB', (16,16), (20*i,0,0)).save(tmp_path/f'{i}.png')
    block = DataBlock((ImageBlock,CategoryBlock,CategoryBlock), n_inp=1, get_items=lambda p: [p/f'{i}.png' for i in range(12)],
                      splitter=IndexSplitter(range(6)),
                      get_y=[lambda f: 'abc'[int(f.stem)%3],lambda f: ['land','water'][int(f.stem)%2]])
    dls = block.dataloaders(tmp_path, bs=4, num_workers=0)
    net = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3))
    cams = compare_cams(net, dls, ColorSquare(4), n=3)
    fig = cams.plot()
    assert cams.vocab==['a','b','c'] and [o.get_title() for o in fig.axes[:3]]==['abc'[int(i)] for i in cams.share.label]

@pytest.mark.parametrize('change', [lambda y: y[:,None], lambda y: y.byte(), lambda y: y.byte()[:,None]],
                         ids=['column','uint8','uint8 column'])
def test_labels_of_any_kind_of_integer(change):
    "`inject` takes them, so attention does, too: the same as of int64 in a row"
    set_seed(0)
    x,y = torch.rand(24, 3, 16, 16),torch.arange(24)%3
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3))
    def share(y, target):
        dl = DataLoader(list(zip(x, y)), bs=8)
        dl.c = 3
        return pattern_attention(m, dl, ColorSquare(4), target=target, progress=False).drop(columns='blank')
    for target in (None,'label','picture'): pd.testing.assert_frame_equal(share(change(y), target), share(y, target))

def test_a_network_with_more_outputs_than_classes():
    "As one trained on ImageNet has for ten classes: what it answers may have no name among them"
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,1000))
    m[-1].bias.data[700] = 1e3
    dls = digits_dls(64, 20)
    fig = compare_cams(m, dls, ColorSquare(4), n=3).plot()
    assert [o.get_title() for o in fig.axes[3:6]]==['→ class 700']*3

def test_which_part_of_a_batch_is_the_label():
    "With metadata behind the label, a plain loader does not say it, and the last part is not it; a second image has no place"
    set_seed(0)
    x,y = torch.rand(24, 3, 16, 16),torch.arange(24)%3
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3))
    def loader(*parts, n_inp=None):
        dl = DataLoader(list(zip(*parts)), bs=8)
        dl.c = 3
        if n_inp: dl.n_inp = n_inp
        return dl
    for f in (pattern_attention, compare_cams):
        with pytest.raises(ValueError, match='Sequential needs 1 as input, and the loader does not say'):
            f(m, loader(x, y, y%2), ColorSquare(4))
        with pytest.raises(ValueError, match='a batch has 2 inputs; maps are made of models that take one'):
            f(m, loader(x, x, y, n_inp=2), ColorSquare(4))
    got = compare_cams(m, loader(x, y, y%2, n_inp=1), ColorSquare(4), n=None)
    assert got.share.label.tolist()==y.tolist()

@pytest.mark.parametrize('variant', ['pattern','conflict'])
def test_attention_where_some_classes_have_pictures(variant):
    "On the images with a picture: in 'pattern' those of the chosen classes, as if all classes had theirs"
    set_seed(0)
    m,dls = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,10)),digits_dls(64, 100)
    some = compare_cams(m, dls.inject(ColorSquare(4), classes=['1','7']), n=None, variant=variant).share
    assert set(some.picture)=={1,7}
    if variant=='conflict': return
    want = compare_cams(m, dls.inject(ColorSquare(4)), n=None).share
    want = want[want.label.isin([1,7])]
    assert some.share.tolist()==pytest.approx(want.share.tolist(), abs=1e-6) and some.label.tolist()==want.label.tolist()
    got = pattern_attention(m, dls.inject(ColorSquare(4), classes=['1','7']), progress=False)
    n = torch.isin(dls.valid_ds.y, torch.tensor([1,7])).sum()
    assert got.share.item()==pytest.approx(want.share.mean(), abs=1e-6) and got.n.item()==len(want)==n

@pytest.mark.parametrize('box', [(0,0,2), (0.,0.,2.,2.), (0,0,.5,.5), (0,0,0,2), (5,0,2,2)], ids=str)
def test_boxes_that_are_none(box):
    with pytest.raises(ValueError, match=r'where=.*: must be \(top, left, height, width\) inside 6×6, in whole pixels'):
        attention_share(torch.rand(2, 6, 6), box)

def test_a_target_by_name():
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3))
    for bad in ('label', ['cat','dog']):
        with pytest.raises(ValueError, match="target: must be a class index, or one for each of the 2 images; got"):
            grad_cam(m, torch.rand(2, 3, 8, 8), target=bad)

@pytest.mark.parametrize('variant', ['pattern','conflict'])
def test_the_stamps_of_the_evaluation_sets(variant):
    "Also where only some classes were painted"
    easy = digits_dls(n=100, n_valid=60).inject(ColorSquare(4), classes=['3','8'])
    dl,stamps,_ = attribution._painted(easy, None, variant, 0)
    assert set(stamps.tolist())-{-1}=={3,8} and torch.equal(stamps, pattern_sets(easy)[variant].dataset.stamps)
