"""Training in the background of this process: start it, steer it, watch it, resume it."""

from workbench.live.launch import decoder as decoder
from workbench.live.launch import resume as resume
from workbench.live.launch import start as start
from workbench.live.run import Run as Run
