"""Run folders and models in, numbers and frames out; never draws.

`workbench.analysis.probe` runs a model over text and needs torch: import it by its own name.
"""

from workbench.analysis.cache import bytes_per_token as bytes_per_token
from workbench.analysis.cache import cache_table as cache_table
from workbench.analysis.cache import variants as variants
from workbench.analysis.loss import floors as floors
from workbench.analysis.loss import smooth as smooth
from workbench.analysis.loss import spike_thresholds as spike_thresholds
from workbench.analysis.loss import spikes as spikes
from workbench.analysis.recorded import balance_history as balance_history
from workbench.analysis.routing import coactivation as coactivation
from workbench.analysis.routing import dead_experts as dead_experts
from workbench.analysis.routing import entropy as entropy
from workbench.analysis.routing import expected_coactivation as expected_coactivation
from workbench.analysis.routing import load_fractions as load_fractions
from workbench.analysis.routing import max_violation as max_violation
from workbench.analysis.routing import max_violation_global as max_violation_global
from workbench.analysis.routing import normalized_entropy as normalized_entropy
from workbench.analysis.specialization import DocumentRouting as DocumentRouting
from workbench.analysis.specialization import SpecializationReport as SpecializationReport
from workbench.analysis.specialization import shuffled_specialization as shuffled_specialization
from workbench.analysis.specialization import specialization as specialization
from workbench.analysis.specialization import specialization_report as specialization_report
