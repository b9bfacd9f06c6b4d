"Labels as people's datasets give them, and loaders of any class: what is kept, read right, or refused by name."
import numpy as np, pytest, torch
from types import SimpleNamespace
from fastai.callback.data import PartialDL, WeightedDL
from fastai.text.data import LMDataLoader, SortedDL
from fastai.vision.all import CrossEntropyLossFlat, DataLoader, DataLoaders, IntToFloatTensor, TensorImage, TfmdDL, set_seed
from feature_erosion.data import TensorDL, TensorImages, digits_dls
from feature_erosion.patterns import ColorSquare, same_dl, stamp_dl

def works(kind, what, how): return pytest.mark.works(kind=kind, what=what, how=how)

class Black(list):
    "Samples `(black image, label)`; the image's first pixel, in 1/255, says which sample it is"
    def __init__(self, y): super().__init__((torch.zeros(3,8,8).index_put_((torch.tensor(0),torch.tensor(7),torch.tensor(7)), torch.tensor(i/255)), int(o)) for i,o in enumerate(y))

y100 = np.repeat([0,1], [90,10])
square = ColorSquare(2, palette=['red','blue'])

def numbers(dl): return [round(float(o)*255) for b in dl for o in b[0][:,0,7,7]]
def share(dl): return np.mean([float(b[1].float().mean()) for _ in range(40) for b in dl])
def painted(dl):
    "Every image of the loader wears the square of its own class"
    return all(torch.equal(x[[0,2],0,0], torch.tensor([1.-y,float(y)])) for b in dl for x,y in zip(b[0], b[1].tolist()))

@works('loaders', 'WeightedDL, weighted_dataloaders', 'works: samples are drawn with the same weights')
@pytest.mark.parametrize('ds', [Black(y100), TensorImages(np.zeros((100,8,8,3), np.uint8), y100, ['a','b'], 0)], ids=['list','TensorImages'])
def test_weights_are_kept(ds):
    "By the weights: ten samples of weight 9 among ninety of weight 1 are half of what is drawn; without them a tenth"
    set_seed(0)
    dl = WeightedDL(ds, bs=50, wgts=np.where(y100==1, 9., 1.), shuffle=True, num_workers=0, after_batch=[IntToFloatTensor()])
    easy = stamp_dl(dl, square, n_classes=2)
    assert share(dl)==pytest.approx(.5, abs=.04) and share(easy)==pytest.approx(.5, abs=.04) and painted(easy)
    assert type(easy) is WeightedDL and sum(len(b[1]) for b in same_dl(easy, idxs=range(7)))==7

@works('loaders', 'PartialDL, partial_dataloaders', 'works: a part of the samples each epoch; all where a measure asks for them')
def test_part_is_kept():
    dl = stamp_dl(PartialDL(Black(y100), bs=8, partial_n=30, num_workers=0), square, n_classes=2)
    a,b = numbers(dl),numbers(dl)
    assert len(a)==len(set(a))==30 and a!=b and len(dl)==4 and painted(dl)
    some = same_dl(dl, idxs=[5,3,99])
    assert numbers(some)==[5,3,99] and len(some)==1 and dl.partial_n==30

@works('loaders', 'SortedDL', 'works: goes through the samples in the same order')
def test_order_is_kept():
    dl = SortedDL(Black(y100), sort_func=lambda o: float(o[0].max()), bs=10, num_workers=0)
    assert numbers(dl)==numbers(stamp_dl(dl, square, n_classes=2))==list(range(100))[::-1]
    assert numbers(same_dl(dl, idxs=[1,2,0]))==[1,2,0]

class Balanced(TfmdDL):
    "Somebody's loader: an argument without default, a method of its own, and a counter"
    def __init__(self, dataset, per_class, **kwargs):
        super().__init__(dataset, **kwargs)
        self.groups,self.drawn = [np.flatnonzero(np.array([o[1] for o in dataset])==c) for c in (0,1)],0
        self.per_class = per_class
    def get_idxs(self):
        self.drawn += 1
        return np.concatenate([np.random.choice(g, self.per_class) for g in self.groups]).tolist()
    def __len__(self): return -(-2*self.per_class//self.bs)

@works('loaders', "a subclass of somebody's own, with arguments and a sampler", 'works: its arguments and attributes are kept')
def test_anybodys_subclass():
    dl = Balanced(Black(y100), 12, bs=8, num_workers=0)
    with pytest.raises(TypeError, match='per_class'): dl.new()                  # what fastai's own way says
    easy = DataLoaders(dl, dl).inject(square, n_classes=2).train
    assert type(easy) is Balanced and share(easy)==.5 and len(easy)==3 and painted(easy)
    assert dl.drawn==0 and easy.drawn==41                                       # each counts for itself
    with pytest.raises(ValueError, match='Balanced chooses its samples in a way of its own; evaluate on a plain loader'): same_dl(easy, idxs=[0,1,2])

class OverTwo(DataLoader):
    "Somebody's loader that alternates between two"
    def __init__(self, *dls):
        super().__init__(dls[0].dataset, bs=dls[0].bs)
        self.dls = list(dls)
    def __iter__(self): return (b for bs in zip(*self.dls) for b in bs)

@works('loaders', 'a loader that mixes other loaders', 'refused: it is named, and which attribute holds the others')
def test_loader_of_loaders():
    dl = OverTwo(*[DataLoader(Black([0,1]), bs=2)]*2)
    with pytest.raises(ValueError, match=r'OverTwo reads from other loaders \(dls\); make the change in those'): stamp_dl(dl, square, n_classes=2)

class Hoarder(DataLoader):
    "Somebody's loader that keeps the samples"
    def __init__(self, ds, **kwargs):
        super().__init__(ds, **kwargs)
        self.kept = {i:o for i,o in enumerate(ds)}
    def create_item(self, s): return self.kept[s or 0]

@works('loaders', 'a loader that does not read from its dataset', 'refused: it is named')
def test_loader_reads_elsewhere():
    with pytest.raises(ValueError, match='Hoarder reads its samples from elsewhere than its `dataset`'): stamp_dl(Hoarder(Black([0,1]), bs=2), square, n_classes=2)

@works('loaders', 'DistributedDL', 'works: the loader in it is painted, each process keeps its share')
def test_distributed():
    from fastai.distributed import DistributedDL
    class Alone(DistributedDL):
        def _broadcast(self, t, rank): return t
    inner = PartialDL(Black(y100), bs=8, partial_n=40, num_workers=0)
    two = [stamp_dl(Alone(inner, rank=r, world_size=2), square, n_classes=2) for r in (0,1)]
    assert [type(dl) for dl in two]==[Alone]*2 and [len(numbers(dl)) for dl in two]==[20,20] and all(map(painted, two))
    assert [numbers(same_dl(dl, idxs=range(4))) for dl in two]==[[0,1],[2,3]]

class Halved(DataLoader):
    def after_batch(self, b): return (b[0]/2, *b[1:])

@works('loaders', 'a function, or a method, as after_batch of a plain DataLoader', 'works: called on whole batches, before painting')
@pytest.mark.parametrize('make', [lambda ds: DataLoader(ds, bs=4, after_batch=lambda b: (b[0]/2, *b[1:])), lambda ds: Halved(ds, bs=4)], ids=['function','method'])
def test_functions_of_batches(make):
    ds = [(torch.full((3,8,8), .5), i%2) for i in range(4)]
    for x,y in stamp_dl(make(ds), square, n_classes=2):
        assert (x[:,:,2:]==.25).all() and painted([(x,y)])

@works('loaders', "attributes set on DataLoaders: `dls.c`, a subclass's own", 'works: the painted DataLoaders have them, too')
def test_dataloaders_keep_what_was_set():
    class Mine(DataLoaders):
        def __init__(self, *dls, owner, **kwargs):
            super().__init__(*dls, **kwargs)
            self.owner = owner
    dls = Mine(*[DataLoader(Black(y100), bs=4)]*2, owner='me', path='there', device=torch.device('cpu'))
    dls.note = 7
    easy = dls.inject(square, n_classes=2)
    assert (type(easy), easy.owner, easy.note, str(easy.path), easy.device)==(Mine, 'me', 7, 'there', torch.device('cpu'))
    assert easy.clean is dls and not hasattr(dls, 'pattern') and dls.train.dataset is not easy.train.dataset

def test_copies_share_nothing_that_changes():
    "Random numbers, the split of the transforms and added transforms are each loader's own; unknown attributes and other samples are refused"
    dls = digits_dls(n=100, bs=10)
    a = dls.train
    b = same_dl(a, dls.train_ds)
    assert type(b) is TensorDL and a.rng is not b.rng and a.fake_l.d is a and b.fake_l.d is b and a.after_batch is not b.after_batch
    b.after_batch.add(ColorTwice())
    assert len(b.after_batch.fs)==len(a.after_batch.fs)+1
    assert same_dl(a, bs=7, num_workers=0).bs==7 and a.bs==10
    with pytest.raises(TypeError, match='batchsize: no attribute of TensorDL'): same_dl(a, batchsize=3)
    with pytest.raises(ValueError, match='360 samples, the loader\'s own has 100; want the same samples'): same_dl(a, dls.valid_ds)
    with pytest.raises(ValueError, match='must be a fastai DataLoader; got torch'): same_dl(torch.utils.data.DataLoader([1]))

class ColorTwice(IntToFloatTensor): order = 50
