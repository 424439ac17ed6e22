"""What the runner costs beside a loop written by hand: python scripts/loop_cost.py [cpu|cuda] [rounds]."""

import sys

import torch

from experiments.training.loop_cost import loop_cost

device, rounds = (*sys.argv[1:], *("cpu", "60")[len(sys.argv) - 1 :])
for name, (milliseconds, ratio) in loop_cost(torch.device(device), int(rounds)).items():
    print(f"{name:<28}{milliseconds:8.3f} ms a step   {ratio:.3f} of the steps per second by hand")
