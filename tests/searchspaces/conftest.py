"""Small networks gain nothing from threads and lose much when cores are shared."""
import torch

torch.set_num_threads(1)
