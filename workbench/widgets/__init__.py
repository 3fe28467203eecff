"""Live views and final figures of runs and models."""

from workbench.widgets.base import View as View
from workbench.widgets.cache import cache as cache
from workbench.widgets.corpora import corpora as corpora
from workbench.widgets.curves import curves as curves
from workbench.widgets.dashboard import dashboard as dashboard
from workbench.widgets.primitives import Bars as Bars
from workbench.widgets.primitives import Heatmap as Heatmap
from workbench.widgets.primitives import Line as Line
from workbench.widgets.primitives import Lines as Lines
from workbench.widgets.primitives import Marker as Marker
from workbench.widgets.primitives import Reference as Reference
from workbench.widgets.primitives import Table as Table
from workbench.widgets.routing import routing as routing
