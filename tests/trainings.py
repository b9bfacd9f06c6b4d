"What tests of trainings share: one that breaks off, one in bfloat16, and whether two ended alike."
import torch
from fastai.vision.all import Callback, MixedPrecision

class Boom(Exception): pass

class StopAt(Callback):
    "Raise an error after a batch of training"
    order,run_valid,passive = 999,False,True
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.learn.train_iter==self.at: raise Boom('here')

class Bf16(MixedPrecision):
    "fastai autocasts on CUDA only"
    def __init__(self): super().__init__('bf16')
    def before_fit(self): super().before_fit(); self.autocast = torch.autocast('cpu', torch.bfloat16)

def weights(learn): return list(learn.model.state_dict().values())
def same(a, b): return all(torch.equal(x, y) for x,y in zip(weights(a), weights(b), strict=True))
