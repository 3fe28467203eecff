"""Small weights that 16 bits are too few for, in a model that is cast to 16 bits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn


class KeepWide(nn.Module):
    """Abstract: the parameters and buffers of its own named in `keep_wide` stay float32 or wider when it is cast.

    Source: `_keep_in_fp32_modules_strict` in `transformers`; DeepSeek-V3, arXiv 2412.19437, section 3.3.1.
    """

    keep_wide: ClassVar[tuple[str, ...]]

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name).data for name in self.keep_wide}
        super()._apply(fn, recurse)
        for name, wide in before.items():
            tensor = getattr(self, name)
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = wide.to(tensor.device)
        return self
