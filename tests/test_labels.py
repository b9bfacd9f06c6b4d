"Labels as people's datasets give them, and loaders of any class: what is kept, read right, or refused by name."
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import QMNIST, ImageFolder
from torchvision.transforms.v2.functional import to_image
from fastai.callback.data import PartialDL, WeightedDL
from fastai.tabular.all import Categorify, TabularDataLoaders
from fastai.text.data import LMDataLoader, SortedDL
from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, ImageBlock, IndexSplitter,
                               IntToFloatTensor, Learner, MaskBlock, MultiCategoryBlock, PointBlock, RegressionBlock, TfmdDL,
                               Transform, get_c, set_seed)
from conftest import works
from feature_erosion.data import TensorDL, TensorImages, digits_dls
from feature_erosion.evalsets import evaluate, pattern_sets, train_accuracy
from feature_erosion.loaders import label_vocab, n_labels, read_labels, same_dl
from feature_erosion.mitigations import just_train_twice, stamp_groups
from feature_erosion.patterns import ColorSquare, InjectPattern, assign_stamps, stamp_dl
from feature_erosion.unlearning import sample_losses, split_forget

def number(i):
    "A black image whose last red pixel says which sample it is, in 1/255"
    x = torch.zeros(3,8,8)
    x[0,7,7] = i/255
    return x

class Black(list):
    "Samples `(black image, label)`"
    def __init__(self, y): super().__init__((number(i),int(o)) for i,o in enumerate(y))

y100 = np.repeat([0,1], [90,10])
square = ColorSquare(2, palette=['red','blue'])

def numbers(dl): return [round(float(o)*255) for b in dl for o in b[0][:,0,7,7]]
def share(dl): return np.mean([float(b[1].float().mean()) for _ in range(40) for b in dl])
def painted(dl):
    "Every image of the loader wears the square of its own class"
    return all(torch.equal(x[[0,2],0,0], torch.tensor([1.-y,float(y)])) for b in dl for x,y in zip(b[0], b[1].tolist()))

@works('loaders', 'WeightedDL, weighted_dataloaders', 'works: samples are drawn with the same weights')
@pytest.mark.parametrize('ds', [Black(y100), TensorImages(np.zeros((100,8,8,3), np.uint8), y100, ['a','b'], 0)],
                         ids=['list','TensorImages'])
def test_weights_are_kept(ds):
    "By the weights: ten samples of weight 9 among ninety of weight 1 are half of what is drawn; without them a tenth"
    set_seed(0)
    dl = WeightedDL(ds, bs=50, wgts=np.where(y100==1, 9., 1.), shuffle=True, num_workers=0, after_batch=[IntToFloatTensor()])
    easy = stamp_dl(dl, square, n_classes=2)
    assert share(dl)==pytest.approx(.5, abs=.04) and share(easy)==pytest.approx(.5, abs=.04) and painted(easy)
    assert type(easy) is WeightedDL and sum(len(b[1]) for b in same_dl(easy, idxs=range(7)))==7

def test_weighted_dataloaders():
    "The same by fastai's own way to them, on files' worth of blocks"
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: np.zeros((8,8,3), np.uint8), get_y=lambda i: int(i%10==9),
                      splitter=IndexSplitter(range(100, 120)))
    set_seed(0)
    dls = block.weighted_dataloaders(list(range(120)), [9 if i%10==9 else 1 for i in range(120)], bs=50, num_workers=0)
    easy = dls.inject(square)
    assert share(easy.train)==pytest.approx(.5, abs=.04) and painted(easy.train) and share(easy.valid)==pytest.approx(.1)

@works('loaders', 'PartialDL, partial_dataloaders',
       'works: a part of the samples each epoch; all where a measure asks for them')
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
    with pytest.raises(ValueError, match='Balanced chooses its samples in a way of its own; evaluate on a plain loader'):
        same_dl(easy, idxs=[0,1,2])

class OverTwo(DataLoader):
    "Somebody's loader that alternates between two"
    def __init__(self, *dls):
        super().__init__(dls[0].dataset, bs=dls[0].bs)
        self.dls = list(dls)
    def __iter__(self): return (b for bs in zip(*self.dls) for b in bs)

@works('loaders', 'a loader that mixes other loaders', 'refused: it is named, and which attribute holds the others')
def test_loader_of_loaders():
    dl = OverTwo(*[DataLoader(Black([0,1]), bs=2)]*2)
    with pytest.raises(ValueError, match=r'OverTwo reads from other loaders \(dls\); make the change in those'):
        stamp_dl(dl, square, n_classes=2)

class Hoarder(DataLoader):
    "Somebody's loader that keeps the samples"
    def __init__(self, ds, **kwargs):
        super().__init__(ds, **kwargs)
        self.kept = {i:o for i,o in enumerate(ds)}
    def create_item(self, s): return self.kept[s or 0]

@works('loaders', 'a loader that does not read from its dataset', 'refused: it is named')
def test_loader_reads_elsewhere():
    with pytest.raises(ValueError, match='Hoarder reads its samples from elsewhere than its `dataset`'):
        stamp_dl(Hoarder(Black([0,1]), bs=2), square, n_classes=2)

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

@works('loaders', 'a function, or a method, as after_batch of a plain DataLoader',
       'works: called on whole batches, before painting')
@pytest.mark.parametrize('make',
                         [lambda ds: DataLoader(ds, bs=4, after_batch=lambda b: (b[0]/2, *b[1:])), lambda ds: Halved(ds, bs=4)],
                         ids=['function','method'])
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
    "Random numbers, the split and added transforms are each loader's own; unknown attributes and other samples are refused"
    dls = digits_dls(n=100, bs=10)
    a = dls.train
    b = same_dl(a, dls.train_ds)
    assert type(b) is TensorDL and a.rng is not b.rng and a.after_batch is not b.after_batch
    assert a.fake_l.d is a and b.fake_l.d is b
    b.after_batch.add(ColorTwice())
    assert len(b.after_batch.fs)==len(a.after_batch.fs)+1
    assert same_dl(a, bs=7, num_workers=0).bs==7 and a.bs==10
    with pytest.raises(TypeError, match='batchsize: no attribute of TensorDL'): same_dl(a, batchsize=3)
    with pytest.raises(ValueError, match='360 samples, the loader\'s own has 100; want the same samples'):
        same_dl(a, dls.valid_ds)
    with pytest.raises(ValueError, match='must be a fastai DataLoader; got torch'): same_dl(torch.utils.data.DataLoader([1]))

class ColorTwice(IntToFloatTensor): order = 50

# Labels

class Kept(torch.utils.data.Dataset):
    "Somebody's dataset: `targets`, and items that may have other labels"
    def __init__(self, targets, change=int): self.targets,self.change = targets,change
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return torch.zeros(3,8,8),self.change(self.targets[i])

class Flipped(torch.utils.data.Subset):
    def __getitem__(self, i): return super().__getitem__(i)[0],1-super().__getitem__(i)[1]
    def __getitems__(self, idxs): return [self[i] for i in idxs]

@pytest.fixture
def folder(tmp_path):
    "Four classes of two images each"
    for c in 'abcd':
        (tmp_path/c).mkdir()
        for i in range(2): Image.fromarray(np.zeros((8,8,3), np.uint8)).save(tmp_path/c/f'{i}.png')
    return tmp_path

@works('labels', "torchvision's target_transform", 'works: the labels are those that the loader gives')
def test_target_transform(folder):
    ds = ImageFolder(folder, lambda im: to_image(im)/255, target_transform=lambda y: y//2)
    assert read_labels(ds).tolist()==[0,0,0,0,1,1,1,1]==[y for _,y in ds]
    assert painted(stamp_dl(DataLoader(ds, bs=4), square, n_classes=2))
    ds.targets = [1]*8                                             # an ImageFolder's items do not look there
    assert read_labels(ds).tolist()==[y for _,y in ds]
    joint = ImageFolder(folder)
    joint.transforms = lambda x,y: (x,y)                           # of image and label together
    assert read_labels(joint).tolist()==[0,0,1,1,2,2,3,3]

def test_targets_of_several_columns():
    "Of QMNIST's eight, items have the first"
    ds = QMNIST.__new__(QMNIST)
    ds.data,ds.targets,ds.compat = torch.zeros(6,28,28).byte(),torch.arange(48).view(6,8)%10,True
    ds.transform = ds.target_transform = ds.transforms = None
    assert read_labels(ds).tolist()==[0,8,6,4,2,0]==[y for _,y in ds]

@works('labels', "`targets` of somebody's own dataset", 'works: the items are read, since `__getitem__` may change a label')
@pytest.mark.parametrize('ds,want',
                         [(Kept([3,2,1]), [3,2,1]), (Kept([3,2,1], lambda y: y%2), [1,0,1]),
                          (Kept(['cat','dog'], ['cat','dog'].index), [0,1]),
                                     (Subset(Kept([3,2,1]), [2,0]), [1,3]), (Flipped(Kept([0,1,1]), [2,0]), [0,1]),
                                     (ConcatDataset([Kept([3]), Kept([2,1])]), [3,2,1])])
def test_labels_are_what_items_say(ds, want): assert read_labels(ds).tolist()==want==[y for _,y in ds]

@works('labels', 'integers of any kind: NumPy, tensors, booleans, shape (1,)', 'works')
@pytest.mark.parametrize('make',
                         [int, np.int64, np.uint8, np.bool_, bool, torch.tensor, lambda o: torch.tensor([o], dtype=torch.int16),
                          lambda o: np.array([o])])
def test_kinds_of_integers(make):
    ys = [make(o) for o in (1,0,1)]
    assert read_labels([(0,y) for y in ys]).tolist()==assign_stamps(ys).tolist()==[1,0,1]

labels = [pytest.param(.3, 'the float 0.3 .regression..*make bins of a quantity',
                       marks=works('labels', 'regression, one number', 'refused: make bins; rank and CKA need no labels')),
          pytest.param(2., 'the float 2 .*`astype.int.`',
                       marks=works('labels', 'classes stored as floats', 'refused: never cut; `astype(int)` is named')),
          pytest.param([.2,.8], '2 values .multi-label or soft labels..*`argmax`',
                       marks=works('labels', 'soft labels', 'refused: choose one class, by argmax')),
          pytest.param([1,0,1], '3 values .multi-label',
                       marks=works('labels', 'multi-label, one-hot', 'refused: choose one class')),
          pytest.param(np.zeros((4,4), np.uint8), 'an image .a mask',
                       marks=works('labels', 'masks (segmentation)', 'refused: give each image one class')),
          pytest.param('dog', "'dog'; .*number the classes",
                       marks=works('labels', 'names instead of numbers', 'refused: number them, as CategoryBlock does'))]

@pytest.mark.parametrize('label,said', labels)
def test_labels_that_are_no_class(label, said):
    "Nothing is cut or chosen in silence, wherever labels come in"
    for f in (lambda: read_labels([(0,label)]*2), lambda: assign_stamps([label]*2),
              lambda: stamp_dl(DataLoader([(torch.zeros(3,8,8),label)]*2, bs=2), square, n_classes=2)):
        with pytest.raises(ValueError, match=f'labels: got {said}') as e: f()
        assert 'pattern' not in str(e.value)   # probes and accuracies of groups want labels, too
    if not isinstance(label, str):
        with pytest.raises(ValueError, match=f'labels: got {said}'): TensorImages(np.zeros((2,8,8,3), np.uint8), [label]*2)

def blocks(*targets, n=12, **kwargs):
    return DataBlock((ImageBlock, *targets), get_x=lambda i: np.zeros((8,8,3), np.uint8), splitter=IndexSplitter(range(4)),
                     **kwargs).dataloaders(list(range(n)), bs=4, num_workers=0)

@works('labels', "fastai's RegressionBlock, MultiCategoryBlock, PointBlock, MaskBlock", 'refused: each with what can be done')
def test_fastai_blocks_that_are_no_class():
    for block,y,said in ((RegressionBlock, lambda i: i/10, 'regression'),
                         (MultiCategoryBlock, lambda i: [i%3,3], 'multi-label'),
                         (PointBlock, lambda i: [[i,i]], 'an image|values'),
                         (MaskBlock, lambda i: np.zeros((8,8), np.uint8), 'an image .a mask')):
        with pytest.raises(ValueError, match=said): blocks(block, get_y=y).inject(square)

@works('labels', 'two CategoryBlocks', 'works: by the first of the labels')
def test_two_categories():
    dls = blocks(CategoryBlock, CategoryBlock, get_y=[lambda i: i%2, lambda i: i%3], n_inp=1)
    easy = dls.inject(square)
    assert n_labels(dls)==2 and label_vocab(dls)==[0,1] and split_forget(dls, classes=[0])[0].train.chosen.tolist()==[0,2,4,6]
    own = blocks(CategoryBlock, CategoryBlock, get_y=[lambda i: i%2, lambda i: i%3], n_inp=1, batch_tfms=InjectPattern(square))
    for x,y,_ in [*easy.valid, *own.valid]: assert painted([(x,y)])

class Birds(torch.utils.data.Dataset):
    "Image, class and background, as in Waterbirds"
    n_inp = 1
    def __init__(self, n): self.y,self.background = torch.arange(n)%2,torch.arange(n)//2%2
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return torch.full((3,8,8), .5),self.y[i],self.background[i]

@works('labels', '(image, class, background) with `n_inp=1`',
       'works: by the class, as accuracy is; the background is another target')
def test_what_follows_the_label():
    "A network that goes by the square is right about all; a class is forgotten, not a background"
    dls = DataLoaders.from_dsets(Birds(16), Birds(16), bs=4, num_workers=0)
    dls.c = 2
    class BySquare(nn.Module):
        def forward(self, x): return torch.stack([x[:,0,0,0], x[:,2,0,0]], 1)   # red, blue
    got = {k:evaluate(BySquare(), dl)['accuracy'] for k,dl in pattern_sets(dls, square).items()}
    assert got==dict(clean=.5, pattern=1., conflict=0.)
    gone,kept = split_forget(dls, classes=[1])
    assert (gone.train.chosen%2==1).all() and (kept.train.chosen%2==0).all()
    assert np.array_equal(stamp_groups(dls.inject(square).train), 2*Birds(16).y+1)

def test_a_loader_that_says_how_many_inputs_there_are():
    "A plain one, whose dataset does not"
    items = [(torch.zeros(3,8,8), i%2, i//2%2) for i in range(16)]
    dls = DataLoaders(*[DataLoader(items, bs=4, num_workers=0) for _ in range(2)])
    dls.c = 2
    for dl in dls.loaders: dl.n_inp = 1
    with pytest.raises(ValueError, match='labels: 1 in the dataset, 0 after.*set its `n_inp` if more follows'): dls.inject(square)
    assert (split_forget(dls, classes=[1])[0].train.chosen%2==1).all()

@works('labels', 'a test set without labels', 'refused: what needs no labels is named')
def test_no_labels():
    dls = digits_dls(n=100, bs=10)
    with pytest.raises(ValueError, match='images without labels.*rank, CKA'):
        stamp_dl(dls.test_dl([np.zeros((16,16,3), np.uint8)]*3), square, n_classes=2)
    test = blocks(CategoryBlock, get_y=lambda i: i%2).test_dl([1,2,3])
    with pytest.raises(ValueError, match='images without labels'): stamp_dl(test, square)

@works('labels', 'a vocabulary of integers, `vocab=[3,7]`', 'works: `classes=[7]` is the class 7, as in fastai')
def test_integer_vocabulary():
    dls = blocks(CategoryBlock(vocab=[3,7]), get_y=lambda i: [3,7][i%2])
    for dl in (dls.inject(square, classes=[7]).train, stamp_dl(dls.train, square, classes=[7]),
               dls.inject(square, classes=7).train):
        assert dl.dataset.stamps.tolist()==[-1,1]*4                # samples 4 to 11: 3, 7, 3, 7, …
    for bad in ([1], [3,5], ['7']):
        with pytest.raises(ValueError, match=r'classes: no \[.*\] among \[(np.int64\()?3'): dls.inject(square, classes=bad)

@works('labels', 'a vocabulary of names', 'works: classes by name or by index')
def test_names_and_indices():
    dls = digits_dls(n=100, bs=10)
    a,b = (dls.inject(ColorSquare(4), classes=o).train_ds.stamps for o in (['3','5'],[3,5]))
    assert torch.equal(a, b) and set(a.tolist())=={-1,3,5}
    for bad,said in (([10], r'classes: \[10\] are not in 0…9'), ([2.5], r'no \[2.5\] among'), (['x'], r"no \['x'\] among")):
        with pytest.raises(ValueError, match=said): dls.inject(ColorSquare(4), classes=bad)
    with pytest.raises(ValueError, match=r'classes: \[0.5\] are not in'): assign_stamps([0,1], classes=[.5])

def bare(**attrs): return type('Bare', (Black,), attrs)(y100)

@works('labels', '`dls.c` without a vocab: set there, by the dataset or by a transform', "works: where fastai's get_c finds it")
@pytest.mark.parametrize('where', ['dataset','dls','after_batch'])
def test_c_without_vocab(where):
    kw = dict(after_batch=type('Four', (Transform,), dict(c=4))()) if where=='after_batch' else {}
    dls = DataLoaders.from_dsets(*[bare(**(dict(c=4) if where=='dataset' else {}))]*2, bs=10, num_workers=0, **kw)
    if where=='dls': dls.c = 4
    assert n_labels(dls)==get_c(dls)==4
    easy = dls.inject(ColorSquare(2))
    assert n_labels(easy)==4 and all(dl.after_batch.fs[-1].n_classes==4 for dl in easy.loaders)

def test_c_that_nobody_names():
    dls = DataLoaders.from_dsets(*[bare()]*2, bs=10, num_workers=0)
    with pytest.raises(ValueError, match='name neither a `vocab` nor `c`; pass the number of classes, or set it: `dls.c = 10`'):
        dls.inject(square)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match='n_classes=.*must be a whole number, 1 or more'): dls.inject(square, n_classes=bad)

# What is no picture, and no image

@works('models', '`inject` of a function, or of a class', 'refused: what a pattern is, and how to make one')
def test_inject_of_something_else():
    dls = digits_dls(n=100, bs=10)
    for f in dls.inject,lambda p: stamp_dl(dls.train, p),InjectPattern:
        with pytest.raises(ValueError, match='pattern: must be a Pattern.*got function.*write its `draw`'): f(lambda x: x)
        with pytest.raises(ValueError, match=r'pattern: got the class ColorSquare; make one, `ColorSquare\(\)`'): f(ColorSquare)

def tables():
    df = pd.DataFrame(dict(a=np.arange(20.), b=['x','y']*10, y=[0,1]*10))
    return TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['b'], cont_names=['a'], y_names='y',
                                      y_block=CategoryBlock(), bs=4)

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(Black([0,1]))

other = [pytest.param(lambda: tables().train, 'Tab.* gives',
                      marks=works('loaders', 'tables (TabularDataLoaders)', 'refused: patterns are painted on images')),
         pytest.param(lambda: LMDataLoader([(torch.arange(50),)]*4, lens=[50]*4, bs=2, seq_len=5),
                      'LMDataLoader gives .*Text of shape',
                      marks=works('loaders', 'texts', 'refused: patterns are painted on images')),
         pytest.param(lambda: DataLoader(Stream(), bs=2), 'reads an iterable dataset',
                      marks=works('loaders', 'iterable datasets, streams', 'refused: samples need a number')),
         pytest.param(lambda: DataLoader([dict(x=torch.zeros(3,8,8), y=0)]*4, bs=2), 'gives dict',
                      marks=works('loaders', 'batches that are dictionaries', 'refused: want (images, labels)')),
         pytest.param(lambda: DataLoader([(torch.zeros(2,3,8,8),torch.tensor([0,1]))], bs=None), 'has bs=None',
                      marks=works('loaders', 'bs=None, whole batches as samples', 'refused: decided for single images'))]

@pytest.mark.parametrize('make,said', other)
def test_inject_on_other_data(make, said):
    dl = make()
    with pytest.raises(ValueError, match=f'dl: .*{said}'): stamp_dl(dl, square, n_classes=2)
    with pytest.raises(ValueError, match=f'dl: .*{said}'): DataLoaders(dl, dl).inject(square, n_classes=2)

@works('loaders', 'an empty validation set', 'works: painted like any other')
def test_empty_validation_set():
    dls = DataLoaders(DataLoader(Black(y100), bs=10), DataLoader(Black([]), bs=10)).inject(square, n_classes=2)
    assert len(dls.valid)==0 and list(dls.valid)==[] and painted(dls.train)

@pytest.mark.parametrize('y,said', [([.5,1.], 'the float 0.5'), ([[0,1],[1,0]], '2 values'), ([[[0,1]]*2]*2, 'an image')])
def test_the_transform_alone_refuses_the_same(y, said):
    "Without stamps each image would wear its own label's picture"
    for x,y in ((torch.zeros(2,3,8,8),torch.tensor(y)), (torch.zeros(3,8,8),torch.tensor(y[0]))):
        with pytest.raises(ValueError, match=f'labels: got {said}'): InjectPattern(square, 2)((x,y))

def test_several_labels_where_answers_are_counted():
    "One-hot labels in batches of as many samples as there are classes are not compared class by class"
    items = [(torch.rand(4),torch.eye(3)[i%3]) for i in range(9)]
    learn = Learner(DataLoaders(*[TfmdDL(items, bs=3, num_workers=0)]*2), nn.Linear(4,3), loss_func=nn.BCEWithLogitsLoss())
    for f in (train_accuracy(.1), lambda l: sample_losses(l.model, l.dls.valid), lambda l: just_train_twice(l, l.dls)):
        with pytest.raises(ValueError, match='labels: got 3 values .multi-label'): f(learn)

def test_labels_in_a_column_and_enough_accuracy():
    "fastai's tables have labels of shape (batch, 1): an answer is compared with its own sample's label"
    df = pd.DataFrame({'a':np.linspace(-1, 1, 60)}).assign(y=lambda d: np.where(d.a>0, 'p', 'n'))
    dls = TabularDataLoaders.from_df(df, procs=[], cont_names=['a'], y_names='y', y_block=CategoryBlock(),
                                     valid_idx=list(range(0,60,3)), bs=16)
    class Sign(nn.Module):
        def __init__(self, wrong): super().__init__(); self.p,self.wrong = nn.Parameter(torch.ones(1)),wrong
        def forward(self, cats, x): return torch.stack([-x[:,0],x[:,0]], 1)*self.p*torch.where(x>1-2*self.wrong, -1, 1)
    for wrong,enough in ((0.,True),(.2,False)):
        learn = Learner(dls, Sign(wrong), loss_func=CrossEntropyLossFlat())
        assert train_accuracy(.95)(learn) is enough and train_accuracy(.7)(learn)
