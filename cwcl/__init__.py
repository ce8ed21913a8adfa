__version__ = "0.1.0"

import warnings

# fastai 2.8 calls torch.jit.script as it is imported, which PyTorch 2.14 deprecates: nothing that a reader could mend
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)
