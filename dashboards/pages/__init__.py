"""Pages as Dash components built from studies and trials, a file a page. Nothing here reads a store or reacts.

Dash escapes every text it is given; `texts.plain` also makes invisible characters visible and clips long ones.
"""

from hypernas.dashboards.pages.cluster import cluster_facts, cluster_page, running_table, workers_table
from hypernas.dashboards.pages.front import axis_choices, front_page, study_facts
from hypernas.dashboards.pages.parts import link, trials_table
from hypernas.dashboards.pages.scale import scale_page, scale_said
from hypernas.dashboards.pages.space import space_page
from hypernas.dashboards.pages.trial import no_trial, trial_content, trial_page
from hypernas.dashboards.pages.waiting import waiting

PAGES = {"/": "Front", "/trial": "Trial", "/space": "Space", "/scale": "Scale", "/cluster": "Cluster"}

__all__ = [
    "PAGES",
    "axis_choices",
    "cluster_facts",
    "cluster_page",
    "front_page",
    "link",
    "no_trial",
    "running_table",
    "scale_page",
    "scale_said",
    "space_page",
    "study_facts",
    "trial_content",
    "trial_page",
    "trials_table",
    "waiting",
    "workers_table",
]
