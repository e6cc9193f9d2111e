"""Tests that need a CUDA device; without one they are skipped, and say so."""

import pytest
import torch

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
