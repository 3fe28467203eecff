"""The browser's half of every live view: one module and its style sheet, as plain strings.

It asks for frames by custom message and draws them on canvases. All words arrive as data and become text nodes; nothing
is parsed as markup. `base.py` is the kernel's half.
"""

import re

from workbench.widgets.panel_script import PANEL
from workbench.widgets.style_sheet import CSS as CSS
from workbench.widgets.view_script import VIEW

# Every widget sends its script: indentation and whole-line comments stay here. No string in it spans lines.
ESM = re.sub(r"\n\s*(//[^\n]*)?(?=\n)|(?<=\n) +", "", PANEL + VIEW)
