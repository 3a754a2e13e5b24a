import torch

# The models here are tiny: a second thread costs more than it brings, and more still beside another busy process.
torch.set_num_threads(1)
