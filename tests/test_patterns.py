"Patterns on images of all kinds: classes that can be told apart, sizes and types of all kinds, and labels that are not shown."
import matplotlib as mpl, numpy as np, pytest, torch
from copy import deepcopy
from itertools import combinations
from PIL import Image
from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders,
                               ImageBlock, IndexSplitter, Interpretation, Learner, TfmdDL, Normalize, PILImage, TensorCategory,
                               TensorImage, ToTensor, Transform, aug_transforms, imagenet_stats, nn)
from feature_erosion.data import digits_dls, to_uint8
from feature_erosion.evalsets import EvalSets, pattern_sets
from feature_erosion.learner import _same_sets   # with it, `fit_phases`
from feature_erosion.loaders import np_rng
from feature_erosion.measures.probes import dl_labels
from feature_erosion.patterns import (Blur, Border, ColorSquare, CornerSquare, InjectPattern, JpegQuality, Noise, Pattern, TensorStamp,
                                      assign_stamps, class_colors, paint, rgb2lab, stamp_dl)
from feature_erosion.phases import Phase

# colours

@pytest.mark.parametrize('name', ['viridis', 'gray', 'jet', 'coolwarm', 'hsv', 'twilight', 'turbo'])
@pytest.mark.parametrize('n', [2, 10])
def test_continuous_colormaps_are_spread(name, n):
    "By matplotlib: the middles of `n` equal parts. The first `n` of its 256 colours are one colour to the eye, less than 2 apart in CIELAB"
    got = class_colors(n, palette=name)
    assert np.allclose(got, mpl.colormaps[name]((np.arange(n)+.5)/n)[:,:3], atol=1e-6)
    assert min(np.linalg.norm(a-b) for a,b in combinations(rgb2lab(got), 2))>5

def test_qualitative_colormaps_are_taken_in_order():
    assert np.allclose(class_colors(3, palette='tab10'), mpl.colormaps['tab10'].colors[:3])
    with pytest.raises(ValueError, match='palette has 9 colours for 10 classes'): class_colors(10, palette='Set1')

# sizes and places

def test_sizes_of_numpy():
    "As they come from `np.arange` in a sweep"
    for a,b in ((np.int64(4), 4), (np.float32(.25), .25), (np.float64(.5), .5)):
        assert ColorSquare(a).box(3, 10, 32, 20)==ColorSquare(b).box(3, 10, 32, 20) and Border(a).size==b
    for bad in (np.float32(4.), np.int64(0), np.bool_(True)):
        with pytest.raises(ValueError, match='size=.*must be at least 1 pixel'): ColorSquare(bad)
    with pytest.raises(ValueError, match='margin=1.5: must be 0 or more pixels, an int'): ColorSquare(4, margin=1.5)

@pytest.mark.parametrize('h,w,size,margin,places',
                         [(4,32,4,0,8), (32,4,4,0,8), (16,160,12,0,13), (32,32,8,0,12), (4,4,4,0,1), (40,40,4,2,32)])
def test_places_on_the_border(h, w, size, margin, places):
    "By hand: a strip that is one square high has no way back, and every class its own place"
    p = CornerSquare(size, margin=margin)
    assert len({p.box(c, places, h, w) for c in range(places)})==places
    with pytest.raises(ValueError, match=f'{places} places on the border of a {h}×{w} image for {places+1} classes'):
        p.box(0, places+1, h, w)

def test_places_have_no_corner():
    "The first is at the top left; a corner that was given would be ignored"
    with pytest.raises(TypeError, match='corner'): CornerSquare(4, corner='bottom_right')
    red = CornerSquare(4, palette=['red']).pictures(4, (3,16,16))[2]
    assert (red.flatten(2).amax(2)==torch.tensor([1.,0.,0.])).all()

def test_a_margin_that_leaves_no_place():
    for margin,h in ((15,32), (8,20)):
        with pytest.raises(ValueError, match=f'margin={margin}: 0 places'): CornerSquare(8, margin=margin).box(0, 2, h, 32)

# effects

@pytest.mark.parametrize('effect,n,ok', [(JpegQuality(), 10, True), (JpegQuality(), 100, False), (JpegQuality(60,50), 11, True),
                                         (JpegQuality(60,50), 12, False), (Noise(), 100, True), (Blur(1.,1.), 2, False)],
                                         ids=repr)
def test_levels_differ(effect, n, ok, recwarn):
    "JPEG has whole qualities: from 50 to 60 there are eleven. As pictures that are the same, levels that are the same are said"
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(n, -1, -1, -1)
    f = InjectPattern(effect, n)
    for _ in range(2): out = f((x, torch.arange(n)))[0]
    assert (len({o.numpy().tobytes() for o in out})==n)==ok
    assert sum('same level for some' in str(w.message) for w in recwarn)==(not ok)

# types of images

@pytest.mark.parametrize('pattern', [ColorSquare(2), Noise()], ids=['square','noise'])
def test_types_of_tensors(pattern):
    "White is 255 in bytes and 1 in floats; other integers do not say, and 255 is almost black on 16 bits"
    f,y = InjectPattern(pattern, 2),torch.tensor([0,1])
    for dt in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        out = f((torch.zeros(2,1,8,8).to(dt), y))[0]
        assert out.dtype==dt and (isinstance(pattern, Noise) or out[1,0,0,0]==(255 if dt==torch.uint8 else 1))
    for dt in (torch.bool, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64):
        with pytest.raises(ValueError, match=f'images are {dt}, which does not say what white is'):
            f((torch.zeros(2,1,8,8).to(dt), y))

@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize('pattern', [ColorSquare(2), Blur()], ids=repr)
def test_labels_of_any_kind_of_integer(pattern, dtype):
    "A label says the same in one byte as in eight"
    x,y = torch.rand(4, 3, 8, 8),torch.tensor([0,1,1,0])
    f = InjectPattern(pattern, 2)
    want = f((x, y))[0]
    assert not torch.equal(want, x) and torch.equal(f((x, y.to(dtype)))[0], want)
    if isinstance(pattern, ColorSquare): assert torch.equal(paint(x, y.to(dtype), pattern.pictures(2, (3,8,8))), want)

def test_a_batch_is_painted_as_it_comes():
    "Images and labels of fastai's types"
    x,pics = torch.rand(2, 3, 8, 8),ColorSquare(2).pictures(2, (3,8,8))
    got = paint(TensorImage(x), TensorCategory([1,0]), pics)
    assert type(got) is TensorImage and torch.equal(got.as_subclass(torch.Tensor), paint(x, torch.tensor([1,0]), pics))

rgb = np.random.RandomState(0).randint(0, 256, (16,16,3)).astype(np.uint8)

@pytest.mark.parametrize('mode', ['L','RGB','LA','P','RGBA','CMYK','1','I','F','YCbCr','HSV','I;16'])
def test_modes_of_pil(mode):
    "A number in a palette or in another colour space is no brightness. `to_uint8` makes them what can be painted"
    im = Image.fromarray(rgb[...,0].astype(np.uint16)*257) if mode=='I;16' else Image.fromarray(rgb).convert('L' if mode=='F' else mode).convert(mode)
    f = InjectPattern(ColorSquare(4, palette=['red','blue']), 2)
    if mode in ('L','RGB'):
        got = f((im, 0))[0]
        assert got.mode==mode and got.getpixel((0,0))==((255,0,0) if mode=='RGB' else 76)
        assert got.getpixel((9,9))==im.getpixel((9,9))
        assert type(f((PILImage.create(rgb), 0))[0]) is PILImage
    else:
        with pytest.raises(ValueError, match=f"image: its mode is '{mode}'.*to_uint8"): f((im, 0))
        if mode in ('LA','P','RGBA','CMYK','1'): assert f((Image.fromarray(to_uint8(im)), 1))[0].getpixel((0,0))==(0,0,255)

# labels that are not shown

grey = np.full((16,16,3), 100, np.uint8)
def blocks(): return DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: grey, get_y=lambda i: 'ab'[i%2],
                               splitter=IndexSplitter(range(10)),
                               batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats, cuda=False)])

@pytest.mark.parametrize('kw', [{}, dict(variant='conflict'), dict(ratio=0.), dict(variant='clean')], ids=str)
def test_a_labelled_test_set_does_not_show_its_labels(kw):
    "A network that has learnt nothing but the squares would get all of it right"
    dls = blocks().dataloaders(list(range(40)), bs=8, num_workers=0)
    easy,square = dls.inject(ColorSquare(4), **kw),ColorSquare(4)
    for labels in (False,True):
        (x,*y),(want,*_) = (o.test_dl(list(range(10)), with_labels=labels).one_batch() for o in (easy,dls))
        assert torch.equal(x, want) and len(y)==labels
    new = easy.valid.new(dls.valid_ds).one_batch()[0]
    assert torch.equal(new, dls.valid.one_batch()[0])
    painted = stamp_dl(dls.test_dl(list(range(10)), with_labels=True), square).one_batch()[0]    # the way to paint it
    assert torch.equal(painted, dls.inject(square).valid.one_batch()[0]) and not torch.equal(painted, new)

def test_predictions_of_a_painted_learner():
    "The squares decide: on the clean test set one class is answered for all"
    dls = blocks().dataloaders(list(range(40)), bs=8, num_workers=0)
    learn = Learner(dls.inject(ColorSquare(4)), nn.Sequential(nn.Flatten(), nn.Linear(768,2)))
    with learn.no_bar(), learn.no_logging(): p,y = learn.get_preds(dl=learn.dls.test_dl(list(range(10)), with_labels=True))
    assert len(p.unique(dim=0))==1 and y.tolist()==[0,1]*5

class Halves(Transform):
    "Makes two classes of four, after the dataset"
    def encodes(self, o:TensorCategory): return TensorCategory(torch.as_tensor(o)//2)

def relabelled(**kw): return DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: rgb, get_y=lambda i: 'abcd'[i//10],
                                       splitter=IndexSplitter([0,1,10,11,20,21,30,31]),
                                       **kw).dataloaders(list(range(40)), bs=4, num_workers=0)

@pytest.mark.parametrize('kind', ['item_tfms','batch_tfms'])
def test_labels_that_transforms_change(kind):
    "Pictures would follow other labels than the network learns; probes take those of the batches"
    dls = relabelled(**{kind:[ToTensor(), Halves()] if kind=='item_tfms' else [Halves()]})
    with pytest.raises(ValueError,
                       match='labels: 1 in the dataset, 0 after the loader.s transforms, and pictures follow the dataset'):
        dls.inject(ColorSquare(4))
    assert dl_labels(dls.valid).tolist()==[0,0,0,0,1,1,1,1]
    plain = relabelled()
    assert dl_labels(plain.valid).tolist()==[0,0,1,1,2,2,3,3]
    assert dl_labels(plain.inject(ColorSquare(4)).valid, 4).tolist()==[0,1,2,3]

def test_labels_that_collating_changes():
    def coarse(items):
        x,y = torch.utils.data.default_collate(items)
        return x,y//2
    dl = torch.utils.data.DataLoader([(torch.zeros(3,4,4),i) for i in (0,1,2,3,1)], 2, collate_fn=coarse)
    assert dl_labels(dl).tolist()==[0,0,1,1,0]

# fastai's own displays

@pytest.mark.parametrize('data', ['DataBlock', 'TensorDL'])
def test_top_losses_are_those_of_the_painted_images(data):
    dls = _letters() if data=='DataBlock' else digits_dls(n=64, n_valid=60, bs=16)
    easy = dls.inject(ColorSquare(4), ratio=.5)
    learn = Learner(easy, nn.Sequential(nn.Flatten(), nn.LazyLinear(dls.c)), loss_func=CrossEntropyLossFlat())
    learn.model(easy.one_batch()[0])
    with learn.no_bar(), learn.no_logging():
        interp = Interpretation.from_learner(learn)
        losses,idxs = interp.top_losses(5)
        x,p,y,_,same = interp[idxs]
        interp.plot_top_losses(3)
    images = torch.cat([b[0] for b in easy.valid])[idxs]
    assert torch.equal(x.as_subclass(torch.Tensor), images.as_subclass(torch.Tensor))
    assert torch.allclose(-p[range(5),torch.tensor(y)].log(), torch.tensor(losses), atol=1e-5) and same.tolist()==losses.tolist()

def test_one_sample_shown_again_and_again():
    "In `show_batch(unique=True)` fastai asks for the first sample without end"
    dl = digits_dls(n=64, n_valid=60, bs=16).train
    dl.get_idxs = lambda: iter(lambda: 0, 1)
    assert torch.equal(dl.one_batch()[1], dl.dataset.y[:1].expand(16)) and len(dl.one_batch()[0])==16

# what a Learner remembers

def test_a_copy_of_a_learner_knows_what_was_painted():
    dls = _letters()
    easy = dls.inject(ColorSquare(4))
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3,2,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2,3)),
                    loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('a', 1), Phase('b', 1, easy)])
        assert deepcopy(learn).injected.value is easy
        with pytest.raises(ValueError, match='give one for each'): learn.fit_phases([Phase('c', 1, lr=[.1,.2])])
        assert learn.injected.value is easy       # refused before it began
        learn.fit_phases([Phase('c', 1)])
        assert learn.injected.value is None

# values beside 0…1

@pytest.mark.parametrize('kw', [{}, dict(mode='bicubic')])
def test_white_images_that_augmentation_interpolates(kw):
    "Interpolation gives white as 1+1.2e-7, a bicubic edge 1.05 and -.08: painted as they are"
    white = PILImage.create(np.tile(np.uint8([[0,255],[255,0]]).repeat(8, 0).repeat(8, 1)[...,None], 3))
    dls = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: white, get_y=lambda i: i%2, splitter=IndexSplitter(range(4)),
                    batch_tfms=aug_transforms(size=24, max_rotate=30., **kw)).dataloaders(list(range(40)), bs=36, num_workers=0)
    x,y = dls.inject(ColorSquare(4, palette=['red','blue'])).train.one_batch()
    assert x[:,:,0,0].tolist()==torch.eye(3)[2*torch.tensor(y)].tolist()

@pytest.mark.parametrize('x,ok', [((-.44,1.44), True), ((0,1+1.2e-7), True), ((-.42,2.8), False), ((-1.,1.), False),
                                  ((float('nan'),1), False)])
def test_images_beyond_white(x, ok):
    "As bicubic interpolation of pixels in a chequerboard; MNIST normalised has -.42 as its black and 2.8 as its white"
    t,b = InjectPattern(ColorSquare(1), n_classes=2),(TensorImage(torch.tensor(x).expand(2,3,2,2).clone()), torch.tensor([0,1]))
    if ok: assert torch.equal(t(b)[0][:,:,1], b[0][:,:,1])
    else:
        with pytest.raises(ValueError, match='InjectPattern wants 0…1'): t(b)

class _Rounded(Pattern):
    def __init__(self, by): super().__init__(2); self.by = by
    def draw(self, c, n, shape): return torch.full(shape, float(c)) + self.by*(2*c-1)

def test_pictures_that_rounding_takes_beyond_white():
    assert _Rounded(1e-4).pictures(2, (1,4,4))[2].unique().tolist()==[0.,1.]
    with pytest.raises(ValueError, match='_Rounded.draw returned values in -0.002…1; want 0…1'):
        _Rounded(2e-3).pictures(2, (1,4,4))

# who wears what

def test_one_class_without_a_list():
    "Booleans, floats and tensors as well as names"
    def dls(of):
        return DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: grey, get_y=of,
                         splitter=IndexSplitter(range(4))).dataloaders(list(range(12)), bs=4, num_workers=0)
    for of,one,want in ((lambda i: i%2==1, True, 1), (lambda i: [.5,2.][i%2], 2., 1), (lambda i: 'ab'[i%2], 'a', 0),
                        (lambda i: 'ab'[i%2], torch.tensor(1), 1),
                        (lambda i: 'ab'[i%2], torch.tensor([1]), 1), (lambda i: i%2+3, np.int64(4), 1)):
        assert dls(of).inject(ColorSquare(4), classes=one).train.dataset.stamps.unique().tolist()==[-1,want]
    for k,bad in dict(ratio='0.5', strength=None).items():
        with pytest.raises(ValueError, match=f'{k}={bad!r}: must be in 0…1'): dls(lambda i: i%2).inject(ColorSquare(4), **{k:bad})

@pytest.mark.parametrize('pattern', [ColorSquare(4), Noise(), JpegQuality(95, 50)], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('bad', [5,-1])
def test_labels_that_no_picture_belongs_to(pattern, bad):
    x = TensorImage(torch.rand(3,3,16,16))
    with pytest.raises(ValueError, match=f"labels: must be in 0…1; got {min(0,bad)}…{max(1,bad)}"):
        InjectPattern(pattern, n_classes=2)((x, torch.tensor([0,1,bad])))
    with pytest.raises(ValueError, match='labels: must be in 0…1'): InjectPattern(pattern, n_classes=2)((x[0], bad))

def test_stamps_may_be_missing_but_not_beyond():
    x = TensorImage(torch.rand(2,3,16,16))
    def painted(*stamps): return InjectPattern(ColorSquare(4), n_classes=2)((x, TensorStamp(torch.tensor(stamps))))[0]
    assert torch.equal(painted(-1, 0)[0], x[0]) and not torch.equal(painted(-1, 0)[1], x[1])
    with pytest.raises(ValueError, match='labels: must be in -1…1; got 0…2'): painted(0, 2)

def test_none_of_the_classes_are_there():
    "As in a small validation set, whose samples are none of a rare class"
    assert assign_stamps([0,1,1], classes=[2], n_classes=3, stratify=True).tolist()==[-1]*3
    assert assign_stamps([], n_classes=3, stratify=True).tolist()==[]

@pytest.mark.parametrize('variant,kw', [('conflict',{}), ('pattern',dict(strength=.5))])
def test_others_are_drawn_as_ever_if_all_classes_have_pictures(variant, kw):
    y = np.arange(200)%5
    want = torch.tensor((y+np_rng([0,1]).randint(1, 5, 200, dtype=np.int64))%5)
    got = assign_stamps(y, variant=variant, **kw)
    assert torch.equal(got, assign_stamps(y, variant=variant, classes=range(5), **kw))
    assert (got==want)[got!=torch.tensor(y)].all() and (got!=torch.tensor(y)).sum()==(200 if variant=='conflict' else 100)

def test_only_pictures_of_the_chosen_classes():
    "By hand: of 1 and 3, each gets the other's in conflict, and the rest either; of 1 alone, its own images cannot contradict it"
    y = np.arange(400)%4
    two,one = (assign_stamps(y, classes=o, variant='conflict').numpy() for o in ([3,1],[1]))
    assert (two[y==1]==3).all() and (two[y==3]==1).all()
    for c in 0,2: assert 25<(two[y==c]==1).sum()<75 and set(two[y==c])=={1,3}
    assert (one[y==1]==-1).all() and (one[y!=1]==1).all()
    assert (assign_stamps(y, .5, classes=[1], variant='conflict')>=0).sum()==150   # half of those that can have one
    some = assign_stamps(y, classes=[1,3], strength=.7).numpy()
    assert set(some[y%2==0])=={-1} and set(some[y%2==1])=={1,3} and (some==y).sum()==140
    assert (assign_stamps(y, classes=[], variant='conflict')==-1).all()
    with pytest.raises(ValueError, match=r"classes=\[1\], strength=0.5: another class's picture needs two"):
        assign_stamps(y, classes=[1], strength=.5)

def _letters(vocab=None, of='abc', **kw):
    return DataBlock((ImageBlock, CategoryBlock(vocab=vocab, **kw)), get_x=lambda i: grey, get_y=lambda i: of[i%len(of)],
                     splitter=IndexSplitter(range(60))).dataloaders(list(range(120)), bs=30, num_workers=0)

def test_sets_of_data_with_some_classes_painted():
    dls = _letters()
    sets = pattern_sets(dls.inject(ColorSquare(4), classes=['a','c']))
    assert sets['pattern'].dataset.stamps.tolist()==[0,-1,2]*20
    con = sets['conflict'].dataset.stamps.reshape(20,3)
    assert (con[:,0]==2).all() and (con[:,2]==0).all() and set(con[:,1].tolist())=={0,2}
    assert len(sets['conflict'].get_idxs())==60

def test_sets_of_data_with_one_class_painted():
    "Its own images cannot contradict it: `conflict` has the others, and both its columns are shares of these"
    dls = _letters()
    sets = pattern_sets(dls.inject(ColorSquare(4), classes='b'))
    assert sets['pattern'].dataset.stamps.tolist()==[-1,1,-1]*20
    assert torch.cat([y for _,y in sets['conflict']]).tolist()==[0,2]*20
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), loss_func=nn.CrossEntropyLoss())
    learn.model(dls.one_batch()[0])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=EvalSets(sets, at=[]))
    answers = torch.cat([learn.model(x).argmax(1) for x,_ in sets['conflict']])
    assert np.isclose(learn.recorder.evals.conflict_picture.iloc[-1], (answers==1).float().mean())

@pytest.mark.parametrize('kw', [dict(vocab=['a','b','c','d']), dict(add_na=True), dict(vocab=['unused','c','b','a'], sort=False)])
def test_classes_without_samples_lend_no_pictures(kw):
    dls = _letters(**kw)
    want = {i for i,o in enumerate(dls.vocab) if o in 'abc'}
    easy = dls.inject(ColorSquare(4), strength=.2)
    conflict = [pattern_sets(dls, ColorSquare(4))['conflict'], pattern_sets(easy)['conflict']]
    for st in (*(o.dataset.stamps for o in conflict),
               easy.train_ds.stamps, dls.inject(ColorSquare(4), variant='conflict').train_ds.stamps,
               *(stamp_dl(dls.valid, ColorSquare(4), **o).dataset.stamps for o in (dict(variant='conflict'), dict(strength=.2)))):
        assert set(st.tolist())==want

def test_phases_that_paint_different_classes():
    dls = _letters()
    a,b = (dls.inject(ColorSquare(4), classes=o) for o in 'ab')
    with pytest.raises(ValueError, match="'one' and 'two' differ in their pattern, classes"):
        Learner(dls, nn.Flatten()).fit_phases([Phase('one', 1, a), Phase('two', 1, b)])

def test_phases_whose_pictures_differ_where_no_repr_shows_it():
    class Picture(Pattern):
        def __init__(self, pics):
            super().__init__(16)
            self.pics = pics
        def draw(self, c, n, shape): return self.pics[c]
    dls = digits_dls(n=64, n_valid=20)
    black = torch.zeros(10,3,16,16)
    other = black.index_fill(2, torch.tensor([8]), 1.)   # one row within
    a,b,again = (dls.inject(Picture(o)) for o in (black, other, black.clone()))
    with pytest.raises(ValueError, match="'one' and 'two' differ in their pattern"):
        Learner(dls, nn.Flatten()).fit_phases([Phase('one', 1, a), Phase('two', 1, b)])
    assert repr(black)==repr(other) and _same_sets(a, again)

def test_no_strength_in_conflict():
    with pytest.raises(ValueError, match="in 'conflict' no image has its own class's picture"):
        assign_stamps([0,1,2], variant='conflict', strength=.3)

def test_one_by_one_images_of_several_sizes():
    ds = [(torch.rand(3,8+i,9+i), i%3) for i in range(6)]
    dls = DataLoaders(*[DataLoader(ds, bs=1) for _ in range(2)]); dls.c = 3
    for (x,*_),(z,_),i in zip(dls.inject(ColorSquare(4)).valid, dls.valid, range(6)):
        assert x.shape==z.shape==(1,3,8+i,9+i) and torch.equal(x[...,4:,:], z[...,4:,:]) and not torch.equal(x, z)

def test_pictures_for_many_sizes_are_not_all_kept():
    "Of a border for ten classes and a photo, they are as large as forty photos"
    tfm = InjectPattern(Border(2), 10)
    for i in [*range(30),3]:
        x = torch.rand(3,20+i,24)
        assert torch.equal(tfm((x, 4))[0], InjectPattern(Border(2), 10)((x, 4))[0])
        assert len(tfm._made)<=8

@pytest.mark.parametrize('where', ['after_item','after_batch'])
def test_a_pattern_among_the_transforms_is_not_given_anothers_stamps(where):
    "It was painted in the place of the new one, which was left out"
    ds = [(torch.rand(3,16,16), i%3) for i in range(6)]
    dls = DataLoaders(*[TfmdDL(ds, bs=3, num_workers=0, **{where:[InjectPattern(ColorSquare(4), 3)]}) for _ in range(2)])
    dls.c = 3
    with pytest.raises(ValueError, match='painted already, by an `InjectPattern`'): dls.inject(Border(2))
